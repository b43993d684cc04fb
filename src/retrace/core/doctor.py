"""`retrace doctor`: what this machine has, what is missing, and how to get it."""

from __future__ import annotations

import os
import shutil
import sys
from collections.abc import Iterator
from importlib import metadata
from pathlib import Path

from rich.console import Console

from retrace.core.config import Hardware, Tracking, data_root, papers, read_yaml, validate
from retrace.core.plan import load_ablations
from retrace.core.provenance import processor
from retrace.core.tracking import wandb_mode

NEEDED_GIB = 1.0
REQUIRED = (
    "torch",
    "transformers",
    "accelerate",
    "datasets",
    "lm-eval",
    "hydra-core",
    "peft",
    "scipy",
    "submitit",
    "wandb",
)

Check = tuple[bool | None, str, str]  # fine / not fine / optional and absent; what; how to get it


def print_checks(console: Console, *, home: Path, configs: Path) -> int:
    """Print every check; exit code 1 if something that is needed is missing."""
    wrong = 0
    for fine, what, remedy in _checks(home, configs):
        mark = {True: "[green]ok[/]     ", False: "[red]missing[/]", None: "[yellow]none[/]   "}[fine]
        console.print(f"{mark} {what}" + (f"\n        -> {remedy}" if remedy and not fine else ""), soft_wrap=True)
        wrong += fine is False
    return 1 if wrong else 0


def _checks(home: Path, configs: Path) -> Iterator[Check]:
    version = ".".join(map(str, sys.version_info[:3]))
    yield sys.version_info >= (3, 11), f"Python {version}", "install Python 3.11 or newer and run `make setup`"
    for package in REQUIRED:
        try:
            yield True, f"{package} {metadata.version(package)}", ""
        except metadata.PackageNotFoundError:
            yield False, package, "run `make setup`"
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    yield True, f"{cores} cores: {processor()}", ""
    gpu = shutil.which("nvidia-smi") is not None
    yield (True if gpu else None), "NVIDIA GPU", "not needed for scale=smoke and scale=laptop"
    slurm = shutil.which("sbatch") is not None
    yield (True if slurm else None), "Slurm", "only for hardware=slurm_...: a login node has it"
    try:
        home.mkdir(parents=True, exist_ok=True)
        free = shutil.disk_usage(home).free / 2**30
        yield (
            free > NEEDED_GIB,
            f"{free:.1f} GiB free at {home}",
            f"free {NEEDED_GIB} GiB or set RETRACE_HOME elsewhere",
        )
        yield os.access(home, os.W_OK), f"{home} can be written", "set RETRACE_HOME to a folder of yours"
    except OSError as error:
        yield False, f"{home}: {error.strerror}", "set RETRACE_HOME to a folder of yours"
    try:
        data = data_root()
        yield (
            (True if data else None),
            f"local datasets: {data or 'RETRACE_DATA is not set'}",
            ("only for real GSM8K and CommonsenseQA: set RETRACE_DATA to a folder with gsm8k/ and commonsense_qa/"),
        )
    except ValueError as error:
        yield False, str(error), ""
    mode = wandb_mode(Tracking.model_validate(read_yaml(configs / "tracking" / "default.yaml")))
    yield True, f"W&B: {mode}" + (" (set WANDB_API_KEY to see runs online)" if mode == "offline" else ""), ""
    for slug in papers():
        yield True, f"{slug}: {len(load_ablations(slug))} ablations", ""
    for path in sorted((configs / "hardware").glob("*.yaml")):
        hardware = validate(Hardware, read_yaml(path), source=path.name)
        yield True, f"hardware={path.stem}: {hardware.device} x {hardware.processes}, {hardware.slots} runs at once", ""

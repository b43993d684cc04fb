"""`retrace doctor`: what this machine has, what is missing, and how to get it."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from importlib import metadata
from pathlib import Path

import psutil
from rich.console import Console

from retrace.core import provenance, squeue
from retrace.core.config import Hardware, Tracking, data_root, num_cores, read_yaml, validate
from retrace.core.discovery import configs_of, papers
from retrace.core.plan import load_ablations, plan
from retrace.core.tracking import wandb_mode
from retrace.core.units import say

NEEDED_GIB = 1.0
WORKER_GIB = 0.7  # what a process takes before it has a model
BROWSERS = ("chromium", "chromium-browser", "google-chrome")

Check = tuple[bool | None, str, str]  # fine / not fine / optional and absent; what; how to get it


def print_checks(console: Console, *, home: Path, configs: Path) -> int:
    """Print every check as it is made; exit code 1 if something that is needed is missing."""
    wrong = 0
    marks = {True: "[green]ok[/]     ", False: "[red]missing[/]", None: "[yellow]none[/]   "}
    for fine, what, remedy in _checks(home, configs):
        console.print(f"{marks[fine]} ", end="")
        say(console, what)
        if remedy and not fine:
            say(console, f"        -> {remedy}")
        wrong += fine is False
    if wrong:
        console.print(f"{wrong} missing; 'none' is something that only some commands need")
    else:
        first = " ".join(papers()[:1])
        console.print(f"all that is needed is there; try: retrace run {first} scale=smoke seed=0", highlight=False)
    return 1 if wrong else 0


def _checks(home: Path, configs: Path) -> Iterator[Check]:
    yield from _software()
    yield from _machine(home)
    yield from _data()
    yield from _services(configs)
    for path in sorted((configs / "hardware").glob("*.yaml")):
        try:
            hardware = validate(Hardware, read_yaml(path), source=str(path))
            places = f"{hardware.device} x {hardware.processes}, {hardware.slots} runs at once"
            yield True, f"hardware={path.stem}: {places}", ""
        except ValueError as error:
            yield False, f"hardware={path.stem}", str(error)
    for slug in papers():
        yield from _paper(slug)


def _software() -> Iterator[Check]:
    version = ".".join(map(str, sys.version_info[:3]))
    yield sys.version_info >= (3, 11), f"Python {version}", "install Python 3.11 or newer and run `make setup`"
    for package in _required():
        found = provenance.version(package)
        yield found is not None, f"{package} {found or ''}".rstrip(), "run `make setup`"
    commit = provenance.code()["git"]
    remedy = "records can't say which code made them: install git, and clone the repository instead of copying it"
    yield commit is not None or None, f"git: commit {commit[:12]}" if commit else "git: no commit known", remedy
    browser = next(filter(None, map(shutil.which, BROWSERS)), None)
    remedy = "only for `make test`, which looks at the reports in it: apt-get install chromium"
    yield bool(browser) or None, f"Chromium{f': {browser}' if browser else ''}", remedy


def _required() -> list[str]:
    """The packages that this one asks for, without extras; itself where it is not installed."""
    try:
        asked = metadata.requires("retrace") or []
    except metadata.PackageNotFoundError:
        return ["retrace"]
    return [re.split(r"[^\w.-]", text)[0] for text in asked if "extra ==" not in text]


def _machine(home: Path) -> Iterator[Check]:
    cores = num_cores()
    yield True, f"{cores} cores: {provenance.processor()}", ""
    free, total = (value / 2**30 for value in (psutil.virtual_memory().available, psutil.virtual_memory().total))
    runs = max(1, int(free / WORKER_GIB))
    enough = f"a run takes {WORKER_GIB} GiB before it has a model: end other programs, or hardware.parallel_runs={runs}"
    yield free > WORKER_GIB * cores or None, f"memory: {free:.1f} of {total:.1f} GiB free", enough
    gpus = _gpus()
    remedy = "not needed for scale=smoke and scale=laptop; hardware=gpu1, gpu8: run where `nvidia-smi` shows one"
    yield bool(gpus) or None, f"NVIDIA GPU{': ' if gpus else ''}{', '.join(gpus)}", remedy
    if gpus and "+cpu" in (provenance.version("torch") or ""):
        yield False, "torch that can use the GPU", "this one is for CPUs alone: see https://pytorch.org/get-started"
    try:
        home.mkdir(parents=True, exist_ok=True)
        space = shutil.disk_usage(home).free / 2**30
        remedy = f"free {NEEDED_GIB:g} GiB, or set RETRACE_HOME to a folder on another disk"
        yield space > NEEDED_GIB, f"{space:.1f} GiB free at {home}", remedy
        for folder in [home, *(path for name in ("runs", "results") if (path := home / name).exists())]:
            yield os.access(folder, os.W_OK), f"{folder} can be written", "set RETRACE_HOME to a folder of yours"
    except OSError as error:
        yield False, f"{home}: {error.strerror}", "set RETRACE_HOME to a folder of yours"


def _gpus() -> list[str]:
    """Names and memory, as the driver tells them."""
    if shutil.which("nvidia-smi") is None:
        return []
    command = ["nvidia-smi", "--query-gpu=name,memory.total", "--format=csv,noheader"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=30)
    except subprocess.TimeoutExpired:  # of a driver that hangs
        return []
    return [" ".join(line.split(",")) for line in done.stdout.splitlines()] if done.returncode == 0 else []


def _data() -> Iterator[Check]:
    try:
        root = data_root()
        found = sorted(path.name for path in root.iterdir()) if root else []
        shown = (
            f"{root}: {', '.join(found[:8])}{', ...' if len(found) > 8 else ''}" if root else "RETRACE_DATA is not set"
        )
        remedy = "only for real text, images and test sets: set RETRACE_DATA to the folder that holds them (README)"
        yield bool(root) or None, f"local datasets: {shown}", remedy
    except (ValueError, OSError) as error:
        yield False, f"local datasets: {error}", "or unset RETRACE_DATA"


def _services(configs: Path) -> Iterator[Check]:
    slurm = shutil.which("sbatch") is not None
    if slurm and squeue.queue() is None:
        remedy = "only for hardware=slurm_...: ask `sinfo`, and whoever runs the cluster"
        yield None, "Slurm: sbatch is here and squeue does not answer", remedy
    else:
        yield slurm or None, "Slurm", "only for hardware=slurm_...: run on a login node, which has sbatch"
    try:
        tracking = validate(Tracking, read_yaml(configs / "tracking" / "default.yaml"), source="tracking/default.yaml")
        mode = wandb_mode(tracking)
        remedy = "runs are written offline: for online ones set WANDB_API_KEY, from https://wandb.ai/authorize"
        yield mode == "online" or None, f"W&B: {mode}", remedy if mode == "offline" else "as configs or WANDB_MODE say"
    except ValueError as error:
        yield False, "W&B", str(error)


def _paper(slug: str) -> Iterator[Check]:
    """A paper's ablations, and at each scale what its base would find missing, such as a dataset."""
    try:
        yield True, f"{slug}: {len(load_ablations(slug))} ablations", ""
        scales = [path.stem for path in sorted((configs_of(slug) / "scale").glob("*.yaml"))]
    except ValueError as error:
        yield False, slug, str(error)
        return
    for scale in scales:
        try:
            plan([f"{slug}/main"], [f"scale={scale}"], check=True)
            yield True, f"{slug} scale={scale}: data and models are at hand", ""
        except ValueError as error:
            yield (None if scale in ("gpu", "paper") else False), f"{slug} scale={scale}", str(error)

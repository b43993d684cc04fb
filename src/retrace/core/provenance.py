"""Where a number comes from: code, packages, machine, data, command. Read once a process; no network, no torch."""

from __future__ import annotations

import functools
import hashlib
import json
import os
import platform
import subprocess
from importlib import metadata
from pathlib import Path
from typing import Any

from retrace.core.discovery import package_folder, paper_packages

PACKAGES = (
    "accelerate",
    "datasets",
    "lm-eval",
    "numpy",
    "retrace",
    "safetensors",
    "tokenizers",
    "torch",
    "transformers",
)
SNAPSHOT = "snapshot.json"  # at the root of one, see core/snapshot.py


@functools.cache
def code() -> dict[str, Any]:
    """Commit of the checkout and, where it has uncommitted changes, the hash of their diff.

    Of a snapshot, what was written down when it was taken; there the diff is whole.
    """
    root = Path(__file__).resolve().parents[3]
    if (root / SNAPSHOT).is_file():
        taken: dict[str, Any] = json.loads((root / SNAPSHOT).read_text())
        return taken
    sha = _git(root, "rev-parse", "HEAD")
    diff = _git(root, "diff", "HEAD", "--", "src", "configs") if sha else None
    new = _git(root, "ls-files", "--others", "--exclude-standard", "--", "src", "configs") if sha else None
    return {
        "git": sha,
        "dirty": bool(diff or new) if sha else None,
        "diff_sha256": hashlib.sha256(diff.encode()).hexdigest()[:16] if diff else None,
    }


@functools.cache
def paper_code(slug: str) -> dict[str, Any]:
    """Of a paper that another package brings: its distribution and, where it is a checkout, its commit.

    Nothing for a paper of this repository; a snapshot holds what was true when it was taken.
    """
    folder, entry = package_folder(slug), paper_packages().get(slug)
    if folder is None or entry is None:
        return {}
    taken = code().get("paper_code")
    if taken and slug in taken:
        return {}  # as a part of `code()`
    sha = _git(folder, "rev-parse", "HEAD")
    changed = _git(folder, "status", "--porcelain", "--", ".") if sha else None
    dist = f"{entry.dist.name} {entry.dist.version}" if entry.dist else entry.module
    return {"paper_code": {slug: {"package": dist, "git": sha, "dirty": bool(changed) if sha else None}}}


def _git(root: Path, *arguments: str) -> str | None:
    try:
        done = subprocess.run(["git", "-C", str(root), *arguments], capture_output=True, text=True, timeout=20)
    except (FileNotFoundError, subprocess.TimeoutExpired):
        return None
    return done.stdout.strip() if done.returncode == 0 else None


@functools.cache
def packages() -> dict[str, str]:
    """Versions of the packages that can move a number."""
    found = {}
    for name in PACKAGES:
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return found


@functools.cache
def processor() -> str:
    """The CPU's name as the operating system gives it."""
    try:
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    except OSError:
        pass
    return platform.processor() or platform.machine()


def describe(
    *, paper: str, device: str, processes: int, threads: int, hardware_config: str, command: str
) -> dict[str, Any]:
    """Provenance of a run. `device` is the accelerator's name, or "" on a CPU."""
    place = device or f"{processor()}, {threads} thread{'s' * (threads > 1)}"
    return {
        **code(),
        **paper_code(paper),
        "packages": packages(),
        "python": platform.python_version(),
        "platform": platform.platform(),
        "hardware": place if processes == 1 else f"{processes} x {place}",
        "hardware_config": hardware_config,
        "command": command,
        "cores": os.cpu_count(),
    }

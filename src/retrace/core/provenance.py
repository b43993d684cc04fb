"""Where a number comes from: code, packages, machine, data, command. Read once a process; no network, no torch."""

from __future__ import annotations

import functools
import hashlib
import json
import os
import platform
import shutil
import subprocess
import tempfile
from importlib import metadata
from pathlib import Path
from typing import Any

from retrace.core.config import Hardware
from retrace.core.discovery import package_folder, paper_packages

PACKAGES = (
    "accelerate", "datasets", "lm-eval", "numpy", "retrace", "safetensors", "tokenizers", "torch", "transformers",
)  # fmt: skip
SNAPSHOT = "snapshot.json"  # at the root of one, see core/snapshot.py


@functools.cache
def code() -> dict[str, Any]:
    """Commit of the checkout and, where it has uncommitted changes, the hash of their diff, new files included.

    Of a snapshot, what was written down when it was taken; there the diff is whole.
    """
    root = Path(__file__).resolve().parents[3]
    if (root / SNAPSHOT).is_file():
        taken: dict[str, Any] = json.loads((root / SNAPSHOT).read_text())
        return taken
    sha = commit(root)
    diffs = [uncommitted(root / name) for name in ("src", "configs")]
    if sha is None or None in diffs:
        return {"git": sha, "dirty": None, "diff_sha256": None}  # not known
    diff = "".join(filter(None, diffs))
    return {"git": sha, "dirty": bool(diff), "diff_sha256": fingerprint(diff) if diff else None}


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
    sha = commit(folder)
    changed = git(folder, "status", "--porcelain", "--", ".") if sha else None
    dist = f"{entry.dist.name} {entry.dist.version}" if entry.dist else entry.module
    return {"paper_code": {slug: {"package": dist, "git": sha, "dirty": bool(changed) if sha else None}}}


def commit(folder: Path) -> str | None:
    """The last commit of the checkout that a folder is in."""
    return (git(folder, "rev-parse", "HEAD") or "").strip() or None


def uncommitted(folder: Path) -> str | None:
    """The diff of a folder against the last commit, new files included; "" where git knows nothing of it.

    None where git can't tell, as on a full disk. It is made in an index and an object store of its own, so that what
    the user has staged stays as it is, and a checkout that nobody may write in is read as well.
    """
    where = git(folder, "rev-parse", "--path-format=absolute", "--git-path", "index", "--git-path", "objects")
    if where is None:
        return ""
    index, objects = where.splitlines()
    try:
        with tempfile.TemporaryDirectory() as place:
            own = {"GIT_INDEX_FILE": f"{place}/index", "GIT_OBJECT_DIRECTORY": f"{place}/objects"}
            own["GIT_ALTERNATE_OBJECT_DIRECTORIES"] = objects
            Path(place, "objects").mkdir()
            if Path(index).is_file():
                shutil.copy2(index, own["GIT_INDEX_FILE"])  # with its time, by which git knows what was edited after it
            if git(folder, "add", "--all", "--", ".", **own) is None:
                return None
            return git(folder, "diff", "--cached", "--binary", "HEAD", "--", ".", **own)
    except OSError:
        return None


def fingerprint(diff: str) -> str:
    return hashlib.sha256(diff.encode()).hexdigest()[:16]


def git(folder: Path, *arguments: str, **environment: str) -> str | None:
    """What git prints; None where there is no git, or it fails. Bytes that are no UTF-8 come escaped."""
    command = ["git", "-C", str(folder), *arguments]
    try:
        done = subprocess.run(command, capture_output=True, timeout=60, env={**os.environ, **environment})
    except (FileNotFoundError, subprocess.TimeoutExpired):
        return None
    return done.stdout.decode(errors="backslashreplace") if done.returncode == 0 else None


@functools.cache
def packages() -> dict[str, str]:
    """Versions of the packages that can move a number."""
    return {name: found for name in PACKAGES if (found := version(name))}


def version(package: str) -> str | None:
    """Of an installed package; None where it is not there."""
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


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


def describe(paper: str, hardware: Hardware, *, device: str, command: str) -> dict[str, Any]:
    """Provenance of a run. `device` is the accelerator's name, or "" on a CPU."""
    threads, processes = hardware.threads, hardware.processes
    place = device or f"{processor()}, {threads} thread{'s' * (threads > 1)}"
    return {
        **code(),
        **paper_code(paper),
        "packages": packages(),
        "python": platform.python_version(),
        "platform": platform.platform(),
        "hardware": place if processes == 1 else f"{processes} x {place}",
        "hardware_config": hardware.name,
        "command": command,
        "cores": os.cpu_count(),
    }

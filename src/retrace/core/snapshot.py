"""The code and the configs as they are at this moment, for jobs that start later: what is edited then changes no job.

    runs/.snapshots/<commit>-<hash>/src/retrace/  configs/  snapshot.json

Jobs import from it and read its YAML. `snapshot.json` is what their records say of the code.
"""

from __future__ import annotations

import hashlib
import os
import shutil
import subprocess
import tempfile
import time
from collections.abc import Collection
from pathlib import Path
from typing import Any

from retrace.core.config import CONFIGS
from retrace.core.discovery import package_folder, paper_packages
from retrace.core.files import write_json
from retrace.core.provenance import SNAPSHOT, paper_code
from retrace.core.safety import own_folder, refuse_secrets
from retrace.core.store import Store

KEEP_SECONDS = 24 * 3600.0
PACKAGE = Path(__file__).resolve().parents[1]


def take(store: Store, *, papers: Collection[str], allow_dirty: bool) -> Path:
    """The folder of the snapshot; the same state of the code gives the same one. It has the packages of `papers` too.

    Raises ValueError where code or configs differ from the last commit and nobody allowed it.
    """
    folders = {"src/retrace": PACKAGE, "configs": CONFIGS}
    brought = {slug: folder for slug in papers if (folder := package_folder(slug))}
    folders |= {f"src/{paper_packages()[slug].module}": folder for slug, folder in brought.items()}
    commit = (_git(PACKAGE, "rev-parse", "HEAD") or "").strip() or None
    diff = "".join(uncommitted(folder) for folder in folders.values())
    refuse_secrets(diff, where="the uncommitted diff")
    if diff and not allow_dirty:
        raise ValueError(
            f"{_first_file(diff)} differs from the last commit: commit, or submit with --allow-dirty, which keeps the "
            "diff in the records"
        )
    digest = hashlib.sha256(diff.encode())
    chosen = [(f"{name}/{file}", folder / file) for name, folder in folders.items() for file in _files(folder)]
    for name, file in chosen:
        digest.update(name.encode() + b"\0" + hashlib.sha256(file.read_bytes()).digest())
    target = store.runs / ".snapshots" / f"{(commit or 'no_commit')[:12]}-{digest.hexdigest()[:8]}"
    if target.is_dir():
        os.utime(target)  # so that `prune` sees that it is wanted
    else:
        code: dict[str, Any] = {"git": commit, "dirty": bool(diff) if commit else None, "diff_sha256": None}
        for slug in brought:
            code.setdefault("paper_code", {}).update(paper_code(slug)["paper_code"])
        if diff:
            code |= {"diff_sha256": hashlib.sha256(diff.encode()).hexdigest()[:16], "diff": diff}
        _copy(chosen, target, code=code)
    return target


def _copy(files: list[tuple[str, Path]], target: Path, *, code: dict[str, Any]) -> None:
    """All of it or nothing; two that submit at once may both do it."""
    own_folder(target.parent)
    temporary = Path(tempfile.mkdtemp(prefix=".tmp", dir=target.parent))
    try:
        for name, file in files:
            (temporary / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(file, temporary / name)
        write_json(temporary / SNAPSHOT, code)
        temporary.chmod(0o755)
        try:
            os.rename(temporary, target)
        except OSError:
            if not target.is_dir():
                raise
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def prune(store: Store, *, needed: Collection[Path]) -> list[Path]:
    """Remove the snapshots that no job in the queue needs; those that are returned.

    One of the last day stays: somebody may have taken it whose jobs are not in the queue yet.
    """
    removed = []
    for path in sorted((store.runs / ".snapshots").glob("*")):
        if path.absolute() not in needed and time.time() - path.stat().st_mtime > KEEP_SECONDS:
            shutil.rmtree(path)
            removed.append(path)
    return removed


def _files(folder: Path) -> list[Path]:
    """What git tracks or would track; all that is there where git knows nothing of the folder."""
    listed = _git(folder, "ls-files", "-z", "--cached", "--others", "--exclude-standard")
    if listed:
        names = {name for name in listed.split("\0") if name}
    else:
        names = {str(path.relative_to(folder)) for path in folder.rglob("*") if "__pycache__" not in path.parts}
    return sorted(Path(name) for name in names if (folder / name).is_file())


def uncommitted(folder: Path) -> str:
    """The diff of a folder against the last commit, new files included; "" where git knows nothing of it.

    It is made in an index of its own, so that what the user has staged stays as it is.
    """
    index = (_git(folder, "rev-parse", "--path-format=absolute", "--git-path", "index") or "").strip()
    if not index:
        return ""
    with tempfile.TemporaryDirectory() as place:
        other = Path(place) / "index"
        if Path(index).is_file():
            shutil.copyfile(index, other)
        _git(folder, "add", "--all", "--", ".", index=other)
        return _git(folder, "diff", "--cached", "--binary", "HEAD", "--", ".", index=other) or ""


def _first_file(diff: str) -> str:
    return diff.partition("\n")[0].rpartition(" b/")[2]


def _git(folder: Path, *arguments: str, index: Path | None = None) -> str | None:
    """What git prints; None where there is no git, or it fails."""
    environment = {**os.environ, "GIT_INDEX_FILE": str(index)} if index else None
    try:
        done = subprocess.run(
            ["git", "-C", str(folder), *arguments], capture_output=True, text=True, timeout=60, env=environment
        )
    except (FileNotFoundError, subprocess.TimeoutExpired):
        return None
    return done.stdout if done.returncode == 0 else None

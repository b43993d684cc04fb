"""The code and the configs as they are at this moment, for jobs that start later: what is edited then changes no job.

    runs/.snapshots/<commit>-<hash>/src/retrace/  configs/  snapshot.json

Jobs import from it and read its YAML. `snapshot.json` is what their records say of the code.
"""

from __future__ import annotations

import hashlib
import os
import shutil
import tempfile
import time
from collections.abc import Collection
from pathlib import Path
from typing import Any

from retrace.core.config import CONFIGS
from retrace.core.discovery import package_folder, paper_packages
from retrace.core.files import write_json
from retrace.core.provenance import SNAPSHOT, commit, fingerprint, git, paper_code, uncommitted
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
    sha = commit(PACKAGE)
    diffs = {folder: uncommitted(folder) for folder in folders.values()}
    unknown = [str(folder) for folder, found in diffs.items() if found is None]
    if unknown and not allow_dirty:
        raise ValueError(
            f"{unknown[0]}: git can't tell what differs from the last commit (try `git status` there), and records say "
            "which code ran: mend that, or submit with --allow-dirty"
        )
    diff = "".join(filter(None, diffs.values()))
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
    target = store.runs / ".snapshots" / f"{(sha or 'no_commit')[:12]}-{digest.hexdigest()[:8]}"
    if target.is_dir():
        os.utime(target)  # so that `prune` sees that it is wanted
    else:
        code: dict[str, Any] = {"git": sha, "dirty": bool(diff) if sha and not unknown else None, "diff_sha256": None}
        for slug in brought:
            code.setdefault("paper_code", {}).update(paper_code(slug)["paper_code"])
        if diff:
            code |= {"diff_sha256": fingerprint(diff), "diff": diff}
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
    listed = git(folder, "ls-files", "-z", "--cached", "--others", "--exclude-standard")
    if listed:
        names = {name for name in listed.split("\0") if name}
    else:
        names = {str(path.relative_to(folder)) for path in folder.rglob("*") if "__pycache__" not in path.parts}
    return sorted(Path(name) for name in names if (folder / name).is_file())


def _first_file(diff: str) -> str:
    return diff.partition("\n")[0].rpartition(" b/")[2]

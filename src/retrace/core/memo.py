"""Texts that took long to make, kept on disk under a hash of all that they were made from: they can't be out of date.

They lie in the user's cache folder, `$XDG_CACHE_HOME/retrace` or `~/.cache/retrace`, which may be deleted at any time.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path

MOST = 32  # generations of sources whose texts are kept: those that were used last


def remember(sources: str, key: str, make: Callable[[], str | None]) -> str | None:
    """The JSON text that `make` gives for `key`, from an earlier call where there was one; None is not kept.

    `sources`: a hash of everything else that the text depends on.
    """
    root = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "retrace"
    path = root / sources[:32] / f"{hashlib.sha256(key.encode()).hexdigest()[:32]}.json"
    with contextlib.suppress(OSError, ValueError):  # not there, or torn by a power cut
        text = path.read_text()
        json.loads(text)
        os.utime(path.parent)
        return text
    made = make()
    if made is not None:
        with contextlib.suppress(OSError):  # a full disk or a folder of somebody else: made again next time
            _keep(path, made)
    return made


def _keep(path: Path, text: str) -> None:
    """Write a file whole; with the first of a generation those go that were not used for longest."""
    if not path.parent.is_dir():
        path.parent.mkdir(parents=True, mode=0o700)
        generations = sorted(path.parent.parent.iterdir(), key=lambda folder: folder.stat().st_mtime)
        for folder in generations[:-MOST]:
            shutil.rmtree(folder, ignore_errors=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    temporary.write_text(text)
    os.replace(temporary, path)

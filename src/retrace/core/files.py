"""Files that are whole or not there at all, also after a kill, a full disk or a power cut."""

from __future__ import annotations

import contextlib
import errno
import hashlib
import json
import os
import shutil
import uuid
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

MANIFEST = "manifest.json"  # name -> size and SHA-256 of every other file of a sealed folder
LOST = (errno.ENOENT, errno.ENOTDIR, errno.EISDIR, errno.EIO)  # other errors say nothing of a file


def write_atomic(path: Path, data: bytes | str) -> None:
    """Write, fsync, rename: a reader sees the old file or the new one, also after a power cut."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{uuid.uuid4().hex[:8]}")
    try:
        with open(temporary, "wb") as file:
            file.write(data.encode() if isinstance(data, str) else data)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)
    sync_folder(path.parent)


def sync_folder(path: Path) -> None:
    """Make renames within a folder durable."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def write_json(path: Path, value: Any) -> None:
    write_atomic(path, json.dumps(value, indent=1, sort_keys=True, allow_nan=False) + "\n")


def read_json(path: Path) -> Any | None:
    """The file's content, or None where there is no such file; raises ValueError, naming it, where it is broken."""
    try:
        return json.loads(path.read_text())
    except FileNotFoundError:
        return None
    except ValueError as error:  # of JSON, or of text that is no UTF-8
        raise ValueError(f"{path}: not readable as JSON ({error}); delete it and run again") from None


def try_json(path: Path) -> dict[str, Any]:
    """The file's keys and values, none where it is not there or holds no such: for what can be done without."""
    try:
        found = read_json(path)
    except ValueError:
        return {}
    return found if isinstance(found, dict) else {}


def json_lines(lines: Iterable[str], *, path: Path) -> Iterator[Any]:
    """What each line of a file of JSON lines holds, blank ones left out; raises ValueError for a broken one."""
    for number, line in enumerate(lines, start=1):
        if line.strip():
            try:
                yield json.loads(line)
            except json.JSONDecodeError as error:
                raise ValueError(f"{path}: line {number} is not JSON: {error}") from None


def fingerprint(path: Path) -> str:
    """SHA-256 of a file."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def seal(folder: Path) -> None:
    """Make the files of a folder durable, and write down what they are."""
    files = sorted(folder.iterdir())
    for file in files:
        with open(file, "rb") as opened:
            os.fsync(opened.fileno())
    write_json(folder / MANIFEST, {file.name: [file.stat().st_size, fingerprint(file)] for file in files})


@contextlib.contextmanager
def whole_folder(final: Path, *, temporary: Path) -> Iterator[Path]:
    """A sealed folder that appears under its name, in place of one that is there, only when the block has filled it."""
    remove(temporary)
    temporary.mkdir(parents=True)
    try:
        yield temporary
        seal(temporary)
        shutil.rmtree(final, ignore_errors=True)
        os.replace(temporary, final)
    except BaseException:  # on a full disk it would be in the way of the reason, and of all other runs
        remove(temporary)
        raise
    sync_folder(final.parent)


def remove(path: Path) -> None:
    """A folder, or whatever has its name."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path, ignore_errors=True)
    else:
        path.unlink(missing_ok=True)


def damage(folder: Path, *, needed: tuple[str, ...] = ()) -> str | None:
    """What is wrong with a sealed folder, or None; it has `needed` files among others.

    Raises OSError where a file is there and can't be opened, which damages nothing.
    """
    try:
        manifest = json.loads((folder / MANIFEST).read_text())
        for name in dict.fromkeys((*needed, *manifest)):
            file, (size, digest) = folder / name, manifest[name]
            if file.stat().st_size != size:
                return f"{name} has {file.stat().st_size} bytes, not {size}"
            if fingerprint(file) != digest:
                return f"{name} does not match its checksum"
    except OSError as error:
        if error.errno not in LOST:
            raise
        return f"{Path(error.filename or folder).name}: {error.strerror}"
    except (ValueError, TypeError, KeyError):
        return f"{MANIFEST} is not readable"
    return None

"""Who carries out a run: a lock of the system and a heartbeat on the disk, so that one process at a time writes there.

On one host the lock (`.lock`) says who lives: it ends with its process and asks no clock. It does not reach every other
host, nor is it there on every file system; then a lease (`lease.json`) lives as long as its heart beats.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
import socket
import threading
import time
import uuid
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, TextIO

from retrace.core.files import try_json, write_json

HEARTBEAT_SECONDS = 10.0
LEASE_SECONDS = 90.0  # a lease that no lock tells of is dead after this long without a heartbeat
LOCK = ".lock"
LOOKS, LOOK_SECONDS = 5, 0.02
NO_LOCKS = (errno.ENOSYS, errno.ENOLCK, errno.EOPNOTSUPP)  # as on Lustre without `-o flock`


class Busy(RuntimeError):
    """Somebody alive holds the lease of this run."""


class Leased:
    """The folder of a run, as something that one process holds."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.id = path.name
        self.lost = threading.Event()  # somebody else has taken the lease that this process holds
        self._open_lock: TextIO | None = None  # the open lock, while this process holds the run

    @contextlib.contextmanager
    def lease(self) -> Iterator[None]:
        """Hold the run: raises `Busy` while somebody alive holds it, takes over from the dead."""
        with open(self.path / LOCK, "w") as lock:
            locked = _lock(lock)
            if locked is False:
                raise Busy(f"{self.id} is being run by {self.holder() or 'another process'}")
            os.utime(lock.fileno())  # the time of the disk's clock, which may not be that of this host
            owner = _owner(self.path / "lease.json")
            now = os.fstat(lock.fileno()).st_mtime
            if owner and (locked is None or owner["host"] != socket.gethostname()) and self._beats(now):
                raise Busy(f"{self.id} is being run by {_name(owner)}")
            self._open_lock = lock
            try:
                with self._held(self.path / "lease.json"):
                    yield
            finally:
                self._open_lock = None

    @contextlib.contextmanager
    def _held(self, path: Path) -> Iterator[None]:
        """Write the lease that others read, keep it young, and remove it."""
        owner = {"host": socket.gethostname(), "pid": os.getpid(), "since": uuid.uuid4().hex}
        write_json(path, owner)
        stop = threading.Event()

        def beat() -> None:
            while not stop.wait(HEARTBEAT_SECONDS):
                with contextlib.suppress(OSError):  # a disk that does not answer now may do so at the next beat
                    found = _owner(path)
                    if found is None:  # deleted or broken by hand: other hosts would walk in
                        write_json(path, owner)
                    elif found != owner:  # for another host this one was dead, as one that sleeps or loses its disk
                        self.lost.set()
                        return
                    os.utime(path)

        thread = threading.Thread(target=beat, daemon=True)
        thread.start()
        try:
            yield
        finally:
            stop.set()
            thread.join()
            if _owner(path) == owner:
                path.unlink(missing_ok=True)

    def check_lease(self) -> None:
        """Raises `Busy` where the lease is lost: what is written now would fall among the files of another process."""
        if self._open_lock is not None and _is_another(self.path / LOCK, self._open_lock):
            self.lost.set()  # the folder was deleted, and somebody has begun the run anew in its place
        if self.lost.is_set():
            raise Busy(
                f"{self.id} was taken over by {self.holder() or 'another process'}, which took this one for dead"
            )

    def holder(self) -> str | None:
        """'host:pid' of a live owner, else None."""
        owner = _owner(self.path / "lease.json")
        if owner is None:
            return None
        alive = self._locked() if owner["host"] == socket.gethostname() else None
        return _name(owner) if (self._beats(time.time()) if alive is None else alive) else None

    def _locked(self) -> bool | None:
        """Whether a process of this host holds the run; None where the disk has no locks."""
        try:
            with open(self.path / LOCK) as file:
                fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
        except FileNotFoundError:
            return False
        except BlockingIOError:
            return True
        except OSError as error:
            if error.errno not in NO_LOCKS:
                raise
            return None
        return False

    def _beats(self, now: float) -> bool:
        """Whether the lease is young. One from the future is as old as it is far: a clock was set back since."""
        try:
            return abs(now - (self.path / "lease.json").stat().st_mtime) < LEASE_SECONDS
        except FileNotFoundError:
            return False


def _lock(file: TextIO) -> bool | None:
    """Lock an open file for this process; False where another holds it, and not just looks at it for a moment.

    None where the disk has no locks.
    """
    for _ in range(LOOKS):
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            return True
        except BlockingIOError:
            time.sleep(LOOK_SECONDS)
        except OSError as error:
            if error.errno not in NO_LOCKS:
                raise
            return None
    return False


def _is_another(path: Path, file: TextIO) -> bool:
    """Whether a path leads to a file other than the open one that it once led to; False where there is none."""
    try:
        return not os.path.samestat(path.stat(), os.fstat(file.fileno()))
    except FileNotFoundError:
        return False


def _owner(path: Path) -> Mapping[str, Any] | None:
    """Who a lease says that it is of; None where there is none, or nobody can read it."""
    found = try_json(path)
    return found if {"host", "pid"} <= found.keys() else None


def _name(owner: Mapping[str, Any]) -> str:
    return f"{owner['host']}:{owner['pid']}"

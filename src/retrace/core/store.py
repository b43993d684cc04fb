"""The run directory and the records: the only code that writes in runs/ and in results/*/records/ and pages/.

    runs/<id>/config.json      the frozen run, all that a worker reads
              slurm.json       the jobs that were to run it, the last one last
              lease.json       who is running it now, with a heartbeat
              progress.json    step, total, seconds left and taken
              metrics.jsonl    one line for each logged step
              checkpoints/     core/checkpoint.py
              model/ tasks/    what a program leaves behind
              pages/           HTML that it attached to its record
              record.json      the record, as it stands in results/, as the pages do
              result.json      DONE, DIVERGED or FAILED: the last thing that is written

Every file is written whole or not at all, so a run killed at any instant leaves a readable directory.
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import shutil
import socket
import threading
import time
import uuid
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TextIO

from retrace.core.config import HOME, Hardware, Tracking, validate
from retrace.core.files import read_json, sync_folder, try_json, write_atomic, write_json
from retrace.core.identity import science
from retrace.core.paper import load_paper
from retrace.core.plan import RunSpec
from retrace.core.record import Record

HEARTBEAT_SECONDS = 10.0
FINISHED = ("DONE", "DIVERGED")
LEASE_SECONDS = 90.0  # a lease of another host is dead after this long without a heartbeat
LOCK = ".lock"
LOOKS, LOOK_SECONDS = 5, 0.02


@dataclass(frozen=True)
class State:
    """What the disk says of a run. `status`: PLANNED, RUNNING, DONE, DIVERGED or FAILED."""

    status: str
    step: int = 0
    total: int = 0
    seconds_left: float | None = None
    reason: str = ""

    @property
    def finished(self) -> bool:
        """A diverged run is a finished result; a failed one is tried again."""
        return self.status in FINISHED


class Busy(RuntimeError):
    """Somebody alive holds the lease of this run."""


class RunDir:
    """One run on disk."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.id = path.name
        self.lost = threading.Event()  # another host has taken the lease that this process holds

    def freeze(self, spec: RunSpec, *, command: str) -> None:
        """Write config.json; a run that is already frozen has its placement renewed, and gains labels."""
        assert spec.id == self.id
        frozen = try_json(self.path / "config.json") or {}  # a broken one is written anew
        tree = {name: getattr(spec, name) for name in ("id", "paper", "program", "recipe", "scale", "seed")}
        tree |= {"config": science(spec.config), "parents": dict(spec.parents)}
        tree |= {
            "labels": list(dict.fromkeys((*frozen.get("labels", ()), *spec.labels))),
            "hardware": spec.hardware.model_dump(mode="json"),
            "tracking": spec.tracking.model_dump(),
            "command": command,
        }
        if frozen != tree:
            write_json(self.path / "config.json", tree)

    def load(self) -> tuple[RunSpec, str]:
        """The frozen run and the command that asked for it."""
        tree = read_json(self.path / "config.json")
        if tree is None:
            raise ValueError(f"{self.path}: no config.json there; give the folder of a run, such as runs/<id>")
        program = load_paper(tree["paper"]).programs[tree["program"]]
        command = tree.pop("command")
        tree["config"] = validate(program.config, tree["config"], source=str(self.path))
        tree["hardware"] = validate(Hardware, tree["hardware"], source=str(self.path))
        tree["tracking"] = validate(Tracking, tree["tracking"], source=str(self.path))
        tree["labels"] = tuple(tree["labels"])
        tree["accepts_diverged"] = program.accepts_diverged
        return RunSpec(**tree), command

    def state(self) -> State:
        progress = try_json(self.path / "progress.json") or {}  # never fsynced: a power cut may leave it empty
        try:
            result = read_json(self.path / "result.json") or {"status": "PLANNED"}
        except ValueError as error:  # one run's trouble, which is told in its line; it is run again
            result = {"status": "FAILED", "reason": str(error)}
        status, reason = result["status"], result.get("reason", "")
        if status in ("PLANNED", "FAILED") and self._holder():
            status, reason = "RUNNING", ""
        return State(status, progress.get("step", 0), progress.get("total", 0), progress.get("seconds_left"), reason)

    def page_path(self, name: str) -> Path:
        return self.path / "pages" / f"{name}.html"

    def spent(self) -> float:
        """Seconds that the run had taken when it last said how far it was, over all processes that carried it out."""
        return float((try_json(self.path / "progress.json") or {}).get("seconds", 0.0))

    def progress(self, *, step: int, total: int, seconds_left: float | None, seconds: float) -> None:
        """Say how far the run is; no fsync, since the next one follows soon. Raises `Busy` where the lease is lost."""
        self.check_lease()
        temporary = self.path / ".progress.json"
        content = {"step": step, "total": total, "seconds_left": seconds_left, "seconds": seconds}
        temporary.write_text(json.dumps(content))
        os.replace(temporary, self.path / "progress.json")

    def clear(self) -> None:
        """Forget why an earlier try failed, as this one begins: killed or stopped, it would be told that reason."""
        (self.path / "result.json").unlink(missing_ok=True)

    def finish(self, status: str, **content: Any) -> None:
        """Write result.json; checkpoints of a finished run have done their work."""
        write_json(self.path / "result.json", {"status": status, **content})
        if status in FINISHED:
            shutil.rmtree(self.path / "checkpoints", ignore_errors=True)

    @contextlib.contextmanager
    def folder(self, name: str) -> Iterator[Path]:
        """A folder of the run that appears under its name only when the block has filled it."""
        temporary, final = self.path / f".{name}.tmp", self.path / name
        shutil.rmtree(temporary, ignore_errors=True)
        temporary.mkdir(parents=True)
        yield temporary
        for file in temporary.iterdir():
            with open(file, "rb") as opened:
                os.fsync(opened.fileno())
        shutil.rmtree(final, ignore_errors=True)
        os.replace(temporary, final)
        sync_folder(self.path)

    @contextlib.contextmanager
    def lease(self) -> Iterator[None]:
        """Hold the run: raises `Busy` while somebody alive holds it, takes over from the dead.

        On one host the system's lock says who lives: it ends with its process and asks no clock.
        """
        path = self.path / "lease.json"
        with open(self.path / LOCK, "w") as lock:
            if not _lock(lock):
                raise Busy(f"{self.id} is being run by {self._holder() or 'another process'}")
            os.utime(lock.fileno())  # the time of the disk's clock, which may not be that of this host
            owner = read_json(path)
            now = os.fstat(lock.fileno()).st_mtime
            if owner and owner["host"] != socket.gethostname() and self._beats(now):
                raise Busy(f"{self.id} is being run by {_name(owner)}")
            with self._held(path):
                yield

    @contextlib.contextmanager
    def _held(self, path: Path) -> Iterator[None]:
        """Write the lease that others read, keep it young, and remove it."""
        owner = {"host": socket.gethostname(), "pid": os.getpid(), "since": uuid.uuid4().hex}
        write_json(path, owner)
        stop = threading.Event()

        def beat() -> None:
            while not stop.wait(HEARTBEAT_SECONDS):
                if try_json(path) != owner:  # a host for which this one was dead, as one that sleeps or loses its disk
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
            if try_json(path) == owner:
                path.unlink(missing_ok=True)

    def check_lease(self) -> None:
        """Raises `Busy` where the lease is lost: what is written now would fall among the files of another process."""
        if self.lost.is_set():
            raise Busy(
                f"{self.id} was taken over by {self._holder() or 'another process'}, which took this one for dead"
            )

    def _holder(self) -> str | None:
        """'host:pid' of a live owner, else None."""
        owner = try_json(self.path / "lease.json")
        if owner is None:
            return None
        here = owner["host"] == socket.gethostname()
        return _name(owner) if (self._locked() if here else self._beats(time.time())) else None

    def _locked(self) -> bool:
        """Whether a process of this host holds the run."""
        try:
            with open(self.path / LOCK) as file:
                fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
        except FileNotFoundError:
            return False
        except BlockingIOError:
            return True
        return False

    def _beats(self, now: float) -> bool:
        """Whether the lease is young. One from the future is as old as it is far: a clock was set back since."""
        try:
            return abs(now - (self.path / "lease.json").stat().st_mtime) < LEASE_SECONDS
        except FileNotFoundError:
            return False


def _lock(file: TextIO) -> bool:
    """Lock an open file for this process; False where another holds it, and not just looks at it for a moment."""
    for _ in range(LOOKS):
        with contextlib.suppress(BlockingIOError):
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            return True
        time.sleep(LOOK_SECONDS)
    return False


def _name(owner: Mapping[str, Any]) -> str:
    return f"{owner['host']}:{owner['pid']}"


class Store:
    """All runs and all records under one home folder."""

    def __init__(self, home: Path = HOME) -> None:
        self.runs = home / "runs"
        self.results = home / "results"
        self.published = home / "wandb"  # offline files of `retrace publish`

    def run(self, run_id: str) -> RunDir:
        return RunDir(self.runs / run_id)

    def labels(self) -> dict[str, tuple[str, ...]]:
        """Every run on disk, by id, with the labels that asked for it; none for a config that can't be read."""
        paths = sorted(self.runs.glob("*/config.json"))
        return {path.parent.name: tuple((try_json(path) or {}).get("labels", ())) for path in paths}

    def record_path(self, paper: str, run_id: str) -> Path:
        return self.results / paper / "records" / f"{run_id}.json"

    def page_path(self, paper: str, run_id: str, name: str) -> Path:
        return self.results / paper / "pages" / f"{run_id}--{name}.html"

    def write_record(self, record: Record) -> None:
        """Into the run's own folder and into results/, after the pages that it names."""
        for name in record.pages:
            page = self.run(record.id).page_path(name).read_bytes()
            write_atomic(self.page_path(record.paper, record.id, name), page)
        for path in (self.run(record.id).path / "record.json", self.record_path(record.paper, record.id)):
            write_atomic(path, record.to_json())

    def records(self, paper: str) -> list[Record]:
        """Every record of a paper, by id; raises ValueError for a file that is none."""
        return [Record.load(path) for path in sorted((self.results / paper / "records").glob("*.json"))]

    def keep_record(self, spec: RunSpec) -> None:
        """See that a finished run's record stands in results/, with the labels of this plan beside those it has.

        The run keeps a copy, so a record that was deleted or broken comes back without running again.
        """
        path, copy = self.record_path(spec.paper, spec.id), self.run(spec.id).path / "record.json"
        try:
            record = Record.load(path)
        except (FileNotFoundError, ValueError):
            if not copy.is_file():
                raise
            record = Record.load(copy)
        labels = tuple(dict.fromkeys((*record.labels, *spec.labels)))
        files = [path, *(self.page_path(spec.paper, spec.id, name) for name in record.pages)]
        if labels != tuple(record.labels) or not all(file.is_file() for file in files):
            self.write_record(record.relabelled(labels))

    def remove_orphaned_pages(self, paper: str) -> None:
        """Remove pages of records that are gone; a run that is being finished writes its pages first."""
        for path in (self.results / paper / "pages").glob("*.html"):
            run_id = path.name.partition("--")[0]
            if not self.record_path(paper, run_id).is_file() and self.run(run_id).state().status != "RUNNING":
                path.unlink()

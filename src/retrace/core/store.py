"""The run directory and the records: the only code that writes in runs/ and in results/*/records/ and pages/.

    runs/<id>/config.json      the frozen run, all that a worker reads
              slurm.json       the jobs that were to run it, the last one last
              lease.json       who is running it now, with a heartbeat
              progress.json    step, total, seconds left
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
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil

from retrace.core.config import HOME, Hardware, Tracking, validate
from retrace.core.identity import science
from retrace.core.paper import load_paper
from retrace.core.plan import RunSpec
from retrace.core.record import Record

HEARTBEAT_SECONDS = 10.0
FINISHED = ("DONE", "DIVERGED")
LEASE_SECONDS = 90.0  # a lease of another host is dead after this long without a heartbeat


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

    def freeze(self, spec: RunSpec, *, command: str) -> None:
        """Write config.json; a run that is already frozen only has its placement and labels renewed."""
        assert spec.id == self.id
        tree = {name: getattr(spec, name) for name in ("id", "paper", "program", "recipe", "scale", "seed")}
        tree |= {"config": science(spec.config), "parents": dict(spec.parents), "labels": list(spec.labels)}
        tree |= {
            "hardware": spec.hardware.model_dump(mode="json"),
            "tracking": spec.tracking.model_dump(),
            "command": command,
        }
        try:
            frozen = read_json(self.path / "config.json")
        except ValueError:
            frozen = None  # torn by a full disk or a power cut: written anew
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
        try:
            progress = read_json(self.path / "progress.json") or {}
        except ValueError:
            progress = {}  # never fsynced, so a power cut may leave it empty; it is a courtesy and not a fact
        result = read_json(self.path / "result.json") or {"status": "PLANNED"}
        status, reason = result["status"], result.get("reason", "")
        if status in ("PLANNED", "FAILED") and self._holder():
            status, reason = "RUNNING", ""
        return State(status, progress.get("step", 0), progress.get("total", 0), progress.get("seconds_left"), reason)

    def page_path(self, name: str) -> Path:
        return self.path / "pages" / f"{name}.html"

    def progress(self, *, step: int, total: int, seconds_left: float | None) -> None:
        """Say how far the run is; no fsync, since the next one follows soon."""
        temporary = self.path / ".progress.json"
        temporary.write_text(json.dumps({"step": step, "total": total, "seconds_left": seconds_left}))
        os.replace(temporary, self.path / "progress.json")

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
        """Hold the run: raises `Busy` while somebody alive holds it, takes over from the dead."""
        path = self.path / "lease.json"
        with self._locked():
            if self._holder():
                raise Busy(f"{self.id} is being run by {self._holder()}")
            me = psutil.Process()
            owner = {"host": socket.gethostname(), "pid": me.pid, "started": me.create_time()}
            write_json(path, owner)
        stop = threading.Event()

        def beat() -> None:
            while not stop.wait(HEARTBEAT_SECONDS):
                if _owner(path) == owner:  # else another host has taken a lease that it believed dead
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

    @contextlib.contextmanager
    def _locked(self) -> Iterator[None]:
        with open(self.path / ".lock", "w") as file:
            fcntl.flock(file, fcntl.LOCK_EX)
            yield

    def _holder(self) -> str | None:
        """'host:pid' of a live owner, else None."""
        path = self.path / "lease.json"
        try:
            owner, beat = json.loads(path.read_text()), path.stat().st_mtime
        except FileNotFoundError:
            return None
        if owner["host"] == socket.gethostname():
            try:
                alive = abs(psutil.Process(owner["pid"]).create_time() - owner["started"]) < 2
            except psutil.NoSuchProcess:
                alive = False
        else:
            alive = time.time() - beat < LEASE_SECONDS
        return f"{owner['host']}:{owner['pid']}" if alive else None


def _owner(path: Path) -> Any | None:
    """Who holds a lease, or None where nobody does."""
    try:
        return json.loads(path.read_text())
    except (FileNotFoundError, ValueError):
        return None


class Store:
    """All runs and all records under one home folder."""

    def __init__(self, home: Path = HOME) -> None:
        self.runs = home / "runs"
        self.results = home / "results"
        self.published = home / "wandb"  # offline files of `retrace publish`

    def run(self, run_id: str) -> RunDir:
        return RunDir(self.runs / run_id)

    def labels(self) -> dict[str, str]:
        """Every run on disk, by id, with the first label that asked for it."""
        found = {path.parent.name: read_json(path) for path in sorted(self.runs.glob("*/config.json"))}
        return {run_id: next(iter((tree or {}).get("labels", [])), "") for run_id, tree in found.items()}

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

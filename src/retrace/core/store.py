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
import json
import os
import shutil
from collections.abc import Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from retrace.core.config import HOME, Hardware, Tracking, validate
from retrace.core.files import MANIFEST, damage, read_json, try_json, whole_folder, write_atomic, write_json
from retrace.core.identity import run_id, science
from retrace.core.lease import Leased
from retrace.core.paper import load_paper
from retrace.core.plan import RunSpec
from retrace.core.record import FINISHED, Record


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


class RunDir(Leased):
    """One run on disk. Who carries it out holds its lease (core/lease.py)."""

    def freeze(self, spec: RunSpec, *, command: str) -> None:
        """Write config.json; a run that is already frozen has its placement renewed, and gains labels."""
        assert spec.id == self.id
        frozen = try_json(self.path / "config.json")  # a broken one is written anew
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
        self._check_identity(tree)
        tree["hardware"] = validate(Hardware, tree["hardware"], source=str(self.path))
        tree["tracking"] = validate(Tracking, tree["tracking"], source=str(self.path))
        tree["labels"] = tuple(tree["labels"])
        tree["accepts_diverged"] = program.accepts_diverged
        return RunSpec(**tree), command

    def _check_identity(self, tree: Mapping[str, Any]) -> None:
        """Raises ValueError for a config that somebody has edited: the id promises its numbers."""
        parts = {name: tree[name] for name in ("paper", "program", "recipe", "scale", "config", "parents")}
        seed = getattr(tree["config"], "seed", tree["seed"])
        if (run_id(**parts), tree["id"], tree["seed"]) != (self.id, self.id, seed):
            raise ValueError(
                f"{self.path / 'config.json'}: it was changed, and is not what {self.id} stands for: `retrace run` "
                "writes it anew; to try something else, give it overrides"
            )

    def state(self) -> State:
        progress = self._progress()
        try:
            result = read_json(self.path / "result.json") or {"status": "PLANNED"}
            status, reason = result["status"], result.get("reason", "")
            if status not in (*FINISHED, "PLANNED", "FAILED") or not isinstance(reason, str):
                raise TypeError
        except ValueError as error:  # one run's trouble, which is told in its line; it is run again
            status, reason = "FAILED", str(error)
        except (TypeError, KeyError):
            status, reason = "FAILED", f"{self.path / 'result.json'}: not a result"
        if status in ("PLANNED", "FAILED") and self.holder():
            status, reason = "RUNNING", ""
        return State(status, progress.get("step", 0), progress.get("total", 0), progress.get("seconds_left"), reason)

    def page_path(self, name: str) -> Path:
        return self.path / "pages" / f"{name}.html"

    def spent(self) -> float:
        """Seconds that the run had taken when it last said how far it was, over all processes that carried it out."""
        return float(self._progress().get("seconds", 0.0))

    def _progress(self) -> dict[str, Any]:
        """How far the run is, what is a number of it; it is never fsynced, so a power cut may leave it empty."""
        found = try_json(self.path / "progress.json")
        return {name: value for name, value in found.items() if isinstance(value, int | float)}

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

    def folder(self, name: str) -> AbstractContextManager[Path]:
        """A folder of the run that appears under its name only when the block has filled it."""
        return whole_folder(self.path / name, temporary=self.path / f".{name}.tmp")

    def check_folders(self) -> None:
        """Raises ValueError where a folder that the run left is not what it wrote; without a seal nothing is known."""
        for manifest in sorted(self.path.glob(f"*/{MANIFEST}")):
            found = damage(manifest.parent)
            if found is not None:
                raise ValueError(
                    f"runs/{self.id}/{manifest.parent.name}: is damaged ({found}): delete runs/{self.id}, and the same "
                    "command makes it again"
                )


class Store:
    """All runs and all records under one home folder."""

    def __init__(self, home: Path = HOME) -> None:
        self.runs = home / "runs"
        self.results = home / "results"
        self.published = home / "wandb"  # offline files of `retrace publish`

    def run(self, run_id: str) -> RunDir:
        return RunDir(self.runs / run_id)

    def record_path(self, paper: str, run_id: str) -> Path:
        return self.results / paper / "records" / f"{run_id}.json"

    def page_path(self, paper: str, run_id: str, name: str) -> Path:
        return self.results / paper / "pages" / f"{run_id}--{name}.html"

    def write_record(self, record: Record) -> None:
        """Into the run's own folder and into results/, after the pages that it names.

        The labels of a record that stands there stay: of a run that is made again, others may still be asked for.
        """
        path = self.record_path(record.paper, record.id)
        with contextlib.suppress(FileNotFoundError, ValueError):
            record = record.relabelled(tuple(dict.fromkeys((*Record.load(path).labels, *record.labels))))
        for name in record.pages:
            page = self.run(record.id).page_path(name).read_bytes()
            write_atomic(self.page_path(record.paper, record.id, name), page)
        for place in (self.run(record.id).path / "record.json", path):
            write_atomic(place, record.to_json())

    def records(self, paper: str) -> list[Record]:
        """Every record of a paper, by id; raises ValueError for a file that is none."""
        return [Record.load(path) for path in self._record_paths(paper)]

    def has_records(self, paper: str) -> bool:
        return bool(self._record_paths(paper))

    def _record_paths(self, paper: str) -> list[str]:
        """As text: of thousands, making a Path of each takes as long as reading it."""
        folder = self.results / paper / "records"
        names = os.listdir(folder) if folder.is_dir() else []
        return [f"{folder}/{name}" for name in sorted(names) if name.endswith(".json")]

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

"""Where runs are shown beside their own metrics.jsonl: W&B and trackio, behind one interface.

`Card` says how a run is shown, the same for one that is running and one that is rebuilt from its record. Nothing here
is imported before it is asked for. What is sent to W&B's server later is core/upload.py.
"""

from __future__ import annotations

import contextlib
import io
import logging
import os
import shutil
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, ClassVar, Protocol

from retrace.core.config import HOME
from retrace.core.identity import science
from retrace.core.plan import RunSpec
from retrace.core.record import Label, Record

log = logging.getLogger("retrace")
INIT_SECONDS = 20.0  # for W&B to answer
_failed: list[str] = []  # attempts of this process: its next runs shall not wait again


@dataclass(frozen=True)
class Card:
    """How a run is shown. `config["arms"]` has the arm of every ablation that shares the run: what panels group by."""

    id: str
    name: str
    group: str
    job_type: str
    tags: tuple[str, ...]
    config: Mapping[str, Any]

    @classmethod
    def of(cls, run: RunSpec | Record) -> Card:
        """The card of a run or of its record: the same, but for labels that a record has gathered since."""
        arms: dict[str, list[str]] = {}
        for label in map(Label.parse, run.labels):
            arms.setdefault(label.ablation, []).append(label.arm)
        first = run.labels[0] if run.labels else run.id
        config = dict(run.config) if isinstance(run, Record) else science(run.config)
        config |= {name: getattr(run, name) for name in ("paper", "program", "recipe", "scale", "seed")}
        config |= {"labels": list(run.labels), "parents": dict(run.parents)}
        config |= {"arms": {name: ", ".join(dict.fromkeys(found)) for name, found in arms.items()}}
        return cls(
            id=run.id,
            name=f"{first} {run.program}",
            group=f"{run.paper}/{Label.parse(first).ablation}",
            job_type=run.program,
            tags=(f"scale:{run.scale}", f"seed:{run.seed}", *sorted(arms)),
            config=config,
        )


class Mirror(Protocol):
    """What is told of a run; each call may raise whatever the library behind it raises."""

    name: ClassVar[str]

    def rewind(self, lines: Sequence[Mapping[str, Any]]) -> None:
        """The run goes on from a checkpoint, and of its metrics these lines stand."""

    def log(self, step: int, metrics: Mapping[str, float]) -> None:
        """One line of metrics."""

    def finish(self, summary: Mapping[str, float], *, exit_code: int) -> None:
        """The run has ended with these metrics."""


class Wandb:
    """A W&B run."""

    name: ClassVar[str] = "W&B"

    def __init__(self, run: Any) -> None:
        self._run = run
        run.define_metric("step", hidden=True)
        run.define_metric("*", step_metric="step")

    def rewind(self, lines: Sequence[Mapping[str, Any]]) -> None:
        """W&B keeps what it was sent; `step` tells the lines that stand from those before them."""

    def log(self, step: int, metrics: Mapping[str, float]) -> None:
        self._run.log({"step": step, **metrics})

    def finish(self, summary: Mapping[str, Any], *, exit_code: int) -> None:
        self._run.summary.update(dict(summary))
        self._run.finish(exit_code=exit_code)


def open_wandb(card: Card, *, mode: str, project: str, entity: str | None, folder: Path) -> Wandb | None:
    """The W&B run of a run's id, `mode` online or offline, its files in folder/wandb; None where W&B fails."""
    import wandb

    os.environ.setdefault("WANDB_SILENT", "true")
    # A killed process would otherwise lose up to 15 s of an offline run, its config included.
    settings = _settings(x_transaction_log_flush_interval=0.5)
    arguments = _arguments(card, project, folder) | {"entity": entity, "resume": "allow", "settings": settings}
    for attempt in ("online", "offline") if mode == "online" and not _failed else ("offline",):
        try:
            return Wandb(wandb.init(mode=attempt, **arguments))
        except Exception as error:  # its classes are many, not all public, and none of them is worth the run
            log.warning("W&B failed (%s); this process goes on offline, send its runs later with `wandb sync`", error)
            _failed.append(attempt)
            wandb.teardown()  # else the service holds the run's id for the attempt that failed
    return None


def write_offline(
    card: Card, *, project: str, folder: Path, rows: Iterable[Mapping[str, Any]], summary: Mapping[str, Any]
) -> None:
    """A finished run as W&B's offline files, in `folder`; they are whole after `flush_offline`.

    `rows`: lines of metrics with their "step", in order.
    """
    import wandb

    building = folder.with_name(f".{folder.name}.tmp")
    shutil.rmtree(building, ignore_errors=True)
    building.mkdir(parents=True)
    settings = _settings(x_disable_meta=True, x_save_requirements=False, x_disable_machine_info=True, disable_git=True)
    run = Wandb(wandb.init(mode="offline", settings=settings, **_arguments(card, project, building)))
    for row in rows:
        run.log(row["step"], row)
    run.finish(summary, exit_code=0)
    (written,) = building.glob("wandb/offline-run-*")
    shutil.rmtree(folder, ignore_errors=True)
    written.rename(folder)
    shutil.rmtree(building)


def flush_offline() -> None:
    """End W&B's service of this process: only then are the files of `write_offline` sure to be on the disk.

    Of 240 runs, 7 files held nothing yet when `finish` had returned, and none afterwards.
    """
    import wandb

    wandb.teardown()


def _settings(**more: Any) -> Any:
    import wandb

    return wandb.Settings(console="off", init_timeout=INIT_SECONDS, silent=True, x_disable_stats=True, **more)


def _arguments(card: Card, project: str, folder: Path) -> dict[str, Any]:
    return {**asdict(card), "tags": list(card.tags), "project": project, "dir": str(folder)}


class Trackio:
    """A run in the local database that `retrace dashboard` shows; it holds what metrics.jsonl holds, and no more."""

    name: ClassVar[str] = "trackio"

    def __init__(self, card: Card, *, project: str) -> None:
        self._card, self._project = card, project
        self._run = self._anew()

    def _anew(self) -> Any:
        """An empty run in place of the one that an earlier attempt left."""
        trackio = load_trackio()
        self._step, self._drawn = 0, set[str]()
        key = self._card.id.rpartition("-")[2]
        with _quiet():
            with contextlib.suppress(ValueError):  # the first run of its project
                for old in trackio.Api().runs(self._project):
                    if old.name.endswith(f" {key}"):
                        old.delete()
            return trackio.init(
                project=self._project,
                name=f"{self._card.name} {key}",
                group=self._card.group,
                config={**self._card.config, "id": self._card.id},
                embed=False,
                auto_log_cpu=False,
                auto_log_gpu=False,
            )

    def rewind(self, lines: Sequence[Mapping[str, Any]]) -> None:
        """trackio appends, so the run is written again as it stands."""
        with _quiet():
            load_trackio().finish()
        self._run = self._anew()
        for line in lines:
            self.log(line["step"], {key: value for key, value in line.items() if key != "step"})

    def log(self, step: int, metrics: Mapping[str, float]) -> None:
        self._step = step
        self._drawn |= metrics.keys()
        with _quiet():
            self._run.log(dict(metrics), step=step)

    def finish(self, summary: Mapping[str, float], *, exit_code: int) -> None:  # noqa: ARG002 (trackio knows no state)
        with _quiet():
            more = {name: value for name, value in summary.items() if name not in self._drawn}
            if more:  # a curve that ends in its last value twice is drawn with a kink
                self._run.log(more, step=self._step)
            load_trackio().finish()


def load_trackio() -> Any:
    """The library, with its database in RETRACE_HOME/trackio unless TRACKIO_DIR says another place."""
    os.environ.setdefault("TRACKIO_DIR", str(HOME / "trackio"))  # it is read when the library is imported
    import trackio

    logging.captureWarnings(True)  # it warns where it fails, and goes on: that belongs in a run's log
    return trackio


@contextlib.contextmanager
def _quiet() -> Any:
    """trackio prints what it does."""
    with contextlib.redirect_stdout(io.StringIO()):
        yield

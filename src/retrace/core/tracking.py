"""Who hears of a run: metrics.jsonl always, progress always, W&B and trackio as its config says.

The JSONL is the truth; the others are its mirrors (core/mirrors.py).
"""

from __future__ import annotations

import json
import logging
import netrc
import os
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from retrace.core.config import Tracking
from retrace.core.files import write_atomic
from retrace.core.mirrors import Card, Mirror, Trackio, open_wandb
from retrace.core.plan import RunSpec
from retrace.core.store import RunDir

log = logging.getLogger("retrace")
MAX_POINTS = 60  # of a curve in a record; the whole curve stays beside the run


class Tracker:
    """The metrics of one run. Only the main process logs; the others hold a silent one (`main=False`)."""

    def __init__(self, run: RunDir, spec: RunSpec, *, main: bool = True) -> None:
        self.run = run
        self.log_every = spec.tracking.log_every
        self._main = main
        self._path = run.path / "metrics.jsonl"
        self._mirrors = _open_mirrors(run, spec) if main else []
        self._size = self._path.stat().st_size if self._path.exists() else 0  # that the log has at least
        self._said = 0.0
        self._began, self._before = time.monotonic(), run.spent()

    @property
    def seconds(self) -> float:
        """That the run has taken, in this process and in those before it."""
        return self._before + time.monotonic() - self._began

    def resume(self, step: int, *, saved: Path | None = None) -> None:
        """Forget lines after `step`: a killed run may have logged past its last checkpoint, which has the log `saved`.

        What is there of the log may be cut or gone, so that copy of it is the better one.
        """
        source = saved if saved is not None and saved.exists() else self._path
        if self._main and source.exists():
            kept = [line for line in read_lines(source) if line["step"] <= step]
            write_atomic(self._path, "".join(json.dumps(line) + "\n" for line in kept))
            self._size = self._path.stat().st_size
            self._tell(lambda mirror: mirror.rewind(kept))

    def log(self, step: int, metrics: Mapping[str, float | None]) -> None:
        """One line of metrics at a step; what is unknown (None) is left out, never written as zero."""
        if not self._main:
            return
        known = {key: value for key, value in metrics.items() if value is not None}
        self._check_size()
        with open(self._path, "a") as file:
            file.write(json.dumps({"step": step, **known}) + "\n")
        self._size = self._path.stat().st_size
        self._tell(lambda mirror: mirror.log(step, known))

    def progress(self, step: int, total: int, *, seconds_left: float | None) -> None:
        """Say how far the run is, twice a second at most."""
        now = time.monotonic()
        if self._main and (now - self._said > 0.5 or step == total):
            self._said = now
            self.run.progress(step=step, total=total, seconds_left=seconds_left, seconds=self.seconds)

    def series(self) -> dict[str, tuple[tuple[int, float], ...]]:
        """Each logged metric as a curve of at most `MAX_POINTS` points."""
        self._check_size()
        curves: dict[str, list[tuple[int, float]]] = {}
        for line in read_lines(self._path) if self._path.exists() else []:
            step = line.pop("step")
            for key, value in line.items():
                curves.setdefault(key, []).append((step, value))
        return {key: _thin(curve) for key, curve in curves.items()}

    def _check_size(self) -> None:
        """Raise ValueError where somebody has deleted or cut the log since: its record would lack the beginning."""
        if self._size and not (self._path.exists() and self._path.stat().st_size >= self._size):
            raise ValueError(
                f"{self._path}: was deleted or cut while the run went on: run it again, and it goes on from its last "
                "checkpoint, with the log of then"
            )

    def close(self, *, summary: Mapping[str, float], exit_code: int) -> None:
        """End the run with its final metrics, wherever it is shown."""
        self._tell(lambda mirror: mirror.finish(summary, exit_code=exit_code))

    def _tell(self, act: Callable[[Mirror], None]) -> None:
        """Tell every mirror; of one that fails say so once and go on without it: the run is worth more."""
        for mirror in tuple(self._mirrors):
            try:
                act(mirror)
            except Exception as error:  # its classes are many, not all public, and none of them is worth the run
                log.warning("%s failed (%s); metrics.jsonl goes on alone", type(mirror).name, error)
                self._mirrors.remove(mirror)


def read_lines(path: Path) -> list[dict[str, Any]]:
    """The whole lines of a JSONL file; a torn last line, from a kill in the middle of a write, is left out.

    Raises ValueError for another one that is broken: steps would be missing in the record.
    """
    found = []
    for number, line in enumerate(path.read_text(errors="replace").split("\n")[:-1], start=1):
        try:
            found.append(json.loads(line))
        except ValueError:
            raise ValueError(
                f"{path}: line {number} is damaged; delete it and checkpoints/ beside it, and the run begins anew"
            ) from None
    return found


def _thin(curve: list[tuple[int, float]]) -> tuple[tuple[int, float], ...]:
    """Every k-th point and the last."""
    stride = -(-len(curve) // MAX_POINTS)
    thinned = curve[::stride]
    return tuple(thinned if thinned[-1] == curve[-1] else [*thinned[: MAX_POINTS - 1], curve[-1]])


def wandb_mode(tracking: Tracking) -> str:
    """'online', 'offline' or 'off'; auto is online with an API key and offline without, or what WANDB_MODE says."""
    if tracking.wandb != "auto":
        return tracking.wandb
    asked = os.environ.get("WANDB_MODE")
    if asked:
        return {"disabled": "off"}.get(asked, asked)
    return "online" if os.environ.get("WANDB_API_KEY") or _netrc_has_key() else "offline"


def _netrc_has_key() -> bool:
    try:
        return netrc.netrc().authenticators("api.wandb.ai") is not None
    except (OSError, netrc.NetrcParseError):
        return False


def _open_mirrors(run: RunDir, spec: RunSpec) -> list[Mirror]:
    """Those that the config asks for; one that can't be opened is said and left out."""
    mirrors: list[Mirror] = []
    card, asked, mode = Card.of(spec), spec.tracking, wandb_mode(spec.tracking)
    if mode != "off":
        opened = open_wandb(card, mode=mode, project=asked.project, entity=asked.entity, folder=run.path)
        mirrors += [opened] if opened else []
    if asked.trackio:
        try:
            mirrors.append(Trackio(card, project=asked.project))
        except Exception as error:  # see Tracker._tell
            log.warning("trackio failed (%s); metrics.jsonl goes on alone", error)
    return mirrors

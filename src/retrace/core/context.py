"""What a program gets beside its config: its folder, its parents' folders, somewhere to log, and the wish to stop."""

from __future__ import annotations

import logging
import re
import threading
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from retrace.core.config import Hardware
from retrace.core.files import write_atomic
from retrace.core.record import PAGE_NAME
from retrace.core.store import RunDir
from retrace.core.tracking import Tracker

log = logging.getLogger("retrace")


class Diverged(RuntimeError):
    """The loss is no number any more. A result, not a crash; `metrics` are the last good values."""

    def __init__(self, step: int, metrics: Mapping[str, float], *, what: str = "the loss") -> None:
        good = ", ".join(f"{name}={value:.4g}" for name, value in metrics.items() if name.startswith(("loss", "grad")))
        super().__init__(f"{what} was not finite at step {step}; last good values: {good or 'none'}")
        self.step = step
        self.metrics = dict(metrics)


class Stopped(RuntimeError):
    """The run was asked to stop and left a checkpoint; the same command goes on from it."""


@dataclass
class Context:
    """Handed to every program as its second argument. `cost` is filled in by what the program really used."""

    run: RunDir
    seed: int
    parents: Mapping[str, RunDir]
    hardware: Hardware
    tracker: Tracker
    stop: threading.Event
    is_main: bool = True  # of several processes, the one that writes
    cost: dict[str, float | None] = field(default_factory=dict)  # tokens, flops, seconds, mfu
    notes: dict[str, Any] = field(default_factory=dict)  # what else belongs into the record's provenance
    pages: list[str] = field(default_factory=list)  # names, in the order in which they were attached
    warnings: list[str] = field(default_factory=list)  # sentences that whoever waits for the run should read

    def warn(self, sentence: str) -> None:
        """Put a sentence into the run's log at once, and beside its status at its end."""
        log.warning(sentence)
        self.warnings.append(sentence)

    def attach(self, name: str, html: str) -> None:
        """Add a page to the run's record: one HTML file that fetches nothing, a few tens of kB; reports link to it."""
        assert re.fullmatch(PAGE_NAME, name), name
        if self.is_main:
            write_atomic(self.run.page_path(name), html)
            self.pages = [*dict.fromkeys((*self.pages, name))]

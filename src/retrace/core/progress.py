"""What a sweep looks like while it runs: a line with an ETA for each run and for all; plain lines when piped."""

from __future__ import annotations

import threading
import time
from collections.abc import Mapping, Sequence
from types import TracebackType
from typing import Self

from rich.console import Console
from rich.progress import BarColumn, Progress, TaskID, TextColumn

from retrace.core.plan import RunSpec
from retrace.core.record import FINISHED
from retrace.core.store import Store
from retrace.core.units import duration, say

POLL_SECONDS = 0.5


class SweepProgress:
    """Shows the runs of a sweep; `on_change` is what the launcher calls.

    `expected` holds the seconds that each run should take where that was measured before; they make the first ETA.
    """

    def __init__(
        self, specs: Sequence[RunSpec], *, store: Store, console: Console, expected: Mapping[str, float | None]
    ):
        self._specs = {spec.id: spec for spec in specs}
        self._store = store
        self._console = console
        self._expected = expected
        self._left = {spec.id for spec in specs if not store.run(spec.id).state().finished}
        self._total = len(specs)
        self._already = len(specs) - len(self._left)
        self._slots = specs[0].hardware.slots if specs else 1
        self._running: dict[str, tuple[TaskID | None, float | None]] = {}  # since when; None: by somebody else
        self._took: dict[str, list[float]] = {}  # program -> seconds of runs that ended in this sweep
        self._lock = threading.Lock()
        self._live = console.is_terminal
        columns = (TextColumn("{task.description}"), BarColumn(bar_width=24), TextColumn("{task.fields[note]}"))
        self._progress = Progress(*columns, console=console, transient=True)
        self._closing = threading.Event()
        self._began = time.monotonic()

    @property
    def seconds(self) -> float:
        """Since the sweep began."""
        return time.monotonic() - self._began

    def __enter__(self) -> Self:
        if self._left:
            self._console.print(
                f"{self._total} runs: {self._already} finished before, {len(self._left)} to do, "
                f"{self._slots} side by side"
            )
        if self._live and self._left:
            self._sweep = self._progress.add_task("sweep", total=len(self._left), note="")
            self._progress.start()
            self._thread = threading.Thread(target=self._poll, daemon=True)
            self._thread.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, value: BaseException | None, tb: TracebackType | None) -> None:
        self._closing.set()
        if self._live:
            self._progress.stop()

    def on_change(self, run_id: str, status: str, reason: str) -> None:
        """A run has started (RUNNING), is somebody else's for now (BUSY), or has ended, or will never start."""
        with self._lock:
            task, began = self._running.pop(run_id, (None, None))
            if status in ("RUNNING", "BUSY"):
                if task is None and self._live:
                    task = self._progress.add_task(run_id, total=100, note="starting")
                self._running[run_id] = task, time.monotonic() if status == "RUNNING" else None
                return
            if task is not None:
                self._progress.remove_task(task)
            self._left.discard(run_id)
            seconds = None if began is None else time.monotonic() - began
            if status in FINISHED and seconds is not None:
                self._took.setdefault(self._specs[run_id].program, []).append(seconds)
            self._say(run_id, status, reason, seconds)

    def _say(self, run_id: str, status: str, reason: str, seconds: float | None) -> None:
        spec = self._specs[run_id]
        label = spec.labels[0] + (f" +{len(spec.labels) - 1}" if len(spec.labels) > 1 else "")
        count = f"[{self._total - len(self._left)}/{self._total}]"
        eta = f"sweep ETA {duration(self.seconds_left())}" if self._left else ""
        text = f"{count} {status:<8} {run_id}  {label}  {duration(seconds)}  {eta} {reason}"
        console = self._progress.console if self._live else self._console
        say(console, text.rstrip())

    def seconds_left(self) -> float | None:
        """Of the sweep: what each run still needs by its like, over the runs side by side."""
        total = 0.0
        for run_id in self._left:
            took = self._took.get(self._specs[run_id].program)
            whole = sum(took) / len(took) if took else self._expected.get(run_id)
            if whole is None:
                return None
            began = self._running.get(run_id, (None, None))[1]
            total += whole if began is None else max(0.0, whole - (time.monotonic() - began))
        return total / max(1, min(self._slots, len(self._left)))

    def _poll(self) -> None:
        while not self._closing.wait(POLL_SECONDS):
            with self._lock:
                for run_id, (task, _) in self._running.items():
                    state = self._store.run(run_id).state()
                    assert task is not None
                    note = (
                        f"{state.step}/{state.total}  ETA {duration(state.seconds_left)}" if state.total else "starting"
                    )
                    label = f"{self._specs[run_id].program} {self._specs[run_id].labels[0]}"
                    self._progress.update(
                        task, description=label, completed=state.step, total=state.total or 100, note=note
                    )
                eta = duration(self.seconds_left())
                done = self._total - self._already - len(self._left)
                self._progress.update(self._sweep, completed=done, note=f"{len(self._left)} left  ETA {eta}")

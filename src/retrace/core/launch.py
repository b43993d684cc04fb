"""Carries out planned runs on this machine: a pool of warm workers, each run as soon as what it builds on is there.

A worker that dies takes down its run, which is told, and nothing else. core/workers.py has the processes.
"""

from __future__ import annotations

import queue
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from graphlib import TopologicalSorter
from types import MappingProxyType

from retrace.core.plan import RunSpec
from retrace.core.record import FINISHED
from retrace.core.safety import redact
from retrace.core.store import Store
from retrace.core.workers import Worker

BUSY_SECONDS = 2.0  # between two looks at a run that somebody else holds
STOP_SECONDS = 1.0  # between two words to the workers that the sweep is to stop


@dataclass
class Summary:
    """What became of each run of a sweep, by id."""

    done: list[str] = field(default_factory=list)
    diverged: list[str] = field(default_factory=list)
    failed: dict[str, str] = field(default_factory=dict)  # id -> first line of why
    skipped: dict[str, str] = field(default_factory=dict)  # id -> the failed run that it builds on
    stopped: list[str] = field(default_factory=list)
    queued: dict[str, str] = field(default_factory=dict)  # id -> the job that will run it


class Local:
    """This machine. `on_change` is called with (id, status, reason) whenever a run starts, ends or will never start."""

    def __init__(
        self,
        store: Store,
        *,
        command: str,
        on_change: Callable[[str, str, str], None],
        expected: Mapping[str, float | None] = MappingProxyType({}),
    ) -> None:
        """`expected`: seconds that a run should take, by id, where that is known."""
        self._store = store
        self._command = command
        self._expected = expected
        self._on_change = on_change
        self._halt = threading.Event()  # set on Ctrl-C: nothing new is started
        self._workers: list[Worker] = []
        self._ready: queue.PriorityQueue[tuple[int, float, int, RunSpec | None]] = queue.PriorityQueue()
        self._ended: queue.Queue[tuple[RunSpec, str, str]] = queue.Queue()

    def run(self, specs: Sequence[RunSpec]) -> Summary:
        """Carry out all runs that are not finished. On Ctrl-C the runs in hand save and stop, then it is raised."""
        summary = Summary()
        waiting = unfinished(specs, store=self._store, summary=summary)
        self._tell_skipped(summary.skipped)
        if not waiting:
            return summary
        slots = min(len(waiting), next(iter(waiting.values())).hardware.slots)
        threads = [threading.Thread(target=self._serve, daemon=True) for _ in range(slots)]
        for thread in threads:
            thread.start()
        stopping = True  # by Ctrl-C, of which a supervisor tells this process alone, or as nobody reads the output
        try:
            self._schedule(waiting, summary)
            stopping = False
        finally:
            self._halt.set()
            for number in range(len(threads)):
                self._ready.put((1, 0.0, number, None))  # behind all runs
            while any(thread.is_alive() for thread in threads):
                for worker in self._workers if stopping else ():
                    worker.stop()  # more than once: it may just be starting a process
                for thread in threads:
                    thread.join(timeout=STOP_SECONDS)
        return summary

    def _schedule(self, waiting: dict[str, RunSpec], summary: Summary) -> None:
        """Hand out runs whose parents are done, until nothing waits and nothing runs.

        Those that build on most go first, so that results come early; of equals the one with the longest critical path,
        so that no slot idles behind it at the end. A run that somebody else holds is looked at again after
        `BUSY_SECONDS`, and takes no slot until then.
        """
        order = TopologicalSorter({i: waiting.keys() & spec.parents.values() for i, spec in waiting.items()})
        order.prepare()
        depth, path = depths(waiting), critical_paths(waiting, self._expected)
        place = {run_id: (-depth[run_id], -path[run_id], number) for number, run_id in enumerate(waiting)}
        running = 0
        held: dict[str, float] = {}  # run that somebody else holds -> when to look at it again
        while waiting or running:
            now = time.monotonic()
            due = [*order.get_ready(), *(run_id for run_id, at in held.items() if at <= now)]
            for run_id in sorted(waiting.keys() & due, key=place.__getitem__):  # others are skipped
                running += 1
                self._ready.put((*place[run_id], waiting.pop(run_id)))
            held = {run_id: at for run_id, at in held.items() if run_id in waiting}
            try:
                spec, status, reason = self._ended.get(timeout=max(0.0, min(held.values()) - now) if held else None)
            except queue.Empty:
                continue
            running -= 1
            self._on_change(spec.id, status, reason)
            if status == "BUSY":
                waiting[spec.id] = spec
                held[spec.id] = time.monotonic() + BUSY_SECONDS
            elif status in FINISHED:
                order.done(spec.id)
                (summary.done if status == "DONE" else summary.diverged).append(spec.id)
            elif status == "STOPPED":
                self._halt.set()
                summary.stopped += [spec.id, *waiting]
                waiting.clear()
            else:
                summary.failed[spec.id] = reason
            if status not in ("DONE", "BUSY"):
                self._tell_skipped(_skip_children(spec.id, waiting, summary, diverged=status == "DIVERGED"))

    def _tell_skipped(self, skipped: Mapping[str, str]) -> None:
        for run_id, parent in skipped.items():
            self._on_change(run_id, "SKIPPED", f"it builds on {parent}")

    def _serve(self) -> None:
        """One slot: freeze a run, give it to the worker, report."""
        worker: Worker | None = None
        while (spec := self._ready.get()[-1]) is not None:
            if self._halt.is_set():
                self._ended.put((spec, "STOPPED", ""))
                continue
            try:
                run = self._store.run(spec.id)
                state = run.state()
                if state.finished or state.status == "RUNNING":  # another launcher's: what it has frozen stays as it is
                    self._ended.put((spec, state.status if state.finished else "BUSY", state.reason))
                    continue
                run.freeze(spec, command=self._command)
                if worker is None:
                    worker = Worker()
                    self._workers.append(worker)
                self._on_change(spec.id, "RUNNING", "")
                status, reason = worker.run(spec, run.path)
            except Exception as error:  # whatever it is, the sweep must hear of it and go on
                status, reason = "FAILED", redact(f"{type(error).__name__}: {error}")
            self._ended.put((spec, status, reason))
        if worker is not None:
            worker.close()


def depths(runs: Mapping[str, RunSpec]) -> dict[str, int]:
    """How many of these runs have to be carried out one after another before each, which come before it here."""
    found: dict[str, int] = {}
    for run_id, spec in runs.items():
        found[run_id] = max((found[parent] + 1 for parent in spec.parents.values() if parent in found), default=0)
    return found


def critical_paths(runs: Mapping[str, RunSpec], expected: Mapping[str, float | None]) -> dict[str, float]:
    """Seconds of the longest chain that begins with each of these runs; one of unknown time counts nothing."""
    found: dict[str, float] = {}
    behind = dict.fromkeys(runs, 0.0)
    for run_id, spec in reversed(list(runs.items())):  # parents come before their children
        found[run_id] = behind[run_id] + (expected.get(run_id) or 0.0)
        for parent in behind.keys() & spec.parents.values():
            behind[parent] = max(behind[parent], found[run_id])
    return found


def unfinished(specs: Sequence[RunSpec], *, store: Store, summary: Summary) -> dict[str, RunSpec]:
    """The runs that are to be carried out, by id. Of the others the records are kept and the summary told."""
    states = {spec.id: store.run(spec.id).state() for spec in specs}
    waiting = {spec.id: spec for spec in specs if not states[spec.id].finished}
    for spec in specs:
        if states[spec.id].finished:
            try:
                store.keep_record(spec)
            except (FileNotFoundError, ValueError) as error:
                summary.failed[spec.id] = f"it is finished and its record is gone ({error}): delete runs/{spec.id}"
        if states[spec.id].status == "DIVERGED":
            summary.diverged.append(spec.id)
            _skip_children(spec.id, waiting, summary, diverged=True)
    return waiting


def _skip_children(
    failed: str, waiting: dict[str, RunSpec], summary: Summary, *, diverged: bool = False
) -> dict[str, str]:
    """Take out of the queue everything that builds on a run without a result to build on; those, and on what they do.

    To have diverged is a result, for those that accept it.
    """
    found: dict[str, str] = {}
    for spec in list(waiting.values()):
        if failed in spec.parents.values() and spec.id in waiting and not (diverged and spec.accepts_diverged):
            del waiting[spec.id]
            found |= {spec.id: failed} | _skip_children(spec.id, waiting, summary)
    summary.skipped |= found
    return found

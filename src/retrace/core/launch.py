"""Carries out planned runs on this machine: a pool of warm workers, each run as soon as what it builds on is there.

A worker that dies takes down its run, which is told, and nothing else. core/workers.py has the processes.
"""

from __future__ import annotations

import queue
import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from retrace.core.plan import RunSpec
from retrace.core.safety import redact
from retrace.core.store import FINISHED, Store
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
    """This machine. `on_change` is called with (id, status, reason) whenever a run starts or ends."""

    def __init__(self, store: Store, *, command: str, on_change: Callable[[str, str, str], None]) -> None:
        self._store = store
        self._command = command
        self._on_change = on_change
        self._halt = threading.Event()  # set on Ctrl-C: nothing new is started
        self._workers: list[Worker] = []

    def run(self, specs: Sequence[RunSpec]) -> Summary:
        """Carry out all runs that are not finished. On Ctrl-C the runs in hand save and stop, then it is raised."""
        summary = Summary()
        waiting = unfinished(specs, store=self._store, summary=summary)
        if not waiting:
            return summary
        slots = min(len(waiting), next(iter(waiting.values())).hardware.slots)
        ready: queue.Queue[RunSpec | None] = queue.Queue()
        ended: queue.Queue[tuple[RunSpec, str, str]] = queue.Queue()
        threads = [threading.Thread(target=self._serve, args=(ready, ended), daemon=True) for _ in range(slots)]
        for thread in threads:
            thread.start()
        interrupted = True
        try:
            self._schedule(waiting, ready, ended, summary)
            interrupted = False
        finally:
            self._halt.set()
            for _ in threads:
                ready.put(None)
            while any(thread.is_alive() for thread in threads):
                for worker in self._workers if interrupted else ():
                    worker.stop()  # more than once: it may just have started a process
                for thread in threads:
                    thread.join(timeout=STOP_SECONDS)
        return summary

    def _schedule(
        self,
        waiting: dict[str, RunSpec],
        ready: queue.Queue[RunSpec | None],
        ended: queue.Queue[tuple[RunSpec, str, str]],
        summary: Summary,
    ) -> None:
        """Hand out runs whose parents are done, until nothing waits and nothing runs.

        A run that somebody else holds is looked at again after `BUSY_SECONDS`, and takes no slot until then.
        """
        needs = {run_id: set(spec.parents.values()) & waiting.keys() for run_id, spec in waiting.items()}
        children: dict[str, list[str]] = {}
        for run_id, parents in needs.items():
            for parent in parents:
                children.setdefault(parent, []).append(run_id)
        todo = deque(waiting.pop(run_id) for run_id, parents in needs.items() if not parents)
        held: deque[tuple[float, RunSpec]] = deque()  # runs of somebody else, and when to look again
        running = 0
        while todo or running or held:
            while held and held[0][0] <= time.monotonic():
                todo.append(held.popleft()[1])
            while todo:
                ready.put(todo.popleft())
                running += 1
            try:
                spec, status, reason = ended.get(timeout=max(0.0, held[0][0] - time.monotonic()) if held else None)
            except queue.Empty:
                continue
            running -= 1
            if status == "BUSY":
                held.append((time.monotonic() + BUSY_SECONDS, spec))
                continue
            self._on_change(spec.id, status, reason)
            if status in FINISHED:
                (summary.done if status == "DONE" else summary.diverged).append(spec.id)
                if status == "DIVERGED":
                    _skip_children(spec.id, waiting, summary, diverged=True)
                for child in children.get(spec.id, ()):
                    needs[child].discard(spec.id)
                    if not needs[child] and child in waiting:
                        todo.append(waiting.pop(child))
            elif status == "STOPPED":
                self._halt.set()
                summary.stopped += [spec.id, *waiting, *(other.id for _, other in held)]
                waiting.clear()
                held.clear()
            else:
                summary.failed[spec.id] = reason
                _skip_children(spec.id, waiting, summary)

    def _serve(self, ready: queue.Queue[RunSpec | None], ended: queue.Queue[tuple[RunSpec, str, str]]) -> None:
        """One slot: freeze a run, give it to the worker, report."""
        worker: Worker | None = None
        while (spec := ready.get()) is not None:
            if self._halt.is_set():
                ended.put((spec, "STOPPED", ""))
                continue
            run = self._store.run(spec.id)
            if run.state().finished:  # by another launcher, for which this one waited
                ended.put((spec, run.state().status, run.state().reason))
                continue
            try:
                run.freeze(spec, command=self._command)
                if worker is None:
                    worker = Worker(threads=spec.hardware.threads)
                    self._workers.append(worker)
                self._on_change(spec.id, "RUNNING", "")
                status, reason = worker.run(spec, run.path)
            except Exception as error:  # whatever it is, the sweep must hear of it and go on
                status, reason = "FAILED", redact(f"{type(error).__name__}: {error}")
            ended.put((spec, status, reason))
        if worker is not None:
            worker.close()


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


def _skip_children(failed: str, waiting: dict[str, RunSpec], summary: Summary, *, diverged: bool = False) -> None:
    """Take out of the queue everything that builds on a run without a result to build on.

    To have diverged is a result, for those that accept it.
    """
    for spec in list(waiting.values()):
        if failed in spec.parents.values() and spec.id in waiting and not (diverged and spec.accepts_diverged):
            del waiting[spec.id]
            summary.skipped[spec.id] = failed
            _skip_children(spec.id, waiting, summary)

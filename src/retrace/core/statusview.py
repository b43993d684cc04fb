"""What `status` prints: each run as the disk and Slurm's queue know it. Layer 0: answers at once on a login node."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from rich.console import Console
from rich.live import Live
from rich.text import Text

from retrace.core import squeue
from retrace.core.cost import makespan
from retrace.core.discovery import papers
from retrace.core.lookup import known_runs, names
from retrace.core.plan import RunSpec, plan
from retrace.core.planview import expected_seconds, shown
from retrace.core.store import State, Store
from retrace.core.units import duration, say


@dataclass(frozen=True)
class Status:
    """`lines` has one for each run, by id; `live` tells whether anything runs or is in the queue."""

    lines: dict[str, str]
    finished: frozenset[str]
    total: str
    live: bool


def print_status(specs: Sequence[RunSpec] | None, *, store: Store, console: Console) -> None:
    """Each run's state, reasons in full, and counts; all runs on disk where `specs` is None."""
    _print(look(specs, store=store), console)


def watch(specs: Sequence[RunSpec] | None, *, store: Store, console: Console, every: float) -> None:
    """The runs that are not finished, looked at every so many seconds until nothing goes on; then all, as they are.

    Nothing goes on where nothing did at two looks: between two runs of a sweep there may be none for a moment.
    Into a pipe a line comes when it has changed.
    """
    printed: dict[str, str] = {}
    screen = Live(console=console, auto_refresh=False, transient=True) if console.is_terminal else None
    before = False
    with screen or contextlib.nullcontext():
        while (status := look(specs, store=store)).live or before:
            before = status.live
            open_lines = [line for run_id, line in status.lines.items() if run_id not in status.finished]
            if screen is not None:
                screen.update(Text("\n".join([*open_lines[: console.height - 3], status.total])), refresh=True)
            else:
                for run_id, line in status.lines.items():
                    if printed.get(run_id) != line:
                        say(console, line)
                printed = status.lines
            time.sleep(every)
    _print(status, console)


def look(specs: Sequence[RunSpec] | None, *, store: Store) -> Status:
    """Everything that disk and queue say at this moment."""
    if specs is None:
        labels = {run.id: run.label for run in known_runs(store)}
    else:
        labels = {spec.id: spec.labels[0] for spec in specs}
    jobs = squeue.queue()
    counts: dict[str, int] = {}
    lines: dict[str, str] = {}
    finished: set[str] = set()
    left: dict[str, State] = {}
    live = False
    for run_id, label in labels.items():
        run = store.run(run_id)
        state = run.state()
        counts[state.status] = counts.get(state.status, 0) + 1
        place = ""
        if state.finished:
            finished.add(run_id)
        else:
            left[run_id] = state
            place = squeue.where(run, jobs)
            live = live or state.status == "RUNNING" or squeue.queued(run, jobs or {}) is not None
        lines[run_id] = (
            f"{shown(state):<22} {run_id}  {label}  {' '.join(filter(None, (place, state.reason)))}".rstrip()
        )
    total = ", ".join(f"{count} {status}" for status, count in sorted(counts.items()))
    text = f"{len(labels)} runs: {total}{_eta(specs, left, store=store)}"
    return Status(lines, frozenset(finished), text if labels else _NO_RUNS, live)


_NO_RUNS = "no runs yet; start with `retrace run PAPER`"


def _eta(specs: Sequence[RunSpec] | None, left: Mapping[str, State], *, store: Store) -> str:
    """What is left of all of them, where the speed of every one is known. `left`: how far those are."""
    todo = [spec for spec in specs or () if spec.id in left]
    if not todo:
        return ""
    expected = expected_seconds(todo, store=store)
    hardware = todo[0].hardware
    wall = makespan([_seconds_left(left[spec.id], expected[spec.id]) for spec in todo], hardware.slots)
    waiting = " without the time in the queue" if hardware.slurm else ""
    return f"; ETA {duration(wall)}{waiting}" if wall is not None else ""


def _seconds_left(state: State, expected: float | None) -> float | None:
    """By its own account while it runs; else of what such a run takes, the share that it has not done."""
    if state.status == "RUNNING" and state.seconds_left is not None:
        return state.seconds_left
    return None if expected is None else expected * (1 - state.step / max(1, state.total))


def named_runs(words: Sequence[str], *, store: Store) -> dict[str, str]:
    """Runs that a command line names, by id, with a label each: targets with overrides, ids or starts of ids, labels.

    A word that begins with a paper's name and a slash, or is one, is a target: its overrides choose among its runs.
    Raises ValueError for a word that names nothing, and for overrides without a target that they could be of.
    """
    overrides = [word for word in words if "=" in word and "/" not in word.partition("=")[0]]  # or it is a label
    asked = [word for word in words if word not in overrides]
    if not asked:
        raise ValueError("no run named: give ids of runs, labels as `retrace status` shows them, or targets")
    targets = [word for word in asked if word.split("/")[0] in papers()]
    if overrides and not targets:
        raise ValueError(
            f"{' '.join(overrides)}: chooses among the runs of a target, and {asked[0]} is none: leave it out"
        )
    known = known_runs(store)
    found: dict[str, str] = {}
    for word in asked:
        named = {run.id: run.label for run in known if word not in targets and names(word, run)}
        found |= named or {spec.id: spec.labels[0] for spec in plan([word], overrides)}
    return found


def _print(status: Status, console: Console) -> None:
    if status.lines:
        say(console, "\n".join(status.lines.values()))
    say(console, status.total)

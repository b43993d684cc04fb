"""What `run` does with planned runs, and what it says of them: here, or in Slurm's queue."""

from __future__ import annotations

from collections.abc import Sequence

from rich.console import Console

from retrace.core import planview
from retrace.core.launch import Local
from retrace.core.plan import RunSpec
from retrace.core.progress import SweepProgress
from retrace.core.store import Store
from retrace.core.units import duration, say


def submit(specs: Sequence[RunSpec], *, command: str, allow_dirty: bool, console: Console) -> int:
    """Put runs into Slurm's queue; exit code 0, or 1 when some can't be tried."""
    from retrace.core.slurm import Slurm  # with submitit, which only this needs

    summary = Slurm(Store(), command=command, allow_dirty=allow_dirty).run(specs)
    jobs = list(dict.fromkeys(summary.queued.values()))
    finished = len(specs) - len(summary.queued) - len(summary.skipped) - len(summary.failed)
    counts = f"{len(specs)} runs: {finished} finished before, {len(summary.queued)} in the queue"
    counts += (
        f" as {len(jobs)} jobs, {jobs[0]} to {jobs[-1]}" if len(jobs) > 1 else f" as job {jobs[0]}" if jobs else ""
    )
    counts += f", {len(summary.skipped)} not tried because they build on diverged ones" if summary.skipped else ""
    say(console, counts)
    for run_id, reason in summary.failed.items():
        say(console, f"  {run_id}: {reason}")
    if jobs:
        console.print("follow them with `retrace status --watch`, stop them with `retrace cancel`", highlight=False)
    return 1 if summary.skipped or summary.failed else 0


def _tell_replaced(specs: Sequence[RunSpec], *, store: Store, console: Console) -> None:
    """Say it before records of another machine, or of an earlier day, are made again here."""
    recorded = [spec for spec in specs if store.record_path(spec.paper, spec.id).is_file()]
    count = sum(not store.run(spec.id).state().finished for spec in recorded)
    if count:
        say(console, f"{count} of {len(specs)} runs have a record made elsewhere: what comes out here takes its place")


def sweep(specs: Sequence[RunSpec], *, command: str, console: Console) -> int:
    """Carry out runs on this machine; exit code 0, 1 when some failed or were stopped, 130 after Ctrl-C."""
    store = Store()
    _tell_replaced(specs, store=store, console=console)
    expected = planview.expected_seconds(specs, store=store)
    with SweepProgress(specs, store=store, console=console, expected=expected) as progress:
        try:
            launcher = Local(store, command=command, on_change=progress.on_change, expected=expected)
            summary = launcher.run(specs)
        except KeyboardInterrupt:
            console.print("stopped; every run keeps its last checkpoint, and the same command goes on from there")
            return 130
    finished = len(specs) - len(summary.failed) - len(summary.skipped) - len(summary.stopped)
    counts = f"{finished} of {len(specs)} runs finished"
    counts += f", {len(summary.diverged)} of them diverged" if summary.diverged else ""
    counts += f", {len(summary.stopped)} stopped (the same command goes on)" if summary.stopped else ""
    counts += f", {len(summary.failed)} failed" if summary.failed else ""
    counts += f", {len(summary.skipped)} not tried because they build on those" if summary.skipped else ""
    say(console, f"{counts}; {duration(progress.seconds)} here")
    for run_id, reason in summary.failed.items():
        say(console, f"  {run_id}: {reason}")
    return 1 if summary.failed or summary.stopped else 0

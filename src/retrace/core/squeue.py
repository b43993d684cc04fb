"""What Slurm's queue says of runs, through its own commands: squeue and scancel.

The jobs that were submitted for a run stand in runs/<id>/slurm.json, so any login node that sees the store can tell.
"""

from __future__ import annotations

import os
import secrets
import shutil
import subprocess
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

from retrace.core.files import read_json, write_json
from retrace.core.store import RunDir, Store

JOB_NAME = "retrace-"  # and a random token: another cluster, or one set up anew, gives the same ids to other jobs
FORGOTTEN = timedelta(days=30)  # since it was submitted, a job that this queue does not know is in no other either
NUM_NAMED = 3  # runs that share a cancelled job, before the rest are only counted
_ENDED = (
    "COMPLETED", "CANCELLED", "FAILED", "TIMEOUT", "NODE_FAIL", "PREEMPTED", "BOOT_FAIL", "DEADLINE", "OUT_OF_MEMORY",
    "REVOKED",
)  # fmt: skip
_COLUMNS = {"Name": 20, "JobArrayID": 40, "State": 20, "RestartCnt": 8, "NodeList": 60, "Reason": 60}


@dataclass(frozen=True)
class QueuedJob:
    """A job as squeue shows it. `state`: PENDING, RUNNING, COMPLETING, ..."""

    id: str
    state: str
    restarts: int
    nodes: str
    reason: str
    name: str

    def describe(self) -> str:
        """'job 12_3 running on n1', 'job 12_3 requeued (BeginTime)', 'job 12_3 pending (Priority)'."""
        if self.state != "PENDING":
            return f"job {self.id} {self.state.lower()} on {self.nodes}"
        why = f" ({self.reason})" if self.reason not in ("", "None") else ""
        return f"job {self.id} {'requeued' if self.restarts else 'pending'}{why}"


Queue = Mapping[str, QueuedJob]  # by id


@dataclass(frozen=True)
class Submitted:
    """A job that was asked to carry out a run. `logs` is the folder of its output."""

    id: str
    logs: Path


def new_name() -> str:
    """A job name that no other has."""
    return JOB_NAME + secrets.token_hex(4)


def queue() -> Queue | None:
    """The user's jobs of Retrace in the queue, by id; None where there is no Slurm or it does not answer."""
    if shutil.which("squeue") is None:
        return None
    columns = ",".join(f"{name}:{width}" for name, width in _COLUMNS.items())
    command = ["squeue", "--noheader", "--array", "--states=all", f"--user={os.getuid()}", f"--Format={columns}"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=60)
    except subprocess.TimeoutExpired:
        return None
    if done.returncode:
        return None
    jobs = [_read(line) for line in done.stdout.splitlines() if line.startswith(JOB_NAME)]
    return {job.id: job for job in jobs if job.state not in _ENDED}


def runs(job: str) -> bool:
    """Whether a job runs: it does in the grace of a preemption, and does not once `scancel` or its limit ends it."""
    try:
        done = subprocess.run(["squeue", "-h", "-j", job, "-o", "%T"], capture_output=True, text=True, timeout=60)
    except (OSError, subprocess.TimeoutExpired):
        return False
    return done.stdout.split() == ["RUNNING"]


def _read(line: str) -> QueuedJob:
    cells, start = [], 0
    for width in _COLUMNS.values():
        cells.append(line[start : start + width].strip())
        start += width
    name, job, state, restarts, nodes, reason = cells
    return QueuedJob(job, state, int(restarts or 0), nodes, reason, name)


def note(run: RunDir, *, job: str, name: str, logs: Path, snapshot: Path) -> None:
    """Keep a job's id and name beside the run."""
    now = datetime.now(UTC).isoformat(timespec="seconds")
    entry = {"job": job, "name": name, "submitted": now, "logs": str(logs), "snapshot": str(snapshot)}
    write_json(run.path / "slurm.json", [*_noted(run), entry])


def submitted(run: RunDir) -> Submitted | None:
    """The last job that was submitted for a run, or None."""
    entries = _noted(run)
    return Submitted(entries[-1]["job"], Path(entries[-1]["logs"])) if entries else None


def queued(run: RunDir, jobs: Queue) -> QueuedJob | None:
    """The job in the queue that carries out a run, or will, the newest of several; None where there is none."""
    return next(iter(_all_queued(run, jobs)), None)


def _all_queued(run: RunDir, jobs: Queue) -> list[QueuedJob]:
    """The jobs of a run that are in the queue, the newest first."""
    return [jobs[entry["job"]] for entry in reversed(_noted(run)) if _is_queued(entry, jobs)]


def _is_queued(entry: Mapping[str, Any], jobs: Queue) -> bool:
    """Whether the queue has the job that was noted, and not another of the same id."""
    job = jobs.get(entry["job"])
    return job is not None and job.name == entry.get("name")


def noted_runs(store: Store) -> list[RunDir]:
    """Every run that a job was submitted for."""
    return [RunDir(path.parent) for path in store.runs.glob("*/slurm.json")]


def needed_snapshots(runs: Iterable[RunDir], jobs: Queue) -> set[Path]:
    """The copies of the code that jobs import from, or will; those too that may be in another cluster's queue."""
    return {
        Path(entry["snapshot"])
        for run in runs
        for entry in _noted(run)
        if _is_queued(entry, jobs) or (_is_recent(entry) and not run.state().finished)
    }


def _is_recent(entry: Mapping[str, Any]) -> bool:
    """Whether a job may still be in some queue, by when it was submitted."""
    return datetime.now(UTC) - datetime.fromisoformat(entry["submitted"]) < FORGOTTEN


def _noted(run: RunDir) -> list[dict[str, Any]]:
    found = read_json(run.path / "slurm.json")
    return found if isinstance(found, list) else []


def where(run: RunDir, jobs: Queue | None) -> str:
    """What the queue says of a run that is not finished; "" where it was never submitted."""
    last = submitted(run)
    if last is None:
        return ""
    if jobs is None:
        return f"job {last.id} (this machine can't ask Slurm)"
    if job := queued(run, jobs):
        return job.describe()
    return f"job {last.id} has ended without a result, see {last.logs}/{last.id}_0_log.out; `retrace run` goes on"


def cancel(runs: Sequence[RunDir], *, store: Store) -> dict[str, str]:
    """Take the jobs of runs out of the queue; what was done, by run id. A run that goes on saves and stops.

    What else a job of several runs held, and has not finished, is told. Raises ValueError where Slurm can't be asked.
    """
    jobs = queue()
    if jobs is None:
        raise ValueError("cancel: this machine can't ask Slurm (squeue fails or is missing); use a login node")
    asked_for = {run.id for run in runs}
    others: dict[str, list[RunDir]] = {}  # by job
    for other in noted_runs(store):
        for job in _all_queued(other, jobs) if other.id not in asked_for else ():
            others.setdefault(job.id, []).append(other)
    told: dict[str, str] = {}
    done: dict[str, str] = {}  # a job of several runs is cancelled once
    for run in runs:
        found = _all_queued(run, jobs)
        for job in found:
            if job.id not in done:
                done[job.id] = _cancel(job, others=others.get(job.id, ()))
        told[run.id] = "; ".join(done[job.id] for job in found) or "has no job in the queue"
    return told


def _cancel(job: QueuedJob, *, others: Iterable[RunDir]) -> str:
    """What was done. `others` are runs that nobody has asked to cancel."""
    asked = subprocess.run(["scancel", job.id], capture_output=True, text=True)
    if asked.returncode:
        return f"job {job.id} not cancelled: {asked.stderr.strip()}"
    told = f"job {job.id} cancelled, it was {job.state.lower()}"
    held = sorted(run.id for run in others if not run.state().finished)
    if held:
        named = ", ".join(held[:NUM_NAMED]) + (", ..." if len(held) > NUM_NAMED else "")
        told += f"; it also held {len(held)} other run{'s' if len(held) > 1 else ''}: {named}"
    return told

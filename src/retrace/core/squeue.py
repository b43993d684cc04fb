"""What Slurm's queue says of runs, through its own commands: squeue and scancel.

The jobs that were submitted for a run stand in runs/<id>/slurm.json, so any login node that sees the store can tell.
"""

from __future__ import annotations

import shutil
import subprocess
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from retrace.core.files import read_json, write_json
from retrace.core.store import RunDir

JOB_NAME = "retrace"
_ENDED = (
    "COMPLETED", "CANCELLED", "FAILED", "TIMEOUT", "NODE_FAIL", "PREEMPTED", "BOOT_FAIL", "DEADLINE", "OUT_OF_MEMORY",
    "REVOKED",
)  # fmt: skip
_COLUMNS = {"JobArrayID": 40, "State": 20, "RestartCnt": 8, "NodeList": 60, "Reason": 60}


@dataclass(frozen=True)
class QueuedJob:
    """A job as squeue shows it. `state`: PENDING, RUNNING, COMPLETING, ..."""

    id: str
    state: str
    restarts: int
    nodes: str
    reason: str

    def describe(self) -> str:
        """'job 12_3 running on n1', 'job 12_3 requeued (BeginTime)', 'job 12_3 pending (Priority)'."""
        if self.state != "PENDING":
            return f"job {self.id} {self.state.lower()} on {self.nodes}"
        why = f" ({self.reason})" if self.reason not in ("", "None") else ""
        return f"job {self.id} {'requeued' if self.restarts else 'pending'}{why}"


@dataclass(frozen=True)
class Submitted:
    """A job that was asked to carry out a run. `logs` is the folder of its output."""

    id: str
    logs: Path


def queue() -> dict[str, QueuedJob] | None:
    """The jobs that Retrace has in the queue, by id; None where there is no Slurm or it does not answer."""
    if shutil.which("squeue") is None:
        return None
    columns = ",".join(f"{name}:{width}" for name, width in _COLUMNS.items())
    command = ["squeue", "--noheader", "--array", "--states=all", f"--name={JOB_NAME}", f"--Format={columns}"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=60)
    except subprocess.TimeoutExpired:
        return None
    if done.returncode:
        return None
    jobs = map(_read, done.stdout.splitlines())
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
    job, state, restarts, nodes, reason = cells
    return QueuedJob(job, state, int(restarts or 0), nodes, reason)


def note(run: RunDir, *, job: str, logs: Path, snapshot: Path) -> None:
    """Keep a job's id beside the run."""
    now = datetime.now(UTC).isoformat(timespec="seconds")
    entry = {"job": job, "submitted": now, "logs": str(logs), "snapshot": str(snapshot)}
    write_json(run.path / "slurm.json", [*_noted(run), entry])


def submitted(run: RunDir) -> Submitted | None:
    """The last job that was submitted for a run, or None."""
    entries = _noted(run)
    return Submitted(entries[-1]["job"], Path(entries[-1]["logs"])) if entries else None


def needed_snapshots(runs: Iterable[RunDir], jobs: Mapping[str, QueuedJob]) -> set[Path]:
    """The copies of the code that jobs in the queue import from, or will."""
    return {Path(entry["snapshot"]) for run in runs for entry in _noted(run) if entry["job"] in jobs}


def _noted(run: RunDir) -> list[dict[str, Any]]:
    found = read_json(run.path / "slurm.json")
    return found if isinstance(found, list) else []


def where(run: RunDir, jobs: Mapping[str, QueuedJob] | None) -> str:
    """What the queue says of a run that is not finished; "" where it was never submitted."""
    last = submitted(run)
    if last is None:
        return ""
    if jobs is None:
        return f"job {last.id} (this machine can't ask Slurm)"
    if last.id in jobs:
        return jobs[last.id].describe()
    return f"job {last.id} has ended without a result, see {last.logs}/{last.id}_0_log.out; `retrace run` goes on"


def cancel(runs: Iterable[RunDir]) -> dict[str, str]:
    """Take the jobs of runs out of the queue; what was done, by run id. A run that goes on saves and stops.

    Raises ValueError where Slurm can't be asked.
    """
    jobs = queue()
    if jobs is None:
        raise ValueError("cancel: this machine can't ask Slurm (squeue fails or is missing); use a login node")
    told: dict[str, str] = {}
    done: dict[str, str] = {}  # a job of several runs is cancelled once
    for run in runs:
        last = submitted(run)
        if last is None or last.id not in jobs:
            told[run.id] = "has no job in the queue"
            continue
        if last.id not in done:
            asked = subprocess.run(["scancel", last.id], capture_output=True, text=True)
            state = jobs[last.id].state.lower()
            done[last.id] = f"job {last.id} cancelled, it was {state}"
            if asked.returncode:
                done[last.id] = f"job {last.id} not cancelled: {asked.stderr.strip()}"
        told[run.id] = done[last.id]
    return told

"""What a Slurm job does on its nodes, in each of its tasks; core/slurm.py submits it. submitit calls and requeues it.

A job looks at the disk first: a finished run is left alone, one whose parent has no result says so and ends. On
submitit's signal (USR2: before the time limit, or at a preemption) the run saves and stops, and the job puts itself
back into the queue. So it does where a preemption sends no more than SIGTERM, which reaches the run and not the job:
Slurm requeues what it had to kill alone.
"""

from __future__ import annotations

import os
import signal
import threading
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from submitit import JobEnvironment
from submitit.helpers import DelayedSubmission, TorchDistributedEnvironment

from retrace.core import squeue
from retrace.core.config import Hardware
from retrace.core.launch import BUSY_SECONDS
from retrace.core.lease import LEASE_SECONDS
from retrace.core.safety import redact
from retrace.core.store import RunDir, Store
from retrace.core.workers import Worker

POLL_SECONDS = 0.2


class Job:
    """What a job calls, in each of its tasks: some runs, one after another, on the hardware that it asked for.

    The work is a thread's, so that the main one is free for the signal; `patience` is how many seconds the signal waits
    for a run to save before the job is requeued all the same.
    """

    def __init__(self, home: str, runs: Sequence[str], *, hardware: Hardware, patience: float) -> None:
        self.home, self.runs, self.hardware, self.patience = home, list(runs), hardware, patience

    def __call__(self) -> dict[str, str]:
        """The status of each run by id; raises RuntimeError, so that Slurm sees it, when one has failed."""
        self.stopping = False
        self.worker: Worker | None = None
        self.statuses: dict[str, str] = {}
        self.failed: list[str] = []
        self.thread = threading.Thread(target=self._work, daemon=True)
        self.thread.start()
        while self.thread.is_alive():  # without a lock that the signal's handler might find taken
            time.sleep(POLL_SECONDS)
        if "STOPPED" in self.statuses.values() and not self.stopping and squeue.runs(os.environ["SLURM_JOB_ID"]):
            signal.raise_signal(getattr(signal, f"SIG{JobEnvironment.USR_SIG}"))  # submitit requeues, in the first task
        if self.failed and not self.stopping:
            raise RuntimeError("; ".join(self.failed))
        return self.statuses

    def checkpoint(self) -> DelayedSubmission:
        """submitit calls it in the first task, at the signal; what it returns is what the requeued job calls."""
        self.stopping = True
        began = time.monotonic()
        while self.thread.is_alive() and time.monotonic() - began < self.patience:
            if self.worker is not None:
                self.worker.stop()
            time.sleep(POLL_SECONDS)
        if all(RunDir(Path(self.home) / "runs" / run_id).state().finished for run_id in self.runs):
            raise SystemExit(0)  # the signal came just as the last run ended: nothing is left to requeue for
        return DelayedSubmission(Job(self.home, self.runs, hardware=self.hardware, patience=self.patience))

    def _work(self) -> None:
        store = Store(Path(self.home))
        for run_id in self.runs:
            if self.stopping:
                break
            try:
                status, reason = self._run(store.run(run_id), store)
            except Exception as error:  # the runs after it must have their turn
                status, reason = "FAILED", redact(f"{type(error).__name__}: {error}")
            self.statuses[run_id] = status
            if status in ("FAILED", "BUSY"):
                self.failed.append(f"{run_id}: {reason}")
            print(f"{run_id}: {status} {reason}".rstrip(), flush=True)
            if status == "STOPPED":
                break
        if self.worker is not None:
            self.worker.close()

    def _run(self, run: RunDir, store: Store) -> tuple[str, str]:
        """(status, reason) of one run, as far as this task is concerned."""
        state = run.state()
        if state.finished:
            return state.status, state.reason
        spec, _ = run.load()
        for parent in spec.parents.values():
            found = store.run(parent).state().status
            if found != "DONE" and not (found == "DIVERGED" and spec.accepts_diverged):
                return "FAILED", f"it builds on {parent}, which is {found} and has no result; `retrace run` tries again"
        if self.worker is None:
            self.worker = Worker(task=_task())
        began = time.monotonic()
        while True:
            status, reason = self._begin(run, self.worker)
            if status != "BUSY" or self.stopping or time.monotonic() - began > LEASE_SECONDS + 30:
                return status, reason
            time.sleep(BUSY_SECONDS)  # a dead node's lease runs out; somebody alive may end the run

    def _begin(self, run: RunDir, worker: Worker) -> tuple[str, str]:
        """A run on the hardware of this job, frozen so where somebody began it elsewhere and does not go on."""
        spec, command = run.load()
        if spec.hardware != self.hardware:
            if holder := run.holder():
                return "BUSY", f"{run.id} is being run by {holder}"
            spec = replace(spec, hardware=self.hardware)
            run.freeze(spec, command=command)
        return worker.run(spec, run.path)


def _task() -> dict[str, str] | None:
    """What torch must know to find the other tasks of the job, None where there are none.

    submitit derives it from Slurm's variables, so no other launcher is needed on any node; the
    signal then reaches every process itself.
    """
    found = TorchDistributedEnvironment()
    if found.world_size == 1:
        return None
    variables = {"RANK": found.rank, "WORLD_SIZE": found.world_size, "LOCAL_RANK": found.local_rank}
    variables |= {"LOCAL_WORLD_SIZE": found.local_world_size, "MASTER_ADDR": found.master_addr}
    variables |= {"MASTER_PORT": found.master_port}
    return {name: str(value) for name, value in variables.items()}

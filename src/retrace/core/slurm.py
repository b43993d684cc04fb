"""Carries out planned runs as Slurm jobs, through submitit; the only file that imports it.

Runs are frozen and the code is copied (core/snapshot.py) when they are submitted. They go as arrays, one for each depth
of what builds on what, each waiting until the one before it has ended in whatever way. A job looks at the disk first:
a finished run is left alone, one whose parent has no result says so and ends. On submitit's signal (USR2: before the
time limit, or at a preemption) the run saves and stops, and the job puts itself back into the queue. So it does where a
preemption sends no more than SIGTERM, which reaches the run and not the job: Slurm requeues what it had to kill alone.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import shlex
import signal
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from submitit import JobEnvironment, SlurmExecutor
from submitit.core.utils import FailedJobError, FailedSubmissionError
from submitit.helpers import DelayedSubmission, TorchDistributedEnvironment

from retrace.core import snapshot, squeue
from retrace.core.config import Hardware, SlurmJobs
from retrace.core.launch import BUSY_SECONDS, Summary, depths, unfinished
from retrace.core.lease import LEASE_SECONDS, NO_LOCKS
from retrace.core.plan import RunSpec
from retrace.core.safety import own_folder, redact
from retrace.core.store import RunDir, Store
from retrace.core.workers import Worker

MAX_ARRAY = 1000  # Slurm's own default; what is more goes into a second array, after the first
POLL_SECONDS = 0.2
GPU_OPTIONS = {"gres", "gpus", "gpus-per-node", "gpus-per-task", "tres-per-task"}  # in `extra`, they replace ours


class Slurm:
    """The cluster that this login node belongs to. `run` returns as soon as all jobs are in the queue."""

    def __init__(self, store: Store, *, command: str, allow_dirty: bool = False) -> None:
        self._store = store
        self._command = command
        self._allow_dirty = allow_dirty
        self._logs = (store.runs / ".slurm").absolute()

    def run(self, specs: Sequence[RunSpec]) -> Summary:
        """Submit all runs that are neither finished nor in the queue, and that nobody carries out elsewhere.

        Raises ValueError where Slurm does not answer, refuses or would misread the path of its logs, and where the code
        is not committed.
        """
        if "%" in str(self._logs):
            raise ValueError(
                f"RETRACE_HOME={self._logs.parents[1]}: Slurm reads % in the path of its logs as a code of its own; "
                "expected a path without one: set RETRACE_HOME to it"
            )
        own_folder(self._logs)
        with _one_at_a_time(self._logs):
            return self._submit_new(specs)

    def _submit_new(self, specs: Sequence[RunSpec]) -> Summary:
        """What `run` does once no other launcher is at it."""
        summary = Summary()
        waiting = unfinished(specs, store=self._store, summary=summary)
        jobs = squeue.queue()
        if jobs is None:
            raise ValueError("squeue: Slurm does not answer here; try `sinfo`, or run with hardware=cpu or gpu1")
        new = self._new(waiting, jobs, summary)
        if not new:
            return summary
        papers = sorted({spec.paper for spec in specs})
        code = snapshot.take(self._store, papers=papers, allow_dirty=self._allow_dirty).absolute()
        for spec in new.values():
            self._store.run(spec.id).freeze(spec, command=self._command)
        arrays: list[str] = []  # each waits for those before it
        for group in _by_depth(new, waiting):
            parents = {parent for spec in group for parent in spec.parents.values()}
            after = [*arrays, *sorted({summary.queued[p] for p in parents if p in summary.queued and p not in new})]
            arrays.append(self._submit(group, after=after, code=code, summary=summary))
        submitted = squeue.noted_runs(self._store)
        snapshot.prune(self._store, needed={code, *squeue.needed_snapshots(submitted, jobs)})
        return summary

    def _new(self, waiting: Mapping[str, RunSpec], jobs: squeue.Queue, summary: Summary) -> dict[str, RunSpec]:
        """The runs to submit. Of those that are in the queue or held elsewhere, and what builds on these, it tells."""
        held: dict[str, str] = {}
        for run_id, spec in waiting.items():
            run = self._store.run(run_id)
            parent = next((parent for parent in spec.parents.values() if parent in held), None)
            if job := squeue.queued(run, jobs):
                summary.queued[run_id] = job.id
            elif holder := run.holder():  # what it has frozen stays as it is
                held[run_id] = f"is running on {holder} already, as no job of this queue: run again when it has ended"
            elif parent is not None:
                held[run_id] = f"builds on {parent}, which is not in the queue: run again when that has ended"
        summary.failed |= held
        left_alone = {*summary.queued, *held}
        return {run_id: spec for run_id, spec in waiting.items() if run_id not in left_alone}

    def _submit(self, specs: Sequence[RunSpec], *, after: Sequence[str], code: Path, summary: Summary) -> str:
        """One array; returns its id."""
        asked = specs[0].hardware.slurm
        assert asked is not None
        name = squeue.new_name()
        executor = SlurmExecutor(folder=self._logs, max_num_timeout=asked.max_requeues)
        executor.update_parameters(job_name=name, **_options(specs[0], asked, after=after))
        executor.update_parameters(setup=[_only_ours(self._logs), *asked.setup, *self._environment(code)])
        packs = [specs[i : i + asked.runs_per_job] for i in range(0, len(specs), asked.runs_per_job)]
        home = str(self._store.runs.parent.absolute())
        os.environ.pop("SBATCH_JOB_NAME", None)  # it would take the place of ours
        try:
            with executor.batch():
                jobs = [
                    executor.submit(
                        Job(
                            home,
                            [spec.id for spec in pack],
                            hardware=specs[0].hardware,
                            patience=0.8 * asked.signal_seconds,
                        )
                    )
                    for pack in packs
                ]
        except (FailedJobError, FailedSubmissionError) as error:
            reason = " ".join(str(error).split()) or "it gave no reason"
            raise ValueError(f"sbatch refused the jobs of hardware={specs[0].hardware.name}: {reason}") from None
        for job, pack in zip(jobs, packs, strict=True):
            for spec in pack:
                run = self._store.run(spec.id)
                squeue.note(run, job=job.job_id, name=name, logs=self._logs, snapshot=code)
                summary.queued[spec.id] = job.job_id
        return str(jobs[0].job_id).partition("_")[0]

    def _environment(self, code: Path) -> list[str]:
        """Shell lines, after the user's own, that make a job import and read the snapshot."""
        variables = {
            "RETRACE_HOME": self._store.runs.parent.absolute(),
            "RETRACE_CONFIGS": code / "configs",
            "PYTHONSAFEPATH": "1",  # or the folder of submission would come before the snapshot
        }
        lines = [f"export {name}={shlex.quote(str(value))}" for name, value in variables.items()]
        source = shlex.quote(str(code / "src"))
        return [*lines, f'export PYTHONPATH={source}"${{PYTHONPATH:+:$PYTHONPATH}}"']


@contextlib.contextmanager
def _one_at_a_time(folder: Path) -> Iterator[None]:
    """Wait for other launchers: two that look at the queue and then submit would submit each run twice."""
    with open(folder / "lock", "w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX)
        except OSError as error:
            if error.errno not in NO_LOCKS:  # a disk without locks does without
                raise
        yield


def _only_ours(folder: Path) -> str:
    """A shell line that ends a job before it reads a folder that somebody else could have written in.

    submitit unpickles there what it was given at submission: ids of runs, their hardware, when to give up waiting.
    """
    name = shlex.quote(str(folder))
    wrong = shlex.quote(f"{folder}: others can write in it, and a job trusts what it finds there: chmod 700, run again")
    return f'[ -O {name} ] && [ "$(stat -c %a {name})" = 700 ] || {{ echo {wrong} >&2; exit 1; }}'


def _by_depth(new: Mapping[str, RunSpec], waiting: Mapping[str, RunSpec]) -> Iterator[list[RunSpec]]:
    """Runs in arrays: what nothing has to wait for, then what builds on that, ...; of one kind of hardware each."""
    depth = depths(waiting)
    groups: dict[tuple[int, str], list[RunSpec]] = {}
    for run_id, spec in new.items():
        groups.setdefault((depth[run_id], spec.hardware.model_dump_json()), []).append(spec)
    for _, group in sorted(groups.items(), key=lambda item: item[0]):
        size = MAX_ARRAY * (group[0].hardware.slurm.runs_per_job if group[0].hardware.slurm else 1)
        yield from (group[i : i + size] for i in range(0, len(group), size))


def _options(spec: RunSpec, asked: SlurmJobs, *, after: Sequence[str]) -> dict[str, Any]:
    """submitit's parameters of a job: one Slurm task for each process of the run."""
    hardware = spec.hardware
    tasks = hardware.processes // asked.nodes
    extra = {key: value or True for key, _, value in (text.removeprefix("--").partition("=") for text in asked.extra)}
    options: dict[str, Any] = {
        "partition": asked.partition,
        "account": asked.account,
        "qos": asked.qos,
        "time": asked.minutes,
        "nodes": asked.nodes,
        "ntasks_per_node": tasks,
        "cpus_per_task": hardware.threads,
        "gpus_per_node": tasks if hardware.device == "cuda" and not GPU_OPTIONS & set(extra) else None,
        "mem": f"{asked.memory_gb * 1024:.0f}M" if asked.memory_gb else None,
        "signal_delay_s": asked.signal_seconds,
        "array_parallelism": asked.array_parallelism,
        "dependency": "afterany:" + ":".join(after) if after else None,
        # srun takes CPUs from its own option only (since Slurm 22.05), and must not wait for the others of a dead task
        "srun_args": [f"--cpus-per-task={hardware.threads}", "--kill-on-bad-exit=1"],
        "additional_parameters": {"requeue": True, **extra},
    }
    return {name: value for name, value in options.items() if value is not None}


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

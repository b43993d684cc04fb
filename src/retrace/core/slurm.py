"""Submits planned runs as Slurm jobs, through submitit.

Runs are frozen and the code is copied (core/snapshot.py) when they are submitted. They go as arrays, one for each depth
of what builds on what, each waiting until the one before it has ended in whatever way. core/slurmjob.py is what runs.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import shlex
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from submitit import SlurmExecutor
from submitit.core.utils import FailedJobError, FailedSubmissionError

from retrace.core import snapshot, squeue
from retrace.core.config import SlurmJobs
from retrace.core.launch import Summary, depths, unfinished
from retrace.core.lease import NO_LOCKS
from retrace.core.plan import RunSpec
from retrace.core.safety import own_folder
from retrace.core.slurmjob import Job
from retrace.core.store import Store

MAX_ARRAY = 1000  # Slurm's own default; what is more goes into a second array, after the first
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

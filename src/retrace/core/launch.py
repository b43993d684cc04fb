"""Carries out planned runs on this machine: a pool of warm workers, each run as soon as what it builds on is there.

One process pays the imports once and then runs whatever comes; a run of several processes gets its own
`accelerate launch`. A worker that dies takes down its run, which is told, and nothing else.
"""

from __future__ import annotations

import json
import os
import queue
import re
import subprocess
import sys
import threading
import time
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from graphlib import TopologicalSorter
from pathlib import Path
from subprocess import PIPE

from retrace.core.memory import what_to_lower
from retrace.core.plan import RunSpec
from retrace.core.safety import redact
from retrace.core.store import FINISHED, RunDir, Store

BUSY_SECONDS = 2.0  # between two looks at a run that somebody else holds
DRAIN_SECONDS = 5.0  # for the last words of a process that has ended


@dataclass
class Summary:
    """What became of each run of a sweep, by id."""

    done: list[str] = field(default_factory=list)
    diverged: list[str] = field(default_factory=list)
    failed: dict[str, str] = field(default_factory=dict)  # id -> first line of why
    skipped: dict[str, str] = field(default_factory=dict)  # id -> the failed run that it builds on
    stopped: list[str] = field(default_factory=list)
    queued: dict[str, str] = field(default_factory=dict)  # id -> the job that will run it


class Worker:
    """A process that runs one run at a time; started again when it has died.

    In a `task` of a job, somebody else has started the other processes of the run, and `task` is what torch's
    `env://` needs to find them: RANK, WORLD_SIZE, MASTER_ADDR, ...
    """

    def __init__(self, *, threads: int, task: Mapping[str, str] | None = None) -> None:
        self._task = task
        self._environment = {**os.environ, "OMP_NUM_THREADS": str(threads), "MKL_NUM_THREADS": str(threads)}
        self._environment |= {"TOKENIZERS_PARALLELISM": "false", "TQDM_DISABLE": "1", "PYTHONUNBUFFERED": "1"}
        self._environment |= task or {}
        self._process: subprocess.Popen[str] | None = None
        self._errors: deque[str] = deque(maxlen=20)  # the last lines of stderr: the reason, should it die
        self._reader = threading.Thread()

    def run(self, spec: RunSpec, path: Path) -> tuple[str, str]:
        """(status, reason) of one run; blocks until it has ended."""
        if spec.hardware.processes > 1:
            return self._run_many(spec, path)
        process = self._process
        if process is None or process.poll() is not None:
            process = self._start([sys.executable, "-m", "retrace.worker", "-"])
        assert process.stdin is not None
        assert process.stdout is not None
        try:
            process.stdin.write(f"{path}\n")
            process.stdin.flush()
            line = process.stdout.readline()
        except BrokenPipeError:
            line = ""
        if not line:
            return self._died(process, spec)
        answer = json.loads(line)
        return answer["status"], answer["reason"]

    def _run_many(self, spec: RunSpec, path: Path) -> tuple[str, str]:
        """A run of several processes, through Accelerate's launcher; or this task's one of them."""
        hardware = spec.hardware
        command = [sys.executable, "-m"]
        if self._task is None:
            command += ["accelerate.commands.launch", "--num_processes", str(hardware.processes)]
            command += ["--multi_gpu", "--num_machines", "1", "--mixed_precision", "no", "--dynamo_backend", "no"]
            command += ["--main_process_port", "0", "-m"]
        command += ["retrace.worker", str(path)]
        if hardware.device == "cpu":  # `--cpu` starts a single process; this is what really gives several
            self._environment["ACCELERATE_USE_CPU"] = "true"
        process = self._start(command)
        assert process.stdout is not None
        output = process.stdout.read()  # `communicate` would take the lines on stderr away from `_drain`
        process.wait()
        self._process = None
        said = [line.partition(" ") for line in output.splitlines()]
        answers = [(word, rest) for word, _, rest in said if word in (*FINISHED, "FAILED", "STOPPED", "BUSY")]
        found = next((answer for answer in answers if answer[0] in FINISHED), None) or self._killed(spec)
        if found is None:  # one process's failure makes others fail; what was said first is the reason
            found = next(iter(sorted(answers, key=lambda answer: answer[0] != "FAILED")), None)
        if found is None:
            return self._died(process, spec)
        run = RunDir(path)
        if found[0] == "FAILED" and run.state().reason != found[1]:  # the first process wrote what followed, or nothing
            run.finish("FAILED", reason=found[1])
        return found

    def _killed(self, spec: RunSpec) -> tuple[str, str] | None:
        """What torch's launcher says of a process that a signal ended before any other one ended, if so."""
        text = "\n".join(self._said_last()).rpartition("Root Cause")[2]
        match = re.search(r"rank\s*: (\d+) .*?exitcode\s*: -(\d+)", text, re.DOTALL)
        if match is None:
            return None
        return "FAILED", f"process {match[1]} of {spec.hardware.processes} was {_ended(-int(match[2]), spec)}"

    def _start(self, command: list[str]) -> subprocess.Popen[str]:
        self._process = subprocess.Popen(
            command, stdin=PIPE, stdout=PIPE, stderr=PIPE, text=True, env=self._environment
        )
        self._errors = deque(maxlen=20)  # its own: the thread of the process before may not have ended yet
        self._reader = threading.Thread(target=_drain, args=(self._process, self._errors), daemon=True)
        self._reader.start()
        return self._process

    def _said_last(self) -> list[str]:
        """The last lines on stderr of a process that has ended; what it started may hold the pipe open."""
        self._reader.join(timeout=DRAIN_SECONDS)
        return [redact(line) for line in self._errors]

    def _died(self, process: subprocess.Popen[str], spec: RunSpec) -> tuple[str, str]:
        code = process.wait()
        self._process = None
        last = next((line for line in reversed(self._said_last()) if line.strip()), "it wrote nothing")
        if code == 3:
            return "STOPPED", last
        return "FAILED", f"its worker died ({_ended(code, spec)}): {last}"

    def stop(self) -> None:
        """Ask the run in hand to save and stop."""
        if self._process is not None:
            self._process.terminate()

    def close(self) -> None:
        """End the process: it sees the end of its input."""
        if self._process is not None and self._process.stdin is not None:
            self._process.stdin.close()
            try:
                self._process.wait(timeout=30)
            except subprocess.TimeoutExpired:
                self._process.kill()


def _drain(process: subprocess.Popen[str], lines: deque[str]) -> None:
    """Keep the last lines that a worker writes on stderr."""
    assert process.stderr is not None
    for line in process.stderr:
        lines.append(line.rstrip())


def _ended(code: int, spec: RunSpec) -> str:
    """How a process ended."""
    hint = f"; out of memory? {what_to_lower(spec)}" if code == -9 else ""
    return f"killed by signal {-code}{hint}" if code < 0 else f"exit code {code}"


class Local:
    """This machine. `on_change` is called with (id, status, reason) whenever a run starts, ends or will never start."""

    def __init__(self, store: Store, *, command: str, on_change: Callable[[str, str, str], None]) -> None:
        self._store = store
        self._command = command
        self._on_change = on_change
        self._halt = threading.Event()  # set on Ctrl-C: nothing new is started
        self._workers: list[Worker] = []
        self._ready: queue.Queue[RunSpec | None] = queue.Queue()
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
        try:
            self._schedule(waiting, summary)
        except BaseException:  # Ctrl-C, of which a supervisor tells this process alone, or nobody reads the output
            for worker in self._workers:
                worker.stop()
            raise
        finally:
            self._halt.set()
            for _ in threads:
                self._ready.put(None)
            for thread in threads:
                thread.join()
        return summary

    def _schedule(self, waiting: dict[str, RunSpec], summary: Summary) -> None:
        """Hand out runs whose parents are done, until nothing waits and nothing runs.

        A run that somebody else holds is looked at again after `BUSY_SECONDS`, and takes no slot until then.
        """
        order = TopologicalSorter({i: waiting.keys() & spec.parents.values() for i, spec in waiting.items()})
        order.prepare()
        running = 0
        held: dict[str, float] = {}  # run that somebody else holds -> when to look at it again
        while waiting or running:
            now = time.monotonic()
            due = [*order.get_ready(), *(run_id for run_id, at in held.items() if at <= now)]
            for spec in [waiting.pop(run_id) for run_id in due if run_id in waiting]:  # others are skipped
                running += 1
                self._ready.put(spec)
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
        while (spec := self._ready.get()) is not None:
            if self._halt.is_set():
                self._ended.put((spec, "STOPPED", ""))
                continue
            run = self._store.run(spec.id)
            state = run.state()
            if state.finished or state.status == "RUNNING":  # another launcher's: what it has frozen stays as it is
                self._ended.put((spec, state.status if state.finished else "BUSY", state.reason))
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
            self._ended.put((spec, status, reason))
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

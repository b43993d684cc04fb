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
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from retrace.core.memory import what_to_lower
from retrace.core.plan import RunSpec
from retrace.core.safety import redact
from retrace.core.store import FINISHED, RunDir, Store

BUSY_SECONDS = 2.0  # between two looks at a run that somebody else holds


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
        self._errors: list[str] = []

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
        text = "\n".join(self._errors).rpartition("Root Cause")[2]
        match = re.search(r"rank\s*: (\d+) .*?exitcode\s*: -(\d+)", text, re.DOTALL)
        if match is None:
            return None
        return "FAILED", f"process {match[1]} of {spec.hardware.processes} was {_ended(-int(match[2]), spec)}"

    def _start(self, command: list[str]) -> subprocess.Popen[str]:
        self._errors = []
        self._process = subprocess.Popen(
            command,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            env=self._environment,
        )
        threading.Thread(target=self._drain, args=(self._process,), daemon=True).start()
        return self._process

    def _drain(self, process: subprocess.Popen[str]) -> None:
        """Keep the last lines that a worker wrote on stderr: the reason, should it die."""
        assert process.stderr is not None
        for line in process.stderr:
            self._errors = [*self._errors[-19:], redact(line.rstrip())]

    def _died(self, process: subprocess.Popen[str], spec: RunSpec) -> tuple[str, str]:
        code = process.wait()
        self._process = None
        last = next((line for line in reversed(self._errors) if line.strip()), "it wrote nothing")
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


def _ended(code: int, spec: RunSpec) -> str:
    """How a process ended."""
    hint = f"; out of memory? {what_to_lower(spec)}" if code == -9 else ""
    return f"killed by signal {-code}{hint}" if code < 0 else f"exit code {code}"


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
        try:
            self._schedule(waiting, ready, ended, summary)
        except KeyboardInterrupt:
            for worker in self._workers:  # a terminal sends them the signal too, a supervisor does not
                worker.stop()
            raise
        finally:
            self._halt.set()
            for _ in threads:
                ready.put(None)
            for thread in threads:
                thread.join()
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
        running = 0
        blocked: set[str] = set(waiting)  # ids that are not done yet
        held: dict[str, float] = {}  # run that somebody else holds -> when to look at it again
        while waiting or running:
            now = time.monotonic()
            held = {run_id: at for run_id, at in held.items() if at > now and run_id in waiting}
            for spec in list(waiting.values()):
                if spec.id not in held and not blocked & set(spec.parents.values()):
                    del waiting[spec.id]
                    running += 1
                    ready.put(spec)
            try:
                spec, status, reason = ended.get(timeout=min(held.values()) - now if held else None)
            except queue.Empty:
                continue
            running -= 1
            if status == "BUSY":
                waiting[spec.id] = spec
                held[spec.id] = time.monotonic() + BUSY_SECONDS
                continue
            self._on_change(spec.id, status, reason)
            if status in FINISHED:
                blocked.discard(spec.id)
                (summary.done if status == "DONE" else summary.diverged).append(spec.id)
                if status == "DIVERGED":
                    _skip_children(spec.id, waiting, summary, diverged=True)
            elif status == "STOPPED":
                self._halt.set()
                summary.stopped += [spec.id, *waiting]
                waiting.clear()
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

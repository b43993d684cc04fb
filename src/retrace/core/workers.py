"""Processes that carry out runs: each is a `python -m retrace.worker -`, spoken to in lines.

One process pays the imports once and then runs whatever comes. A run of several processes gets its own, one a rank;
the first rank's answer counts, and one that fails takes the others with it. However a process ends, whoever asked gets
(status, reason), and so does the disk.
"""

from __future__ import annotations

import contextlib
import json
import os
import queue
import re
import signal
import socket
import subprocess
import sys
import threading
import time
from collections import deque
from collections.abc import Mapping
from pathlib import Path
from subprocess import PIPE

from retrace.core.memory import what_to_lower
from retrace.core.plan import RunSpec
from retrace.core.record import FINISHED
from retrace.core.safety import redact
from retrace.core.store import RunDir

END_SECONDS = 20.0  # that a process has to end, from the moment at which it is of no use any more
SETTLE_SECONDS = 1.0  # from the first failure of a rank to the news of a signal that may be behind it
WATCH_SECONDS = 10.0  # between two looks at whether a run is over
DRAIN_SECONDS = 5.0  # for the last words of a process that has ended
_OF_A_TASK = re.compile(r"(LOCAL_|GROUP_)?RANK$|(LOCAL_)?WORLD_SIZE$|MASTER_(ADDR|PORT)$|TORCHELASTIC_")
ASKED = (-signal.SIGTERM, -signal.SIGINT, -signal.SIGUSR1, -signal.SIGUSR2, 3)  # how a worker ends that is to stop


class Worker:
    """A process that runs one run at a time; started again when it has died.

    As one of several processes of a run it has a `task`, which is what torch's `env://` needs to find the others: RANK,
    WORLD_SIZE, MASTER_ADDR, ... Under Slurm somebody else starts those; here a worker without a task does.
    """

    def __init__(self, *, task: Mapping[str, str] | None = None) -> None:
        self._task = task
        self._process: subprocess.Popen[str] | None = None
        self._errors: deque[str] = deque(maxlen=20)  # the last lines of stderr: the reason, should it die
        self._reader = threading.Thread()
        self._ranks: list[Worker] = []  # the processes of the run in hand, where it has several

    def run(self, spec: RunSpec, path: Path) -> tuple[str, str]:
        """(status, reason) of one run; blocks until it has ended."""
        run = RunDir(path)
        alone = spec.hardware.processes == 1 or self._task is not None
        status, reason = self._ask(spec, run) if alone else self._run_ranks(spec, run)
        if status in ("FAILED", "KILLED"):
            found = run.state()
            if found.finished:
                return found.status, found.reason
            theirs = found.status == "RUNNING" and self._task is None  # somebody else has begun it anew
            if not theirs and found.reason != reason:  # nobody wrote, or a process that fell with another
                with contextlib.suppress(OSError):  # of a full disk; the answer still has it
                    run.finish("FAILED", reason=reason)
            if spec.hardware.device != "cpu":
                self.close()  # an error on a GPU can stay with its process, and fail whatever comes next
        return "FAILED" if status == "KILLED" else status, reason

    def stop(self) -> None:
        """Ask the run in hand to save and stop."""
        for worker in (self, *self._ranks):
            if worker._process is not None:
                worker._process.terminate()

    def close(self, *, seconds: float = END_SECONDS) -> None:
        """End the processes: they see the end of their input."""
        ending = [worker._process for worker in (self, *self._ranks) if worker._process is not None]
        for process in ending:
            assert process.stdin is not None
            with contextlib.suppress(BrokenPipeError):
                process.stdin.close()
        end = time.monotonic() + seconds
        for process in ending:
            try:
                process.wait(timeout=max(0.0, end - time.monotonic()))
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()

    def _ask(self, spec: RunSpec, run: RunDir) -> tuple[str, str]:
        """What the process says of a run; KILLED where a signal ended it before it said a word."""
        if self._task is not None:
            self.close()  # a process meets the others of a run once
        process = self._process
        if process is None or process.poll() is not None:
            process = self._start(spec)
            if self._task is not None and self._task["RANK"] != "0":
                threading.Thread(target=_end_with, args=(process, run), daemon=True).start()
        assert process.stdin is not None
        assert process.stdout is not None
        try:
            process.stdin.write(f"{run.path}\n")
            process.stdin.flush()
            line = process.stdout.readline()
        except BrokenPipeError:
            line = ""
        if not line:
            return self._died(process, spec)
        answer = json.loads(line)
        return answer["status"], answer["reason"]

    def _run_ranks(self, spec: RunSpec, run: RunDir) -> tuple[str, str]:
        """A run of several processes on this machine."""
        if run.state().status == "RUNNING":
            return "BUSY", f"{run.id} is being run by another process"  # said before anything is started
        world, port = spec.hardware.processes, _free_port()
        self._ranks = [Worker(task=_task(rank, world, port)) for rank in range(world)]
        answers: queue.Queue[tuple[int, str, str]] = queue.Queue()

        def serve(rank: int, worker: Worker) -> None:
            answers.put((rank, *worker._ask(spec, run)))

        for rank, worker in enumerate(self._ranks):
            threading.Thread(target=serve, args=(rank, worker), daemon=True).start()
        heard: dict[int, tuple[str, str]] = {}
        end: float | None = None  # once one has ended badly
        while 0 not in heard and (end is None or time.monotonic() < end):
            with contextlib.suppress(queue.Empty):
                rank, status, reason = answers.get(timeout=None if end is None else max(0.0, end - time.monotonic()))
                heard[rank] = status, reason
                if end is None and status not in FINISHED:
                    end = time.monotonic() + END_SECONDS
                    self.stop()
        while end is not None and heard.keys() != set(range(world)):  # which of them fell with another?
            try:
                rank, status, reason = answers.get(timeout=SETTLE_SECONDS)
            except queue.Empty:
                break
            heard[rank] = status, reason
        self.close(seconds=5.0)  # what the first one has not written nobody will
        self._ranks = []
        return _verdict(heard)

    def _start(self, spec: RunSpec) -> subprocess.Popen[str]:
        threads = str(spec.hardware.threads)
        environment = {name: value for name, value in os.environ.items() if not _OF_A_TASK.match(name)}  # of torchrun's
        environment |= {"OMP_NUM_THREADS": threads, "MKL_NUM_THREADS": threads, "PYTHONUNBUFFERED": "1"}
        environment |= {"TOKENIZERS_PARALLELISM": "false", "TQDM_DISABLE": "1"}
        environment["PYTHONSAFEPATH"] = "1"  # a tokenizers.py in the folder of the launcher is not the library
        environment |= self._task or {}
        if self._task is not None and spec.hardware.device == "cpu":
            environment["ACCELERATE_USE_CPU"] = "true"
        return self._open([sys.executable, "-m", "retrace.worker", "-"], environment)

    def _open(self, command: list[str], environment: Mapping[str, str]) -> subprocess.Popen[str]:
        self._process = subprocess.Popen(
            command, stdin=PIPE, stdout=PIPE, stderr=PIPE, text=True, errors="replace", env=environment
        )
        self._errors = deque(maxlen=20)  # its own: the thread of the process before may not have ended yet
        self._reader = threading.Thread(target=_drain, args=(self._process, self._errors), daemon=True)
        self._reader.start()
        return self._process

    def _died(self, process: subprocess.Popen[str], spec: RunSpec) -> tuple[str, str]:
        code = process.wait()
        self._process = None
        self._reader.join(timeout=DRAIN_SECONDS)  # what it started may hold the pipe open
        last = redact(next((line for line in reversed(self._errors) if line.strip()), "it wrote nothing"))
        if code in ASKED:
            return "STOPPED", last
        how = f"exit code {code}"
        if code < 0:
            how = f"killed by signal {-code}" + (f"; out of memory? {what_to_lower(spec)}" if code == -9 else "")
            if self._task is not None:
                return "KILLED", f"process {self._task['RANK']} of {self._task['WORLD_SIZE']} was {how}"
        return "KILLED" if code < 0 else "FAILED", f"its worker died ({how}): {last}"


def _drain(process: subprocess.Popen[str], lines: deque[str]) -> None:
    """Keep the last lines that a worker writes on stderr."""
    assert process.stderr is not None
    for line in process.stderr:
        lines.append(line.rstrip())


def _verdict(heard: Mapping[int, tuple[str, str]]) -> tuple[str, str]:
    """What became of a run, from what its processes said, in the order in which they did.

    The first process writes what there is to write, so another one's success says nothing. One that a signal ended
    makes others fail, and so does the first that fails.
    """
    if 0 in heard and heard[0][0] not in ("FAILED", "KILLED"):
        stopped = heard[0][0] == "STOPPED"
        return next((a for a in heard.values() if stopped and a[0] in ("FAILED", "KILLED")), heard[0])
    for bad in ("KILLED", "FAILED"):
        for answer in heard.values():
            if answer[0] == bad:
                return answer
    return next(answer for answer in heard.values() if answer[0] not in FINISHED)


def _end_with(process: subprocess.Popen[str], run: RunDir) -> None:
    """End a process other than the first when its run is over: it may wait, for torch's half an hour, to begin."""
    over = False
    while not over:
        over = run.state().finished
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(timeout=END_SECONDS if over else WATCH_SECONDS)
            return
    process.kill()


def _task(rank: int, world: int, port: int) -> dict[str, str]:
    """A rank among those of this machine, as torch and Accelerate read it from the environment."""
    found = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": world, "LOCAL_WORLD_SIZE": world, "MASTER_PORT": port}
    return {"MASTER_ADDR": "127.0.0.1", **{name: str(value) for name, value in found.items()}}


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])

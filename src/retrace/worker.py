"""Runs frozen configs: `python -m retrace.worker runs/<id>`; with `-`, the folders come on standard input, a line each.

In the second form the process stays warm: imports are paid once, and each run is answered by one line of JSON. When the
launcher goes away (standard input ends) or a SIGTERM comes, the run in hand saves a checkpoint and stops. It is also
that of each process of a run that has several, with its rank in the environment.
"""

from __future__ import annotations

import contextlib
import json
import logging
import math
import os
import signal
import sys
import threading
import time
import traceback
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any, TextIO

from retrace.core import provenance
from retrace.core.config import HOME
from retrace.core.identity import science
from retrace.core.lease import Busy
from retrace.core.memory import out_of_memory
from retrace.core.paper import load_paper
from retrace.core.plan import RunSpec
from retrace.core.record import Finished, Record, RunCost
from retrace.core.safety import RedactingFormatter, deny_others, redact, redact_tracebacks
from retrace.core.store import RunDir, Store

if TYPE_CHECKING:
    from retrace.core.context import Context

log = logging.getLogger("retrace")
GRACE_SECONDS = 20.0  # from the wish to stop to the end of a process that does not answer it


@dataclass(frozen=True)
class Outcome:
    """`status` is DONE, DIVERGED, FAILED, STOPPED (goes on with the same command) or BUSY (somebody else runs it)."""

    status: str
    reason: str = ""


def execute(path: Path, *, store: Store, stop: threading.Event) -> Outcome:
    """Run one run directory to its end. One run's failure, of whatever kind, is an outcome and not a crash."""
    run, spec = RunDir(path), None
    try:
        spec, command = run.load()
        if int(os.environ.get("RANK", 0)) > 0:
            state = run.state()
            if state.finished:  # the first process sees it too, and nobody would be there to work with
                return Outcome(state.status, state.reason)
            return _program(run, spec, command, store=store, stop=stop, main=False)
        with run.lease(), _logging_to(path / "log.txt"):
            state = run.state()
            if state.finished:
                return Outcome(state.status, state.reason)
            run.clear()
            return _program(run, spec, command, store=store, stop=stop, main=True)
    except Busy as error:
        return Outcome("BUSY", str(error))
    except Exception as error:
        return Outcome("BUSY", str(error)) if run.lost.is_set() else _failed(run, spec, error)


class _Stop(threading.Event):
    """The wish to stop one run: that of the process, or because the run's lease is lost."""

    def __init__(self, process: threading.Event, lost: threading.Event) -> None:
        super().__init__()
        self._wishes = process, lost

    def is_set(self) -> bool:
        return any(wish.is_set() for wish in self._wishes)


def _program(run: RunDir, spec: RunSpec, command: str, *, store: Store, stop: threading.Event, main: bool) -> Outcome:
    """Import what the run needs, run it, and write down what came of it."""
    from retrace.core.context import Context, Diverged, Stopped
    from retrace.core.tracking import Tracker

    _set_up_torch(spec)
    tracker = Tracker(run, spec, main=main)
    parents = {role: store.run(parent) for role, parent in spec.parents.items()}
    ctx = Context(
        run=run,
        seed=spec.seed,
        parents=parents,
        hardware=spec.hardware,
        tracker=tracker,
        stop=_Stop(stop, run.lost),
        is_main=main,
    )
    log.info("%s: start (%s)", spec.id, ", ".join(spec.labels))
    status: Finished | None = None
    metrics: dict[str, float] = {}
    reason = ""
    try:
        if main:
            for parent in parents.values():
                parent.check_folders()
        paper = load_paper(spec.paper)
        if spec.recipe != paper.recipe:
            raise ValueError(
                f"frozen for recipe {spec.recipe}, and this code has {paper.recipe}: `retrace run` plans anew"
            )
        metrics = _finite(paper.programs[spec.program].load()(spec.config, ctx))
        status = "DONE"
    except Diverged as error:
        status, reason = "DIVERGED", str(error)
        metrics = {**error.metrics, "diverged_at": float(error.step)}
    except Stopped as error:
        log.info("%s: %s", spec.id, error)
        run.check_lease()
        return Outcome("STOPPED", str(error))
    finally:
        tracker.close(summary=metrics, exit_code=0 if status else 1)
    if main:
        run.check_lease()
        ctx.cost.setdefault("seconds", tracker.seconds)
        store.write_record(_record(run, spec, ctx, command=command, status=status, metrics=metrics))
        run.finish(status, metrics=metrics, reason=reason)  # after the record: finished means that the numbers are safe
    log.info("%s: %s", spec.id, status)
    return Outcome(status, "; ".join(filter(None, (reason, *ctx.warnings))))


def _finite(metrics: Mapping[str, float]) -> dict[str, float]:
    """Raises ValueError, naming them, for metrics that no record can hold."""
    wrong = ", ".join(f"{name}={value}" for name, value in metrics.items() if not math.isfinite(value))
    if wrong:
        raise ValueError(f"measured {wrong}, and a result is finite: the model that it is of has exploded, or its data")
    return dict(metrics)


def _record(
    run: RunDir,
    spec: RunSpec,
    ctx: Context,
    *,
    command: str,
    status: Finished,
    metrics: Mapping[str, float],
) -> Record:
    device = _device_name(spec.hardware.device)
    where = provenance.describe(spec.paper, spec.hardware, device=device, command=command)
    return Record(
        schema=1,
        id=run.id,
        paper=spec.paper,
        program=spec.program,
        recipe=spec.recipe,
        labels=spec.labels,
        scale=spec.scale,
        seed=spec.seed,
        status=status,
        config=science(spec.config),
        parents=dict(spec.parents),
        metrics=dict(metrics),
        series=ctx.tracker.series(),
        cost=RunCost(**ctx.cost),
        provenance={**where, **ctx.notes, "finished": datetime.now(UTC).isoformat(timespec="seconds")},
        pages=tuple(ctx.pages),
    )


def _failed(run: RunDir, spec: RunSpec | None, error: Exception) -> Outcome:
    """Write the reason down; where even that can't be written, the answer to the launcher still carries it."""
    exhausted = out_of_memory(error, spec) if spec else None
    reason = redact(exhausted or f"{type(error).__name__}: {error}".splitlines()[0])
    rank = int(os.environ.get("RANK", 0))
    if run.state().finished or rank > 0:  # a result stands; and of several processes only the first writes
        return Outcome("FAILED", f"process {rank}: {reason}" if rank else reason)
    try:
        run.finish("FAILED", reason=reason, traceback=redact(traceback.format_exc()))
    except OSError as second:
        print(f"{run.id}: {redact(str(second))} while writing down: {reason}", file=sys.stderr, flush=True)
    return Outcome("FAILED", reason)


def _set_up_torch(spec: RunSpec) -> None:
    import torch

    torch.set_num_threads(spec.hardware.threads)
    torch.use_deterministic_algorithms(spec.hardware.device == "cpu")
    # filling memory before its use takes 5 % of a small step
    torch.utils.deterministic.fill_uninitialized_memory = False  # type: ignore[attr-defined]


def _device_name(device: str) -> str:
    if device == "cpu":
        return ""
    import torch

    return torch.cuda.get_device_name()


@contextlib.contextmanager
def _logging_to(path: Path) -> Any:
    handler = logging.FileHandler(path)
    handler.setFormatter(RedactingFormatter("%(asctime)s %(levelname)s %(name)s: %(message)s"))
    root = logging.getLogger()
    root.addHandler(handler)
    root.setLevel(logging.INFO)
    try:
        yield
    finally:
        root.removeHandler(handler)
        handler.close()


def _serve(store: Store, stop: threading.Event, lines: TextIO) -> None:
    """The warm form: one line in, one line of JSON out, until the input ends."""
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # whatever libraries print must not look like an answer
    todo: list[str] = []
    arrived = threading.Condition()

    def listen() -> None:
        for line in lines:
            with arrived:
                todo.append(line.strip())
                arrived.notify()
        stop.set()
        time.sleep(GRACE_SECONDS)
        os._exit(3)  # the launcher is gone and the program does not look at `stop`

    threading.Thread(target=listen, daemon=True).start()
    while not stop.is_set():
        with arrived:
            if not arrived.wait_for(lambda: bool(todo), timeout=1.0):
                continue
            path = Path(todo.pop(0))
        outcome = execute(path, store=store, stop=stop)
        answers.write(json.dumps({"id": path.name, "status": outcome.status, "reason": outcome.reason}) + "\n")
        answers.flush()


def main(arguments: list[str]) -> int:
    """Exit code: 0 done or diverged, 1 failed, 2 wrong usage, 3 stopped or busy."""
    if len(arguments) != 1:
        print("usage: python -m retrace.worker runs/<id>   (or - to read folders from standard input)", file=sys.stderr)
        return 2
    redact_tracebacks()
    deny_others()
    stop = threading.Event()
    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1, signal.SIGUSR2):
        signal.signal(number, lambda *_: stop.set())
    store = Store(HOME)
    provenance.code()  # now, and not when the first record is written: the code that runs is the code of this moment
    if arguments == ["-"]:
        _serve(store, stop, sys.stdin)
        return 3
    if not (Path(arguments[0]) / "config.json").is_file():
        print(f"{arguments[0]}: no config.json there; give the folder of a run, such as runs/<id>", file=sys.stderr)
        return 2
    outcome = execute(Path(arguments[0]), store=store, stop=stop)
    print(f"{outcome.status} {outcome.reason}".strip(), flush=True)
    return {"DONE": 0, "DIVERGED": 0, "FAILED": 1}.get(outcome.status, 3)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))

"""How long MM1's laptop trainings wait for their data: made in turn with the steps, and ahead of them in a thread.

    python benchmarks/mm1_data.py

A run draws its images itself. Made in turn, they are part of each step; ahead, a second core makes them while the model
works on the batch before, if there is one: so each way is measured with one run on the machine and with one a core.
Real runs of 150 steps at the laptop's settings; the clock is around the call that gives a step its batch. The first
batch, which nothing can be made ahead of, is told in milliseconds and left out of the share.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Mapping
from pathlib import Path

from torch import Tensor

from retrace.core.context import Context
from retrace.core.optim import Optim
from retrace.core.plan import plan
from retrace.core.store import Store
from retrace.papers.mm1 import programs
from retrace.papers.mm1.stream import Ahead
from retrace.worker import execute

RESULTS = Path(__file__).parent / "results" / "mm1_data.json"
Rows = Callable[[range], Mapping[str, Tensor]]
STEPS = {"encoder": 150, "decoder": 20, "pretrain": 150}
TRAININGS = {"pretrain_encoder": "encoder", "pretrain": "pretrain"}


def train(ahead: bool) -> dict[str, list[float]]:
    """Of each training (seconds, seconds waited for the first batch, and for all others), in this process."""
    waits: list[float] = []

    def clocked(rows: Rows, optim: Optim, ctx: Context) -> Rows:  # noqa: ARG001
        made = Ahead(rows, between=optim.batch_size, end=optim.steps * optim.batch_size) if ahead else rows

        def timed(numbers: range) -> Mapping[str, Tensor]:
            began = time.monotonic()
            batch = made(numbers)
            waits.append(time.monotonic() - began)
            return batch

        return timed

    programs.ahead = clocked
    words = ["scale=laptop", "tracking.wandb=off", "seed=0"]
    for part, steps in STEPS.items():
        words += [f"{part}.optim.{key}={value}" for key, value in
                  (("steps", steps), ("warmup_steps", 5), ("hold_steps", steps // 2))]  # fmt: skip
    found = {}
    with tempfile.TemporaryDirectory() as home:
        store = Store(Path(home))
        for spec in plan(["mm1/main"], words):
            if spec.program == "evaluate":
                continue
            waits.clear()
            run = store.run(spec.id)
            run.freeze(spec, command="benchmark")
            outcome = execute(run.path, store=store, stop=threading.Event())
            assert outcome.status == "DONE", outcome
            if spec.program in TRAININGS:
                seconds = next(r for r in store.records("mm1") if r.id == spec.id).cost.seconds
                assert seconds is not None
                found[spec.program] = [seconds, waits[0], sum(waits[1:])]
    return found


def measured(way: str, processes: int) -> list[dict[str, list[float]]]:
    """`train` in several processes at a time."""
    command = [sys.executable, __file__, "--child", way]
    started = [subprocess.Popen(command, stdout=subprocess.PIPE, text=True) for _ in range(processes)]
    texts = [process.communicate()[0] for process in started]
    assert not any(process.returncode for process in started)
    return [json.loads(text.splitlines()[-1]) for text in texts]


def main() -> None:
    if "--child" in sys.argv:
        print(json.dumps(train(sys.argv[-1] == "ahead")))
        return
    found: dict[str, dict[str, float]] = {}
    for processes in (1, os.cpu_count() or 1):
        for way in ("in turn", "ahead"):
            runs = measured(way, processes)
            for program, part in TRAININGS.items():
                seconds, first, others = (sum(run[program][i] for run in runs) / len(runs) for i in range(3))
                name, later = f"{program}, {processes} at a time, {way}", seconds - first
                found[name] = {
                    "ms a step": 1000 * later / STEPS[part],
                    "waited": others / later,
                    "first ms": 1000 * first,
                }
                print(name, *(f"{value:.3g} {key}" for key, value in found[name].items()), sep=", ")
    RESULTS.write_text(json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    main()

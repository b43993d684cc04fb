"""What checkpoints cost a training run, and how long a killed one takes to train again.

    python benchmarks/checkpoints.py [--smallest]

The stall is the share of a run's training time in which it waits for checkpoints, taken inside one process by a clock
around `core.checkpoint.save`: between runs of their own, a shared machine's noise is larger than the stall. Resume is
the time from `python -m retrace.worker` to the first progress beyond the checkpoint, beside that of an interpreter
which only imports what the worker imports. Quiet-STaR's, MM1's and DeepScaleLM's laptop settings.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from retrace.core import checkpoint
from retrace.core.plan import RunSpec, plan
from retrace.core.store import Store
from retrace.worker import execute

RESULTS = Path(__file__).parent / "results" / "checkpoints.json"
TARGETS = {  # the program, and the setting that says how long it trains
    "quietstar/main": ("pretrain", "base.optim.steps"),
    "mm1/main": ("pretrain_decoder", "decoder.optim.steps"),
    "deepscalelm/main": ("train", "training.optim.steps"),
}
IMPORTS = "import accelerate, safetensors.torch, torch, transformers"


def training(target: str, *overrides: str, steps: int) -> RunSpec:
    """A run of a target that trains and builds on no other."""
    program, key = TARGETS[target]
    specs = plan([target], ["tracking.wandb=off", "seed=0", f"{key}={steps}", *overrides])
    return next(spec for spec in specs if spec.program == program)


def stall(spec: RunSpec, home: Path) -> dict[str, float]:
    """Training seconds of a run, how many checkpoints it wrote, and the seconds that it waited for them."""
    waited: list[float] = []
    save: Callable[..., None] = checkpoint.save

    def timed(*arguments: Any, **options: Any) -> None:
        began = time.monotonic()
        save(*arguments, **options)
        waited.append(time.monotonic() - began)

    run = Store(home).run(spec.id)
    run.freeze(spec, command="benchmark")
    checkpoint.save = timed
    try:
        outcome = execute(run.path, store=Store(home), stop=threading.Event())
    finally:
        checkpoint.save = save
    assert outcome.status == "DONE", outcome
    (record,) = Store(home).records(spec.paper)
    seconds = record.cost.seconds
    assert seconds is not None
    return {"training": seconds, "checkpoints": len(waited), "waited": sum(waited), "share": sum(waited) / seconds}


def resume(spec: RunSpec, home: Path) -> dict[str, float]:
    """Seconds from the start of a worker to its first step: of a new run, and of one that was killed."""
    run = Store(home).run(spec.id)
    run.freeze(spec, command="benchmark")
    command = [sys.executable, "-m", "retrace.worker", str(run.path)]
    found: dict[str, float] = {}
    for name in ("from the start", "from a checkpoint"):
        before = run.state().step
        began = time.monotonic()
        process = subprocess.Popen(command, env={**os.environ, "RETRACE_HOME": str(home)})
        while run.state().step <= before and process.poll() is None:
            time.sleep(0.01)
        found[name] = time.monotonic() - began
        time.sleep(1.0)  # so that there is a checkpoint behind the first step
        assert process.poll() is None, "the run ended before it was killed: give it more steps"
        process.send_signal(signal.SIGKILL)
        process.wait()
    began = time.monotonic()
    subprocess.run([sys.executable, "-c", IMPORTS], check=True)
    return {**found, "imports alone": time.monotonic() - began}


def main() -> None:
    smallest = "--smallest" in sys.argv[1:]
    scale = ["scale=smoke"] if smallest else ["scale=laptop"]
    found: dict[str, dict[str, float]] = {}
    for target in TARGETS:
        for every in (20, 0):
            with tempfile.TemporaryDirectory() as home:
                frequency = f"hardware.checkpoint_seconds={every}"
                spec = training(target, *scale, frequency, steps=50 if smallest else 1000)
                found[f"{target}, a checkpoint every {every} s"] = stall(spec, Path(home))
    with tempfile.TemporaryDirectory() as home:
        spec = training("quietstar/main", *scale, "hardware.checkpoint_seconds=0", steps=100_000)
        found["quietstar/main, to the first step"] = resume(spec, Path(home))
    for name, values in found.items():
        print(name, {key: round(value, 4) for key, value in values.items()})
    if not smallest:
        RESULTS.write_text(json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    main()

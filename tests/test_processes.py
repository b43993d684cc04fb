"""A run of several processes gives the numbers of one: real Accelerate processes over gloo on the CPU."""

from __future__ import annotations

import shutil
import threading
import time
from pathlib import Path

import pytest
import torch
from conftest import TINY, Run
from safetensors import safe_open
from safetensors.torch import load_file
from torch import Tensor

from retrace.core.launch import Worker
from retrace.core.plan import RunSpec, plan
from retrace.core.record import Record
from retrace.core.store import Store

# Four micro-batches in a step, so that two processes accumulate two each.
SMALL = [*TINY, "seed=0", "base.optim.micro_batch_size=2", "train.optim.micro_batch_size=1", "eval.num_questions=2"]
ALONE = ["hardware.processes=1"]
WHOLE = ["hardware.processes=2"]
SHARDED = ["hardware.processes=2", "hardware.shard=true"]
AGAIN = "hardware.activation_checkpointing=true"
ROUNDED = "base.optim.precision=fp32_master"
ADAPTERS = "train.lora={rank: 2, alpha: 4, target_modules: [q_proj, down_proj]}"


def records(home: Path) -> dict[str, Record]:
    return {record.id: record for record in Store(home).records("quietstar")}


def weights(home: Path, run_id: str) -> dict[str, Tensor]:
    """All tensors of the model that a run left."""
    folder = home / "runs" / run_id / "model"
    return {name: t for file in folder.glob("*.safetensors") for name, t in load_file(file).items()}


@pytest.mark.parametrize(
    ("arms", "placement"),
    [([[], [ADAPTERS, "train.optim.precision=fp32_master"]], WHOLE), ([[ROUNDED]], [*SHARDED, AGAIN])],
    ids=["whole", "sharded"],
)
def test_two_processes_give_the_losses_gradients_and_weights_of_one(
    arms: list[list[str]], placement: list[str], home: Path, retrace: Run, tmp_path: Path
) -> None:
    other = tmp_path / "two"
    for arm in arms:
        done = retrace("run", "quietstar/main", *SMALL, *arm)
        assert done.returncode == 0, done.stdout
        specs = {spec.program: spec for spec in plan(["quietstar/main"], [*SMALL, *arm])}
        last = specs["evaluate"].id  # is one process's work in any case
        shutil.copytree(home / "runs" / last, other / "runs" / last)
        done = retrace("run", "quietstar/main", *SMALL, *arm, *placement, RETRACE_HOME=str(other))
        assert done.returncode == 0, done.stdout
        one, two = records(home), records(other)
        for program in ("pretrain", "train"):
            run_id = specs[program].id
            assert two[run_id].provenance["hardware"].startswith("2 x ")
            assert any(name.startswith("grad_norm/") for name in one[run_id].metrics)
            assert two[run_id].metrics == pytest.approx(one[run_id].metrics, rel=1e-4, abs=1e-6)
            before, after = weights(home, run_id), weights(other, run_id)
            assert before.keys() == after.keys()
            for name, tensor in before.items():
                torch.testing.assert_close(after[name], tensor, rtol=0, atol=1e-5)


def start(worker: Worker, home: Path, spec: RunSpec, *, stop_at: int | None = None) -> dict[str, list[int]]:
    """Carry out a run to its end; or ask it to stop at a step, and give the layout of the checkpoint that it leaves."""
    run = Store(home).run(spec.id)
    run.freeze(spec, command="test")
    outcome: list[tuple[str, str]] = []
    thread = threading.Thread(target=lambda: outcome.append(worker.run(spec, run.path)))
    thread.start()
    while stop_at is not None and run.state().step < stop_at and thread.is_alive():
        time.sleep(0.02)
    if stop_at is None:
        thread.join()
        assert outcome == [("DONE", "")]
        return {}
    worker.stop()
    thread.join()
    assert outcome[0][0] == "STOPPED", outcome
    newest = max((run.path / "checkpoints").glob("step_*"))
    with safe_open(newest / "tensors.safetensors", "pt") as file:
        return {name: file.get_slice(name).get_shape() for name in file.keys()}  # noqa: SIM118


def test_a_checkpoint_goes_on_with_another_number_of_processes(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RETRACE_HOME", str(home))
    one, two = (
        next(s for s in plan(["quietstar/main"], [*SMALL, "base.optim.steps=60", *way]) if s.program == "pretrain")
        for way in (ALONE, SHARDED)
    )
    worker, ends, layouts = Worker(threads=1), [], []
    for first, then in ((None, one), (one, two), (two, one)):
        if first is not None:
            layouts.append(start(worker, home, first, stop_at=5))
        start(worker, home, then)
        ends.append((records(home)[one.id].metrics, weights(home, one.id)))
        shutil.rmtree(home / "runs" / one.id)
    worker.close()
    assert layouts[0] == layouts[1]
    for metrics, tensors in ends[1:]:
        assert metrics == pytest.approx(ends[0][0], rel=1e-3)
        for name, tensor in ends[0][1].items():
            torch.testing.assert_close(tensors[name], tensor, rtol=0, atol=1e-3)

"""A run of several processes gives the numbers of one: real Accelerate processes over gloo on the CPU."""

from __future__ import annotations

import os
import re
import shutil
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path

import psutil
import pytest
import torch
from conftest import TINY, Run
from safetensors import safe_open
from safetensors.torch import load_file
from torch import Tensor

from retrace.core.launch import Local
from retrace.core.plan import RunSpec, plan
from retrace.core.record import Record
from retrace.core.store import Store
from retrace.core.workers import Worker

# Four micro-batches in a step, so that two processes accumulate two each.
SMALL = [*TINY, "seed=0", "base.optim.micro_batch_size=2", "train.optim.micro_batch_size=1", "eval.num_questions=2"]
ALONE = ["hardware.processes=1"]
WHOLE = ["hardware.processes=2"]
SHARDED = ["hardware.processes=2", "hardware.shard=true"]
FOUR = ["hardware.processes=4", "hardware.shard=true"]
OTHER = [*TINY, "seed=0", "tracking.log_every=1"]
AGAIN = "hardware.activation_checkpointing=true"
ROUNDED = "base.optim.precision=fp32_master"
ADAPTERS = "train.lora={rank: 2, alpha: 4, target_modules: [q_proj, down_proj]}"


def records(home: Path, paper: str = "quietstar") -> dict[str, Record]:
    return {record.id: record for record in Store(home).records(paper)}


def weights(home: Path, run_id: str) -> dict[str, Tensor]:
    """All tensors of the models that a run left."""
    files = (home / "runs" / run_id).rglob("*.safetensors")
    found = {f"{file.parent.name}/{name}": t for file in files for name, t in load_file(file).items()}
    return {name: without_bias_of_keys(name, tensor) for name, tensor in found.items()}


def without_bias_of_keys(name: str, tensor: Tensor) -> Tensor:
    """A bias of all keys moves all scores of a query alike, which softmax does not see: its gradient is rounding alone,

    of which AdamW makes whole steps. In one tensor with those of queries and values it is the second third.
    """
    if name.endswith("k_proj.bias"):
        return torch.zeros_like(tensor)
    if name.endswith("attention.branch.rows.bias"):
        tensor[len(tensor) // 3 : 2 * len(tensor) // 3] = 0
    return tensor


def same_training(one: Path, two: Path, paper: str, run_id: str) -> None:
    """Whether a run of two processes lost, clipped and learned as that of one did."""
    alone, shared = records(one, paper)[run_id], records(two, paper)[run_id]
    assert shared.provenance["hardware"].startswith("2 x ")
    assert any(name.startswith("grad_norm/") for name in alone.series)
    assert shared.metrics.keys() == alone.metrics.keys()
    for name, value in alone.metrics.items():
        # rewards are differences of log-probabilities, here some 1e-5, and their signs those of what rounding leaves
        rounding = {"reward/mean": 1e-5, "reward/positive_fraction": 0.02}.get(name, 1e-6)
        assert shared.metrics[name] == pytest.approx(value, rel=1e-4, abs=rounding), name
    losses = alone.series["loss/total"]
    assert [step for step, _ in shared.series["loss/total"]] == [step for step, _ in losses]
    assert [v for _, v in shared.series["loss/total"]] == pytest.approx([v for _, v in losses], rel=1e-4)
    before, after = weights(one, run_id), weights(two, run_id)
    assert before.keys() == after.keys()
    for name, tensor in before.items():
        torch.testing.assert_close(after[name], tensor, rtol=0, atol=1e-5)


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
        for program in ("pretrain", "train"):
            same_training(home, other, "quietstar", specs[program].id)


# Chains of training runs of the two other papers, with two micro-batches in each step, and at three steps.
OTHERS = {
    "mm1/main": [
        f"{part}.optim.{setting}"
        for part in ("encoder", "decoder", "pretrain")
        for setting in ("micro_batch_size=2", "steps=3")
    ],
    "deepscalelm/transfer": [
        "training.learning_rates=[1.0e-3]",
        *(
            f"{part}.optim.{setting}"
            for part in ("training", "transfer")
            for setting in ("micro_batch_size=4", "steps=3")
        ),
    ],
}


def chain(target: str, *placement: str) -> list[RunSpec]:
    """The last run of a target that trains, and all that it builds on."""
    specs = [s for s in plan([target], [*OTHER, *OTHERS[target], *placement]) if s.program != "evaluate"]
    wanted = {specs[-1].id}
    for spec in reversed(specs):
        wanted |= set(spec.parents.values()) if spec.id in wanted else set()
    return [spec for spec in specs if spec.id in wanted]


def train(home: Path, specs: list[RunSpec]) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("RETRACE_HOME", str(home))
        summary = Local(Store(home), command="test", on_change=lambda *_: None).run(specs)
    assert sorted(summary.done) == sorted(spec.id for spec in specs), summary


@pytest.fixture(scope="module", params=OTHERS)
def alone(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[str, Path]:
    """A target, and a home in which its chain of trainings has ended in one process each."""
    home = tmp_path_factory.mktemp("alone")
    train(home, chain(request.param))
    return request.param, home


@pytest.mark.parametrize("placement", [WHOLE, SHARDED], ids=["whole", "sharded"])
def test_two_processes_give_the_losses_and_weights_of_one_for_each_model_that_another_paper_trains(
    placement: list[str], alone: tuple[str, Path], tmp_path: Path
) -> None:
    target, home = alone
    specs = chain(target, *placement)
    assert len(specs) == 3
    train(tmp_path, specs)
    for spec in specs:
        same_training(home, tmp_path, spec.paper, spec.id)


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
    one, two, four = (
        next(s for s in plan(["quietstar/main"], [*SMALL, "base.optim.steps=60", *way]) if s.program == "pretrain")
        for way in (ALONE, SHARDED, FOUR)
    )
    worker, ends, layouts = Worker(), [], []
    for first, then in ((None, one), (one, two), (two, one), (two, four)):
        if first is not None:
            layouts.append(start(worker, home, first, stop_at=5))
        start(worker, home, then)
        ends.append((records(home)[one.id].metrics, weights(home, one.id)))
        shutil.rmtree(home / "runs" / one.id)
    worker.close()
    assert layouts[0] == layouts[1] == layouts[2]
    for metrics, tensors in ends[1:]:
        assert metrics == pytest.approx(ends[0][0], rel=1e-3)
        for name, tensor in ends[0][1].items():
            torch.testing.assert_close(tensors[name], tensor, rtol=0, atol=1e-3)


def ranks_below(ancestor: psutil.Process) -> dict[psutil.Process, str]:
    """The processes of a run that has several, with their ranks."""
    found = {process: process.environ().get("RANK") for process in ancestor.children(recursive=True)}
    return {process: rank for process, rank in found.items() if rank is not None}


def memory_runs_out(process: psutil.Process) -> None:
    """The process gets no byte more than it has."""
    process.rlimit(psutil.RLIMIT_AS, (process.memory_info().vms, -1))


@pytest.mark.parametrize(
    ("rank", "placement", "end", "reason"),
    [
        (
            0,
            SHARDED,
            psutil.Process.kill,
            r"process 0 of 2 was killed by signal 9; out of memory\? lower micro_batch_size",
        ),
        (
            1,
            WHOLE,
            psutil.Process.kill,
            r"process 1 of 2 was killed by signal 9; out of memory\? lower micro_batch_size",
        ),
        (
            1,
            SHARDED,
            memory_runs_out,
            r"process 1: out of memory in a pretrain run on cpu.*lower micro_batch_size \(now 2",
        ),
    ],
    ids=["kill the first", "kill the second", "an exception in the second"],
)
def test_a_process_that_ends_takes_the_others_with_it_and_its_own_error_is_the_reason(
    rank: int,
    placement: list[str],
    end: Callable[[psutil.Process], None],
    reason: str,
    home: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("RETRACE_HOME", str(home))
    specs = plan(["quietstar/main"], [*SMALL, "base.optim.steps=100000", *placement])
    run = Store(home).run(specs[0].id)
    run.freeze(specs[0], command="test")
    worker, outcome = Worker(), []
    thread = threading.Thread(target=lambda: outcome.append(worker.run(specs[0], run.path)))
    thread.start()
    while run.state().step < 3 and thread.is_alive():
        time.sleep(0.05)
    ranks = ranks_below(psutil.Process())
    processes = list(ranks)
    (victim,) = (p for p in processes if ranks[p] == str(rank))
    end(victim)
    thread.join(timeout=30)
    assert not thread.is_alive()
    assert not any(p.is_running() for p in processes)
    ((status, said),) = outcome
    assert status == "FAILED"
    assert re.match(reason, said), said
    assert run.state().status == "FAILED"
    assert run.state().reason == said


def pretraining(home: Path, *overrides: str) -> RunSpec:
    """A frozen pretraining by two processes."""
    spec = plan(["quietstar/main"], [*SMALL, *WHOLE, *overrides])[0]
    Store(home).run(spec.id).freeze(spec, command="test")
    return spec


def test_a_run_whose_first_process_fails_has_failed_although_the_second_has_done_its_part(
    home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("RETRACE_HOME", str(home))
    spec = pretraining(home, "base.optim.steps=2")
    run = Store(home).run(spec.id)
    (home / "results" / "quietstar").mkdir(parents=True)
    (home / "results" / "quietstar" / "records").write_text("in the way")  # only the first process writes a record
    status, reason = Worker().run(spec, run.path)
    assert status == "FAILED"
    assert "records" in reason
    assert (run.state().status, run.state().reason) == (status, reason)


def test_a_run_that_somebody_else_ends_while_its_processes_start_is_left_alone_at_once(
    home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("RETRACE_HOME", str(home))
    spec = pretraining(home)
    run = Store(home).run(spec.id)
    worker, outcome = Worker(), []
    thread = threading.Thread(target=lambda: outcome.append(worker.run(spec, run.path)))
    thread.start()
    while len(processes := ranks_below(psutil.Process())) < 2:
        time.sleep(0.01)
    run.finish("DONE")  # long before they have imported what they need
    thread.join(timeout=120)
    assert outcome == [("DONE", "")]
    assert not any(process.is_running() for process in processes)
    assert run.state().status == "DONE"


def test_a_run_that_somebody_holds_is_not_even_started(home: Path) -> None:
    spec = pretraining(home)
    run, began = Store(home).run(spec.id), time.monotonic()
    with run.lease():
        assert Worker().run(spec, run.path)[0] == "BUSY"
    assert time.monotonic() - began < 5


def test_processes_of_a_launcher_that_is_killed_save_and_end_and_the_same_command_goes_on(
    home: Path, retrace: Run
) -> None:
    words = ["run", "quietstar/main", *SMALL, *WHOLE, "base.optim.steps=150"]
    spec = plan([words[1]], words[2:])[0]
    run = Store(home).run(spec.id)
    launcher = psutil.Popen(
        [sys.executable, "-m", "retrace.cli", *words], env={**os.environ, "RETRACE_HOME": str(home)}
    )
    while run.state().step < 3 and launcher.poll() is None:
        time.sleep(0.05)
    processes = list(ranks_below(launcher))
    assert len(processes) == 2
    launcher.kill()
    launcher.wait()
    _, alive = psutil.wait_procs(processes, timeout=30)
    assert not alive
    assert run.state().status == "PLANNED"
    assert list((run.path / "checkpoints").glob("step_*"))
    done = retrace(*words)
    assert "3 of 3 runs finished" in done.stdout, done.stdout

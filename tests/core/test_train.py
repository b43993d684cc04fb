"""The training loop in one process: precisions, resuming in each of them, and what it refuses."""

from __future__ import annotations

import threading
import time
from collections.abc import Mapping
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM

from retrace.core.checkpoint import model_tensors
from retrace.core.context import Context, Diverged, Stopped
from retrace.core.cost import Cost, Memory
from retrace.core.optim import Optim, Precision
from retrace.core.plan import plan
from retrace.core.precision import bf16_copy, cast_parameters
from retrace.core.store import RunDir
from retrace.core.tracking import Tracker
from retrace.core.train import WEIGHT, Batch, Group, fit

PRECISIONS: list[Precision] = ["fp32", "fp32_master", "pure_bf16"]
COST = Cost(tokens=1, flops=1.0, memory=Memory(1, 1, "fp32", 0.0, 0.0))


def context(folder: Path, *overrides: str) -> Context:
    spec = plan(["quietstar/main"], ["scale=smoke", "tracking.wandb=off", *overrides])[0]
    run = RunDir(folder)
    folder.mkdir(parents=True, exist_ok=True)
    tracker = Tracker(run, spec)
    return Context(run=run, seed=0, parents={}, hardware=spec.hardware, tracker=tracker, stop=threading.Event())


def optim(precision: Precision, **changes: float) -> Optim:
    settings = {"steps": 6, "batch_size": 4, "micro_batch_size": 2, "learning_rate": 1e-2, "weight_decay": 0.1}
    fixed = {"warmup_steps": 0, "decay": "constant", "clip_norm": 1.0, "clip": "global", "precision": precision}
    return Optim(**{**settings, **fixed, **changes})


def rows(chosen: range) -> Batch:
    return {"input_ids": torch.stack([torch.arange(8) * (row + 1) % 23 for row in chosen])}


def next_token_loss(model: nn.Module, batch: Batch, _: torch.Generator) -> tuple[Tensor, Mapping[str, Tensor]]:
    return model(input_ids=batch["input_ids"], labels=batch["input_ids"], use_cache=False).loss, {}


def llama() -> LlamaForCausalLM:
    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2}
    return LlamaForCausalLM(LlamaConfig(vocab_size=23, **sizes))


def train(model: nn.Module, ctx: Context, settings: Optim, loss: object = next_token_loss) -> dict[str, float]:
    groups = [Group("all", list(model.parameters()), settings.learning_rate, settings.weight_decay)]
    return fit(model, ctx=ctx, optim=settings, groups=groups, rows=rows, loss=loss, cost=COST)  # type: ignore[arg-type]


@pytest.mark.parametrize("precision", PRECISIONS)
def test_a_stopped_run_ends_bit_for_bit_as_one_that_was_not(precision: Precision, tmp_path: Path) -> None:
    undisturbed, interrupted = llama(), llama()
    metrics = train(undisturbed, context(tmp_path / "a"), optim(precision))
    ctx, calls = context(tmp_path / "b"), 0

    def loss_with_a_signal(*arguments: object) -> tuple[Tensor, Mapping[str, Tensor]]:
        nonlocal calls
        calls += 1
        if calls == 5:  # in the middle of the third step
            ctx.stop.set()
        return next_token_loss(*arguments)  # type: ignore[arg-type]

    with pytest.raises(Stopped, match="step 3 of 6"):
        train(interrupted, ctx, optim(precision), loss_with_a_signal)
    resumed = llama()
    assert train(resumed, context(tmp_path / "b"), optim(precision)) == metrics
    expected = torch.bfloat16 if precision == "pure_bf16" else torch.float32
    for name, tensor in model_tensors(undisturbed).items():
        assert tensor.dtype == expected
        assert torch.equal(model_tensors(resumed)[name], tensor), name


def label_loss(model: nn.Module, batch: Batch, _: torch.Generator) -> tuple[Tensor, Mapping[str, Tensor]]:
    """A mean over labels, of which row r has r % 4: some micro-batches of one row have none."""
    logits = model(input_ids=batch["input_ids"], use_cache=False).logits
    rows, column = batch["input_ids"][:, 1] % 4, torch.arange(8)
    learned = column < rows[:, None]
    each = nn.functional.cross_entropy(logits[learned], batch["input_ids"][learned], reduction="sum")
    return each / learned.sum().clamp(min=1), {"loss/text": each.detach() / learned.sum(), WEIGHT: learned.sum()}


def test_a_loss_that_weighs_its_micro_batches_trains_alike_whatever_their_size(tmp_path: Path) -> None:
    found = {}
    for size in (1, 2, 4):
        model = llama()
        metrics = train(model, context(tmp_path / f"{size}"), optim("fp32", micro_batch_size=size), label_loss)
        found[size] = metrics, torch.cat([p.detach().flatten() for p in model.parameters()])
    for size in (1, 2):
        torch.testing.assert_close(found[size][1], found[4][1], rtol=0, atol=1e-5)
        assert found[size][0] == pytest.approx(found[4][0], rel=1e-4)
    assert WEIGHT not in found[1][0]


def test_equal_weights_are_as_none(tmp_path: Path) -> None:
    def weighed(model: nn.Module, batch: Batch, noise: torch.Generator) -> tuple[Tensor, Mapping[str, Tensor]]:
        return next_token_loss(model, batch, noise)[0], {WEIGHT: torch.tensor(4)}

    plain, equal = llama(), llama()
    assert train(plain, context(tmp_path / "a"), optim("fp32")) == pytest.approx(
        train(equal, context(tmp_path / "b"), optim("fp32"), weighed)
    )
    assert all(torch.equal(a, b) for a, b in zip(plain.parameters(), equal.parameters(), strict=True))


def test_a_run_that_diverges_after_it_was_stopped_took_the_seconds_of_both_processes(tmp_path: Path) -> None:
    ctx = context(tmp_path)

    def slow(*arguments: object) -> tuple[Tensor, Mapping[str, Tensor]]:
        time.sleep(0.3)
        ctx.stop.set()
        return next_token_loss(*arguments)  # type: ignore[arg-type]

    def broken(*arguments: object) -> tuple[Tensor, Mapping[str, Tensor]]:
        return next_token_loss(*arguments)[0] * torch.nan, {}  # type: ignore[arg-type]

    with pytest.raises(Stopped):
        train(llama(), ctx, optim("fp32"), slow)
    ctx = context(tmp_path)
    with pytest.raises(Diverged):
        train(llama(), ctx, optim("fp32"), broken)
    assert ctx.cost["seconds"] > 0.3


@pytest.mark.parametrize("precision", PRECISIONS)
def test_activation_checkpointing_changes_no_number(precision: Precision, tmp_path: Path) -> None:
    plain, again = llama(), llama()
    metrics = train(plain, context(tmp_path / "a"), optim(precision))
    ctx = context(tmp_path / "b", "hardware.activation_checkpointing=true")
    assert train(again, ctx, optim(precision)) == metrics
    assert again.is_activation_checkpointing
    for name, tensor in model_tensors(plain).items():
        assert torch.equal(model_tensors(again)[name], tensor), name


def test_precisions_are_three_different_trainings_of_one_loss(tmp_path: Path) -> None:
    losses = {p: train(llama(), context(tmp_path / p), optim(p))["loss/total"] for p in PRECISIONS}
    assert len(set(losses.values())) == 3
    assert max(losses.values()) == pytest.approx(min(losses.values()), rel=0.03)


@pytest.mark.parametrize(("precision", "least", "most"), [("fp32_master", 0.999, 1.0), ("pure_bf16", 0.012, 0.026)])
def test_a_step_of_a_millionth_moves_every_weight_in_fp32_and_two_percent_of_them_in_bf16(
    precision: Precision, least: float, most: float, tmp_path: Path
) -> None:
    """Specification 5.2: of weights N(0, 0.02), one step of AdamW at lr 1e-6 moves 1.9 % in bf16 without a copy.

    An update of 1e-6 is lost where it is less than half a unit in the last of 8 bits, so from |w| = 4.9e-4 on, and
    P(|w| < 4.9e-4) is 1.96 %.
    """
    torch.manual_seed(0)
    model = nn.Linear(256, 256, bias=False)
    nn.init.normal_(model.weight, std=0.02)
    model.weight.data = model.weight.data.bfloat16().float()  # as they come from a bf16 checkpoint
    before = model.weight.detach().clone()
    inputs = torch.randn(32, 256)

    def loss(layer: nn.Module, *_: object) -> tuple[Tensor, Mapping[str, Tensor]]:
        weight = layer.weight
        assert weight.dtype == torch.bfloat16  # both compute in bf16
        return (layer(inputs.bfloat16()).float() - 1).square().mean(), {}

    train(model, context(tmp_path), optim(precision, steps=1, learning_rate=1e-6, weight_decay=0.0), loss)
    moved = float((model.weight.float() != before).float().mean())
    assert least <= moved <= most


def test_a_bf16_copy_takes_the_place_of_each_parameter_and_hands_fp32_gradients_back() -> None:
    model = llama()
    model.lm_head.weight = model.model.embed_tokens.weight
    parameters = dict(model.named_parameters())
    ids = rows(range(2))["input_ids"]
    with bf16_copy(model):
        assert {p.dtype for p in model.parameters()} == {torch.bfloat16}
        assert model.lm_head.weight is model.model.embed_tokens.weight
        model(input_ids=ids, labels=ids).loss.backward()
    assert dict(model.named_parameters()).keys() == parameters.keys()
    assert all(p is parameters[name] for name, p in model.named_parameters())
    other = llama()
    other.lm_head.weight = other.model.embed_tokens.weight
    cast_parameters(other, torch.bfloat16)
    other(input_ids=ids, labels=ids).loss.backward()
    for name, p in other.named_parameters():
        assert parameters[name].grad.dtype == torch.float32  # type: ignore[union-attr]
        assert torch.equal(parameters[name].grad, p.grad.float()), name  # type: ignore[arg-type, union-attr]
    with pytest.raises(RuntimeError, match="stray"), bf16_copy(model):
        raise RuntimeError("stray")
    assert all(p is parameters[name] for name, p in model.named_parameters())


@pytest.mark.parametrize(
    ("overrides", "expected"),
    [
        (["hardware.activation_checkpointing=true"], "Linear holds no model of transformers"),
        (["hardware.processes=2", "hardware.shard=true"], "Linear does not name its layers; use shard=false"),
    ],
)
def test_a_model_without_layers_is_refused_by_name(overrides: list[str], expected: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=expected):
        train(nn.Linear(2, 2), context(tmp_path, *overrides), optim("fp32"))


def test_sharing_needs_several_processes_and_batches_that_divide() -> None:
    with pytest.raises(ValueError, match="shard=true with processes=1: nothing is shared"):
        plan(["quietstar/main"], ["scale=smoke", "hardware.shard=true"])
    expected = "base.optim.batch_size=8 does not divide into micro-batches of 8 on 2 processes"
    with pytest.raises(ValueError, match=expected):
        plan(["quietstar/main"], ["scale=smoke", "hardware.processes=2"], check=True)
    expected = "base.optim.batch_size=8 does not divide by hardware.processes=7: change either"
    with pytest.raises(ValueError, match=expected):
        plan(["quietstar/main"], ["scale=smoke", "hardware.processes=7"], check=True)


def test_weights_that_explode_in_the_last_update_are_divergence_although_no_loss_has_seen_them(tmp_path: Path) -> None:
    with pytest.raises(Diverged, match=r"\.weight was not finite at step 1; last good values: loss/total="):
        train(llama(), context(tmp_path), optim("fp32", steps=1, learning_rate=1e39))

"""Adapters on the trunk: what trains, what does not, and that a reader of the folder need not know of them."""

from __future__ import annotations

import threading
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

from retrace.core.checkpoint import model_tensors, whole
from retrace.core.context import Context, Stopped
from retrace.core.plan import plan
from retrace.core.store import RunDir
from retrace.core.tracking import Tracker
from retrace.core.train import Group, fit
from retrace.papers.quietstar import cost
from retrace.papers.quietstar.config import Lora, ThoughtConfig, TrainConfig
from retrace.papers.quietstar.lora import add_adapters, merged
from retrace.papers.quietstar.model import ThoughtModel
from retrace.papers.quietstar.pretrained import from_pretrained
from retrace.papers.quietstar.programs import save
from retrace.papers.quietstar.tokenizer import build_tokenizer
from retrace.papers.quietstar.trunks import build_thinker

SIZES = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
FAMILIES: dict[str, tuple[dict[str, float], tuple[str, ...]]] = {  # further sizes, and layers with adapters
    "llama": ({"num_key_value_heads": 2}, ("q_proj", "v_proj", "down_proj")),
    "mistral": ({"num_key_value_heads": 2}, ("q_proj", "k_proj", "v_proj", "o_proj")),
    "qwen2": ({"num_key_value_heads": 2}, ("q_proj", "gate_proj")),  # biases beside q
    "gpt_neox": ({}, ("query_key_value", "dense_4h_to_h")),
    "gpt2": (  # weights lie the other way around
        {"n_embd": 32, "n_layer": 2, "n_head": 4, "attn_pdrop": 0.0, "resid_pdrop": 0.0, "embd_pdrop": 0.0},
        ("c_attn", "c_proj"),
    ),
}
THOUGHTS = ThoughtConfig(num_sampled=2, num_true=2, num_thoughts=2, policy_weight=1.0, start_init="(", end_init=")")


def trunk(family: str) -> PreTrainedModel:
    torch.manual_seed(0)
    sizes, _ = FAMILIES[family]
    settings = AutoConfig.for_model(
        family,
        vocab_size=len(build_tokenizer()),
        initializer_range=0.1,
        pad_token_id=None,
        bos_token_id=1,
        eos_token_id=2,
        **SIZES,
        **sizes,
    )
    return AutoModelForCausalLM.from_config(settings)


def with_adapters(family: str) -> ThoughtModel:
    model = build_thinker(trunk(family), THOUGHTS, build_tokenizer(), seed=0)
    add_adapters(model.trunk, Lora(rank=4, alpha=8, target_modules=FAMILIES[family][1]), seed=0)
    return model


def context(folder: Path) -> tuple[Context, TrainConfig]:
    lora = "train.lora={rank: 4, alpha: 8, target_modules: [q_proj]}"
    overrides = ["scale=smoke", "tracking.wandb=off", "train.optim.steps=20", lora]
    spec = next(s for s in plan(["quietstar/main"], overrides) if s.program == "train")
    run = RunDir(folder)
    folder.mkdir(parents=True, exist_ok=True)
    ctx = Context(
        run=run, seed=0, parents={}, hardware=spec.hardware, tracker=Tracker(run, spec), stop=threading.Event()
    )
    assert isinstance(spec.config, TrainConfig)
    return ctx, spec.config


def log_probs(model: ThoughtModel) -> Tensor:
    ids = torch.arange(6, 26).view(2, 10)
    return model.eval().predict(ids, None, torch.tensor([[3, 9], [0, 5]]), generator=None).mixed_BNV


def train(model: ThoughtModel, ctx: Context, config: TrainConfig, *, stop_at: int | None = None) -> list[float]:
    """Losses without thoughts of every step, on one batch; a wish to stop comes in one of them."""
    ids = torch.randint(6, 60, (2, 12), generator=torch.Generator().manual_seed(0))
    losses: list[float] = []

    def loss(thinker: ThoughtModel, _: object, noise: torch.Generator) -> tuple[Tensor, dict[str, Tensor]]:
        output = thinker(ids, None, generator=noise)
        losses.append(float(output.metrics["loss/base"]))
        if len(losses) == stop_at:
            ctx.stop.set()
        return output.loss, output.metrics

    groups = [
        Group(name, [p for p in ps if p.requires_grad], 0.02, 0.0) for name, ps in model.parameter_groups().items()
    ]
    settings = {"optim": config.train.optim, "groups": groups, "rows": lambda _: {}, "loss": loss}
    fit(model, ctx=ctx, cost=cost.train(config), **settings)  # type: ignore[arg-type]
    return losses


@pytest.mark.parametrize("family", FAMILIES)
def test_adapters_learn_while_the_trunk_stays_and_merge_into_the_same_predictions(family: str, tmp_path: Path) -> None:
    ctx, config = context(tmp_path / "run")
    model = with_adapters(family)
    torch.testing.assert_close(
        log_probs(model), log_probs(build_thinker(trunk(family), THOUGHTS, build_tokenizer(), seed=0))
    )
    frozen = {name: p.detach().clone() for name, p in model.trunk.named_parameters() if not p.requires_grad}
    assert len(frozen) == len(list(trunk(family).parameters()))
    assert all("lora_" in name for name, p in model.trunk.named_parameters() if p.requires_grad)
    losses = train(model, ctx, config)
    assert losses[-1] < 0.9 * losses[0]
    for name, p in model.trunk.named_parameters():
        assert not (name in frozen and not torch.equal(p, frozen[name])), name
    expected = log_probs(model)
    save(model, build_tokenizer(), ctx)
    loaded, _ = from_pretrained(ctx.run.path / "model")
    torch.testing.assert_close(log_probs(loaded), expected, atol=1e-5, rtol=1e-5)
    assert model_tensors(loaded.trunk).keys() == model_tensors(trunk(family)).keys()
    without = {name: tensor for name, tensor in whole(model_tensors(model), keep=True).items() if "lora_B" in name}
    assert all(float(tensor.abs().max()) > 1e-3 for tensor in without.values())  # there was something to merge


def test_a_checkpoint_holds_adapters_and_no_frozen_weight_and_resumes_bit_for_bit(tmp_path: Path) -> None:
    undisturbed, interrupted, resumed = (with_adapters("llama") for _ in range(3))
    train(undisturbed, *context(tmp_path / "a"))
    with pytest.raises(Stopped):
        train(interrupted, *context(tmp_path / "b"), stop_at=9)
    (checkpoint,) = (tmp_path / "b" / "checkpoints").glob("step_*")
    stored = {name for name in load_file(checkpoint / "tensors.safetensors") if name.startswith("model.")}
    trained = {f"model.{name}" for name, p in interrupted.named_parameters() if p.requires_grad}
    assert stored == trained
    train(resumed, *context(tmp_path / "b"))
    after = model_tensors(resumed)
    assert all(torch.equal(after[name], tensor) for name, tensor in model_tensors(undisturbed).items())


def test_a_model_without_adapters_is_merged_into_itself() -> None:
    model = build_thinker(trunk("llama"), THOUGHTS, build_tokenizer(), seed=0)
    tensors = model_tensors(model)
    after = merged(model, tensors)
    assert after.keys() == tensors.keys()
    assert all(after[name] is tensor for name, tensor in tensors.items())


@pytest.mark.parametrize("target", ["lm_head", "embed_tokens", "c_attn"])
def test_layers_that_can_have_no_adapters_are_refused_by_name(target: str) -> None:
    model = build_thinker(trunk("llama"), THOUGHTS, build_tokenizer(), seed=0)
    expected = f"'llama' has no linear layer '{target}' in its body; it has: down_proj, gate_proj, k_proj, o_proj"
    with pytest.raises(ValueError, match=expected):
        add_adapters(model.trunk, Lora(rank=2, alpha=2, target_modules=("q_proj", target)), seed=0)


def test_adapters_in_bf16_weights_are_refused() -> None:
    lora = "train.lora={rank: 4, alpha: 8, target_modules: [q_proj]}"
    with pytest.raises(ValueError, match=r"train: lora with optim\.precision=pure_bf16: .*; use fp32_master"):
        plan(["quietstar/main"], ["scale=paper", lora])
    frozen, whole_trunk = (cost.train(context_config(*o)) for o in ([lora], []))
    assert frozen.memory.trained < 0.5 * whole_trunk.memory.trained
    assert frozen.flops < whole_trunk.flops


def context_config(*overrides: str) -> TrainConfig:
    spec = next(s for s in plan(["quietstar/main"], ["scale=smoke", *overrides]) if s.program == "train")
    assert isinstance(spec.config, TrainConfig)
    return spec.config

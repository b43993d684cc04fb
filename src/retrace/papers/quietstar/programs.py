"""The runs of an experiment: pretrain -> train -> evaluate. Each is called as (config, ctx) -> metrics.

Between the last two may stand `distill`, and `train` may come several times, each after the one before.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from retrace.core.checkpoint import model_tensors, whole
from retrace.core.context import Context
from retrace.core.precision import COMPUTED, KEPT
from retrace.core.train import Batch, Group, fit
from retrace.papers.quietstar import cost
from retrace.papers.quietstar.attention import compile_layers
from retrace.papers.quietstar.config import DistillConfig, EvaluateConfig, PretrainConfig, TrainConfig
from retrace.papers.quietstar.difficulty import gain_by_difficulty
from retrace.papers.quietstar.evaluation import score_tasks
from retrace.papers.quietstar.heldout import page_of_thoughts
from retrace.papers.quietstar.lora import add_adapters, merged
from retrace.papers.quietstar.model import ThoughtModel
from retrace.papers.quietstar.pretrained import from_pretrained, save_pretrained
from retrace.papers.quietstar.student import student_loss
from retrace.papers.quietstar.trunks import base_tokenizer, build_thinker, build_trunk, load_base, next_stage
from retrace.papers.quietstar.windows import Windows

HELDOUT_SEED = 0  # the same held-out text for every run, whatever its seed


def pretrain(config: PretrainConfig, ctx: Context) -> dict[str, float]:
    """Train a base model from scratch on the corpus with asides."""
    tokenizer = base_tokenizer(config.corpus)
    trunk = build_trunk(config.model, tokenizer, seed=config.seed)

    def loss(model: nn.Module, batch: Batch, _: torch.Generator) -> tuple[Tensor, Mapping[str, Tensor]]:
        labels = batch["input_ids"].masked_fill(batch["attention_mask"] == 0, -100)
        value = model(
            input_ids=batch["input_ids"], labels=labels, use_cache=False
        ).loss  # right padding: no mask needed
        return value, {"loss/base": value.detach()}

    group = Group("trunk", list(trunk.parameters()), config.optim.learning_rate, config.optim.weight_decay)
    metrics = fit(
        trunk,
        ctx=ctx,
        optim=config.optim,
        groups=[group],
        rows=Windows(config.corpus, tokenizer, split="base", seed=config.seed, count=config.num_windows),
        loss=loss,
        cost=cost.pretrain(config),
    )
    save(trunk, tokenizer, ctx)
    return metrics


def train(config: TrainConfig, ctx: Context) -> dict[str, float]:
    """Continue training the base, or a stage before this one, with thoughts, on the corpus without asides."""
    model, tokenizer = start(config, ctx)
    settings = config.train
    if ctx.hardware.compile:
        compile_layers(model.trunk)
    if settings.lora is not None:
        add_adapters(model.trunk, settings.lora, seed=config.seed)
    rates = {
        "trunk": settings.optim.learning_rate,
        "mixing_head": settings.mixing_head_learning_rate,
        "meta": settings.meta_learning_rate,
    }
    decays = {"trunk": settings.optim.weight_decay}
    groups = [
        Group(name, [p for p in parameters if p.requires_grad], rates[name], decays.get(name, 0.0))
        for name, parameters in model.parameter_groups().items()
    ]

    def loss(wrapped: nn.Module, batch: Batch, noise: torch.Generator) -> tuple[Tensor, Mapping[str, Tensor]]:
        output = wrapped(batch["input_ids"], batch["attention_mask"], generator=noise)
        return output.loss, output.metrics

    metrics = fit(
        model,
        ctx=ctx,
        optim=settings.optim,
        groups=groups,
        rows=Windows(config.corpus, tokenizer, split="continued", seed=config.seed, count=settings.num_windows),
        loss=loss,
        cost=cost.train(config),
    )
    save(model, tokenizer, ctx)
    return metrics


def start(config: TrainConfig, ctx: Context) -> tuple[ThoughtModel, PreTrainedTokenizerBase]:
    """The model that continued training begins with: the base, or what the stage before hands on."""
    dtype = KEPT[config.train.optim.precision]
    if config.keeps is None:
        trunk, tokenizer = load_base(config.model, ctx, dtype=dtype)
        return build_thinker(trunk, config.thoughts, tokenizer, seed=config.seed), tokenizer
    before, tokenizer = from_pretrained(ctx.parents["before"].path / "model", dtype=dtype)
    return next_stage(before, config.thoughts, tokenizer, keeps=config.keeps, seed=config.seed), tokenizer


def distill(config: DistillConfig, ctx: Context) -> dict[str, float]:
    """Train a model that never thinks on what the thinking one predicts."""
    optim, folder = config.optim, ctx.parents["teacher"].path / "model"
    dtype = KEPT[optim.precision]
    teacher, tokenizer = from_pretrained(folder, dtype=dtype, device=ctx.hardware.device)
    trunk, _ = load_base(config.model, ctx, dtype=dtype)
    if config.student.start == "teacher":
        trunk.load_state_dict(teacher.trunk.state_dict())

    def loss(model: nn.Module, batch: Batch, noise: torch.Generator) -> tuple[Tensor, Mapping[str, Tensor]]:
        return student_loss(model, teacher, batch, noise, config=config)

    metrics = fit(
        trunk,
        ctx=ctx,
        optim=optim,
        groups=[Group("trunk", list(trunk.parameters()), optim.learning_rate, optim.weight_decay)],
        rows=Windows(config.corpus, tokenizer, split="continued", seed=config.seed, count=config.num_windows),
        loss=loss,
        cost=cost.distill(config),
    )
    plain = config.teacher.model_copy(update={"num_sampled": 0})
    save(build_thinker(trunk, plain, tokenizer, seed=config.seed), tokenizer, ctx)
    return metrics


def evaluate(config: EvaluateConfig, ctx: Context) -> dict[str, float]:
    """Score the trained model with and without thoughts: tasks through lm-eval, and held-out text token by token."""
    if not ctx.is_main:
        return {}  # one process is enough; the others would only repeat it
    device, dtype = ctx.hardware.device, COMPUTED[config.eval.precision]
    trunk, tokenizer = load_base(config.model, ctx, dtype=dtype)
    base = build_thinker(trunk, config.thoughts, tokenizer, seed=config.seed).to(device).eval()  # is never let think
    thinker, _ = from_pretrained(ctx.parents["model"].path / "model", dtype=dtype, device=device)
    used = cost.evaluate(config)
    metrics = score_tasks(thinker, base, tokenizer, config=config, ctx=ctx)
    texts = Windows(config.corpus, tokenizer, split="heldout", seed=HELDOUT_SEED, count=config.eval.num_windows)
    metrics |= gain_by_difficulty(thinker, base, texts.every(), config=config, ctx=ctx)
    if config.thoughts.num_sampled > 0 and config.eval.page_windows > 0:
        ctx.attach("thoughts", page_of_thoughts(thinker, tokenizer, texts.every(), config=config, ctx=ctx))
    ctx.cost.update(tokens=used.tokens, flops=used.flops)
    return metrics


def save(model: ThoughtModel | PreTrainedModel, tokenizer: PreTrainedTokenizerBase, ctx: Context) -> None:
    """Leave the final model in the run's folder `model`, as transformers does; thoughts lie beside it.

    Adapters are merged into the weights that they stand beside. All processes must call it together.
    """
    tensors = merged(model, whole(model_tensors(model), keep=ctx.is_main))
    if not ctx.is_main:
        return
    with ctx.run.folder("model") as folder:
        if isinstance(model, ThoughtModel):
            save_pretrained(model, folder, tokenizer, tensors=tensors)
        else:
            model.save_pretrained(folder, state_dict=tensors)
            tokenizer.save_pretrained(folder)

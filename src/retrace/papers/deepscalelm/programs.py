"""The runs of an experiment. Each is called as (config, ctx) -> metrics."""

from __future__ import annotations

import logging
import math
import shutil

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from retrace.core.checkpoint import model_tensors, whole
from retrace.core.context import Context, Diverged
from retrace.core.record import Record
from retrace.core.store import RunDir
from retrace.core.train import Batch, Group, fit
from retrace.papers.deepscalelm import corpora, cost
from retrace.papers.deepscalelm.answering import Answerer, accuracy, load_questions
from retrace.papers.deepscalelm.config import (
    FinetuneConfig,
    MeasureConfig,
    PrepareConfig,
    SelectConfig,
    TrainConfig,
)
from retrace.papers.deepscalelm.initial import moments_at_start
from retrace.papers.deepscalelm.model import Transformer
from retrace.papers.deepscalelm.objective import Predictor, examples, heldout_loss
from retrace.papers.deepscalelm.variants import make

log = logging.getLogger("retrace")
MODEL = "model"
MAX_EXPONENT = 700.0  # of a loss in nats whose perplexity is still a number


def measure(config: MeasureConfig, ctx: Context) -> dict[str, float]:
    """Moments of a fresh model, forward and backward, beside the theory's."""
    if not ctx.is_main:
        return {}
    metrics, profiles = moments_at_start(config, device=ctx.hardware.device)
    ctx.notes["profiles"] = profiles
    used = cost.measure(config)
    ctx.cost.update(tokens=used.tokens, flops=used.flops)
    return metrics


def prepare(config: PrepareConfig, ctx: Context) -> dict[str, float]:
    """Real text as windows of tokens."""
    if not ctx.is_main:
        return {}
    with ctx.run.folder(corpora.FOLDER) as folder:
        corpora.prepare(config, folder)
    used = cost.prepare(config)
    ctx.cost.update(tokens=used.tokens, flops=used.flops)
    return {"text/windows": float(config.num_windows)}


def train(config: TrainConfig, ctx: Context) -> dict[str, float]:
    """Train from scratch at one learning rate; the loss on validation text is what a choice looks at."""
    shape, optim = config.model, config.optim
    model = Transformer(shape, make(shape, config.method), seed=config.seed)
    if ctx.hardware.compile:
        for block in (*model.stack.layers, *(model.decoder.layers if model.decoder is not None else ())):
            block.compile()
    ids_WT = _windows(config, ctx, "train")
    share = config.objective.mask_share

    def loss(wrapped: nn.Module, batch: Batch, noise: torch.Generator) -> tuple[Tensor, dict[str, Tensor]]:
        return wrapped(examples(batch["input_ids"], shape, mask_share=share, noise=noise)), {}

    matrices = [p for p in model.parameters() if p.dim() > 1]
    others = [p for p in model.parameters() if p.dim() <= 1]  # biases, norms, trained scales: no decay
    groups = [
        Group("matrices", matrices, optim.learning_rate, optim.weight_decay),
        Group("others", others, optim.learning_rate, 0.0),
    ]
    metrics = fit(
        Predictor(model),
        ctx=ctx,
        optim=optim,
        groups=groups,
        rows=corpora.Rows(ids_WT, seed=config.seed),
        loss=loss,
        cost=cost.train(config),
    )
    tensors = whole(model_tensors(model), keep=ctx.is_main)
    if not ctx.is_main:
        return metrics
    with ctx.run.folder(MODEL) as folder:
        save_file(tensors, folder / "model.safetensors")
    if ctx.hardware.shard:  # this process has a part of each weight only
        model = load(config, ctx.run).to(ctx.hardware.device)
    found = _heldout(config, ctx, model, "valid", ids_WT)
    if not math.isfinite(found["valid/loss"]):
        raise Diverged(optim.steps, metrics, what="valid/loss")
    return {**metrics, **found}


def select(config: SelectConfig, ctx: Context) -> dict[str, float]:
    """The training that is best on validation text, and its loss on test text, which no choice has looked at.

    Raises Diverged where every training diverged.
    """
    if not ctx.is_main:
        return {}
    runs = [ctx.parents[f"rate_{index}"] for index in range(len(config.learning_rates))]
    records = [Record.load(run.path / "record.json") for run in runs]
    good = [i for i, record in enumerate(records) if record.status == "DONE"]
    if not good:
        first = min(record.metrics.get("diverged_at", 0.0) for record in records)
        raise Diverged(int(first), {}, what="the loss of every training")
    best = min(good, key=lambda i: records[i].metrics["valid/loss"])
    chosen = records[best]
    _repeat_curves(chosen, ctx)
    with ctx.run.folder(MODEL) as folder:
        shutil.copyfile(runs[best].path / MODEL / "model.safetensors", folder / "model.safetensors")
    model = load(config, ctx.run).to(ctx.hardware.device)
    found = _heldout(config, ctx, model, "test", _windows(config, ctx, "train"))
    used = cost.select(config)
    ctx.cost.update(tokens=used.tokens, flops=used.flops)
    return {
        **chosen.metrics,
        **found,
        "test/perplexity": math.exp(min(found["test/loss"], MAX_EXPONENT)),
        "select/learning_rate": config.learning_rates[best],
        "select/at_lowest_rate": float(best == 0),
        "select/at_highest_rate": float(best == len(runs) - 1),
        "select/diverged_rates": float(len(records) - len(good)),
    }


def finetune(config: FinetuneConfig, ctx: Context) -> dict[str, float]:
    """The selected model learns to answer questions of several choices; accuracy on others."""
    shape, settings = config.model, config.transfer
    trained, asked = load_questions(config, ctx.parents)
    answerer = Answerer(load(config, ctx.parents["model"]), seed=config.seed)

    def rows(chosen: range) -> Batch:
        return trained.batch(chosen, seed=config.seed)

    def loss(wrapped: nn.Module, batch: Batch, _: torch.Generator) -> tuple[Tensor, dict[str, Tensor]]:
        scores_BC = wrapped(batch["input_ids"], batch["attention_mask"])
        return nn.functional.cross_entropy(scores_BC.float(), batch["answers"]), {}

    optim = settings.optim
    metrics = fit(
        answerer,
        ctx=ctx,
        optim=optim,
        groups=[
            Group("all", [p for p in answerer.parameters() if p.requires_grad], optim.learning_rate, optim.weight_decay)
        ],
        rows=rows,
        loss=loss,
        cost=cost.finetune(config),
    )
    tensors = whole(model_tensors(answerer), keep=ctx.is_main and ctx.hardware.shard)
    if not ctx.is_main:
        return metrics
    if ctx.hardware.shard:  # this process has a part of each weight only
        answerer = Answerer(load(config, ctx.parents["model"]), seed=config.seed)
        answerer.load_state_dict(tensors)
    right = accuracy(answerer, asked, device=ctx.hardware.device)
    log.info("%s: %d layers, %.3f right", settings.questions.kind, shape.num_layers, right)
    return {"questions/loss": metrics["loss/total"], "questions/accuracy": right}


def load(config: TrainConfig | SelectConfig | FinetuneConfig, run: RunDir) -> Transformer:
    """The model that a run has left."""
    model = Transformer(config.model, make(config.model, config.method), seed=config.seed)
    model.load_state_dict(load_file(run.path / MODEL / "model.safetensors"))
    return model


def _windows(config: TrainConfig | SelectConfig, ctx: Context, split: corpora.Split) -> Tensor:
    count = config.num_windows if split == "train" else config.num_heldout
    return corpora.windows(
        config.corpus, split, count=count, length=config.model.seq_len, seed=config.seed, parents=ctx.parents
    )


def _heldout(
    config: TrainConfig | SelectConfig, ctx: Context, model: Transformer, split: corpora.Split, train_WT: Tensor
) -> dict[str, float]:
    found = heldout_loss(
        model,
        _windows(config, ctx, split),
        mask_share=config.objective.mask_share,
        unigram_V=corpora.unigram(train_WT, vocab_size=config.model.vocab_size),
        device=ctx.hardware.device,
    )
    return {f"{split}/{name}": value for name, value in found.items()}


def _repeat_curves(chosen: Record, ctx: Context) -> None:
    """The curves of the chosen training are those of the choice, as its metrics are."""
    ctx.tracker.resume(-1)
    steps: dict[int, dict[str, float]] = {}
    for name, curve in chosen.series.items():
        for step, value in curve:
            steps.setdefault(step, {})[name] = value
    for step, values in sorted(steps.items()):
        ctx.tracker.log(step, values)

"""The trainings of an experiment. Each is called as (config, ctx) -> metrics; `evaluation` is a file of its own."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from retrace.core import parallel
from retrace.core.checkpoint import model_tensors, whole
from retrace.core.context import Context
from retrace.core.cost import Cost
from retrace.core.data import derive_seed
from retrace.core.optim import Optim
from retrace.core.precision import KEPT
from retrace.core.train import WEIGHT, Batch, Group, LossFunction, fit
from retrace.core.weights import note_commit
from retrace.papers.mm1 import cost
from retrace.papers.mm1.choices import PretrainedDecoder, PretrainedEncoder, vocab_size
from retrace.papers.mm1.config import PARTS, Rows
from retrace.papers.mm1.contrastive import ContrastiveModel
from retrace.papers.mm1.decoder import Decoder, build_decoder, load_decoder
from retrace.papers.mm1.encoder import VisionEncoder, build_encoder, load_encoder
from retrace.papers.mm1.experts import add_experts
from retrace.papers.mm1.mixture import Mixture
from retrace.papers.mm1.model import MultimodalModel
from retrace.papers.mm1.pairs import Pairs
from retrace.papers.mm1.pretrained import Saved, from_pretrained, load_model, save_pretrained
from retrace.papers.mm1.program_configs import (
    DecoderConfig,
    EncoderConfig,
    FinetuneConfig,
    PretrainConfig,
    TokenizerConfig,
)
from retrace.papers.mm1.reconstruction import ReconstructiveModel, sample_prefixes
from retrace.papers.mm1.rows import IGNORED, PackedBatch
from retrace.papers.mm1.sources import (
    MARKS,
    TOKENIZER,
    ahead,
    image_id,
    load_tokenizer,
    source,
    stream,
    train_tokenizer,
    window_of,
)
from retrace.papers.mm1.stream import Stream, together

MODEL = "model"


def prepare(config: TokenizerConfig, ctx: Context) -> dict[str, float]:
    """The tokenizer of real text."""
    if not ctx.is_main:
        return {}
    tokenizer, ctx.notes["data"] = train_tokenizer(config.data)
    with ctx.run.folder(TOKENIZER) as folder:
        tokenizer.save_pretrained(folder)
    used = cost.prepare(config)
    ctx.cost.update(tokens=used.tokens, flops=used.flops)
    return {"tokenizer/size": float(len(tokenizer))}


def pretrain_encoder(config: EncoderConfig, ctx: Context) -> dict[str, float]:
    """A vision encoder from random weights, on images with their captions or on the images alone (Section 1.2)."""
    settings = config.encoder
    tokenizer = load_tokenizer(config.data, None, ctx)
    encoder = build_encoder(config.vision, seed=config.seed)
    pad = tokenizer.pad_token_id
    assert isinstance(pad, int)
    pairs = Pairs(
        source(config.data, settings.captions, tokenizer, seed=config.seed, purpose="encoder"),
        max_tokens=settings.text_tower.max_tokens,
        image_size=config.vision.image_size,
        pad_id=pad,
        image_id=image_id(tokenizer),
        seed=config.seed,
        marks=ctx.run.path / MARKS,
        write=ctx.is_main,
    )
    model: nn.Module
    if settings.objective == "contrastive":
        model = ContrastiveModel(encoder, settings.text_tower, vocab_size=len(tokenizer), seed=config.seed)
    else:
        model = ReconstructiveModel(encoder, seed=config.seed)
    optim = settings.optim
    metrics = fit(
        model,
        ctx=ctx,
        optim=optim,
        groups=[_group("all", model, optim)],
        rows=ahead(pairs, optim, ctx),
        loss=_encoder_loss(settings.objective, num_patches=encoder.grid**2),
        cost=cost.pretrain_encoder(config),
    )
    _save(encoder, ctx)
    _note(pairs.stream, optim, ctx)
    return metrics


def _encoder_loss(objective: str, *, num_patches: int) -> LossFunction:
    """Weighed by the pairs that could be read."""

    def loss(wrapped: nn.Module, batch: Batch, noise: torch.Generator) -> tuple[Tensor, Mapping[str, Tensor]]:
        images_M3RR = batch["images_B3RR"]
        if objective == "contrastive":
            output = wrapped(images_M3RR, batch["input_ids_BT"], batch["attention_mask_BT"])
        else:
            output = wrapped(images_M3RR, sample_prefixes(len(images_M3RR), num_patches, generator=noise))
        return output.loss, {**output.metrics, WEIGHT: batch["real_B"].sum()}

    return loss


def pretrain_decoder(config: DecoderConfig, ctx: Context) -> dict[str, float]:
    """A language model from random weights, on the experiment's text."""
    settings = config.decoder
    tokenizer = load_tokenizer(config.data, settings, ctx)
    decoder = build_decoder(settings.shape, vocab_size=len(tokenizer), seed=config.seed)
    rows, words = Rows(seq_len=settings.seq_len, max_images=1, mask="documents"), settings.caption_words
    text = stream(
        config.data,
        Mixture(weights={"text": 1 - words, "caption_words": words / 2, "interleaved_words": words / 2}),
        tokenizer,
        window=window_of(rows, tokenizer, image_tokens=1),
        image_size=1,
        seed=config.seed,
        purpose="decoder",
        ctx=ctx,
    )
    metrics = fit(
        decoder,
        ctx=ctx,
        optim=settings.optim,
        groups=[_group("decoder", decoder, settings.optim)],
        rows=ahead(text, settings.optim, ctx),
        loss=_loss,
        cost=cost.pretrain_decoder(config),
    )
    _save(decoder, ctx)
    _note(text, settings.optim, ctx)
    return metrics


def pretrain(config: PretrainConfig, ctx: Context) -> dict[str, float]:
    """Joint multimodal pre-training of a pre-trained encoder, a new connector and a text-pretrained decoder."""
    tokenizer = load_tokenizer(config.data, config.decoder, ctx)
    settings = config.pretrain
    model = MultimodalModel(
        _encoder(config, ctx), config.connector, _decoder(config, ctx), image_token_id=image_id(tokenizer),
        seed=config.seed,
    )  # fmt: skip
    model.train_only(settings.trained)
    _warn_of_positions(model.decoder, settings.rows, ctx, key="pretrain.rows")
    rows = stream(
        config.data,
        settings.mixture,
        tokenizer,
        window=window_of(settings.rows, tokenizer, image_tokens=config.connector.num_tokens),
        image_size=config.image_size,
        seed=config.seed,
        purpose="pretrain",
        ctx=ctx,
    )
    masked = rows if settings.rows.mask == "documents" else _unmasked(rows)
    metrics = _fit_whole(model, masked, settings.optim, cost.pretrain(config), ctx, encoder_rate=settings.encoder_rate)
    _note(rows, settings.optim, ctx)
    return metrics


def finetune(config: FinetuneConfig, ctx: Context) -> dict[str, float]:
    """Instructions behind the pre-training, at its resolution or a higher one (3.5, 2.4)."""
    tokenizer = load_tokenizer(config.data, config.decoder, ctx)
    settings = config.finetune
    model = load_model(ctx.parents["model"].path / MODEL, dtype=KEPT[settings.optim.precision])
    model.train_only(settings.trained)
    model.resize_images(settings.encoder_size)
    _warn_of_positions(model.decoder, settings.rows, ctx, key="finetune.rows")
    asked: dict[str, Any] = {"image_tokens": config.connector.num_tokens, "sub_images": settings.sub_images}
    window = window_of(settings.rows, tokenizer, too_long="trim", **asked)
    rows = stream(
        config.data,
        Mixture(weights={"instruction": 1.0}),
        tokenizer,
        window=window,
        image_size=settings.image_size,
        seed=config.seed,
        purpose="finetune",
        ctx=ctx,
    )
    masked = rows if settings.rows.mask == "documents" else _unmasked(rows)
    metrics = _fit_whole(model, masked, settings.optim, cost.finetune(config), ctx)
    _note(rows, settings.optim, ctx)
    return {f"finetune/{name}": value for name, value in metrics.items()}


def _fit_whole(
    model: MultimodalModel,
    rows: Callable[[range], Mapping[str, Tensor]],
    optim: Optim,
    used: Cost,
    ctx: Context,
    *,
    encoder_rate: float = 1.0,
) -> dict[str, float]:
    rates = {part: optim.learning_rate * (encoder_rate if part == "encoder" else 1.0) for part in PARTS}
    groups = [Group(n, p, rates[n], optim.weight_decay) for n, p in model.parameter_groups().items()]
    metrics = fit(model, ctx=ctx, optim=optim, groups=groups, rows=ahead(rows, optim, ctx), loss=_loss, cost=used)
    _save(model, ctx)
    return metrics


def _loss(wrapped: nn.Module, batch: Batch, _: torch.Generator) -> tuple[Tensor, Mapping[str, Tensor]]:
    """Weighed by labels, so that rows with many of them count as much in whatever micro-batch they stand."""
    output = wrapped(PackedBatch(**batch))
    return output.loss, {**output.metrics, WEIGHT: (batch["labels_BL"] != IGNORED).sum()}


def _note(rows: Stream, optim: Optim, ctx: Context) -> None:
    """What was read, and what was wrong with it, into the run's record. All processes must call it together."""
    ctx.notes["data"] = together(parallel.from_all(rows.notes(optim.steps * optim.batch_size)))


def _warn_of_positions(decoder: Decoder, rows: Rows, ctx: Context, *, key: str) -> None:
    """One sentence where a document may be longer than what the decoder was trained for."""
    if rows.seq_len > decoder.num_positions:
        ctx.warn(
            f"{key}.seq_len={rows.seq_len}: the decoder was trained on {decoder.num_positions} positions, and longer "
            f"documents go beyond them: choose {key}.seq_len={decoder.num_positions}, or another decoder"
        )


def _unmasked(rows: Callable[[range], Mapping[str, Tensor]]) -> Callable[[range], Mapping[str, Tensor]]:
    """The same rows, each as if it were one document: what stands before a document in its row is seen from it."""

    def joined(chosen: range) -> Mapping[str, Tensor]:
        batch = dict(rows(chosen))
        one_BL = (batch["document_ids_BL"] > 0).long()
        batch |= {"document_ids_BL": one_BL, "position_ids_BL": (one_BL.cumsum(1) - 1) * one_BL}
        return batch

    return joined


def _encoder(config: PretrainConfig, ctx: Context) -> VisionEncoder:
    """Of parent `encoder`, or pretrained elsewhere and interpolated to the experiment's resolution."""
    dtype = KEPT[config.pretrain.optim.precision]
    if isinstance(config.encoder, PretrainedEncoder):
        chosen = config.encoder
        chosen.check()
        loaded = load_encoder(chosen.place(), image_size=config.image_size, revision=chosen.revision, dtype=dtype)
        note_commit(ctx.notes, chosen.place(), revision=chosen.revision)
        return loaded
    found = from_pretrained(ctx.parents["encoder"].path / MODEL, dtype=dtype)
    assert isinstance(found, VisionEncoder)
    return found


def _decoder(config: PretrainConfig, ctx: Context) -> Decoder:
    """Of parent `decoder`, or pretrained elsewhere; experts begin as copies of its MLPs."""
    dtype, experts = KEPT[config.pretrain.optim.precision], config.experts
    if isinstance(config.decoder, PretrainedDecoder):
        rows = vocab_size(config.data, config.decoder)
        chosen = config.decoder
        chosen.check()
        new: dict[str, Any] = {"experts": experts, "vocab_size": rows, "seed": config.seed}
        read = load_decoder(chosen.place(), revision=chosen.revision, dtype=dtype, **new)
        note_commit(ctx.notes, chosen.place(), revision=chosen.revision)
        return read
    found = from_pretrained(ctx.parents["decoder"].path / MODEL, dtype=dtype)
    assert isinstance(found, Decoder)
    if experts is None:
        return found
    torch.manual_seed(derive_seed(config.seed, "experts"))
    add_experts(found.trunk, experts, copied=True)
    return Decoder(found.trunk, experts=experts)


def _group(name: str, model: nn.Module, optim: Optim) -> Group:
    trained: list[Any] = [p for p in model.parameters() if p.requires_grad]
    return Group(name, trained, optim.learning_rate, optim.weight_decay)


def _save(model: Saved, ctx: Context) -> None:
    """Leave the model in the run's folder. All processes must call it together."""
    tensors = whole(model_tensors(model), keep=ctx.is_main)
    if ctx.is_main:
        with ctx.run.folder(MODEL) as folder:
            save_pretrained(model, folder, tensors=tensors)

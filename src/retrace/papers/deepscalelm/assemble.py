"""What methods are put together from: stacks of layers, Xavier's numbers, and changes to a layer. No torch."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from typing import Literal

from retrace.papers.deepscalelm.scheme import AttentionInit, FeedForwardInit, LayerInit, ModelInit, Residual
from retrace.papers.deepscalelm.shape import ModelShape

PLAIN = Residual()
Part = Literal["encoder", "decoder", "beside"]  # where a layer stands; beside: in a decoder beside an encoder


def parts(shape: ModelShape) -> tuple[Part, Part | None]:
    if shape.kind == "encoder_decoder":
        return "encoder", "beside"
    return shape.kind, None


def assemble(shape: ModelShape, method: str, layer: Callable[[Part, int], LayerInit]) -> ModelInit:
    """The stacks of `shape`, layer by layer from 1, with embeddings and head of 1/sqrt(d)."""

    def stack(part: Part | None) -> tuple[LayerInit, ...]:
        if part is None:
            return ()
        return tuple(layer(part, number) for number in range(1, shape.num_layers + 1))

    std = shape.hidden_size**-0.5
    first, second = parts(shape)
    return ModelInit(method, std, std, stack(first), stack(second), head_std=std)


def xavier(shape: ModelShape, *, cross: bool = False, residual: Residual = PLAIN) -> LayerInit:
    """One layer of Xavier's standard deviations."""
    square = math.sqrt(1 / shape.hidden_size)
    wide = math.sqrt(2 / (shape.hidden_size + shape.intermediate_size))
    attention = AttentionInit(square, square, square, square, residual)
    return LayerInit(attention, FeedForwardInit(wide, wide, residual), attention if cross else None)


def with_attentions(layer: LayerInit, change: Callable[[AttentionInit], AttentionInit]) -> LayerInit:
    cross = None if layer.cross is None else change(layer.cross)
    return replace(layer, attention=change(layer.attention), cross=cross)


def joined_by(layer: LayerInit, residual: Residual) -> LayerInit:
    joined = with_attentions(layer, lambda a: replace(a, residual=residual))
    return replace(joined, feed_forward=replace(layer.feed_forward, residual=residual))


def gained(layer: LayerInit, gain: float, *, scores: float = 1.0) -> LayerInit:
    """Values, outputs and feed-forward times `gain`, queries and keys times `scores`."""

    def attention(a: AttentionInit) -> AttentionInit:
        return replace(a, query=a.query * scores, key=a.key * scores, value=a.value * gain, output=a.output * gain)

    wide = layer.feed_forward
    made = with_attentions(layer, attention)
    return replace(made, feed_forward=replace(wide, inner=wide.inner * gain, outer=wide.outer * gain))

"""A method as an experiment names it: with its options, and with one thing of it replaced where an arm isolates it."""

from __future__ import annotations

import inspect
import math
from dataclasses import replace
from typing import Any, Literal

from pydantic import Field

from retrace.core.config import Frozen
from retrace.papers.deepscalelm.methods import METHODS, initialise
from retrace.papers.deepscalelm.scheme import AttentionInit, LayerInit, ModelInit
from retrace.papers.deepscalelm.shape import ModelShape


class Variant(Frozen):
    """One method of methods.py. `options` are its keyword arguments."""

    name: str
    options: dict[str, float | str] | None
    embeddings_of: str | None = None  # a method that gives the embeddings, the head and the logit scale instead
    score_variance: float | None = Field(None, gt=0)  # of attention scores of unit input, instead of the method's
    corr0: Literal["assumed", "measured"] = (
        "assumed"  # of the input, where the method asks: its own, or that of the data
    )


def make(shape: ModelShape, variant: Variant, *, corr0: float | None = None) -> ModelInit:
    """The `ModelInit` of a variant; `corr0` is what was measured on the input. Raises ValueError as the method does."""
    options: dict[str, Any] = dict(variant.options or {})
    asks = "corr0" in inspect.signature(METHODS[variant.name]).parameters if variant.name in METHODS else False
    if variant.corr0 == "measured" and corr0 is not None and asks and "corr0" not in options:
        options["corr0"] = corr0
    made = initialise(shape, variant.name, **options)
    if variant.embeddings_of is not None:
        other = initialise(shape, variant.embeddings_of)
        made = replace(
            made,
            token_std=other.token_std,
            position_std=other.position_std,
            head_std=other.head_std,
            logit_scale=other.logit_scale,
        )
    if variant.score_variance is None:
        return made
    std = variant.score_variance**0.25 / math.sqrt(shape.hidden_size)  # S = (d std^2)^2, Section 1.6

    def louder(layer: LayerInit) -> LayerInit:
        def change(attention: AttentionInit) -> AttentionInit:
            return replace(attention, query=std, key=std)

        cross = None if layer.cross is None else change(layer.cross)
        return replace(layer, attention=change(layer.attention), cross=cross)

    return replace(made, layers=tuple(map(louder, made.layers)), decoder_layers=tuple(map(louder, made.decoder_layers)))

"""Moments of a whole transformer at initialisation, sub-block by sub-block, forward and backward. No torch.

    profile(shape, METHODS["dslm"](shape))          a thousand layers in a fraction of a second

The recursion of Section 2.2 (tag B), for any placement of norms, skip, scale, activation and kind of model. Branches
are taken to be independent of the residual, as they are before training, and norms to divide by the standard deviation
that they meet on average. Forward moments are of training mode, with dropout.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from math import sqrt
from typing import Any

import numpy as np

from retrace.papers.deepscalelm.activations import HIDDEN
from retrace.papers.deepscalelm.attention_moments import (
    Weights,
    attention,
    attention_backward,
    cross_attention,
    cross_attention_backward,
    score_variance,
)
from retrace.papers.deepscalelm.components import (
    SOFTMAX_LIMIT,
    GradMoments,
    Moments,
    dropout,
    dropout_backward,
    linear,
    linear_backward,
    ratio,
    residual,
    residual_backward,
)
from retrace.papers.deepscalelm.correlations import Array
from retrace.papers.deepscalelm.embedding_moments import POSITIONS, Table, embeddings, zipf_collision
from retrace.papers.deepscalelm.scheme import AttentionInit, FeedForwardInit, LayerInit, ModelInit, Residual
from retrace.papers.deepscalelm.shape import ModelShape
from retrace.papers.deepscalelm.softmax_weights import MAX_SPREAD

CAUSAL = (
    "causal attention: positions are taken alike, and the first get far more gradient than the last; measured with 12 "
    "and 48 layers: variance within 6 %, correlation 14 %, gradient 24 % (Post-LN with Xavier: a factor of 3 to 10)"
)
Backward = Callable[[GradMoments], tuple[GradMoments, GradMoments | None]]  # at the branch's input, and at the memory


@dataclass(frozen=True)
class Profile:
    """Moments at places along the residual stream: behind the embeddings, then behind each sub-block.

    Arrays have one value a place. `var`, `corr`: of the sum of skip and branch, before the norm that "post" puts behind
    it. `branch_var`: of the branch with its scale and dropout, NaN for embeddings. `grad_var`, `grad_corr`: of the
    gradient at what the next sub-block reads (behind that norm), where the last place of the model has variance 1 and
    the correlation that was asked for. `approximate`: what of the numbers rests on less than a checked closed form.
    """

    places: tuple[str, ...]  # "embeddings", "1.attention", "1.feed_forward", ...; "decoder.1.cross" beside an encoder
    var: Array
    corr: Array
    branch_var: Array
    grad_var: Array
    grad_corr: Array
    approximate: tuple[str, ...] = ()


@dataclass(frozen=True)
class _SubBlock:
    """What the way back needs to know of a sub-block; `divisor`: of the norm in front of its branch, 1 without."""

    name: str
    joined: Moments
    branch_var: float
    skip: float
    scale: float
    divisor: float
    backward: Backward


@dataclass
class _Walk:
    """One pass through the model; collects what is approximate."""

    shape: ModelShape
    init: ModelInit
    weights: Weights | None
    finite_width: bool
    notes: dict[str, None] = field(default_factory=dict)

    @property
    def post(self) -> bool:
        return self.init.norms and self.shape.placement == "post"

    def normed(self, x: Moments) -> Moments:
        return Moments(0.0, 1.0, x.corr) if self.init.norms else x

    def stack(
        self, start: Moments, layers: Sequence[LayerInit], prefix: str, *, causal: bool, memory: Moments | None = None
    ) -> list[_SubBlock]:
        """Forward through the layers; `start` is the embeddings."""
        if causal:
            self.note(CAUSAL)
        x, found = (self.normed(start) if self.post else start), []
        profiled = 1.0  # Admin's skip^2: variances so far
        for name, rule, branch in self.branches(layers, prefix, causal=causal, memory=memory):
            read = self.normed(x)
            out, backward = branch(read)
            if rule.profiled:
                self.note("profiled skips: predicted with dropout on, and measured without")
            skip = sqrt(profiled) if rule.profiled else rule.skip
            profiled = profiled * float(x.var) + float(out.var)
            joined = residual(x, out, skip=skip, scale=rule.scale)
            divisor = float(x.var) if self.init.norms and not self.post else 1.0
            found.append(_SubBlock(name, joined, rule.scale**2 * float(out.var), skip, rule.scale, divisor, backward))
            x = self.normed(joined) if self.post else joined
        return found

    def branches(
        self, layers: Sequence[LayerInit], prefix: str, *, causal: bool, memory: Moments | None
    ) -> Iterator[tuple[str, Residual, Callable[[Moments], tuple[Moments, Backward]]]]:
        """Name, residual and forward function of each sub-block, in order."""
        for number, layer in enumerate(layers, start=1):
            own, cross, wide = layer.attention, layer.cross, layer.feed_forward
            yield f"{prefix}{number}.attention", own.residual, partial(self.attend, init=own, causal=causal)
            if cross is not None:
                assert memory is not None
                yield f"{prefix}{number}.cross", cross.residual, partial(self.look, init=cross, memory=memory)
            yield f"{prefix}{number}.feed_forward", wide.residual, partial(self.feed_forward, init=wide)

    def attend(self, x: Moments, *, init: AttentionInit, causal: bool) -> tuple[Moments, Backward]:
        options = self.options(init, float(x.var), float(x.corr), causal=causal) | {"seq_len": self.shape.seq_len}
        options["causal"] = causal
        out, last = self.last(attention(x, **options), init.output, self.shape.hidden_size)
        return out, lambda g: (attention_backward(last(g), x, **options), None)

    def look(self, x: Moments, *, init: AttentionInit, memory: Moments) -> tuple[Moments, Backward]:
        """Cross-attention; both sequences have the shape's length."""
        both, length = sqrt(float(x.var) * float(memory.var)), self.shape.seq_len
        options = self.options(init, both, float(memory.corr), causal=False) | {"num_keys": length}
        out, last = self.last(cross_attention(x, memory, **options), init.output, self.shape.hidden_size)
        return out, lambda g: cross_attention_backward(last(g), x, memory, num_queries=length, **options)

    def options(self, init: AttentionInit, var: float, corr: float, *, causal: bool) -> dict[str, Any]:
        """Keywords of the formulas of attention on inputs of variance `var`, and notes of what they do not cover."""
        width = self.shape.hidden_size
        score_var = float(score_variance(width=width, query_var=init.query**2, key_var=init.key**2, var=var))
        spread, weights = (1 - corr) * score_var, self.weights
        if spread > SOFTMAX_LIMIT * (1 + 1e-9):
            weights = weights or "exact"
            self.note(
                f"scores of variance above {SOFTMAX_LIMIT:g}: gradients through softmax are good to about 10 % up to a "
                "variance of 4, and too large by up to a factor of 2 at 16, of 4 at 64"
            )
        if spread > MAX_SPREAD:
            self.note(f"scores of variance above {MAX_SPREAD:g} counted as {MAX_SPREAD:g}: softmax picks one key")
        if self.shape.positions == "rope":
            self.note("rope: scores taken without rotation, which spreads them further by what keys share")
        return {
            "width": width,
            "score_var": score_var,
            "gain": width * init.value**2,
            "attention_dropout": self.shape.attention_dropout,
            "weights": None if causal else weights,
        }

    def feed_forward(self, x: Moments, *, init: FeedForwardInit) -> tuple[Moments, Backward]:
        d, wide = self.shape.hidden_size, self.shape.intermediate_size
        function, s, r = HIDDEN[self.shape.activation], d * init.inner**2 * np.asarray(x.var), x.corr
        mean, square = function.mean(s), function.product(s, 1.0)
        hidden = Moments(mean, square - mean**2, ratio(function.product(s, r) - mean**2, square - mean**2))
        slope = function.slope(s, 1.0)
        out, last = self.last(hidden, init.outer, wide)

        def backward(g: GradMoments) -> tuple[GradMoments, None]:
            inside = last(g)
            turned = GradMoments(inside.var * slope, inside.corr * ratio(function.slope(s, r), slope))
            return linear_backward(turned, fan_out=wide, weight_var=init.inner**2), None

        return out, backward

    def last(self, hidden: Moments, std: float, fan_in: int) -> tuple[Moments, Callable[[GradMoments], GradMoments]]:
        """A branch's last matrix and dropout, and the norm in front of it if there is one (Sub-LN)."""
        p, power = self.shape.dropout, np.asarray(1.0)
        if self.init.inner_norms:
            mean = 0.0 if self.shape.norm == "layernorm" else hidden.mean
            power = np.asarray(hidden.var + np.square(mean))
            hidden = Moments(mean / np.sqrt(power), hidden.var / power, hidden.corr)
        out = dropout(linear(hidden, fan_in=fan_in, weight_var=std**2), p=p)

        def backward(g: GradMoments) -> GradMoments:
            g = linear_backward(dropout_backward(g, p=p), fan_out=self.shape.hidden_size, weight_var=std**2)
            return GradMoments(g.var / power, g.corr)

        return out, backward

    def back(self, blocks: Sequence[_SubBlock], top: GradMoments) -> tuple[list[GradMoments], GradMoments]:
        """Gradients at each place of a stack, embeddings first, and at the memory its cross-attentions read."""
        g, found, at_memory = top, [top], GradMoments(0.0, 0.0)
        width, lost = self.shape.hidden_size, 2.0  # directions of `width` that a norm takes from the gradient behind it
        for block in reversed(blocks):
            branch = block.branch_var / float(block.joined.var)
            if self.post:
                more = 4 * branch * (1 - branch) + 2 * branch**2 - lost if self.finite_width else 0.0
                g = GradMoments(g.var / block.joined.var * (1 + more / width), g.corr)
            through, aside = block.backward(g)
            through = GradMoments(through.var / block.divisor, through.corr)
            if aside is not None:
                at_memory = residual_backward(at_memory, aside, scale=block.scale)
            skipped = block.skip**2 * float(g.var)
            g = residual_backward(g, through, skip=block.skip, scale=block.scale)
            share = skipped / float(g.var) if float(g.var) else 1.0
            lost = share * branch + (1 - share) * 2
            found.append(g)
        return found[::-1], at_memory

    def note(self, text: str) -> None:
        self.notes[text] = None


def profile(
    shape: ModelShape,
    init: ModelInit,
    *,
    inputs: Moments | None = None,
    top_corr: float = 0.0,
    weights: Weights | None = None,
    finite_width: bool = True,
) -> Profile:
    """Predicted moments of a model: Sections 2.1 to 2.3, tag B; median error <= 6 % per sub-block in Section 2.4.

    `inputs`: moments behind the embeddings' dropout (of both stacks); default: `input_moments`. `top_corr`: correlation
    of the gradient that enters at the top; a loss on every position has some. `weights`: how softmax is averaged in
    bidirectional attention; default: the spec's closed form, and integrals where (1-r) S > 1. `finite_width`: Post-LN
    gradients with their terms in 1/hidden_size (derived here, tag B): a token's norm wanders around its mean, and the
    norm behind it takes the gradient along the token; without, the spec's recursion. An encoder beside a decoder gets
    the gradient of all cross-attentions.
    """
    walk = _Walk(shape, init, weights, finite_width)
    start = input_moments(shape, init) if inputs is None else inputs
    beside = shape.kind == "encoder_decoder"
    first = walk.stack(start, init.layers, "encoder." if beside else "", causal=shape.kind == "decoder")
    top = GradMoments(1.0, top_corr)
    if not beside:
        return _joined(walk, [("", start, first, walk.back(first, top)[0])])
    memory = walk.normed(first[-1].joined)
    second = walk.stack(start, init.decoder_layers, "decoder.", causal=True, memory=memory)
    grads, at_memory = walk.back(second, top)
    if init.norms and not walk.post:  # through the encoder's final norm
        at_memory = GradMoments(at_memory.var / first[-1].joined.var, at_memory.corr)
    below, _ = walk.back(first, at_memory)
    return _joined(walk, [("encoder.", start, first, below), ("decoder.", start, second, grads)])


def input_moments(shape: ModelShape, init: ModelInit) -> Moments:
    """Of summed embeddings after dropout, for tokens by Zipf's law; Section 1.4. Better measured on real inputs."""
    tables = [Table(init.token_std**2, zipf_collision(shape.vocab_size))]
    if shape.positions == "learned":
        tables.append(Table(init.position_std**2, POSITIONS))
    return embeddings(tables, dropout=shape.dropout)


def _joined(walk: _Walk, stacks: list[tuple[str, Moments, list[_SubBlock], list[GradMoments]]]) -> Profile:
    places, sums, branches, grads = [], [], [], []
    for prefix, start, blocks, found in stacks:
        places += [f"{prefix}embeddings", *(block.name for block in blocks)]
        sums += [start, *(block.joined for block in blocks)]
        branches += [np.nan, *(block.branch_var for block in blocks)]
        grads += found
    return Profile(
        places=tuple(places),
        var=np.array([float(x.var) for x in sums]),
        corr=np.array([float(x.corr) for x in sums]),
        branch_var=np.array(branches),
        grad_var=np.array([float(g.var) for g in grads]),
        grad_corr=np.array([float(g.corr) for g in grads]),
        approximate=tuple(walk.notes),
    )

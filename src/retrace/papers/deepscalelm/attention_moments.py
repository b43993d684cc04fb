"""Moments through attention, forward and backward: bidirectional, causal and cross. No torch.

Inputs have mean 0. `score_var` S is the variance of the scores before softmax, `gain` the variance that the value
matrix gives to an input of unit variance (width * its weights' variance). Terms of Section 1.7: what all values share,
the average of the rest over the keys, and the tilt of the output towards keys of large scores. Backward, Section 1.8,
the gradient reaches an input as a value, as a query and as a key; the official formula knows only the first.
"""

from __future__ import annotations

from typing import Literal

import numpy as np

from retrace.papers.deepscalelm.components import GradMoments, Moments, ratio, warn_softmax
from retrace.papers.deepscalelm.correlations import (
    Array,
    Value,
    check_corr,
    check_dropout,
    check_length,
    check_variance,
)
from retrace.papers.deepscalelm.softmax_weights import WeightStatistics, exact, lognormal

Weights = Literal["lognormal", "exact"]


def score_variance(*, width: int, query_var: Value, key_var: Value, var: Value = 1.0) -> Array:
    """S of q k / sqrt(head size), for weights of those variances and inputs of variance `var`.

    It depends on neither r nor the head size. Scores of one query have correlation r between two keys, of one key r
    between two queries, else r^2. Section 1.6, tag B.
    """
    return np.asarray(width**2 * np.multiply(query_var, key_var) * np.square(check_variance(var)))


def attention(
    x: Moments,
    *,
    width: int,
    seq_len: int,
    score_var: Value,
    gain: Value = 1.0,
    attention_dropout: float = 0.0,
    causal: bool = False,
    weights: Weights | None = None,
) -> Moments:
    """The heads' outputs side by side, before the output matrix; means over positions.

    `weights` "lognormal" is the spec's formula (Section 1.7 without the official code's terms below 1/(L width)), for
    (1-r) S up to 1, and warns beyond; "exact" holds for any S (softmax_weights.py). Causal attention has only the
    latter, derived here (tag B: within 2 % of simulation at S = 1; Section 1.9's bound is 5 to 8 % high).
    """
    r, s, _ = _checked(x, seq_len, score_var, attention_dropout)
    found = _weights((1 - r) * s, r * (1 - r) * s, weights, num_keys=seq_len, causal=causal)
    return forward_moments(x.var, r, r, s, found, width=width, gain=gain, attention_dropout=attention_dropout,
                           closed=not causal and weights != "exact")  # fmt: skip


def attention_backward(
    g: GradMoments,
    x: Moments,
    *,
    width: int,
    seq_len: int,
    score_var: Value,
    gain: Value = 1.0,
    attention_dropout: float = 0.0,
    causal: bool = False,
    weights: Weights | None = None,
) -> GradMoments:
    """Gradient at the input, with value, query and key paths; means over positions.

    Section 1.8, tag B ("use this instead"), within 3 % of simulation at S = 1, where the official formula is 26 to 84 %
    too small. Causal: derived here, tag B, within 3 % at S = 1 for r up to 0.8; what two queries share is first order
    in their scores' covariance: 20 % high at S = 4, r = 0.3. Position j gets far more than the mean for small j.
    """
    r, s, _ = _checked(x, seq_len, score_var, attention_dropout)
    found = _weights((1 - r) * s, r * (1 - r) * s, weights, num_keys=seq_len, causal=causal)
    return backward_moments(g, r, s, found, width=width, seq_len=seq_len, gain=gain,
                            attention_dropout=attention_dropout, closed=not causal and weights != "exact")  # fmt: skip


def attention_backward_official(
    g: GradMoments, *, seq_len: int, gain: Value = 1.0, attention_dropout: float = 0.0
) -> GradMoments:
    """The official code's formula: the value path alone. Section 1.8, tag A; right only for S far below 0.1.

    The official check stops at S = 0.13 and logs 13 % (90th percentile) and 44 % (99th) error there.
    """
    length, kept = check_length(seq_len), 1 - check_dropout(attention_dropout, name="attention_dropout")
    r_g = np.asarray(g.corr)
    base = np.multiply(gain, g.var) / length
    return GradMoments(base * (1 + (length - 1) * r_g * kept) / kept,
                       ratio(1 + (length - 1) * r_g, (1 + (length - 1) * r_g * kept) / kept))  # fmt: skip


def cross_attention(
    x: Moments,
    memory: Moments,
    *,
    width: int,
    num_keys: int,
    score_var: Value,
    gain: Value = 1.0,
    attention_dropout: float = 0.0,
    weights: Weights | None = None,
) -> Moments:
    """Queries from `x`, keys and values from `memory` of `num_keys` positions. Section 1.10, tag B."""
    r, s, _ = _checked(memory, num_keys, score_var, attention_dropout)
    r_x = check_corr(x.corr)
    found = _weights((1 - r) * s, r_x * (1 - r) * s, weights, num_keys=num_keys)
    return forward_moments(memory.var, r, r_x, s, found, width=width, gain=gain, attention_dropout=attention_dropout,
                           closed=weights != "exact")  # fmt: skip


def cross_attention_backward(
    g: GradMoments,
    x: Moments,
    memory: Moments,
    *,
    width: int,
    num_queries: int,
    num_keys: int,
    score_var: Value,
    gain: Value = 1.0,
    attention_dropout: float = 0.0,
    weights: Weights | None = None,
) -> tuple[GradMoments, GradMoments]:
    """Gradients at `x` and at `memory`. Section 1.10, tag B: within 2.5 %, at `x` 10 % for 64 keys.

    The gradient at `x` scales with var(memory) / var(x): it flows through the query alone.
    """
    r, s, kept = _checked(memory, num_keys, score_var, attention_dropout)
    r_x, tau = check_corr(x.corr, seq_len=num_queries), 1 - r
    found = _weights(tau * s, r_x * tau * s, weights, num_keys=num_keys, num_queries=num_queries)
    base, noise = np.multiply(gain, g.var), _noise(found, r, kept)
    tilt = tau**2 * s / width
    at_x = tilt + tau * s * noise
    per_key = num_queries / num_keys
    at_memory = per_key * (found.square / kept + s * noise) + g.corr * found.shared * (1 + tau * s * r_x)
    memory_cov = per_key * (1 + (num_queries - 1) * np.asarray(g.corr)) / num_keys
    x_cov = g.corr * (tilt + tau**2 * s * found.pair)  # queries read the same keys: derived here, tag B
    scale = np.asarray(memory.var) / np.asarray(x.var)
    return GradMoments(base * scale * at_x, ratio(x_cov, at_x)), GradMoments(
        base * at_memory, ratio(memory_cov, at_memory)
    )


def forward_moments(
    var: Value,
    corr: Value,
    query_corr: Value,
    score_var: Value,
    found: WeightStatistics,
    *,
    width: int,
    gain: Value,
    attention_dropout: float,
    closed: bool,
) -> Moments:
    """The formula behind `attention` and `cross_attention`, on unit gain: values of `corr`, queries of `query_corr`."""
    tau, kept = 1 - np.asarray(corr), 1 - attention_dropout
    tilt = tau**2 * score_var / width * found.trace
    single = tau / kept if closed else 1 / kept - np.asarray(corr)  # exactly: dropout strikes what values share too
    total = corr + single * found.square + tilt
    return Moments(0.0, np.multiply(gain, var) * total, ratio(corr + tau * found.pair + query_corr * tilt, total))


def backward_moments(
    g: GradMoments,
    corr: Value,
    score_var: Value,
    found: WeightStatistics,
    *,
    width: int,
    seq_len: int,
    gain: Value,
    attention_dropout: float,
    closed: bool,
) -> GradMoments:
    """The formula behind `attention_backward`.

    Covariance: weights of a query sum to 1 over keys and the keys' gradients to 0, so what one position gets another
    lacks. `closed` is the spec's form of it, for contexts that are all equal and long; else the exact sum.
    """
    r, r_g = np.asarray(corr), np.asarray(g.corr)
    tau, kept = 1 - r, 1 - attention_dropout
    noise = _noise(found, r, kept)
    tilt = tau**2 * score_var / width * found.trace
    value = r_g * found.shared
    key = score_var * (noise + tau * r * r_g * found.shared_jacobian)
    total = found.square / kept + value + tilt + tau * score_var * noise + key
    alike = 1 + (seq_len - 1) * r_g
    cov = alike / seq_len if closed else (alike - found.square - value - key) / (seq_len - 1)
    least = -1 / (seq_len - 1)  # of any correlation among so many positions; large S puts the estimate below
    return GradMoments(np.multiply(gain, g.var) * total, np.maximum(ratio(cov + r_g * tilt, total), least))


def _noise(found: WeightStatistics, corr: Value, kept: float) -> Array:
    """What finite length and dropout of weights add to the query and key paths: e m / L of Section 1.8."""
    return np.asarray(found.jacobian * (1 / kept - corr))


def _weights(
    spread: Value,
    cross: Value,
    weights: Weights | None,
    *,
    num_keys: int,
    num_queries: int | None = None,
    causal: bool = False,
) -> WeightStatistics:
    if causal and weights == "lognormal":
        raise ValueError(
            "weights='lognormal': causal attention has contexts of every length; use 'exact' or leave it out"
        )
    if causal or weights == "exact":
        return exact(spread, cross, num_keys=num_keys, num_queries=num_queries, causal=causal)
    warn_softmax(spread)
    return lognormal(spread, cross, num_keys=num_keys, num_queries=num_queries)


def _checked(x: Moments, seq_len: int, score_var: Value, attention_dropout: float) -> tuple[Array, Array, float]:
    """Correlation, score variance and kept share; raises ValueError for what the formulas do not describe."""
    if np.any(x.mean):
        raise ValueError(f"mean={x.mean}: the moments of attention are of inputs of mean 0; expected a normed input")
    length = check_length(seq_len)
    kept = 1 - check_dropout(attention_dropout, name="attention_dropout")
    return check_corr(x.corr, seq_len=length), check_variance(score_var, name="score_var"), kept

"""How similar positions of a sequence become with depth: what DSLM needs to know before it draws a weight. No torch.

`corr` everywhere is r of Section 1.0: the correlation between two different positions at one feature.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
from numpy.typing import ArrayLike, NDArray

Array = NDArray[np.float64]
Value = float | Array
OFFICIAL_CORR0 = 0.221  # of BERT's summed embeddings before dropout, hard-coded in the official code (Section 1.4)


def relu_kernel(corr: ArrayLike) -> Array:
    """E[f(x) f(y)] / E[f(x)^2] of ReLU for standard normals of correlation `corr` in [-1, 1].

    Section 1.0, K(r), tag A. K(0) = 1/pi, K(1) = 1. Raises ValueError outside of [-1, 1].
    """
    r = check_corr(corr)
    return np.asarray(r * (1 - np.arccos(r) / np.pi) + np.sqrt((1 - r) * (1 + r)) / np.pi)


def check_corr(corr: ArrayLike, *, seq_len: float | None = None, name: str = "corr") -> Array:
    """`corr` as an array; raises ValueError below -1 (-1/(L-1) for a sequence of L that is as equal) or above 1."""
    r = np.asarray(corr, dtype=np.float64)
    low = -1.0 if seq_len is None else -1.0 / (seq_len - 1)
    if r.size and not (r.min() >= low - 1e-12 and r.max() <= 1 + 1e-12):
        why = "" if seq_len is None else f": {seq_len:g} positions can't be less alike than -1/(L-1)"
        raise ValueError(f"{name}={_shown(r)}: expected a correlation from {low:.4g} to 1{why}")
    return np.asarray(np.minimum(np.maximum(r, low), 1.0))


def check_dropout(value: float, *, name: str = "dropout") -> float:
    """A dropout probability; raises ValueError outside of [0, 1), where 1/(1-p) has no meaning."""
    if not 0 <= value < 1:
        raise ValueError(f"{name}={value!r}: expected a probability from 0 to below 1; dropout of 1 leaves no signal")
    return float(value)


def check_length(value: int, *, name: str = "seq_len") -> int:
    """A sequence length; raises ValueError below 2, where there is no pair of positions."""
    if int(value) != value or value < 2:
        raise ValueError(f"{name}={value!r}: expected at least 2 positions, for a correlation needs a pair")
    return int(value)


def check_variance(value: ArrayLike, *, name: str = "var") -> Array:
    """A variance as an array; raises ValueError where it is negative or not finite."""
    v = np.asarray(value, dtype=np.float64)
    if v.size and not (v.min() >= 0 and v.max() < np.inf):
        raise ValueError(f"{name}={_shown(v)}: expected a variance, finite and not negative")
    return v


def _shown(values: Array) -> str:
    return f"{float(values):g}" if values.ndim == 0 else str(values)


def effective_correlation(
    corr: ArrayLike, *, seq_len: int, score_var: float, attention_dropout: float, causal: bool
) -> Array:
    """What an attention layer's output variance is, per unit of value-output gain: corr and the finite-length term.

    corr + (1-corr) e^{(1-corr) S} h / (1-p_a), where h = H_L / L if causal (Section 3.6, tag S; position i averages i
    keys), else 1/L (Section 1.7, tag A, without its terms in 1/width). DSLM on a causal model uses it where the
    encoder's formula has r; the official code, which knows encoders only, uses `corr` itself. `score_var` S: variance
    of the scores before softmax; good to about 8 % up to (1-corr) S = 1.
    """
    length = check_length(seq_len)
    r, s = check_corr(corr, seq_len=length), check_variance(score_var, name="score_var")
    weight = harmonic(length) / length if causal else 1 / length
    kept = 1 - check_dropout(attention_dropout, name="attention_dropout")
    return np.asarray(r + (1 - r) * np.exp((1 - r) * s) * weight / kept)


def harmonic(count: int) -> float:
    """1 + 1/2 + ... + 1/count; exact to rounding."""
    if count <= 10_000:
        return float((1 / np.arange(1, count + 1)).sum())
    return float(np.log(count) + np.euler_gamma + 1 / (2 * count) - 1 / (12 * count**2))


def dslm_correlations(
    num_layers: int,
    *,
    dropout: float,
    beta_sq: float,
    lambda_sq: float,
    corr0: float = OFFICIAL_CORR0,
    kernel: Callable[[ArrayLike], Array] = relu_kernel,
    attention: Callable[[ArrayLike], Array] | None = None,
    cross: bool = False,
) -> Array:
    """The official list r_1 ... r_N: the correlation that enters each layer's attention, by which DSLM sizes V and O.

    shape [num_layers]. `corr0` is that of the embeddings before their dropout. Attention's branch has correlation 1-p
    and the feed-forward's (1-p) K(r), both of unit variance, as DSLM makes them; where lambda_sq + beta_sq
    is not 1 the running variance weighs the skip. `kernel` is K of the activation, ReLU's in the official code;
    `attention` its like for attention, None: 1 as there; `cross`: a branch of correlation 1-p stands between the two.
    Sections 3.1 and 3.3, tag A. Raises ValueError for a dropout of 1 and for a correlation outside of [-1, 1].
    """
    kept = 1 - check_dropout(dropout)
    check_variance([beta_sq, lambda_sq], name="beta_sq, lambda_sq")
    r, v = float(check_corr(corr0, name="corr0")) * kept, 1.0
    found = np.empty(num_layers)
    for layer in range(num_layers):
        found[layer] = r
        for branch in (attention, *([None] if cross else []), kernel):
            skip, v = lambda_sq * v, lambda_sq * v + beta_sq
            r = (skip * r + beta_sq * kept * (1.0 if branch is None else float(branch(r)))) / v
    return found

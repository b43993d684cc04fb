"""Moments through single components, forward and backward: linear, dropout, norms, residual, softmax. No torch.

Everything works on floats and on arrays that broadcast. Conventions (Section 1.0): x has shape [batch, L, d]; mean and
variance are over everything, random weights included; `corr` is r, between two different positions of a sequence at
one feature. Weights are independent with mean 0, biases 0, gains of norms 1. A backward function maps the moments of
the gradient at a component's output to those at its input; gradients have mean 0.
"""

from __future__ import annotations

import warnings
from dataclasses import dataclass

import numpy as np

from retrace.papers.deepscalelm.correlations import (
    Array,
    Value,
    check_corr,
    check_dropout,
    check_length,
    check_variance,
)

SOFTMAX_LIMIT = 1.0  # of (1-r) S, up to which log-normal sums are good: see `warn_softmax`


@dataclass(frozen=True)
class Moments:
    """Mean, variance and correlation along the sequence of an activation."""

    mean: Value
    var: Value
    corr: Value

    def __post_init__(self) -> None:
        check_variance(self.var)
        check_corr(self.corr)

    @property
    def cov(self) -> Array:
        """Covariance of two positions."""
        return np.multiply(self.corr, self.var)


@dataclass(frozen=True)
class GradMoments:
    """Variance and correlation along the sequence of a gradient; its mean is 0."""

    var: Value
    corr: Value

    def __post_init__(self) -> None:
        check_variance(self.var, name="gradient var")
        check_corr(self.corr, name="gradient corr")

    @property
    def cov(self) -> Array:
        """Covariance of two positions."""
        return np.multiply(self.corr, self.var)


def ratio(cov: Value, var: Value) -> Array:
    """cov / var; 0 where nothing varies."""
    found = cov / np.where(np.equal(var, 0), np.inf, var)
    return np.asarray(np.minimum(np.maximum(found, -1.0), 1.0))


def linear(x: Moments, *, fan_in: int, weight_var: Value) -> Moments:
    """y = x W, W of shape [fan_in, ...]. Exact; Section 1.1, tag A."""
    gain = fan_in * check_variance(weight_var, name="weight_var")
    mean_sq = np.square(x.mean)
    return Moments(0.0, gain * (x.var + mean_sq), ratio(x.cov + mean_sq, x.var + mean_sq))


def linear_backward(g: GradMoments, *, fan_out: int, weight_var: Value) -> GradMoments:
    """Gradient through W of shape [..., fan_out]. Exact; Section 1.1, tag A."""
    return GradMoments(fan_out * check_variance(weight_var, name="weight_var") * g.var, g.corr)


def dropout(x: Moments, *, p: float) -> Moments:
    """Inverted dropout: kept values are divided by 1-p. Exact; Section 1.1, tag A. Raises ValueError for p = 1."""
    kept = 1 - check_dropout(p, name="p")
    var = (np.asarray(x.var) + p * np.square(x.mean)) / kept
    return Moments(x.mean, var, ratio(x.cov, var))


def dropout_backward(g: GradMoments, *, p: float) -> GradMoments:
    """Exact; Section 1.1, tag A. Raises ValueError for p = 1."""
    kept = 1 - check_dropout(p, name="p")
    return GradMoments(np.asarray(g.var) / kept, np.multiply(g.corr, kept))


def layer_norm(x: Moments, *, width: int) -> Moments:
    """Over `width` features that share mean and variance.

    Correlation: the mean of a sample correlation of `width` pairs, r (1 - (1-r^2)/(2 width)), tag B; the table of
    Section 1.1 has r. Two features then have covariance -1/(width-1). Raises ValueError where nothing varies.
    """
    _check_norm(x.var, width)
    r = np.asarray(x.corr)
    return Moments(0.0, np.ones_like(r + np.asarray(x.var)), r * (1 - (1 - r**2) / (2 * width)))


def layer_norm_backward(g: GradMoments, x: Moments, *, width: int) -> GradMoments:
    """Divides by the variance of the input; (d-2)/(d-3) is exact for normal features. Section 1.1, tag B."""
    _check_norm(x.var, width)
    return GradMoments(np.asarray(g.var) / x.var * (width - 2) / (width - 3), g.corr)


def rms_norm(x: Moments, *, width: int) -> Moments:
    """Divides by the root mean square of `width` features. Section 1.1, tag B; relative error about 1/width."""
    power = np.asarray(x.var) + np.square(x.mean)
    _check_norm(power, width)
    return Moments(x.mean / np.sqrt(power), x.var / power, x.corr)


def rms_norm_backward(g: GradMoments, x: Moments, *, width: int) -> GradMoments:
    """Divides by the mean square of the input. Section 1.1, tag B, with its terms in 1/width (derived here)."""
    power = np.asarray(x.var) + np.square(x.mean)
    _check_norm(power, width)
    spread = (2 * np.square(x.var) + 4 * x.var * np.square(x.mean)) / power**2  # relative variance of a square
    return GradMoments(np.asarray(g.var) / power * (1 + (spread - 1) / width), g.corr)


def _check_norm(power: Value, width: int) -> None:
    if width < 4:
        raise ValueError(f"width={width}: expected at least 4 features under a norm; its gradient is unbounded below")
    if not np.all(np.asarray(power) > 0):
        raise ValueError("var=0: a norm divides by it; expected an input that varies")


def residual(x: Moments, branch: Moments, *, skip: Value = 1.0, scale: Value = 1.0) -> Moments:
    """skip * x + scale * branch, uncorrelated, as they are at initialisation and not after. Section 1.1, tag B."""
    a, b = np.square(skip), np.square(scale)
    var = a * x.var + b * branch.var
    return Moments(np.multiply(skip, x.mean) + np.multiply(scale, branch.mean), var,
                   ratio(a * x.cov + b * branch.cov, var))  # fmt: skip


def residual_backward(
    g: GradMoments, through_branch: GradMoments, *, skip: Value = 1.0, scale: Value = 1.0
) -> GradMoments:
    """The gradient at the input: `g` on the skip, and what the branch alone, unscaled, makes of it. Section 1.1, B."""
    a, b = np.square(skip), np.square(scale)
    var = a * g.var + b * through_branch.var
    return GradMoments(var, ratio(a * g.cov + b * through_branch.cov, var))


def softmax(var: Value, corr: Value, *, num_logits: int, full: bool = False) -> Moments:
    """Softmax over normal logits of a variance and an equal correlation among them.

    `full` keeps what is of the order of 1/num_logits. Section 1.5, tag A, for (1-corr) var up to about 1: beyond it
    warns with the measured error. The result's `corr` is that between two of its entries, which sum to 1.
    """
    length, spread = _softmax_spread(var, corr, num_logits)
    found = _full_variance(spread, length) if full else np.expm1(spread) / length**2
    return Moments(1 / length, found, np.full_like(found, -1 / (length - 1)))


def softmax_backward(g: GradMoments, var: Value, corr: Value, *, num_logits: int, full: bool = False) -> GradMoments:
    """Gradient of independent entries through softmax (as `softmax`). Section 1.5, tag A."""
    length, spread = _softmax_spread(var, corr, num_logits)
    gain = _full_variance(spread, length) + 1 / length**2 if full else np.exp(spread) / length**2
    return GradMoments(g.var * gain, np.full_like(gain, -1 / (length - 1)))


def _full_variance(spread: Array, length: int) -> Array:
    e = np.exp(spread * length / (length - 1))
    return np.asarray((e - 1) * e**2 / ((length - 1) * np.exp(spread) + 1) ** 2)


def _softmax_spread(var: Value, corr: Value, num_logits: int) -> tuple[int, Array]:
    length = check_length(num_logits, name="num_logits")
    spread = np.asarray((1 - check_corr(corr, seq_len=length)) * check_variance(var))
    warn_softmax(spread)
    return length, spread


def warn_softmax(spread: Value) -> None:
    """Warn where the variance of the logits around their common part is beyond what a log-normal sum describes."""
    most = float(np.max(spread, initial=0.0))
    if most > SOFTMAX_LIMIT * (1 + 1e-9):
        warnings.warn(
            f"softmax: (1-r) S = {most:.3g} is beyond {SOFTMAX_LIMIT:g}, up to which this formula is good to 3 %: "
            "measured at 512 logits it is off by 7 % at 1.35, 35 % at 2.25 and 140 % at 4; use weights='exact' "
            "where offered",
            stacklevel=3,
        )

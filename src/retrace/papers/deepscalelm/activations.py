"""Moments through activations: closed forms of ReLU and GeLU, Gauss-Hermite quadrature for any other function.

Inputs are normal: two positions have variance `var` and correlation `corr`. For a feed-forward block what counts is
the uncentred product E[f(x) f(y)], since the matrix behind it has mean 0 (Section 1.3), and E[f'(x) f'(y)].
"""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import lru_cache
from typing import NamedTuple

import numpy as np

from retrace.papers.deepscalelm.components import GradMoments, Moments, ratio
from retrace.papers.deepscalelm.correlations import Array, Value, check_corr, check_variance, relu_kernel

Function = Callable[[Array], Array]
NODES = 64


def relu(x: Moments) -> Moments:
    """Exact for mean 0; Section 1.1, tag A. Raises ValueError for another mean."""
    _check_centred(x)
    var = np.asarray(x.var)
    mean_sq = var / (2 * math.pi)
    return Moments(
        np.sqrt(mean_sq), var / 2 - mean_sq, ratio(var / 2 * relu_kernel(x.corr) - mean_sq, var / 2 - mean_sq)
    )


def relu_backward(g: GradMoments, x: Moments) -> GradMoments:
    """Exact for mean 0; Section 1.1, tag A."""
    _check_centred(x)
    return GradMoments(np.asarray(g.var) / 2, g.corr * (0.5 + np.arcsin(check_corr(x.corr)) / math.pi))


def gelu(x: Moments) -> Moments:
    """x Phi(x), exact for mean 0; Section 1.2, tag A."""
    _check_centred(x)
    s = np.asarray(x.var)
    mean = s / np.sqrt(2 * math.pi * (1 + s))
    var = gelu_product(s, 1.0) - mean**2
    return Moments(mean, var, ratio(gelu_product(s, x.corr) - mean**2, var))


def gelu_backward(g: GradMoments, x: Moments) -> GradMoments:
    """Exact for mean 0; Section 1.2, tag A."""
    _check_centred(x)
    gain = gelu_slope_product(x.var, 1.0)
    return GradMoments(g.var * gain, g.corr * ratio(gelu_slope_product(x.var, x.corr), gain))


def gelu_product(var: Value, corr: Value) -> Array:
    """E[f(x) f(y)] of GeLU; at corr = 1 the second moment. Section 1.2, tag A."""
    s, r = check_variance(var), check_corr(corr)
    turn = 2 / math.pi * r * np.arcsin(r * s / (1 + s))
    rest = 2 * s / math.pi * (s * (1 - r**2) + 1 + r**2) / ((s + 1) * np.sqrt((s + 1) ** 2 - (r * s) ** 2))
    return np.asarray(s / 4 * (r + turn + rest))


def gelu_slope_product(var: Value, corr: Value) -> Array:
    """E[f'(x) f'(y)] of GeLU; at corr = 1 the gain of a gradient's variance. Section 1.2, tag A."""
    s, r = check_variance(var), check_corr(corr)
    a, inside = r * s / (1 + s), (s + 1) ** 2 - (r * s) ** 2
    rest = a * ((s + 1) * (2 * s + 3) - 2 * (r * s) ** 2) / inside**1.5
    return np.asarray(0.5 + (rest - np.arccos(a)) / (2 * math.pi))


def silu(x: Array) -> Array:
    """x sigmoid(x), without overflow."""
    return np.asarray(x * 0.5 * (1 + np.tanh(x / 2)))


def silu_slope(x: Array) -> Array:
    """The derivative of `silu`."""
    gate = 0.5 * (1 + np.tanh(x / 2))
    return np.asarray(gate * (1 + x * (1 - gate)))


def pointwise(x: Moments, function: Function) -> Moments:
    """Any smooth function of normal inputs of any mean, by quadrature with 64 nodes: about 1e-8 for smooth functions.

    A kink costs accuracy (ReLU: about 1 %). Needs memory for 64 * 64 values per element of `x`.
    """
    mean = expect(function, x.mean, x.var)
    var = expect_product(function, x.mean, x.var, 1.0) - mean**2
    return Moments(mean, var, ratio(expect_product(function, x.mean, x.var, x.corr) - mean**2, var))


def pointwise_backward(g: GradMoments, x: Moments, slope: Function) -> GradMoments:
    """The gradient through a function with derivative `slope`, as `pointwise`."""
    gain = expect_product(slope, x.mean, x.var, 1.0)
    return GradMoments(g.var * gain, g.corr * ratio(expect_product(slope, x.mean, x.var, x.corr), gain))


@lru_cache(maxsize=4)
def _nodes(count: int) -> tuple[Array, Array]:
    nodes, weights = np.polynomial.hermite_e.hermegauss(count)
    return nodes, weights / weights.sum()


def expect(function: Function, mean: Value, var: Value) -> Array:
    """E f(x) of a normal x."""
    z, w = _nodes(NODES)
    m, sd = np.asarray(mean)[..., None], np.sqrt(check_variance(var))[..., None]
    return np.asarray(function(m + sd * z) @ w)


def expect_product(function: Function, mean: Value, var: Value, corr: Value) -> Array:
    """E[f(x) f(y)] of normals of equal mean and variance and a correlation."""
    z, w = _nodes(NODES)
    m, sd = np.asarray(mean)[..., None], np.sqrt(check_variance(var))[..., None]
    r = check_corr(corr)[..., None, None]
    if np.all(r == 1):
        return np.asarray(np.square(function(m + sd * z)) @ w)
    other = r * z[:, None] + np.sqrt(1 - r**2) * z  # [..., node of x, node of the rest of y]
    inner = function(m[..., None] + sd[..., None] * other) @ w
    return np.asarray((function(m + sd * z) * inner) @ w)


class Hidden(NamedTuple):
    """A feed-forward block's hidden layer on inputs of variance `var` per matrix: products along the sequence.

    `mean` of a value; `product(var, corr)` of two positions' values; `slope(var, corr)`: the gain of a gradient into
    the inner layer, summed over its matrices, times the gradient's own covariance. corr = 1 gives squares.
    """

    mean: Callable[[Value], Array]
    product: Callable[[Value, Value], Array]
    slope: Callable[[Value, Value], Array]


def _swiglu_product(var: Value, corr: Value) -> Array:
    return np.asarray(expect_product(silu, 0.0, var, corr) * np.multiply(var, corr))


def _swiglu_slope(var: Value, corr: Value) -> Array:
    through_gate = expect_product(silu_slope, 0.0, var, corr) * np.multiply(var, corr)
    return np.asarray(through_gate + expect_product(silu, 0.0, var, corr))


HIDDEN = {
    "relu": Hidden(
        lambda var: np.sqrt(np.asarray(var) / (2 * math.pi)),
        lambda var, corr: np.asarray(var) / 2 * relu_kernel(corr),
        lambda var, corr: 0.25 + np.arcsin(check_corr(corr)) / (2 * math.pi) + 0 * np.asarray(var),
    ),
    "gelu": Hidden(lambda var: np.asarray(gelu(Moments(0.0, var, 0.0)).mean), gelu_product, gelu_slope_product),
    "swiglu": Hidden(lambda var: 0.0 * np.asarray(var), _swiglu_product, _swiglu_slope),
}


def swiglu(x: Moments) -> Moments:
    """silu(a) b of independent a and b that both have the moments `x`, of mean 0. Quadrature; Section 3.6, tag S."""
    _check_centred(x)
    var = _swiglu_product(x.var, 1.0)
    return Moments(0.0, var, ratio(_swiglu_product(x.var, x.corr), var))


def swiglu_backward(g: GradMoments, x: Moments) -> tuple[GradMoments, GradMoments]:
    """Gradients at the gate a and at b (as `swiglu`), uncorrelated with each other."""
    _check_centred(x)
    gate = expect_product(silu_slope, 0.0, x.var, 1.0) * x.var
    gate_cov = expect_product(silu_slope, 0.0, x.var, x.corr) * x.cov
    up, up_cov = expect_product(silu, 0.0, x.var, 1.0), expect_product(silu, 0.0, x.var, x.corr)
    return (
        GradMoments(g.var * gate, g.corr * ratio(gate_cov, gate)),
        GradMoments(g.var * up, g.corr * ratio(up_cov, up)),
    )


def _check_centred(x: Moments) -> None:
    if np.any(x.mean):
        raise ValueError(f"mean={x.mean}: this closed form is of mean 0; use `pointwise`, which takes any mean")

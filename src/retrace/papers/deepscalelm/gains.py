"""What a feed-forward's hidden layer does to the second moment, for any activation: what DSLM needs of it. No torch."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
from numpy.typing import ArrayLike

from retrace.papers.deepscalelm.activations import HIDDEN, Function, expect_product
from retrace.papers.deepscalelm.correlations import Array, Value, relu_kernel

KNOTS = np.linspace(-1, 1, 129)  # correlations at which a kernel is tabulated


@dataclass(frozen=True)
class Gain:
    """Of a hidden layer whose pre-activations have variance one."""

    square: float  # E[f(z)^2]
    kernel: Callable[[ArrayLike], Array]  # E[f(x) f(y)] / E[f(z)^2] at a correlation of x and y
    homogeneous: bool = False  # f(cz) = c f(z): both matrices can share the gain, as with the official code's ReLU


@lru_cache
def gain_of(activation: str) -> Gain:
    """Of ReLU and GeLU in closed form, of SwiGLU by quadrature."""
    if activation == "relu":
        return Gain(0.5, relu_kernel, homogeneous=True)
    return _tabulated(lambda corr: HIDDEN[activation].product(1.0, corr))


def measured_gain(function: Function, *, gated: bool) -> Gain:
    """Of any function, by quadrature; `gated`: the hidden layer is f(gate) * up, both of variance one."""
    return _tabulated(lambda corr: expect_product(function, 0.0, 1.0, corr) * (corr if gated else 1.0))


def _tabulated(product: Callable[[Value], Array]) -> Gain:
    from scipy.interpolate import CubicSpline  # slow to import, and ReLU needs none

    square = float(product(1.0))
    return Gain(square, CubicSpline(KNOTS, product(KNOTS) / square))

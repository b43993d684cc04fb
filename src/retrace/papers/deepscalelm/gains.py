"""What a feed-forward's hidden layer does to the second moment, for any activation. No torch."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
from numpy.typing import ArrayLike
from scipy.interpolate import CubicSpline
from scipy.special import erf, expit

from retrace.papers.deepscalelm.correlations import Array, relu_kernel

Function = Callable[[Array], Array]
GATES: Mapping[str, Function] = {
    "relu": lambda z: np.maximum(z, 0),
    "gelu": lambda z: z * (1 + erf(z / math.sqrt(2))) / 2,
    "swiglu": lambda z: z * expit(z),
}


@dataclass(frozen=True)
class Gain:
    """What a feed-forward's hidden layer makes of unit-variance pre-activations."""

    square: float  # E[f(z)^2]
    kernel: Callable[[ArrayLike], Array]  # E[f(x) f(y)] / E[f(z)^2] at a correlation of x and y
    homogeneous: bool = False  # f(cz) = c f(z): both matrices can share the gain, as the official code's ReLU does


@lru_cache
def gain_of(activation: str) -> Gain:
    """Of ReLU (exact), exact GeLU and SwiGLU (by quadrature)."""
    if activation == "relu":
        return Gain(0.5, relu_kernel, homogeneous=True)
    return measured_gain(GATES[activation], gated=activation == "swiglu")


def measured_gain(function: Function, *, gated: bool) -> Gain:
    """By Gauss-Hermite quadrature on standard normals; `gated`: the layer is f(gate) * up, both of variance one."""
    nodes, weights = np.polynomial.hermite_e.hermegauss(100)
    weights = weights / weights.sum()
    value = function(nodes)
    square = float(weights @ value**2)

    knots = np.linspace(-1, 1, 129)
    r = knots[:, None, None]
    other = function(r * nodes[:, None] + np.sqrt(1 - r**2) * nodes)
    found = (other @ weights) @ (value * weights) / square
    return Gain(square, CubicSpline(knots, found * knots if gated else found))

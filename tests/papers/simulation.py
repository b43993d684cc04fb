"""Simulated activations, gradients and layers, and how their moments are held against the theory's."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
import torch.nn.functional as F
from hypothesis import settings
from hypothesis import strategies as st
from torch import Tensor

from retrace.papers.deepscalelm.components import GradMoments, Moments

torch.set_num_threads(1)
SAMPLES, LENGTH, WIDTH = 200, 24, 128
quick = settings(max_examples=10, deadline=None, derandomize=True)
corrs, variances = st.floats(0, 0.95), st.floats(0.1, 4)


def draw(moments: Moments | GradMoments, *, length: int = LENGTH, width: int = WIDTH, seed: int) -> Tensor:
    """Normal values [SAMPLES, length, width] of those moments."""
    generator = torch.Generator().manual_seed(seed)
    shared = torch.randn(SAMPLES, 1, width, generator=generator, dtype=torch.float64)
    own = torch.randn(SAMPLES, length, width, generator=generator, dtype=torch.float64)
    spread = math.sqrt(moments.corr) * shared + math.sqrt(1 - moments.corr) * own
    return getattr(moments, "mean", 0.0) + math.sqrt(moments.var) * spread


def products(x: Tensor) -> tuple[Tensor, Tensor]:
    """E x^2 and E[x_i x_j] over pairs of positions, for each sample."""
    length, square = x.shape[1], x.square().mean((1, 2))
    return square, (x.sum(1).square().mean(1) - length * square) / (length * (length - 1))


def assert_agrees(measured: Tensor, expected: float, *, slack: float, scale: float, what: str) -> None:
    """The mean over samples lies within five standard errors, and a bias of `slack` that the formula is allowed."""
    measured = measured.detach()
    mean, error = float(measured.mean()), float(measured.std()) / math.sqrt(len(measured))
    assert error < 0.04 * scale, f"{what}: simulation too noisy to tell"
    assert abs(mean - expected) <= 5 * error + slack * scale + 1e-12, f"{what}: {mean} +- {error}, theory {expected}"


def assert_forward(y: Tensor, theory: Moments, *, slack: float = 0.0) -> None:
    square, product = products(y)
    mean_sq = float(theory.mean) ** 2
    scale = float(theory.var) + mean_sq
    assert_agrees(square, scale, slack=slack, scale=scale, what="square")
    assert_agrees(product, float(theory.cov) + mean_sq, slack=slack, scale=scale, what="product")
    assert_agrees(y.mean((1, 2)), float(theory.mean), slack=slack, scale=math.sqrt(scale), what="mean")


def assert_backward(grad: Tensor, theory: GradMoments, *, slack: float = 0.0) -> None:
    square, product = products(grad)
    scale = float(theory.var)
    assert_agrees(square, scale, slack=slack, scale=scale, what="gradient variance")
    assert_agrees(product, float(theory.cov), slack=slack, scale=scale, what="gradient covariance")


def through(function: Callable[[Tensor], Tensor], x: Moments, g: GradMoments) -> tuple[Tensor, Tensor]:
    """What a function makes of simulated inputs, and of simulated gradients at its output."""
    inputs = draw(x, seed=1).requires_grad_()
    out = function(inputs)
    (grad,) = torch.autograd.grad(out, inputs, draw(g, width=out.shape[-1], seed=2))
    return out.detach(), grad


def matrices(rows: int, columns: int, var: float, *, seed: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(SAMPLES, rows, columns, generator=generator, dtype=torch.float64) * math.sqrt(var)


def attention(x: Tensor, memory: Tensor, s: float, *, heads: int = 4, p: float = 0.0, causal: bool = False) -> Tensor:
    """Attention with matrices of its own for each sample, value weights of variance 1/width."""
    width, std = x.shape[-1], s**0.5 / x.shape[-1]
    q, k, v = (
        (t @ matrices(width, width, var, seed=seed)).unflatten(-1, (heads, -1)).transpose(1, 2)
        for t, var, seed in ((x, std, 3), (memory, std, 4), (memory, 1 / width, 5))
    )
    scores = q @ k.mT / math.sqrt(q.shape[-1])
    if causal:
        scores = scores.masked_fill(torch.ones(x.shape[1], x.shape[1]).triu(1).bool(), -math.inf)
    torch.manual_seed(0)
    return (F.dropout(scores.softmax(-1), p) @ v).transpose(1, 2).flatten(2)

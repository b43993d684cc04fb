"""Moments through softmax and attention against simulation: bidirectional, causal, cross."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from simulation import (
    WIDTH,
    assert_agrees,
    assert_backward,
    assert_forward,
    attention,
    draw,
    products,
    quick,
)  # fmt: skip

from retrace.papers.deepscalelm import attention_moments as att
from retrace.papers.deepscalelm import components as com
from retrace.papers.deepscalelm.components import GradMoments, Moments
from retrace.papers.deepscalelm.softmax_weights import exact, lognormal

CASES = [(0.2, 0.1, 1.0, 0.1), (0.5, 0.0, 1.0, 0.0), (0.8, 0.5, 1.0, 0.1), (0.05, 0.3, 0.13, 0.0)]


@pytest.mark.parametrize("weights", ["lognormal", "exact", "causal"])
@pytest.mark.parametrize(("r", "g_r", "s", "p"), CASES)
def test_attention_maps_moments_as_simulated(r: float, g_r: float, s: float, p: float, weights: str) -> None:
    """With queries, keys and values, at the score variance of DSLM."""
    causal, length = weights == "causal", 64
    x, g = Moments(0.0, 1.0, r), GradMoments(1.0, g_r)
    inputs = draw(x, length=length, seed=1).requires_grad_()
    out = attention(inputs, inputs, s, heads=1, p=p, causal=causal)
    (grad,) = torch.autograd.grad(out, inputs, draw(g, length=length, seed=2))
    kwargs = {"width": WIDTH, "seq_len": length, "score_var": s, "attention_dropout": p, "causal": causal}
    kwargs["weights"] = None if causal else weights
    assert_forward(out.detach(), att.attention(x, **kwargs), slack=0.02)
    assert_backward(grad, att.attention_backward(g, x, **kwargs), slack=0.05)


def test_exact_weights_hold_where_the_closed_form_has_broken_down() -> None:
    x, g, s, length = Moments(0.0, 1.0, 0.3), GradMoments(1.0, 0.0), 4.0, 64
    inputs = draw(x, length=length, seed=1).requires_grad_()
    out = attention(inputs, inputs, s, heads=1)
    (grad,) = torch.autograd.grad(out, inputs, draw(g, length=length, seed=2))
    kwargs = {"width": WIDTH, "seq_len": length, "score_var": s}
    assert_forward(out.detach(), att.attention(x, **kwargs, weights="exact"), slack=0.05)
    assert_backward(grad, att.attention_backward(g, x, **kwargs, weights="exact"), slack=0.15)
    with pytest.warns(UserWarning, match=r"\(1-r\) S = 2.8 is beyond 1"):
        closed = att.attention_backward(g, x, **kwargs)
    assert closed.var > 1.5 * float(products(grad)[0].mean())


@pytest.mark.parametrize(("r", "r_e", "g_r", "s"), [(0.2, 0.5, 0.1, 1.0), (0.6, 0.3, 0.3, 1.0)])
def test_cross_attention_maps_moments_as_simulated(r: float, r_e: float, g_r: float, s: float) -> None:
    x, memory, g = Moments(0.0, 1.0, r), Moments(0.0, 1.0, r_e), GradMoments(1.0, g_r)
    inputs = draw(x, length=32, seed=1).requires_grad_()
    read = draw(memory, length=96, seed=7).requires_grad_()
    out = attention(inputs, read, s, heads=1)
    at_x, at_memory = torch.autograd.grad(out, (inputs, read), draw(g, length=32, seed=2))
    kwargs = {"width": WIDTH, "num_keys": 96, "score_var": s}
    assert_forward(out.detach(), att.cross_attention(x, memory, **kwargs), slack=0.02)
    theory = att.cross_attention_backward(g, x, memory, **kwargs, num_queries=32)
    assert_backward(at_x, theory[0], slack=0.1)
    assert_backward(at_memory, theory[1], slack=0.05)


def test_the_official_gradient_formula_misses_queries_and_keys() -> None:
    """Section 1.8: right for small scores, 26 to 84 % too small at S = 1."""
    x, g = Moments(0.0, 1.0, 0.2), GradMoments(1.0, 0.1)
    official = att.attention_backward_official(g, seq_len=512)
    small = att.attention_backward(g, x, width=256, seq_len=512, score_var=1e-4)
    assert small.var == pytest.approx(float(official.var), rel=0.01)
    assert official.var < 0.74 * att.attention_backward(g, x, width=256, seq_len=512, score_var=1.0).var


@quick
@given(st.floats(0.02, 1), st.sampled_from([256, 512]), st.booleans())
def test_softmax_maps_moments_as_simulated(var: float, length: int, full: bool) -> None:
    logits = draw(Moments(0.0, var, 0.0), length=8, width=length, seed=1).requires_grad_()
    out = logits.softmax(-1)
    slack = 0.03
    assert_agrees(out.var(2, correction=0).mean(1), float(com.softmax(var, 0.0, num_logits=length, full=full).var),
                  slack=slack, scale=float(com.softmax(var, 0.0, num_logits=length).var), what="variance")  # fmt: skip
    (grad,) = torch.autograd.grad(out, logits, draw(GradMoments(1.0, 0.0), length=8, width=length, seed=2))
    theory = float(com.softmax_backward(GradMoments(1.0, 0.0), var, 0.0, num_logits=length, full=full).var)
    assert_agrees(grad.square().mean((1, 2)), theory, slack=0.06, scale=theory, what="gradient")


@pytest.mark.parametrize("spread", [0.0, 0.5, 4.0, 40.0])
def test_integrals_over_softmax_are_those_of_simulation(spread: float) -> None:
    weights = (torch.randn(40_000, 16, generator=torch.Generator().manual_seed(0)) * math.sqrt(spread)).softmax(-1)
    square, cube = weights.square().sum(1), weights.pow(3).sum(1)
    found = exact(spread, 0.0, num_keys=16)
    simulated = [square, square - 2 * cube + square**2, (1 - square) ** 2]
    for value, samples in zip((found.square, found.jacobian, found.trace), simulated, strict=True):
        error = float(samples.std()) / 200
        assert float(value) == pytest.approx(float(samples.mean()), rel=2e-4, abs=5 * error)


def test_closed_form_and_integrals_meet_at_small_scores_and_causal_sums_are_harmonic() -> None:
    closed, integral = lognormal(0.01, 0.0, num_keys=4096), exact(0.01, 0.0, num_keys=4096)
    assert float(integral.square) == pytest.approx(float(closed.square), rel=1e-3)
    length = 100
    h = sum(1 / i for i in range(1, length + 1))
    causal = exact(0.0, 0.0, num_keys=length, causal=True)
    assert float(causal.square) == pytest.approx(h / length, rel=1e-4)
    assert float(causal.shared) == pytest.approx(2 - 2 * h / length, rel=1e-9)  # Section 1.9
    assert float(causal.pair) == pytest.approx(2 * (length - h) / (length * (length - 1)), rel=1e-9)


@pytest.mark.parametrize(("s", "factor"), [(4.0, 1.1), (16.0, 2.0), (64.0, 4.0)])
@pytest.mark.parametrize("corr", [0.2, 0.6])
def test_large_scores_are_predicted_to_a_stated_factor(s: float, factor: float, corr: float) -> None:
    x, g, sizes = Moments(0.0, 1.0, corr), GradMoments(1.0, corr / 2), {"width": 64, "seq_len": 48}
    inputs = draw(x, length=48, width=64, seed=1).requires_grad_()
    out = attention(inputs, inputs, s)
    (grad,) = torch.autograd.grad(out, inputs, draw(g, length=48, width=64, seed=2))
    found = att.attention_backward(g, x, score_var=s, weights="exact", **sizes)
    assert 1 / factor < float(found.var) / float(grad.square().mean()) < factor
    assert 0 < float(att.attention(x, score_var=s, weights="exact", **sizes).corr) <= 1


def test_no_score_variance_gives_a_negative_variance() -> None:
    x, g = Moments(0.0, 1.0, np.linspace(0, 0.99, 12)), GradMoments(1.0, np.linspace(-1 / 15, 1, 5)[:, None])
    for s in (1.0, 16.0, 64.0, 256.0):
        found = att.attention_backward(g, x, width=16, seq_len=16, score_var=s, weights="exact")
        assert np.all(found.var > 0)
        assert np.all((found.corr >= -1 / 15 - 1e-12) & (found.corr <= 1 + 1e-9))


def test_what_causal_queries_share_is_that_of_the_jacobians_at_even_weights() -> None:
    length = 12
    weights = torch.ones(length, length, dtype=torch.float64).tril()
    weights = weights / weights.sum(1, keepdim=True)
    jacobians = torch.diag_embed(weights) - weights[:, :, None] * weights[:, None, :]
    summed = jacobians.sum(0)
    pairs = (
        summed @ summed - (jacobians @ jacobians).sum(0)
    ).trace() / length  # over i != k of (P_i P_k)_jj, mean of j
    found = exact(0.0, 0.0, num_keys=length, causal=True)
    assert float(found.shared_jacobian) == pytest.approx(float(pairs), rel=1e-9)
    assert float(found.jacobian) == pytest.approx(float((jacobians @ jacobians).sum(0).trace()) / length, rel=1e-4)

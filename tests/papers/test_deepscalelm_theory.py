"""The closed forms against simulation, their identities, their limits, and what they refuse."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from simulation import (
    LENGTH,
    SAMPLES,
    WIDTH,
    assert_agrees,
    assert_backward,
    assert_forward,
    corrs,
    draw,
    matrices,
    products,
    quick,
    through,
    variances,
)  # fmt: skip

from retrace.papers.deepscalelm import activations as act
from retrace.papers.deepscalelm import attention_moments as att
from retrace.papers.deepscalelm import components as com
from retrace.papers.deepscalelm import embedding_moments as emb
from retrace.papers.deepscalelm.components import GradMoments, Moments
from retrace.papers.deepscalelm.correlations import dslm_correlations, effective_correlation, relu_kernel


@quick
@given(variances, corrs, st.floats(-1, 1), variances, corrs)
def test_linear_maps_moments_as_simulated(var: float, r: float, mean: float, g_var: float, g_r: float) -> None:
    x, g = Moments(mean, var, r), GradMoments(g_var, g_r)
    weights = matrices(WIDTH, 96, 0.02, seed=3)
    out, grad = through(lambda t: t @ weights, x, g)
    assert_forward(out, com.linear(x, fan_in=WIDTH, weight_var=0.02))
    assert_backward(grad, com.linear_backward(g, fan_out=96, weight_var=0.02))


@quick
@given(variances, corrs, st.floats(-1, 1), corrs, st.floats(0, 0.7))
def test_dropout_maps_moments_as_simulated(var: float, r: float, mean: float, g_r: float, p: float) -> None:
    x, g = Moments(mean, var, r), GradMoments(1.0, g_r)
    torch.manual_seed(0)
    out, grad = through(lambda t: F.dropout(t, p), x, g)
    assert_forward(out, com.dropout(x, p=p))
    assert_backward(grad, com.dropout_backward(g, p=p))


@quick
@given(variances, corrs, corrs)
def test_relu_and_gelu_map_moments_as_simulated(var: float, r: float, g_r: float) -> None:
    x, g = Moments(0.0, var, r), GradMoments(1.0, g_r)
    for function, forward, backward in ((F.relu, act.relu, act.relu_backward), (F.gelu, act.gelu, act.gelu_backward)):
        out, grad = through(function, x, g)
        assert_forward(out, forward(x))
        assert_backward(grad, backward(g, x))


@quick
@given(variances, corrs, st.floats(-1, 1), corrs)
def test_quadrature_maps_moments_of_silu_as_simulated(var: float, r: float, mean: float, g_r: float) -> None:
    x, g = Moments(mean, var, r), GradMoments(1.0, g_r)
    out, grad = through(F.silu, x, g)
    assert_forward(out, act.pointwise(x, act.silu))
    assert_backward(grad, act.pointwise_backward(g, x, act.silu_slope))


@quick
@given(variances, corrs, corrs)
def test_swiglu_maps_moments_as_simulated(var: float, r: float, g_r: float) -> None:
    x, g = Moments(0.0, var, r), GradMoments(1.0, g_r)
    gate, up = (draw(x, seed=seed).requires_grad_() for seed in (1, 5))
    out = F.silu(gate) * up
    grads = torch.autograd.grad(out, (gate, up), draw(g, seed=2))
    assert_forward(out.detach(), act.swiglu(x))
    for grad, theory in zip(grads, act.swiglu_backward(g, x), strict=True):
        assert_backward(grad, theory)
    total, total_cov = (sum(products(grad)[k] for grad in grads) for k in (0, 1))
    slope = act.HIDDEN["swiglu"].slope
    assert_agrees(total, float(slope(var, 1.0)), slack=0, scale=float(slope(var, 1.0)), what="both")
    assert_agrees(total_cov, g_r * float(slope(var, r)), slack=0, scale=float(slope(var, 1.0)), what="both")


@quick
@given(variances, corrs, st.floats(-1, 1), corrs)
def test_norms_map_moments_as_simulated(var: float, r: float, mean: float, g_r: float) -> None:
    x, g = Moments(mean, var, r), GradMoments(1.0, g_r)
    out, grad = through(lambda t: F.layer_norm(t, (WIDTH,), eps=0), x, g)
    assert_forward(out, com.layer_norm(x, width=WIDTH), slack=0.002)
    assert_backward(grad, com.layer_norm_backward(g, x, width=WIDTH), slack=0.02)  # 1/d of the covariance
    out, grad = through(lambda t: F.rms_norm(t, (WIDTH,), eps=1e-12), x, g)
    assert_forward(out, com.rms_norm(x, width=WIDTH), slack=0.01)
    assert_backward(grad, com.rms_norm_backward(g, x, width=WIDTH), slack=0.02)


@quick
@given(corrs, corrs, st.floats(0.1, 2), st.floats(0.1, 2))
def test_residual_maps_moments_as_simulated(r: float, f_r: float, skip: float, scale: float) -> None:
    x, f = Moments(0.0, 1.0, r), Moments(0.0, 2.0, f_r)
    assert_forward(skip * draw(x, seed=1) + scale * draw(f, seed=2), com.residual(x, f, skip=skip, scale=scale))
    both = GradMoments(1.0, r), GradMoments(2.0, f_r)
    total = skip * draw(both[0], seed=1) + scale * draw(both[1], seed=2)
    assert_backward(total, com.residual_backward(*both, skip=skip, scale=scale))


def test_numbers_of_gelu_in_section_1_2() -> None:
    assert float(act.gelu(Moments(0.0, 1.0, 0.0)).mean) == pytest.approx(0.28209, abs=5e-6)
    for s, square, slope in ((1.0, 0.42522, 0.45585), (0.6708, 0.26783, 0.42906), (2.0, 0.92208, 0.48951)):
        assert float(act.gelu_product(s, 1.0)) == pytest.approx(square, abs=6e-6)
        assert float(act.gelu_slope_product(s, 1.0)) == pytest.approx(slope, abs=6e-6)


@quick
@given(variances, st.floats(-1, 1))
def test_closed_forms_of_gelu_are_those_of_quadrature(var: float, r: float) -> None:
    def gelu(z: np.ndarray) -> np.ndarray:
        return F.gelu(torch.from_numpy(z)).numpy()

    assert float(act.expect_product(gelu, 0.0, var, r)) == pytest.approx(float(act.gelu_product(var, r)), abs=1e-6)


@quick
@given(st.floats(-1, 1))
def test_relu_is_its_kernel_and_its_polynomial(r: float) -> None:
    out = act.relu(Moments(0.0, 2.0, r))
    assert float(out.cov + np.square(out.mean)) == pytest.approx(float(relu_kernel(r)), abs=1e-12)  # E f^2 = var / 2
    if r >= 0:
        assert float(out.corr) == pytest.approx(0.7 * r + 0.3 * r**2, abs=0.007)
        assert float(relu_kernel(r)) == pytest.approx(1 / math.pi + r / 2 + (0.5 - 1 / math.pi) * r**2, abs=0.0076)


def test_limits() -> None:
    assert relu_kernel([0, 1, -1]) == pytest.approx([1 / math.pi, 1, 0], abs=1e-15)
    x, g = Moments(0.3, 2.0, 0.5), GradMoments(2.0, 0.5)
    assert com.dropout(x, p=0.0) == x
    assert com.dropout_backward(g, p=0.0) == g
    same = Moments(0.0, 1.0, 1.0)  # positions are equal: attention averages equal values
    alike = att.attention(same, width=64, seq_len=32, score_var=1.0)
    assert (float(alike.var), float(alike.corr)) == pytest.approx((1, 1))
    even = att.attention(Moments(0.0, 1.0, 0.2), width=64, seq_len=32, score_var=0.0)
    assert float(even.var) == pytest.approx(0.2 + 0.8 / 32)
    even_g = att.attention_backward(GradMoments(1.0, 0.2), Moments(0.0, 1.0, 0.2), width=64, seq_len=32, score_var=0.0)
    assert float(even_g.var) == pytest.approx(0.2 + 1 / 32)
    for function in (act.relu, act.gelu, act.swiglu):
        assert float(function(Moments(0.0, 1.5, 1.0)).corr) == pytest.approx(1)


def test_formulas_take_arrays_and_give_what_they_give_for_each_value() -> None:
    r, s = np.array([[0.1, 0.5]]), np.array([[0.2], [1.0], [0.0]])
    x, g = Moments(0.0, np.ones((1, 2)), r), GradMoments(np.ones(2), np.full(2, 0.2))
    for causal in (False, True):
        kwargs = {"width": 64, "seq_len": 32, "causal": causal}
        many = att.attention_backward(g, x, score_var=s, **kwargs)
        one = att.attention_backward(GradMoments(1.0, 0.2), Moments(0.0, 1.0, 0.5), score_var=1.0, **kwargs)
        assert many.var.shape == (3, 2)
        assert many.var[1, 1] == pytest.approx(float(one.var))
        assert many.corr[1, 1] == pytest.approx(float(one.corr))
    assert act.swiglu(Moments(0.0, s + 1, r)).corr.shape == (3, 2)


def test_embeddings_of_bert_and_of_gpt_have_the_correlations_of_section_1_4() -> None:
    assert emb.bert_corr0(30522) == pytest.approx(0.2268, abs=5e-5)
    assert emb.zipf_collision_approximate(30522, euler=False) / 3 + 2 / 9 == pytest.approx(0.2274, abs=5e-5)
    assert emb.zipf_collision(30522) == pytest.approx(0.01384, abs=5e-6)
    assert emb.zipf_collision(30522) == pytest.approx(emb.zipf_collision_approximate(30522), rel=1e-3)
    assert emb.zipf_collision(50257) / 2 == pytest.approx(0.0064, abs=1e-4)
    assert emb.sentence_collision(20) / 3 + emb.zipf_collision(30522) / 3 == pytest.approx(0.2213, abs=1e-4)


@quick
@given(st.integers(2, 200), st.floats(0.05, 2), st.floats(0.05, 2), st.floats(0, 0.5))
def test_embeddings_have_moments_as_simulated(vocab: int, token_var: float, position_var: float, p: float) -> None:
    generator = torch.Generator().manual_seed(0)
    zipf = 1 / torch.arange(1, vocab + 1, dtype=torch.float64)
    tokens = torch.multinomial(zipf, SAMPLES * LENGTH, replacement=True, generator=generator).view(SAMPLES, LENGTH)
    rows = matrices(vocab, WIDTH, token_var, seed=3).take_along_dim(tokens[..., None], 1)
    torch.manual_seed(0)
    summed = F.dropout(rows + matrices(LENGTH, WIDTH, position_var, seed=4), p)
    tables = [emb.Table(token_var, emb.zipf_collision(vocab)), emb.Table(position_var, emb.POSITIONS)]
    assert_forward(summed, emb.embeddings(tables, dropout=p))


REFUSED: list[tuple[Callable[[], object], str]] = [
    (lambda: com.dropout(Moments(0, 1, 0), p=1.0), r"p=1.0: expected a probability from 0 to below 1"),
    (lambda: com.softmax(0.5, 0.0, num_logits=1), r"num_logits=1: expected at least 2"),
    (lambda: Moments(0, -1, 0), r"var=-1: expected a variance"),
    (lambda: Moments(0, math.nan, 0), r"var=nan"),
    (lambda: Moments(0, 1, 1.5), r"corr=1.5: expected a correlation from -1 to 1"),
    (lambda: GradMoments(1, math.nan), r"gradient corr=nan"),
    (lambda: att.attention(Moments(0, 1, -0.5), width=8, seq_len=4, score_var=1), r"-0.3333 to 1: 4 positions can't"),
    (lambda: att.attention(Moments(0, 1, 0), width=8, seq_len=1, score_var=1), r"seq_len=1"),
    (lambda: att.attention(Moments(1, 1, 0), width=8, seq_len=4, score_var=1), r"mean=1: .* normed input"),
    (lambda: act.gelu(Moments(1.0, 1, 0)), r"mean=1.0: .* use `pointwise`"),
    (lambda: com.layer_norm(Moments(0, 0, 0), width=8), r"var=0: a norm divides by it"),
    (lambda: com.layer_norm_backward(GradMoments(1, 0), Moments(0, 1, 0), width=3), r"width=3: expected at least 4"),
    (lambda: emb.embeddings([]), r"one of them positive"),
    (lambda: emb.zipf_collision(1), r"vocab_size=1"),
    (lambda: effective_correlation(0.2, seq_len=1, score_var=1, attention_dropout=0, causal=True), r"seq_len=1"),
    (lambda: dslm_correlations(2, dropout=1.0, beta_sq=0.1, lambda_sq=0.9), r"dropout=1.0"),
]


@pytest.mark.parametrize(("call", "words"), REFUSED, ids=[words[:24] for _, words in REFUSED])
def test_what_no_formula_describes_is_refused_in_a_sentence(call: Callable[[], object], words: str) -> None:
    with pytest.raises(ValueError, match=words) as caught:
        call()
    assert "\n" not in str(caught.value)


def test_softmax_warns_beyond_its_range_and_not_within() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        com.softmax(2.0, 0.5, num_logits=64)
    with pytest.warns(UserWarning, match=r"35 % at 2.25"):
        com.softmax(2.1, 0.5, num_logits=64)

"""The theory: closed forms against simulation, identities, limits, and the numbers of the specification."""

from __future__ import annotations

import math

import numpy as np
import pytest

from retrace.papers.deepscalelm.correlations import dslm_correlations, effective_correlation, relu_kernel

VECTORS = [  # Section 3.3: dropout, k of beta_sq, num_layers, corr0, {layer: r}, {layer: std_VO}, hidden_size
    (0.1, 0.005, 192, 0.221, {1: 0.198900, 2: 0.203311, 3: 0.207689, 96: 0.502131, 192: 0.658565},
     {1: 0.0455777, 2: 0.0453284, 3: 0.0450876, 96: 0.0361582, 192: 0.0337879}, 1024),
    (0.1, 1 / 12, 12, 0.221, {1: 0.1989, 2: 0.270199, 3: 0.33302, 6: 0.48082, 12: 0.65564},
     {1: 0.0526285, 2: 0.0487483, 3: 0.046266, 6: 0.042207, 12: 0.0390583}, 768),
    (0.1, 2 / 12, 12, 0.2274, {1: 0.20466, 2: 0.341387, 3: 0.44699, 6: 0.643201, 12: 0.785153},
     {1: 0.0522543, 2: 0.0459799, 3: 0.0429839, 6: 0.0392458, 12: 0.0373372}, 768),
    (0.0, 1 / 12, 12, 0.221, {1: 0.221, 2: 0.301621, 3: 0.373089, 6: 0.543436, 12: 0.751912}, {}, 768),
]  # fmt: skip


@pytest.mark.parametrize(("p", "beta_sq", "layers", "corr0", "corrs", "stds", "width"), VECTORS)
def test_dslm_correlations_and_value_stds_are_those_of_the_specification_to_six_digits(
    p: float, beta_sq: float, layers: int, corr0: float, corrs: dict[int, float], stds: dict[int, float], width: int
) -> None:
    found = dslm_correlations(layers, dropout=p, beta_sq=beta_sq, lambda_sq=1 - beta_sq, corr0=corr0)
    assert {n: found[n - 1] for n in corrs} == pytest.approx(corrs, abs=5.01e-7)  # six printed decimals
    std_vo = np.sqrt(np.sqrt((1 - p) / found) / width)
    assert {n: std_vo[n - 1] for n in stds} == pytest.approx(stds, abs=5.01e-8)


def test_relu_kernel_at_its_ends() -> None:
    assert relu_kernel([0, 1, -1]) == pytest.approx([1 / math.pi, 1, 0], abs=1e-15)


def test_effective_correlation_tends_to_the_correlation_for_long_sequences() -> None:
    kwargs = {"score_var": 1.0, "attention_dropout": 0.1}
    near = [float(effective_correlation(0.2, seq_len=n, causal=True, **kwargs)) for n in (64, 1024, 2**20)]
    assert near[0] > near[1] > near[2] > 0.2
    assert near[2] == pytest.approx(0.2, abs=1e-4)

"""Tokens drawn from noise."""

from __future__ import annotations

import pytest
import torch

from retrace.papers.quietstar.losses import draw


@pytest.mark.parametrize("vocab_size", [37, 64, 96, 4096])
def test_drawn_tokens_are_where_the_cumulative_distribution_passes_the_noise(vocab_size: int) -> None:
    noise = torch.Generator().manual_seed(0)
    scores_RV = 2 * torch.randn(3, vocab_size, generator=noise)
    scores_RV[:, [0, -1]] = -torch.inf
    noise_RD = torch.rand(3, 2000, generator=noise)
    cumulative_RV = scores_RV.double().softmax(-1).cumsum(-1)
    expected = torch.searchsorted(cumulative_RV, noise_RD.double() * cumulative_RV[:, -1:], right=True)
    assert (draw(scores_RV, noise_RD) != expected).float().mean() < 1e-3  # rounding at the edges
    assert draw(scores_RV, torch.tensor([[0.0, 1.0]]).expand(3, -1)).tolist() == [[1, vocab_size - 2]] * 3

"""The mixing head: how much of the prediction after a thought goes into the next-token prediction (Section 4.3)."""

from __future__ import annotations

from itertools import pairwise

import torch
from torch import Tensor, nn

from retrace.papers.quietstar.config import MixingHead as MixingHeadConfig


class MixingHead(nn.Module):
    """An MLP from [base ; thought] hidden states to one weight per token (specification 1.4)."""

    def __init__(self, config: MixingHeadConfig, *, hidden_size: int, initializer_range: float) -> None:
        super().__init__()
        sizes = [2 * hidden_size] + [hidden_size] * (config.num_layers - 1) + [1]
        last = config.num_layers - 1
        self.linears = nn.ModuleList(
            nn.Linear(fan_in, fan_out, bias=i < last) for i, (fan_in, fan_out) in enumerate(pairwise(sizes))
        )
        self.bounded = config.bounded
        for name, parameter in self.named_parameters():
            zero = name.endswith("bias") or (name.startswith(f"linears.{last}.") and config.zero_init)
            nn.init.normal_(parameter, std=0.0 if zero else initializer_range)

    def forward(self, base: Tensor, thought: Tensor) -> Tensor:
        """Weight of the thought branch, (..., 1), from two tensors of final-norm hidden states (..., hidden_size)."""
        weight = torch.cat([base, thought], -1)
        for linear in self.linears[:-1]:
            weight = torch.relu(linear(weight))
        weight = self.linears[-1](weight)
        return torch.sigmoid(weight) if self.bounded == "sigmoid" else weight

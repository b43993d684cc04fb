"""The mixing head: how much of the prediction after a thought goes into the next-token prediction (Section 4.3)."""

from __future__ import annotations

from itertools import pairwise

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from retrace.papers.quietstar.config import MixingHead as MixingHeadConfig


class MixingHead(nn.Module):
    """An MLP from [base ; thought] hidden states to one weight per token (specification 1.4).

    Its first layer is a sum of two: what the base hidden states add is computed once for all thoughts that follow them.
    """

    def __init__(self, config: MixingHeadConfig, *, hidden_size: int, initializer_range: float) -> None:
        super().__init__()
        sizes = [2 * hidden_size] + [hidden_size] * (config.num_layers - 1) + [1]
        last = config.num_layers - 1
        self.linears = nn.ModuleList(
            nn.Linear(fan_in, fan_out, bias=i < last) for i, (fan_in, fan_out) in enumerate(pairwise(sizes))
        )
        self.hidden_size, self.bounded = hidden_size, config.bounded
        for name, parameter in self.named_parameters():
            zero = name.endswith("bias") or (name.startswith(f"linears.{last}.") and config.zero_init)
            nn.init.normal_(parameter, std=0.0 if zero else initializer_range)

    def base_term(self, base: Tensor) -> Tensor:
        """What hidden states (..., hidden_size) without a thought add in the first layer."""
        weight, bias = self._first()
        return F.linear(base, weight[:, : self.hidden_size], bias)

    def forward(self, base_term: Tensor, thought: Tensor) -> Tensor:
        """Weight of the thought branch, (..., 1), from `base_term` and hidden states (..., hidden_size) of thoughts."""
        weight = base_term + F.linear(thought, self._first()[0][:, self.hidden_size :])
        for linear in self.linears[1:]:
            weight = linear(torch.relu(weight))
        return torch.sigmoid(weight) if self.bounded == "sigmoid" else weight

    def _first(self) -> tuple[Tensor, Tensor | None]:
        layer = self.linears[0]
        assert isinstance(layer, nn.Linear)
        return layer.weight, layer.bias

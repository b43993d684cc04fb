"""Mixture of experts in the place of a decoder layer's MLP (Section 2.5): top-k gating, no token dropped.

transformers' Mixtral has experts in every layer, and no router z loss; here they stand in every `every`-th layer of any
Llama-like model, as a module of their own. Tokens are sorted by expert, so that each expert is one matrix product.

Shapes: T tokens, C hidden size, I intermediate size, X experts, K experts of a token.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.activations import ACT2FN

from retrace.papers.mm1.shape import ExpertsShape


class Routing(NamedTuple):
    """Of one layer and pass, scalars: both losses without their weights, and the busiest expert's share of choices."""

    load_balance: Tensor  # X * sum_x (share of the choices) * (mean probability): 1 when even, up to X
    router_z: Tensor  # mean squared logsumexp of the router's logits
    busiest: Tensor


class Experts(nn.Module):
    """Gated MLPs and a router. `routing` is that of the latest pass."""

    def __init__(self, shape: ExpertsShape, *, hidden_size: int, intermediate_size: int, activation: str) -> None:
        super().__init__()
        self.top_k, self.activation = shape.top_k, ACT2FN[activation]
        self.router = nn.Linear(hidden_size, shape.num_experts, bias=False)
        self.gate_up_XIC = nn.Parameter(torch.empty(shape.num_experts, 2 * intermediate_size, hidden_size))
        self.down_XCI = nn.Parameter(torch.empty(shape.num_experts, hidden_size, intermediate_size))
        self.routing: Routing | None = None

    def forward(self, x_BTC: Tensor) -> Tensor:
        """(B, T, C)."""
        x_TC = x_BTC.flatten(0, -2)
        logits_TX = F.linear(x_TC.float(), self.router.weight.float())  # fp32, as ST-MoE: rounding changes the choice
        probs_TX = logits_TX.softmax(-1)
        weight_TK, expert_TK = probs_TX.topk(self.top_k)
        weight_TK = (weight_TK / weight_TK.sum(-1, keepdim=True)).to(x_TC.dtype)
        counts_X = expert_TK.flatten().bincount(minlength=len(self.down_XCI))
        self.routing = routing(logits_TX, probs_TX, counts_X)
        order_S = expert_TK.flatten().argsort(stable=True)  # S = T * K choices, expert by expert
        token_S = order_S // self.top_k
        found = []
        groups = x_TC[token_S].split(counts_X.tolist())
        weights = (self.gate_up_XIC.unbind(), self.down_XCI.unbind())  # indexed, each would have a gradient of all X
        for rows, gate_up_IC, down_CI in zip(groups, *weights, strict=True):
            gate, up = F.linear(rows, gate_up_IC).chunk(2, -1)
            found.append(F.linear(self.activation(gate) * up, down_CI))
        mixed_SC = torch.cat(found) * weight_TK.flatten()[order_S, None]
        return torch.zeros_like(x_TC).index_add(0, token_S, mixed_SC).view_as(x_BTC)


def routing(logits_TX: Tensor, probs_TX: Tensor, counts_X: Tensor) -> Routing:
    """The losses' formulas of Section 2.5, before their coefficients."""
    share_X = counts_X / counts_X.sum()
    load_balance = len(counts_X) * (share_X * probs_TX.mean(0)).sum()
    router_z = logits_TX.logsumexp(-1).square().mean()
    return Routing(load_balance, router_z, share_X.max())


@torch.no_grad()
def add_experts(trunk: PreTrainedModel, shape: ExpertsShape, *, copied: bool) -> None:
    """Experts in every `every`-th layer of a dense model, the last of each group; in place.

    `copied` ones start as the dense MLP (which is undisclosed; specification: C), so that the model's function does not
    change at first; else all start as random. Raises ValueError where no layer would get any.
    """
    layers, config = trunk.model.layers, trunk.config
    if shape.every > len(layers):
        raise ValueError(f"experts.every={shape.every} with {len(layers)} layers: no layer would have experts")
    for layer in layers[shape.every - 1 :: shape.every]:
        dense, sizes = layer.mlp, {"hidden_size": config.hidden_size, "intermediate_size": config.intermediate_size}
        like = {"device": dense.down_proj.weight.device, "dtype": dense.down_proj.weight.dtype}
        experts = Experts(shape, **sizes, activation=config.hidden_act).to(**like)
        for parameter in experts.parameters():
            parameter.normal_(std=config.initializer_range)
        if copied:
            experts.gate_up_XIC.copy_(torch.cat([dense.gate_proj.weight, dense.up_proj.weight]))
            experts.down_XCI.copy_(dense.down_proj.weight)
        layer.mlp = experts


def routings(model: nn.Module) -> Iterator[Routing]:
    """Of each layer with experts, that of its latest pass, which is then forgotten."""
    for module in model.modules():
        if isinstance(module, Experts) and module.routing is not None:
            yield module.routing
            module.routing = None

"""Cross entropy without stored logits, the reward's baseline, and the sampling of tokens (specification 1.2).

Shapes: R rows (tokens to predict), V vocabulary, C hidden size, B sequences, N positions, P thoughts.
"""

from __future__ import annotations

from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor

CHUNK_LOGITS = 2**21  # logits alive at a time, 8 MiB in fp32: large enough for a full matrix product


class _WeightedCrossEntropy(torch.autograd.Function):
    """sum_r coefficient_r * NLL_r; its gradients are computed in the forward pass, so that no logits are kept."""

    @staticmethod
    def forward(
        ctx: Any,
        hidden_RC: Tensor,
        weight_VC: Tensor,
        target_R: Tensor,
        coefficient_R: Tensor,
        temperature: float,
        blocked: Tensor | None,
    ) -> tuple[Tensor, Tensor]:
        wants_hidden, wants_weight = ctx.needs_input_grad[:2]
        wide = torch.promote_types(hidden_RC.dtype, torch.float32)
        d_hidden = torch.empty_like(hidden_RC) if wants_hidden else None
        d_weight = torch.zeros_like(weight_VC, dtype=wide) if wants_weight else None
        nll_R = torch.empty(len(target_R), dtype=wide, device=hidden_RC.device)
        size = max(1, CHUNK_LOGITS // len(weight_VC))
        for start in range(0, len(target_R), size):
            rows = slice(start, start + size)
            logits = F.linear(hidden_RC[rows], weight_VC)
            scores = scaled_logits(logits, temperature, blocked)
            log_prob = torch.log_softmax(scores, -1)
            index = target_R[rows, None]
            nll_R[rows] = -log_prob.gather(1, index)[:, 0]
            if not (wants_hidden or wants_weight):
                continue
            factor = coefficient_R[rows, None].to(wide) / temperature
            d_logits = log_prob.exp_().mul_(factor).scatter_add_(1, index, -factor).to(logits.dtype)
            if d_hidden is not None:
                d_hidden[rows] = d_logits @ weight_VC.to(logits.dtype)
            if d_weight is not None:
                d_weight += d_logits.mT @ hidden_RC[rows].to(logits.dtype)
        ctx.save_for_backward(d_hidden, None if d_weight is None else d_weight.to(weight_VC.dtype))
        ctx.mark_non_differentiable(nll_R)
        return (nll_R * coefficient_R).sum(), nll_R

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        d_hidden, d_weight = (None if g is None else g * grads[0] for g in ctx.saved_tensors)
        return d_hidden, d_weight, None, None, None, None


def weighted_cross_entropy(
    hidden_RC: Tensor,
    *,
    weight_VC: Tensor,
    target_R: Tensor,
    coefficient_R: Tensor,
    temperature: float = 1.0,
    blocked: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """sum_r coefficient_r * NLL_r in nats, and the detached NLL_r, of `hidden @ weight^T / temperature`.

    `blocked` holds token ids that get probability 0. Coefficients are constants: no gradient flows to them.
    """
    return _WeightedCrossEntropy.apply(hidden_RC, weight_VC, target_R, coefficient_R, temperature, blocked)


def scaled_logits(logits: Tensor, temperature: float, blocked: Tensor | None) -> Tensor:
    """Logits in fp32 or wider, at a temperature, with the `blocked` token ids at -inf."""
    scores = logits.to(torch.promote_types(logits.dtype, torch.float32))
    scores = scores if temperature == 1 else scores / temperature
    if blocked is not None and len(blocked):
        scores = scores.index_fill(-1, blocked, -torch.inf)
    return scores


def advantage(reward_BNP: Tensor, *, baseline: Literal["mean", "loo", "base_loss"], positive_only: bool) -> Tensor:
    """Reward minus its baseline over the thoughts of a position (specification 1.2 "Reward"), (B, N, P), in nats.

    "base_loss" subtracts nothing: the reward is already the gain over the prediction without a thought.
    """
    num_thoughts = reward_BNP.shape[-1]
    if baseline == "mean":
        reward_BNP = reward_BNP - reward_BNP.mean(-1, keepdim=True)
    elif baseline == "loo":
        others = (reward_BNP.sum(-1, keepdim=True) - reward_BNP) / (num_thoughts - 1)
        reward_BNP = reward_BNP - others
    return reward_BNP.clamp(min=0) if positive_only else reward_BNP


def sample_tokens(
    hidden_BNQC: Tensor,
    *,
    weight_VC: Tensor,
    num_thoughts: int,
    temperature: float,
    blocked: Tensor,
    generator: torch.Generator | None,
) -> Tensor:
    """Next tokens (B, N, P), by inversion of the cumulative distribution in fp32; without a generator the likeliest.

    Q is P, or 1 where the thoughts of a position still share their hidden state.
    """
    batch, num_positions, num_shared, hidden_size = hidden_BNQC.shape
    hidden_RC = hidden_BNQC.reshape(-1, hidden_size)
    draws = num_thoughts // num_shared
    noise = None
    if generator is not None:
        noise = torch.rand(len(hidden_RC), draws, generator=generator, device=generator.device).to(hidden_RC.device)
    size = max(1, CHUNK_LOGITS // len(weight_VC))
    tokens = []
    for start in range(0, len(hidden_RC), size):
        rows = slice(start, start + size)
        scores = scaled_logits(F.linear(hidden_RC[rows], weight_VC), temperature, blocked)
        if noise is None:
            tokens.append(scores.argmax(-1, keepdim=True).expand(-1, draws))
            continue
        cumulative = scores.float().softmax(-1).cumsum(-1)
        total = cumulative[:, -1:]
        # rounding must not reach the total itself: the first index above it may be a blocked token
        threshold = torch.minimum(noise[rows] * total, torch.nextafter(total, torch.zeros_like(total)))
        tokens.append(torch.searchsorted(cumulative, threshold, right=True))
    return torch.cat(tokens).view(batch, num_positions, num_thoughts)

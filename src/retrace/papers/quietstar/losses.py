"""Cross entropy without stored logits, the reward's baseline, and the sampling of tokens (specification 1.2).

Shapes: R rows (tokens to predict), V vocabulary, C hidden size, B sequences, N positions, P thoughts, Q thoughts that
have a hidden state of their own (P, or 1 while they still share it).
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, Literal

import torch
from torch import Tensor

from retrace.papers.quietstar.head import OutputHead

CHUNK_LOGITS = {"cpu": 2**21}  # logits alive at a time, 8 MiB in fp32: large enough for a full matrix product
CHUNK_LOGITS_ELSEWHERE = 2**27
GROUP = 64  # tokens that are summed first when one is drawn

Generators = torch.Generator | Sequence[torch.Generator]  # one for all rows, or one for each sequence


class _WeightedCrossEntropy(torch.autograd.Function):
    """sum_r coefficient_r * NLL_r; its gradients are computed in the forward pass, so that no logits are kept."""

    @staticmethod
    def forward(
        ctx: Any,
        hidden_RC: Tensor,
        weight_VC: Tensor,
        bias_V: Tensor | None,
        target_R: Tensor,
        coefficient_R: Tensor,
        scale: float,
        softcap: float | None,
        temperature: float,
        blocked: Tensor | None,
    ) -> tuple[Tensor, Tensor]:
        dtype, wide = _product_dtype(hidden_RC), torch.promote_types(hidden_RC.dtype, torch.float32)
        hidden, weight = hidden_RC.to(dtype), weight_VC.to(dtype)
        wants = ctx.needs_input_grad[:3]
        d_hidden = torch.empty_like(hidden) if wants[0] else None
        d_weight = torch.zeros_like(weight, dtype=wide) if wants[1] else None
        d_bias = torch.zeros_like(weight[:, 0], dtype=wide) if wants[2] else None
        head = OutputHead(weight, None if bias_V is None else bias_V.to(dtype), scale, softcap)
        factor_R = (coefficient_R * (scale / temperature)).to(wide)
        nll_R = torch.empty(len(target_R), dtype=wide, device=hidden.device)
        for rows in _chunks(target_R, len(weight)):
            scores = head.logits(hidden[rows], temperature=temperature, blocked=blocked)
            index, factor = target_R[rows, None], factor_R[rows, None]
            probs = torch.softmax(scores, -1)
            # the likeliest token's probability is at least 1 / V, so its logarithm is safe where the target's is not
            nll_R[rows] = scores.amax(-1) - scores.gather(1, index)[:, 0] - probs.amax(-1).log()
            if not any(wants):
                continue
            d_scores = probs.mul_(factor).scatter_add_(1, index, -factor)
            if softcap is not None:
                d_scores *= 1 - (scores * (temperature / softcap)).square_().nan_to_num_(posinf=0.0)
            d_scores = d_scores.to(dtype)
            if d_hidden is not None:
                torch.mm(d_scores, weight, out=d_hidden[rows])
            if d_weight is not None:
                _add_product(d_weight, d_scores.mT, hidden[rows])
            if d_bias is not None:
                d_bias += d_scores.sum(0)
        ctx.save_for_backward(*(None if g is None else g.to(hidden_RC.dtype) for g in (d_hidden, d_weight, d_bias)))
        ctx.mark_non_differentiable(nll_R)
        return (nll_R * coefficient_R).sum(), nll_R

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        return *(None if g is None else g * grads[0] for g in ctx.saved_tensors), *([None] * 6)


def weighted_cross_entropy(
    hidden_RC: Tensor,
    *,
    head: OutputHead,
    target_R: Tensor,
    coefficient_R: Tensor,
    temperature: float = 1.0,
    blocked: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """sum_r coefficient_r * NLL_r in nats, and the detached NLL_r, of the head's logits over `temperature`.

    `blocked` holds token ids that get probability 0. Coefficients are constants: no gradient flows to them.
    """
    return _WeightedCrossEntropy.apply(
        hidden_RC, head.weight_VC, head.bias_V, target_R, coefficient_R, head.scale, head.softcap, temperature, blocked
    )


@torch.no_grad()
def entropies(hidden_RC: Tensor, *, head: OutputHead) -> Tensor:
    """Entropy (R,) of the predicted distributions, in nats."""
    found = []
    for rows in _chunks(hidden_RC, len(head.weight_VC)):
        log_probs = head.log_probs(hidden_RC[rows])
        found.append(-(log_probs.exp() * log_probs).sum(-1))
    return torch.cat(found)


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


@torch.no_grad()
def sample_tokens(
    hidden_BNQC: Tensor,
    *,
    head: OutputHead,
    num_thoughts: int,
    temperature: float,
    blocked: Tensor,
    noise_BNP: Tensor | None,
) -> Tensor:
    """Next tokens (B, N, P) from uniform noise; without it the likeliest ones."""
    batch, num_positions, num_shared, hidden_size = hidden_BNQC.shape
    hidden_RC = hidden_BNQC.reshape(-1, hidden_size)
    draws = num_thoughts // num_shared
    tokens = []
    for rows in _chunks(hidden_RC, len(head.weight_VC)):
        scores = head.logits(hidden_RC[rows], temperature=temperature, blocked=blocked)
        if noise_BNP is None:
            tokens.append(scores.argmax(-1, keepdim=True).expand(-1, draws))
        else:
            tokens.append(draw(scores, noise_BNP.reshape(-1, draws)[rows]))
    return torch.cat(tokens).view(batch, num_positions, num_thoughts)


def draw(scores_RV: Tensor, noise_RD: Tensor) -> Tensor:
    """Tokens (R, D) from scores (logits or log-probabilities) and uniform noise, by inversion of the distribution.

    First the group of W tokens is found, then the token in it: one pass over the probabilities and no sum of thousands.
    """
    width = min(GROUP, scores_RV.shape[1] & -scores_RV.shape[1])  # a power of two that divides the vocabulary
    probs_RGW = scores_RV.float().softmax(-1).view(len(scores_RV), -1, width)
    group_RD, rest_RD = _invert(probs_RGW.sum(-1), noise_RD)
    own_RDW = probs_RGW.gather(1, group_RD[..., None].expand(-1, -1, width))
    within, _ = _invert(own_RDW.flatten(0, 1), rest_RD.reshape(-1, 1))
    return group_RD * width + within.view_as(group_RD)


def _invert(weights_RV: Tensor, noise_RD: Tensor) -> tuple[Tensor, Tensor]:
    """Where uniform noise falls among weights, and where in its interval: (R, D) indices and noise anew on [0, 1)."""
    cumulative_RV = weights_RV.cumsum(-1)
    total_R1 = cumulative_RV[:, -1:]
    # rounding must not reach the total itself: the first index above it may have weight 0
    below_R1 = torch.nextafter(total_R1, torch.zeros_like(total_R1))
    threshold_RD = torch.minimum(noise_RD * total_R1, below_R1)
    index_RD = torch.searchsorted(cumulative_RV, threshold_RD, right=True)
    weight_RD = weights_RV.gather(1, index_RD)
    return index_RD, (1 - (cumulative_RV.gather(1, index_RD) - threshold_RD) / weight_RD).clamp(0, 1)


def uniform(shape: tuple[int, ...], generator: Generators, device: torch.device) -> Tensor:
    """Uniform noise on [0, 1); with a generator for each sequence, a row does not depend on the batch around it."""
    if isinstance(generator, torch.Generator):
        return torch.rand(shape, generator=generator, device=generator.device).to(device)
    rows = [torch.rand(shape[1:], generator=own, device=own.device).to(device) for own in generator]
    if len(rows) != shape[0]:
        raise ValueError(f"{len(rows)} generators for {shape[0]} sequences: give one for each, or a single one")
    return torch.stack(rows)


def _chunks(rows: Tensor, vocab_size: int) -> Iterator[slice]:
    size = max(1, CHUNK_LOGITS.get(rows.device.type, CHUNK_LOGITS_ELSEWHERE) // vocab_size)
    return (slice(start, start + size) for start in range(0, len(rows), size))


def _product_dtype(tensor: Tensor) -> torch.dtype:
    """The dtype that a matrix product with `tensor` has here, under autocast or not."""
    if torch.is_autocast_enabled(tensor.device.type):
        return torch.get_autocast_dtype(tensor.device.type)
    return tensor.dtype


def _add_product(total: Tensor, left: Tensor, right: Tensor) -> None:
    """total += left @ right, in place."""
    if total.dtype == left.dtype:
        total.addmm_(left, right)
    else:
        total += left @ right

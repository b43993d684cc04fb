"""The loss of one training step, given the hidden states of text and threads (specification 1.2).

Shapes: B sequences, T text tokens, U = T - 1 tokens with a next one, N positions that think, P thoughts per position,
M sampled tokens, S true tokens scored, C hidden size, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from retrace.papers.quietstar.config import ThoughtConfig
from retrace.papers.quietstar.head import OutputHead
from retrace.papers.quietstar.losses import advantage, weighted_cross_entropy
from retrace.papers.quietstar.mixing import MixingHead


@dataclass(frozen=True)
class ThoughtOutput:
    """The scalar to minimise, and detached 0-d tensors under the names a dashboard shows (losses, rewards in nats)."""

    loss: Tensor
    metrics: dict[str, Tensor]


@dataclass(frozen=True)
class Thinking:
    """Hidden states that each sampled token was drawn from (M of (B, N, P or 1, C)), and the tokens."""

    before: list[Tensor]
    thoughts_BNPM: Tensor


@dataclass(frozen=True)
class Targets:
    """The next S tokens after each token of the text, and which of them are real and follow a real one."""

    next_BUS: Tensor
    valid_BUS: Tensor

    @classmethod
    def of(cls, input_ids_BT: Tensor, real_BT: Tensor, num_true: int) -> Targets:
        """Windows over the shifted text; beyond its end there are no targets."""
        ids, real = following(input_ids_BT[:, 1:], num_true), following(real_BT[:, 1:], num_true)
        return cls(ids, real & real_BT[:, :-1, None])

    def at(self, choose: Callable[[Tensor], Tensor]) -> Targets:
        """Those of chosen positions."""
        return Targets(choose(self.next_BUS), choose(self.valid_BUS))

    def mean_weight(self, dtype: torch.dtype) -> Tensor:
        """Weights of the shape of `valid_BUS` that sum to one over the valid targets of each offset."""
        return self.valid_BUS.to(dtype) / self.valid_BUS.sum((0, 1)).clamp(min=1)


def following(values: Tensor, count: int) -> Tensor:
    """Each of (B, U, ...) with those behind it, (B, U, ..., count), zero beyond the end."""
    padding = [0, 0] * (values.ndim - 2) + [0, count - 1]
    return F.pad(values, padding).unfold(1, count, 1)


def plain_objective(base_BUC: Tensor, *, head: OutputHead, targets: Targets, scale: float) -> tuple[Tensor, Tensor]:
    """`scale` times the mean cross entropy of the next token, and the detached NLL (B, U)."""
    loss, nll_R = weighted_cross_entropy(
        base_BUC.flatten(0, 1),
        head=head,
        target_R=targets.next_BUS[..., 0].flatten(),
        coefficient_R=scale * targets.mean_weight(_wide(base_BUC))[..., 0].flatten(),
    )
    return loss, nll_R.view(base_BUC.shape[:2])


def mix(
    mixing_head: MixingHead | None, base_BTC: Tensor, after_BNPSC: Tensor, *, choose: Callable[[Tensor], Tensor]
) -> tuple[Tensor, Tensor]:
    """Hidden states between those without and with a thought, and the weight of the latter; 1 without a head.

    The prediction of the s-th token after a position mixes with the base prediction of the same token: `choose` picks
    the N positions out of (B, T, ...).
    """
    if mixing_head is None:
        return after_BNPSC, after_BNPSC.new_ones(after_BNPSC.shape[:-1])
    count = after_BNPSC.shape[3]

    def aligned(values_BTC: Tensor) -> Tensor:
        return choose(following(values_BTC, count)).mT[:, :, None]

    weight = mixing_head(aligned(mixing_head.base_term(base_BTC)), after_BNPSC)
    mixed_BNPSC = torch.lerp(aligned(base_BTC).expand_as(after_BNPSC), after_BNPSC, weight.to(after_BNPSC.dtype))
    return mixed_BNPSC, weight[..., 0]


def thought_objective(
    config: ThoughtConfig,
    *,
    base_BTC: Tensor,
    thinking: Thinking,
    after_BNPSC: Tensor,
    targets: Targets,
    positions_BN: Tensor,
    choose: Callable[[Tensor], Tensor],
    head: OutputHead,
    mixing_head: MixingHead | None,
    blocked: Tensor,
) -> ThoughtOutput:
    """0.5 * base NLL + 0.5 * mean talk NLL + policy weight * REINFORCE, with the config's weights.

    `after_BNPSC` are the hidden states that predict the S true tokens after the thoughts of the N `positions_BN`, which
    `choose` picks out of (B, U, ...).
    """
    base_loss, base_nll_BU = plain_objective(
        base_BTC[:, :-1], head=head, targets=targets, scale=config.base_loss_weight
    )
    here = targets.at(choose)
    mixed_BNPSC, mixing_weight = mix(mixing_head, base_BTC, after_BNPSC, choose=choose)
    mean_BNPS = (here.mean_weight(_wide(base_BTC)) / (config.num_true * config.num_thoughts))[:, :, None]
    mean_BNPS = mean_BNPS.expand(mixing_weight.shape)
    talk_loss, talk_nll = _talk_nll(mixed_BNPSC, config.talk_loss_weight * mean_BNPS, here, head)
    reward_nll = talk_nll
    if config.reward == "thought" and mixing_head is not None:
        with torch.no_grad():
            reward_nll = _talk_nll(after_BNPSC, mean_BNPS, here, head)[1]
    gain_BNPS = choose(following(base_nll_BU, config.num_true))[:, :, None] - reward_nll
    reward_BNP = (gain_BNPS * here.valid_BUS[:, :, None]).sum(-1)
    # One more position has all S targets; the official code leaves it out, and so do we.
    rewarded_BN = positions_BN < base_nll_BU.shape[1] - config.num_true
    loss, metrics = base_loss + talk_loss, _metrics(base_nll_BU, talk_nll, mean_BNPS, mixing_weight, targets)
    if config.policy_weight > 0:
        policy_loss = _policy_loss(config, reward_BNP, rewarded_BN, thinking, head, blocked)
        loss = loss + config.policy_weight * policy_loss
        metrics["loss/policy"] = policy_loss.detach()
    scored_BN = rewarded_BN & here.valid_BUS[..., 0]
    return ThoughtOutput(loss, {"loss/total": loss.detach(), **metrics, **_reward_metrics(reward_BNP[scored_BN])})


def _wide(tensor: Tensor) -> torch.dtype:
    return torch.promote_types(tensor.dtype, torch.float32)


def _talk_nll(
    hidden_BNPSC: Tensor, coefficient_BNPS: Tensor, targets: Targets, head: OutputHead
) -> tuple[Tensor, Tensor]:
    """Weighted cross entropy of the S true tokens after each thought, and the detached NLL (B, N, P, S)."""
    shape = coefficient_BNPS.shape
    loss, nll_R = weighted_cross_entropy(
        hidden_BNPSC.reshape(-1, hidden_BNPSC.shape[-1]),
        head=head,
        target_R=targets.next_BUS[:, :, None].expand(shape).flatten(),
        coefficient_R=coefficient_BNPS.flatten(),
    )
    return loss, nll_R.view(shape)


def _policy_loss(
    config: ThoughtConfig,
    reward_BNP: Tensor,
    rewarded_BN: Tensor,
    thinking: Thinking,
    head: OutputHead,
    blocked: Tensor,
) -> Tensor:
    """-mean(advantage * log p(sampled token)) over tokens, thoughts and positions; logits only where it is not 0."""
    advantage_BNP = advantage(reward_BNP, baseline=config.baseline, positive_only=config.positive_only)
    advantage_BNP = advantage_BNP * rewarded_BN[..., None]
    num_thoughts, num_sampled = advantage_BNP.shape[-1], config.num_sampled
    at = advantage_BNP.nonzero(as_tuple=True)
    hidden_ZMC = torch.stack([h.expand(-1, -1, num_thoughts, -1)[at] for h in thinking.before], 1)
    coefficient_Z = advantage_BNP[at] / (rewarded_BN.sum().clamp(min=1) * num_thoughts * num_sampled)
    loss, _ = weighted_cross_entropy(
        hidden_ZMC.flatten(0, 1),
        head=head,
        target_R=thinking.thoughts_BNPM[at].flatten(),
        coefficient_R=coefficient_Z[:, None].expand(-1, num_sampled).flatten(),
        temperature=config.policy_temperature,
        blocked=blocked,
    )
    return loss


def _metrics(
    base_nll_BU: Tensor, talk_nll_BNPS: Tensor, mean_BNPS: Tensor, mixing_weight: Tensor, targets: Targets
) -> dict[str, Tensor]:
    return {
        "loss/base": (base_nll_BU * targets.mean_weight(base_nll_BU.dtype)[..., 0]).sum(),
        "loss/talk": (talk_nll_BNPS * mean_BNPS).sum(),
        "mixing_weight/mean": (mixing_weight.detach() * mean_BNPS).sum(),
    }


def _reward_metrics(reward_Z: Tensor) -> dict[str, Tensor]:
    if reward_Z.numel() == 0:
        return {}
    return {
        "reward/mean": reward_Z.mean(),
        "reward/std": reward_Z.std(correction=0),
        "reward/positive_fraction": (reward_Z > 0).to(reward_Z.dtype).mean(),
    }

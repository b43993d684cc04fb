"""The loss of one training step, given the hidden states of text and threads (specification 1.2).

Shapes: B sequences, T text tokens, N = T - 1 positions with a next token, P thoughts per position, M sampled tokens,
S true tokens scored, C hidden size, V vocabulary.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from retrace.papers.quietstar.config import ThoughtConfig
from retrace.papers.quietstar.losses import advantage, weighted_cross_entropy
from retrace.papers.quietstar.mixing import MixingHead


@dataclass(frozen=True)
class ThoughtOutput:
    """The scalar to minimise, and detached 0-d tensors under the names a dashboard shows (losses, rewards in nats)."""

    loss: Tensor
    metrics: dict[str, Tensor]


@dataclass(frozen=True)
class Thinking:
    """Hidden states of the text, those that each sampled token was drawn from (M of (B, T, P or 1, C)), the tokens."""

    base_BTC: Tensor
    before: list[Tensor]
    thoughts_BNPM: Tensor


@dataclass(frozen=True)
class Targets:
    """The next S tokens after each position, and which of them are real and follow a real position."""

    next_BNS: Tensor
    valid_BNS: Tensor

    @classmethod
    def of(cls, input_ids_BT: Tensor, real_BT: Tensor, num_true: int) -> Targets:
        """Windows over the shifted text; beyond its end there are no targets."""
        ids = F.pad(input_ids_BT[:, 1:], (0, num_true - 1)).unfold(1, num_true, 1)
        real = F.pad(real_BT[:, 1:], (0, num_true - 1)).unfold(1, num_true, 1)
        return cls(ids, real & real_BT[:, :-1, None])

    def mean_weight(self, dtype: torch.dtype) -> Tensor:
        """Weights (B, N, S) that sum to one over the valid targets of each offset."""
        return self.valid_BNS.to(dtype) / self.valid_BNS.sum((0, 1)).clamp(min=1)


def plain_objective(base_BTC: Tensor, *, weight_VC: Tensor, targets: Targets, scale: float) -> tuple[Tensor, Tensor]:
    """`scale` times the mean cross entropy of the next token, and the detached NLL (B, N)."""
    batch, num_positions = targets.valid_BNS.shape[:2]
    loss, nll_R = weighted_cross_entropy(
        base_BTC[:, :-1].flatten(0, 1),
        weight_VC=weight_VC,
        target_R=targets.next_BNS[..., 0].flatten(),
        coefficient_R=scale * targets.mean_weight(_wide(base_BTC))[..., 0].flatten(),
    )
    return loss, nll_R.view(batch, num_positions)


def mix(mixing_head: MixingHead | None, before: Tensor, after: Tensor) -> tuple[Tensor, Tensor]:
    """Hidden states between those without and with a thought, and the weight of the latter; 1 without a head."""
    if mixing_head is None:
        return after, after.new_ones(after.shape[:-1])
    weight = mixing_head(before, after)
    return before + weight * (after - before), weight[..., 0]


def thought_objective(
    config: ThoughtConfig,
    *,
    thinking: Thinking,
    after_BTPSC: Tensor,
    targets: Targets,
    weight_VC: Tensor,
    mixing_head: MixingHead | None,
    blocked: Tensor,
) -> ThoughtOutput:
    """0.5 * base NLL + 0.5 * mean talk NLL + policy weight * REINFORCE, with the config's weights.

    `after_BTPSC` are the hidden states that predict the S true tokens after each position's thoughts.
    """
    base_BTC, num_true = thinking.base_BTC, config.num_true
    base_loss, base_nll_BN = plain_objective(
        base_BTC, weight_VC=weight_VC, targets=targets, scale=config.base_loss_weight
    )
    after_BNPSC = after_BTPSC[:, :-1]
    before_BNPSC = F.pad(base_BTC[:, :-1], (0, 0, 0, num_true - 1)).unfold(1, num_true, 1).mT[:, :, None]
    mixed_BNPSC, mixing_weight = mix(mixing_head, before_BNPSC.expand_as(after_BNPSC), after_BNPSC)
    mean_BNPS = (targets.mean_weight(_wide(base_BTC)) / (num_true * config.num_thoughts))[:, :, None]
    mean_BNPS = mean_BNPS.expand(mixing_weight.shape)
    talk_loss, talk_nll = _talk_nll(mixed_BNPSC, config.talk_loss_weight * mean_BNPS, targets, weight_VC)
    reward_nll = talk_nll
    if config.reward == "thought" and mixing_head is not None:
        reward_nll = _talk_nll(after_BNPSC.detach(), mean_BNPS, targets, weight_VC.detach())[1]
    reward_BIP = _reward(base_nll_BN, reward_nll, targets)
    loss, metrics = base_loss + talk_loss, _metrics(base_nll_BN, talk_nll, mean_BNPS, mixing_weight, targets)
    if config.policy_weight > 0:
        policy_loss = _policy_loss(config, reward_BIP, thinking, weight_VC, blocked)
        loss = loss + config.policy_weight * policy_loss
        metrics["loss/policy"] = policy_loss.detach()
    scored_BIP = targets.valid_BNS[:, : reward_BIP.shape[1], :1].expand_as(reward_BIP)
    return ThoughtOutput(loss, {"loss/total": loss.detach(), **metrics, **_reward_metrics(reward_BIP[scored_BIP])})


def _wide(tensor: Tensor) -> torch.dtype:
    return torch.promote_types(tensor.dtype, torch.float32)


def _talk_nll(
    hidden_BNPSC: Tensor, coefficient_BNPS: Tensor, targets: Targets, weight_VC: Tensor
) -> tuple[Tensor, Tensor]:
    """Weighted cross entropy of the S true tokens after each thought, and the detached NLL (B, N, P, S)."""
    shape = coefficient_BNPS.shape
    loss, nll_R = weighted_cross_entropy(
        hidden_BNPSC.reshape(-1, hidden_BNPSC.shape[-1]),
        weight_VC=weight_VC,
        target_R=targets.next_BNS[:, :, None].expand(shape).flatten(),
        coefficient_R=coefficient_BNPS.flatten(),
    )
    return loss, nll_R.view(shape)


def _reward(base_nll_BN: Tensor, talk_nll_BNPS: Tensor, targets: Targets) -> Tensor:
    """Summed gain over the base prediction, (B, I, P), in nats, at the I = T - 1 - S first positions.

    One more position has all S targets; the official code leaves it out, and so do we.
    """
    num_true = talk_nll_BNPS.shape[-1]
    num_columns = base_nll_BN.shape[1] - num_true
    base_BNS = base_nll_BN.unfold(1, num_true, 1)[:, :num_columns]
    gain = base_BNS[:, :, None] - talk_nll_BNPS[:, :num_columns]
    return (gain * targets.valid_BNS[:, :num_columns, None]).sum(-1)


def _policy_loss(
    config: ThoughtConfig, reward_BIP: Tensor, thinking: Thinking, weight_VC: Tensor, blocked: Tensor
) -> Tensor:
    """-mean(advantage * log p(sampled token)) over tokens, thoughts and positions; logits only where it is not 0."""
    advantage_BIP = advantage(reward_BIP, baseline=config.baseline, positive_only=config.positive_only)
    num_thoughts, num_sampled = advantage_BIP.shape[-1], config.num_sampled
    at = advantage_BIP.nonzero(as_tuple=True)  # the reward's columns are the first positions, so `at` fits all of them
    hidden_ZMC = torch.stack([h.expand(-1, -1, num_thoughts, -1)[at] for h in thinking.before], 1)
    coefficient_Z = advantage_BIP[at] / (advantage_BIP.numel() * num_sampled)
    loss, _ = weighted_cross_entropy(
        hidden_ZMC.flatten(0, 1),
        weight_VC=weight_VC,
        target_R=thinking.thoughts_BNPM[at].flatten(),
        coefficient_R=coefficient_Z[:, None].expand(-1, num_sampled).flatten(),
        temperature=config.policy_temperature,
        blocked=blocked,
    )
    return loss


def _metrics(
    base_nll_BN: Tensor, talk_nll_BNPS: Tensor, mean_BNPS: Tensor, mixing_weight: Tensor, targets: Targets
) -> dict[str, Tensor]:
    return {
        "loss/base": (base_nll_BN * targets.mean_weight(base_nll_BN.dtype)[..., 0]).sum(),
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

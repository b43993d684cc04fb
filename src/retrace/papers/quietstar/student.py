"""A student that never thinks and learns from a teacher that does: Fast Quiet-STaR's "NTP" (specification 7).

Shapes: B sequences, T text tokens, U = T - 1 tokens with a next one, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from retrace.core.train import Batch
from retrace.papers.quietstar.config import DistillConfig
from retrace.papers.quietstar.losses import draw, uniform
from retrace.papers.quietstar.model import ThoughtModel


def student_loss(
    student: nn.Module, teacher: ThoughtModel, batch: Batch, noise: torch.Generator, *, config: DistillConfig
) -> tuple[Tensor, Mapping[str, Tensor]]:
    """Loss of a plain causal LM against the teacher's mixed predictions after greedy thoughts, and metrics in nats."""
    ids_BT, mask_BT = batch["input_ids"], batch["attention_mask"]
    positions_BU = torch.arange(ids_BT.shape[1] - 1, device=ids_BT.device).expand(len(ids_BT), -1)
    taught_BUV = teacher.predict(ids_BT, mask_BT, positions_BU, generator=None).mixed_BNV
    logits_BUV = student(input_ids=ids_BT, attention_mask=mask_BT, use_cache=False).logits[:, :-1].float()
    log_probs_BUV = logits_BUV.log_softmax(-1)
    real_BU, next_BU1 = mask_BT[:, 1:].bool() & mask_BT[:, :-1].bool(), ids_BT[:, 1:, None]
    own, theirs = (-x.gather(-1, next_BU1)[..., 0][real_BU] for x in (log_probs_BUV, taught_BUV))
    if config.student.objective == "cross_entropy":
        loss = -(taught_BUV.exp() * log_probs_BUV).sum(-1)[real_BU].mean()
    else:
        loss = config.teacher.policy_weight * _reinforce(logits_BUV, theirs - own, real_BU, noise, config=config)
    return loss, {"loss/base": own.mean().detach(), "loss/teacher": theirs.mean()}


def _reinforce(
    logits_BUV: Tensor, reward: Tensor, real_BU: Tensor, noise: torch.Generator, *, config: DistillConfig
) -> Tensor:
    """As published: a token is drawn from the student and made likelier by how much better than the teacher it was.

    The reward is that of the true token, whatever was drawn, and positive only.
    """
    logits_RV = logits_BUV[real_BU]
    drawn_R1 = draw(logits_RV.detach(), uniform((len(logits_RV), 1), noise, logits_RV.device))
    log_prob_R = (logits_RV / config.teacher.policy_temperature).log_softmax(-1).gather(1, drawn_R1)[:, 0]
    return -(reward.detach().clamp(min=0) * log_prob_R).mean()

"""Contrastive pre-training of a vision encoder, CLIP's: images and captions meet in one space (Section 1.2).

The text tower is a small bidirectional transformer (transformers' SigLIP text model). Both towers' outputs are averaged
over patches or tokens and projected. With "mean_and_patches" a second loss, of the same weight, projects all patches
side by side: it is quick to read what is small, which counts 1 / P in a mean, and the mean then teaches features to say
where it is. Negatives are the micro-batch's other pairs.

Shapes: B pairs, R pixels a side, P patches of size D, T tokens, E size of the common space.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import SiglipTextConfig, SiglipTextModel

from retrace.core.data import derive_seed
from retrace.papers.mm1.choices import TextTower
from retrace.papers.mm1.decoder import Output
from retrace.papers.mm1.encoder import VisionEncoder

FIRST_TEMPERATURE, LEAST_TEMPERATURE = 0.07, 0.01


class ContrastiveModel(nn.Module):
    """An encoder and the text tower that teaches it."""

    def __init__(self, encoder: VisionEncoder, shape: TextTower, *, vocab_size: int, seed: int) -> None:
        super().__init__()
        torch.manual_seed(derive_seed(seed, "text tower"))
        config = SiglipTextConfig(
            vocab_size=vocab_size,
            hidden_size=shape.hidden_size,
            num_hidden_layers=shape.num_layers,
            num_attention_heads=shape.num_heads,
            intermediate_size=shape.intermediate_size,
            max_position_embeddings=shape.max_tokens,
        )
        self.encoder, self.text = encoder, SiglipTextModel(config)
        self.text.head.requires_grad_(False)  # of a pooling that is not used
        self.project_image = nn.Linear(encoder.hidden_size, shape.joint_size, bias=False)
        self.project_patches: nn.Linear | None = None
        if shape.image_pooling == "mean_and_patches":
            self.project_patches = nn.Linear(encoder.hidden_size * encoder.grid**2, shape.joint_size, bias=False)
        self.project_text = nn.Linear(shape.hidden_size, shape.joint_size, bias=False)
        self.log_scale = nn.Parameter(torch.tensor([-math.log(FIRST_TEMPERATURE)]))

    def forward(self, images_B3RR: Tensor, input_ids_BT: Tensor, attention_mask_BT: Tensor) -> Output:
        """Mean loss in nats, and the share of images that find a caption of theirs, and of captions their image."""
        features_BPD = self.encoder(images_B3RR)
        hidden_BTC = self.text(input_ids=input_ids_BT, attention_mask=attention_mask_BT).last_hidden_state
        mask_BT1 = attention_mask_BT[..., None].to(hidden_BTC.dtype)
        means_BC = (hidden_BTC * mask_BT1).sum(1) / mask_BT1.sum(1)
        texts_BE = F.normalize(self.project_text(means_BC), dim=-1)
        scale = self.log_scale.clamp(max=-math.log(LEAST_TEMPERATURE)).exp()
        alike_BB = same_captions(input_ids_BT, attention_mask_BT)

        def scores(images_BE: Tensor) -> Tensor:
            return (scale * F.normalize(images_BE, dim=-1) @ texts_BE.mT).float()

        scores_BB = scores(self.project_image(features_BPD.mean(1)))
        loss = contrastive_loss(scores_BB, alike_BB)
        metrics = {"temperature": 1 / scale.detach()[0], **_retrieval(scores_BB.detach(), alike_BB)}
        metrics["loss/contrastive"] = loss.detach()
        if self.project_patches is not None:
            by_patches = contrastive_loss(scores(self.project_patches(features_BPD.flatten(1))), alike_BB)
            metrics["loss/contrastive_patches"] = by_patches.detach()
            loss = (loss + by_patches) / 2
        return Output(loss, metrics)

    def activation_checkpointing_enable(self) -> None:
        """In both towers."""
        self.encoder.trunk.activation_checkpointing_enable()
        self.text.activation_checkpointing_enable()


def same_captions(input_ids_BT: Tensor, attention_mask_BT: Tensor) -> Tensor:
    """Which pairs have the same caption, (B, B): short captions repeat in a batch, and are no negatives there."""
    ids_BT = input_ids_BT.masked_fill(attention_mask_BT == 0, -1)
    return (ids_BT[:, None] == ids_BT[None]).all(-1)


def contrastive_loss(scores_BB: Tensor, alike_BB: Tensor) -> Tensor:
    """Symmetric cross entropy, the target spread over pairs with the same caption; CLIP's where no two are alike."""
    target_BB = alike_BB / alike_BB.sum(1, keepdim=True)
    return (F.cross_entropy(scores_BB, target_BB) + F.cross_entropy(scores_BB.mT, target_BB)) / 2


def _retrieval(scores_BB: Tensor, alike_BB: Tensor) -> dict[str, Tensor]:
    rows = torch.arange(len(scores_BB), device=scores_BB.device)
    found = {"accuracy/image_to_text": scores_BB.argmax(1), "accuracy/text_to_image": scores_BB.argmax(0)}
    return {name: alike_BB[rows, best].float().mean() for name, best in found.items()}

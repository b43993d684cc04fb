"""Reconstructive pre-training of a vision encoder, AIM's: each patch is predicted from those before it (Section 1.2).

Patches stand in raster order. A random prefix of them sees itself in both directions, the rest is causal, and the loss
is on the rest: so the encoder can be used without any mask afterwards. Targets are pixels, normalised within a patch.

Shapes: M images, R pixels a side, P patches, S pixels a side of one, D hidden size, K = 3 * S * S values of a patch.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from retrace.core.data import derive_seed
from retrace.papers.mm1.decoder import Output
from retrace.papers.mm1.encoder import VisionEncoder

EPSILON = 1e-6


class ReconstructiveModel(nn.Module):
    """An encoder and the head that its pixels are predicted with, thrown away after the pre-training."""

    def __init__(self, encoder: VisionEncoder, *, seed: int) -> None:
        """Raises ValueError for an encoder with a class token, which would see all patches and tell them to all."""
        super().__init__()
        if encoder.has_class_token:
            raise ValueError(
                "an encoder with a class token cannot predict patches in order: use a SigLIP or a fresh ViT"
            )
        torch.manual_seed(derive_seed(seed, "pixel head"))
        size, values = encoder.hidden_size, 3 * encoder.patch_size**2
        self.encoder = encoder
        self.head = nn.Sequential(nn.Linear(size, 4 * size), nn.GELU(), nn.Linear(4 * size, values))

    def forward(self, images_M3RR: Tensor, prefix_M: Tensor | None = None) -> Output:
        """Mean squared error over patches behind the prefix of each image, 1 <= prefix < P patches (None: 1).

        1 is what a prediction of nothing but the mean has.
        """
        target_MPK = normalised_patches(images_M3RR, self.encoder.patch_size)
        num = target_MPK.shape[1]
        prefix_M = torch.ones(len(images_M3RR), dtype=torch.long) if prefix_M is None else prefix_M
        prefix_M = prefix_M.to(images_M3RR.device)
        features_MPD = self.encoder(images_M3RR, mask_PP=prefix_mask(prefix_M, num))
        error_MP = (self.head(features_MPD[:, :-1]).float() - target_MPK[:, 1:]).square().mean(-1)
        behind_MP = torch.arange(1, num, device=prefix_M.device) >= prefix_M[:, None]
        loss = (error_MP * behind_MP).sum() / behind_MP.sum()
        return Output(loss, {"loss/pixels": loss.detach()})

    def activation_checkpointing_enable(self) -> None:
        """In the encoder."""
        self.encoder.trunk.activation_checkpointing_enable()


def sample_prefixes(num_images: int, num_patches: int, *, generator: torch.Generator) -> Tensor:
    """Uniform in 1 ... P - 1, (M,): as the published pre-training draws them."""
    return torch.randint(1, num_patches, (num_images,), generator=generator, device=generator.device)


def prefix_mask(prefix_M: Tensor, num_patches: int) -> Tensor:
    """Which patches (columns) each sees, (M, 1, P, P): those up to itself, and the prefix."""
    causal_PP = torch.ones(num_patches, num_patches, dtype=torch.bool, device=prefix_M.device).tril()
    in_prefix_MP = torch.arange(num_patches, device=prefix_M.device) < prefix_M[:, None]
    return (causal_PP | in_prefix_MP[:, None])[:, None]


def normalised_patches(images_M3RR: Tensor, patch_size: int) -> Tensor:
    """(M, P, K) in raster order, of mean 0 and variance 1 within each patch (0 where it is of one value)."""
    patches = images_M3RR.unfold(2, patch_size, patch_size).unfold(3, patch_size, patch_size)  # (M, 3, g, g, S, S)
    values_MPK = patches.permute(0, 2, 3, 1, 4, 5).flatten(3).flatten(1, 2)
    variance, mean = torch.var_mean(values_MPK, dim=-1, correction=0, keepdim=True)
    return (values_MPK - mean) / (variance + EPSILON).sqrt()

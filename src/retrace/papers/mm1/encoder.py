"""Vision encoders: transformers' CLIP, SigLIP and AIMv2, pretrained or fresh, at any resolution (Section 2.1, 2.4).

    encoder = load_encoder("openai/clip-vit-large-patch14-336", image_size=672)    the hub or a folder
    encoder = build_encoder(shape, seed=0)                                         random weights

A fresh one is a SigLIP ViT: it has no class token, and takes any patch size.

Shapes: M images, R pixels a side, P = g * g patches in raster order, D hidden size.
"""

from __future__ import annotations

import copy
import logging
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import (
    Aimv2VisionConfig,
    Aimv2VisionModel,
    AutoConfig,
    CLIPVisionConfig,
    CLIPVisionModel,
    PreTrainedModel,
    SiglipVisionConfig,
    SiglipVisionModel,
)
from transformers.image_processing_base import ImageProcessingMixin
from transformers.utils.constants import (
    IMAGENET_STANDARD_MEAN,
    IMAGENET_STANDARD_STD,
    OPENAI_CLIP_MEAN,
    OPENAI_CLIP_STD,
)

from retrace.core.data import derive_seed
from retrace.core.weights import load_pretrained
from retrace.papers.mm1.shape import VisionShape

log = logging.getLogger("retrace")
CLASSES = {
    "clip_vision_model": (CLIPVisionModel, CLIPVisionConfig),
    "siglip_vision_model": (SiglipVisionModel, SiglipVisionConfig),
    "aimv2_vision_model": (Aimv2VisionModel, Aimv2VisionConfig),
}
HEADLESS = {"siglip_vision_model": {"vision_use_head": False}, "aimv2_vision_model": {"use_head": False}}
WHOLE = {"clip": "clip_vision_model", "siglip": "siglip_vision_model"}  # models with a text tower, which is left out
PIXELS = {  # mean and standard deviation of a channel that each family was trained with
    "clip_vision_model": (OPENAI_CLIP_MEAN, OPENAI_CLIP_STD),
    "siglip_vision_model": (IMAGENET_STANDARD_MEAN, IMAGENET_STANDARD_STD),
    "aimv2_vision_model": (OPENAI_CLIP_MEAN, OPENAI_CLIP_STD),
}


class ConvStem(nn.Module):
    """Patches through 3x3 convolutions of stride 2 (Section 5), in the place of a ViT's one linear layer.

    With an even number of pixels a side, a patch sees none of those to its right or below it: a raster order stays one.
    """

    def __init__(self, patch_size: int, *, channels: int, hidden_size: int) -> None:
        super().__init__()
        halvings = 0
        while patch_size % 2 == 0:
            patch_size, halvings = patch_size // 2, halvings + 1
        layers: list[nn.Module] = []
        for _ in range(halvings):
            layers += [nn.Conv2d(channels, hidden_size, 3, stride=2, padding=1), nn.GELU()]
            channels = hidden_size
        self.layers = nn.Sequential(*layers, nn.Conv2d(channels, hidden_size, patch_size, stride=patch_size))

    @property
    def weight(self) -> Tensor:
        """A weight, of which a ViT asks the dtype."""
        weight = self.layers[-1].weight
        assert isinstance(weight, Tensor)
        return weight

    def forward(self, images_MCRR: Tensor) -> Tensor:
        """(M, D, g, g)."""
        found: Tensor = self.layers(images_MCRR)
        return found


class VisionEncoder(nn.Module):
    """Patch features of images: transformers' last hidden states, which CLIP's towers alone do not normalise."""

    def __init__(self, trunk: PreTrainedModel, *, pixels: tuple[Sequence[float], Sequence[float]]) -> None:
        super().__init__()
        self.trunk = trunk
        self.mean: Tensor
        self.std: Tensor
        for name, values in zip(("mean", "std"), pixels, strict=True):
            self.register_buffer(name, torch.tensor(values, dtype=torch.float32).view(3, 1, 1))
        if self.has_class_token:
            self.trunk.post_layernorm.requires_grad_(False)  # of the class token, which nobody reads

    @property
    def has_class_token(self) -> bool:
        return isinstance(self.trunk, CLIPVisionModel)

    @property
    def image_size(self) -> int:
        """Pixels a side that the position embeddings are for."""
        return int(self.trunk.config.image_size)

    @property
    def patch_size(self) -> int:
        return int(self.trunk.config.patch_size)

    @property
    def grid(self) -> int:
        """Patches a side."""
        return self.image_size // self.patch_size

    @property
    def hidden_size(self) -> int:
        return int(self.trunk.config.hidden_size)

    def forward(self, images_M3RR: Tensor, *, mask_PP: Tensor | None = None) -> Tensor:
        """Features (M, P, D) of images in 0..1; of another size than its own with interpolated positions.

        `mask_PP` says which patches (columns) each patch sees; there it may be (M, 1, P, P) too. Raises ValueError for
        images that are not square or whose sides are no multiple of the patch size, and of AIMv2 for another size.
        """
        height, width = images_M3RR.shape[-2:]
        if height != width or height % self.patch_size:
            raise ValueError(
                f"images of {height}x{width} pixels: expected squares, sides a multiple of {self.patch_size}"
            )
        options: dict[str, Any] = {} if mask_PP is None else {"attention_mask": mask_PP}
        if height != self.image_size:
            if isinstance(self.trunk, Aimv2VisionModel):
                raise ValueError(f"images of {height} pixels: AIMv2 takes its own {self.image_size}: see `resized`")
            options["interpolate_pos_encoding"] = True
        found = self.trunk((images_M3RR - self.mean) / self.std, **options)
        features: Tensor = found.last_hidden_state
        return features[:, 1:] if self.has_class_token else features

    def settings(self) -> dict[str, Any]:
        """What `encoder_of` needs beside the tensors."""
        return {
            "model_type": self.trunk.config.model_type,
            "config": self.trunk.config.to_dict(),
            "conv_stem": isinstance(getattr(self.trunk.embeddings, "patch_embedding", None), ConvStem),
            "pixels": [self.mean.flatten().tolist(), self.std.flatten().tolist()],
        }


def encoder_of(settings: dict[str, Any]) -> VisionEncoder:
    """The encoder that `settings` describe, with random weights."""
    model, config = CLASSES[settings["model_type"]]
    trunk = model(config.from_dict(settings["config"]))
    if settings["conv_stem"]:
        trunk.embeddings.patch_embedding = ConvStem(
            trunk.config.patch_size, channels=trunk.config.num_channels, hidden_size=trunk.config.hidden_size
        )
    mean, std = settings["pixels"]
    return VisionEncoder(trunk, pixels=(mean, std))


def build_encoder(shape: VisionShape, *, seed: int) -> VisionEncoder:
    """A ViT with random weights that follow from the seed."""
    config = SiglipVisionConfig(
        image_size=shape.image_size,
        patch_size=shape.patch_size,
        hidden_size=shape.hidden_size,
        num_hidden_layers=shape.num_layers,
        num_attention_heads=shape.num_heads,
        intermediate_size=shape.intermediate_size,
        vision_use_head=False,
    )
    torch.manual_seed(derive_seed(seed, "vision encoder"))
    return encoder_of(
        {
            "model_type": config.model_type,
            "config": config.to_dict(),
            "conv_stem": shape.conv_stem,
            "pixels": PIXELS[config.model_type],
        }
    )


def load_encoder(
    name: str,
    *,
    image_size: int | None = None,
    revision: str = "main",
    dtype: torch.dtype = torch.float32,
) -> VisionEncoder:
    """CLIP's, SigLIP's or AIMv2's image tower from the hub or a folder, at `image_size` pixels a side (None: its own).

    Raises ValueError for other models, and for a size that the patches do not divide.
    """
    config = load_pretrained(AutoConfig, name, revision=revision)
    kind = WHOLE.get(config.model_type, config.model_type)
    if kind not in CLASSES:
        raise ValueError(
            f"{name}: a model of type {config.model_type}: expected one of {', '.join([*WHOLE, *CLASSES])}"
        )
    if getattr(config, "is_native", False):
        raise ValueError(f"{name}: it computes its positions from an image's sides: take the AIMv2 of a fixed size")
    model, _ = CLASSES[kind]
    options: dict[str, Any] = {**HEADLESS.get(kind, {}), "dtype": dtype, "use_safetensors": True}
    trunk = load_pretrained(model, name, revision=revision, **options)
    encoder = VisionEncoder(trunk, pixels=_pixels(name, revision=revision, kind=kind))
    return encoder if image_size is None else resized(encoder, image_size)


def _pixels(name: str, *, revision: str, kind: str) -> tuple[Sequence[float], Sequence[float]]:
    """Mean and standard deviation as the model's own image processor has them."""
    try:
        found, _ = ImageProcessingMixin.get_image_processor_dict(name, revision=revision)
        return found["image_mean"], found["image_std"]
    except (OSError, KeyError):
        log.warning("%s has no preprocessor_config.json with image_mean and image_std: taking those of %s", name, kind)
        return PIXELS[kind]


@torch.no_grad()
def resized(encoder: VisionEncoder, image_size: int) -> VisionEncoder:
    """The same encoder for another resolution, its positions interpolated bicubically, for training there (2.4).

    What is frozen stays frozen. Raises ValueError for a size that the patches do not divide.
    """
    if image_size == encoder.image_size:
        return encoder
    if image_size % encoder.patch_size:
        near = max(1, round(image_size / encoder.patch_size)) * encoder.patch_size
        raise ValueError(f"image_size={image_size} is no multiple of patch_size={encoder.patch_size}: use {near}")
    settings = copy.deepcopy(encoder.settings())
    settings["config"]["image_size"] = image_size
    with torch.random.fork_rng(devices=[]):
        fresh = encoder_of(settings)
    tensors = encoder.state_dict()
    name = "trunk.embeddings.position_embedding.weight"
    extra = int(encoder.has_class_token)
    patches = interpolated(tensors[name][extra:], grid=fresh.grid)
    tensors[name] = torch.cat([tensors[name][:extra], patches])
    fresh.to(patches.dtype).load_state_dict(tensors)
    fresh.mean, fresh.std = encoder.mean, encoder.std  # as they were, whatever the dtype
    frozen = {name for name, parameter in encoder.named_parameters() if not parameter.requires_grad}
    for name, parameter in fresh.named_parameters():
        parameter.requires_grad_(name not in frozen)
    return fresh


def interpolated(positions_PD: Tensor, *, grid: int) -> Tensor:
    """Position embeddings of a square grid for another one, (grid * grid, D)."""
    side, size = round(len(positions_PD) ** 0.5), positions_PD.shape[1]
    if side == grid:
        return positions_PD
    map_1Dgg = positions_PD.view(1, side, side, size).permute(0, 3, 1, 2)
    found = F.interpolate(map_1Dgg, size=(grid, grid), mode="bicubic", align_corners=False)
    return found.permute(0, 2, 3, 1).reshape(grid * grid, size)

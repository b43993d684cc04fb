"""Sizes of a multimodal model: vision encoder, connector, decoder. No torch.

Names are those of transformers' configs; sections are those of the specification of MM1.
"""

from __future__ import annotations

from typing import Literal, Self

from pydantic import Field, model_validator

from retrace.core.config import Frozen

ConnectorKind = Literal["average_pool", "attention_pool", "c_abstractor"]
ImagePooling = Literal["mean", "mean_and_patches"]  # what of an image meets captions in one space


class VisionShape(Frozen):
    """A ViT on square images (Section 2.1): `image_size` / `patch_size` patches a side, whatever it was trained at."""

    image_size: int = Field(ge=1)  # pixels a side, as the encoder gets them
    patch_size: int = Field(ge=1)
    hidden_size: int = Field(ge=1)
    num_layers: int = Field(ge=1)
    num_heads: int = Field(ge=1)
    intermediate_size: int = Field(ge=1)
    conv_stem: bool = False  # 3x3 convolutions of stride 2 before the patches (Section 5); not for a pretrained one

    @model_validator(mode="after")
    def _patches_divide(self) -> Self:
        if self.image_size % self.patch_size:
            near = max(1, round(self.image_size / self.patch_size)) * self.patch_size
            raise ValueError(f"image_size={self.image_size} is no multiple of patch_size={self.patch_size}: use {near}")
        return self

    @property
    def grid(self) -> int:
        """Patches a side."""
        return self.image_size // self.patch_size


class ConnectorShape(Frozen):
    """What turns a grid of patches into image tokens (Section 2.2)."""

    kind: ConnectorKind
    num_tokens: int = Field(ge=1)  # that an image takes in the decoder's sequence
    hidden_size: int = Field(ge=1)  # inside of the C-Abstractor; others do not use it
    depth: int = Field(ge=0)  # bottlenecks before the pooling, and as many behind; 0: pooling and a two-layer read-out
    norm_epsilon: float = Field(1e-5, gt=0)  # of the bottlenecks' norms; Honeybee's, that is timm's, have the default
    zero_init: bool = False  # of the bottlenecks' last norms: they begin as their shortcuts; Honeybee's do not

    @model_validator(mode="after")
    def _tokens_make_a_grid(self) -> Self:
        side = self.side
        if self.kind != "attention_pool" and side * side != self.num_tokens:
            raise ValueError(
                f"num_tokens={self.num_tokens} with kind={self.kind}: expected a square, such as {side * side} or "
                f"{(side + 1) ** 2}; attention_pool takes any number"
            )
        return self

    @property
    def side(self) -> int:
        """Image tokens a side, where they are a grid."""
        return round(self.num_tokens**0.5)


class ExpertsShape(Frozen):
    """Mixture of experts in the decoder (Section 2.5): top-2 gating in every `every`-th layer."""

    num_experts: int = Field(ge=2)
    every: int = Field(ge=1)
    top_k: int = Field(2, ge=1)
    load_balance_weight: float = Field(0.01, ge=0)
    router_z_weight: float = Field(0.001, ge=0)

    @model_validator(mode="after")
    def _enough_to_choose_from(self) -> Self:
        if self.top_k > self.num_experts:
            raise ValueError(f"top_k={self.top_k} with num_experts={self.num_experts}: expected at most as many")
        return self


def check_heads(hidden_size: int, num_heads: int, *, even: bool = False) -> None:
    """Raise ValueError for heads that are not of one size, or not of an `even` one, as rotary positions need."""
    step = 2 * num_heads if even else num_heads
    if hidden_size % step:
        near = max(1, round(hidden_size / step)) * step
        size = "one even size" if even else "one size"
        raise ValueError(
            f"hidden_size={hidden_size} with num_heads={num_heads}: expected a multiple of {step}, for heads of "
            f"{size}: use {near}, or other heads"
        )


class DecoderShape(Frozen):
    """A Llama-like causal decoder."""

    hidden_size: int = Field(ge=1)
    num_layers: int = Field(ge=1)
    num_heads: int = Field(ge=1)
    num_kv_heads: int = Field(ge=1)
    intermediate_size: int = Field(ge=1)
    experts: ExpertsShape | None = None

    @model_validator(mode="after")
    def _heads_divide(self) -> Self:
        check_heads(self.hidden_size, self.num_heads, even=True)
        if self.num_heads % self.num_kv_heads:
            raise ValueError(
                f"num_kv_heads={self.num_kv_heads} with num_heads={self.num_heads}: expected a number that divides it"
            )
        return self

    @model_validator(mode="after")
    def _some_layer_has_experts(self) -> Self:
        if self.experts is not None and self.experts.every > self.num_layers:
            raise ValueError(
                f"experts.every={self.experts.every} with num_layers={self.num_layers}: no layer would have experts"
            )
        return self

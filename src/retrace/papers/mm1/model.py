"""The whole of MM1: images through encoder and connector to tokens that stand in line with text (Section 2.1).

    model = MultimodalModel(encoder, connector, decoder, image_token_id=3)
    loss, metrics = model(batch)

Shapes: M images, R pixels a side, N tokens of an image, T tokens that are no padding, C the decoder's hidden size.
"""

from __future__ import annotations

from collections.abc import Collection

import torch
from torch import Tensor, nn

from retrace.papers.mm1.attention import Tokens
from retrace.papers.mm1.config import PARTS, Part
from retrace.papers.mm1.connectors import CAbstractor, build_connector
from retrace.papers.mm1.decoder import Decoder, Output
from retrace.papers.mm1.encoder import VisionEncoder, resized
from retrace.papers.mm1.rows import PackedBatch
from retrace.papers.mm1.shape import ConnectorShape


class MultimodalModel(nn.Module):
    """Vision encoder, connector and decoder."""

    def __init__(
        self, encoder: VisionEncoder, connector: ConnectorShape, decoder: Decoder, *, image_token_id: int, seed: int = 0
    ) -> None:
        """The connector is new, from the seed. Raises ValueError for tokens that the encoder's grid cannot give."""
        super().__init__()
        if not 0 <= image_token_id < decoder.vocab_size:
            raise ValueError(f"image_token_id={image_token_id}: expected one of the vocabulary's {decoder.vocab_size}")
        self.encoder, self.decoder = encoder, decoder
        self.connector_shape, self.image_token_id = connector, image_token_id
        sizes = {"in_size": encoder.hidden_size, "out_size": decoder.hidden_size}
        self.connector = build_connector(connector, grid=encoder.grid, seed=seed, **sizes)

    @property
    def num_image_tokens(self) -> int:
        """Positions that each image takes."""
        return self.connector_shape.num_tokens

    def image_tokens(self, images_M3RR: Tensor) -> Tensor:
        """What stands in the decoder's sequence for each image, (M, N, C)."""
        found: Tensor = self.connector(self.encoder(images_M3RR))
        return found

    def forward(self, batch: PackedBatch) -> Output:
        """Mean loss over text tokens that have a label, and metrics; raises ValueError as `embeddings` does."""
        tokens = Tokens.of(batch)
        output: Output = self.decoder(tokens, embeddings_TC=self.embeddings(tokens, batch.images_M3RR))
        return output

    @torch.no_grad()
    def logits(self, batch: PackedBatch) -> Tensor:
        """Of the token behind each position (B, L, V), 0 at padding; for evaluation, since all are alive at a time."""
        tokens = Tokens.of(batch)
        scores_TV = self.decoder.logits(self.decoder.hidden(tokens, self.embeddings(tokens, batch.images_M3RR)))
        shape = batch.input_ids_BL.shape
        found = scores_TV.new_zeros(shape.numel(), scores_TV.shape[1])
        return found.index_copy(0, tokens.kept_T, scores_TV).view(*shape, -1)

    def embeddings(self, tokens: Tokens, images_M3RR: Tensor) -> Tensor:
        """The decoder's input (T, C). Raises ValueError where images and positions that wait for one do not match."""
        text_TC = self.decoder.embed(tokens.input_ids_T)
        waiting = (tokens.input_ids_T == self.image_token_id).nonzero()[:, 0]
        if len(waiting) != len(images_M3RR) * self.num_image_tokens:
            raise ValueError(
                f"{len(images_M3RR)} images of {self.num_image_tokens} tokens each, but {len(waiting)} positions hold "
                f"the image token {self.image_token_id}: expected {len(images_M3RR) * self.num_image_tokens}"
            )
        if len(images_M3RR):
            found_MNC = self.image_tokens(images_M3RR)
            return text_TC.index_copy(0, waiting, found_MNC.flatten(0, 1).to(text_TC.dtype))
        if torch.is_grad_enabled() and self.training:  # other processes wait for gradients of the same parameters
            size = self.encoder.image_size
            blank_1NC = self.image_tokens(images_M3RR.new_zeros(1, 3, size, size))
            return text_TC + 0.0 * blank_1NC.sum().to(text_TC.dtype)
        return text_TC

    def resize_images(self, image_size: int) -> None:
        """Go on at another resolution: positions are interpolated, in place (2.4). Before an optimizer is built.

        Raises ValueError for a size that the patches do not divide.
        """
        self.encoder = resized(self.encoder, image_size)
        if isinstance(self.connector, CAbstractor):
            self.connector.resize(self.encoder.grid)

    def train_only(self, parts: Collection[Part]) -> None:
        """Freeze the other parts. Raises ValueError for a name that is none, or for no part at all."""
        wrong = sorted(set(parts) - set(PARTS))
        if wrong or not parts:
            raise ValueError(f"parts={sorted(parts)}: expected some of {', '.join(PARTS)}")
        for name in PARTS:
            if name not in parts:
                getattr(self, name).requires_grad_(False)

    def parameter_groups(self) -> dict[Part, list[nn.Parameter]]:
        """Parameters that are trained, by part; a part that is frozen is left out."""
        found = {name: [p for p in getattr(self, name).parameters() if p.requires_grad] for name in PARTS}
        return {name: parameters for name, parameters in found.items() if parameters}

    def activation_checkpointing_enable(self) -> None:
        """Compute layers of encoder and decoder again in the backward pass; how `core.train` asks for it."""
        self.encoder.trunk.activation_checkpointing_enable()
        self.decoder.trunk.activation_checkpointing_enable()

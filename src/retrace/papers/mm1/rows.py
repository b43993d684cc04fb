"""The contract between data and model: documents, and the packed rows that are made of them.

Shapes: B rows, L positions in a row, M images in a batch, R pixels a side.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor

IGNORED = -100  # label of a position without loss


@dataclass(frozen=True)
class Piece:
    """A part of a document: text tokens, with or without loss, or one image (3, R, R) in 0..1."""

    token_ids: tuple[int, ...] = ()
    image: Tensor | None = None
    learned: bool = True


@dataclass(frozen=True)
class Document:
    """Pieces in their order, and where they came from: "caption", "interleaved", "text", "synthetic", "instruction"."""

    pieces: Sequence[Piece]
    source: str


@dataclass(frozen=True)
class PackedBatch:
    """Rows in which several documents stand behind each other and do not see each other.

    An image takes the connector's number of consecutive positions that hold the image token. `images` are those of
    all rows, in the order of their positions. Loss is on text alone: image positions, padding, the last position of a
    document and pieces that are not learned have the label `IGNORED`; `labels[b, i]` is the token behind position i.
    """

    input_ids_BL: Tensor
    position_ids_BL: Tensor  # from 0 in every document
    document_ids_BL: Tensor  # from 1 in every row; 0 is padding
    labels_BL: Tensor
    images_M3RR: Tensor

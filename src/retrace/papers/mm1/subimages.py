"""High resolution: an image as an overview and the four quarters of it, each encoded by itself (Section 2.4).

An image of 2S pixels a side becomes five of S: the overview first, then the quarters in raster order. So 1344 pixels
take 5 * 144 tokens of an encoder at 672.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch.nn.functional as F
from torch import Tensor

from retrace.papers.mm1.rows import Piece


def sub_images(image_3RR: Tensor, *, side: int) -> list[Tensor]:
    """Five images (3, side, side) of one that is resized to twice the side if need be."""
    whole = resize(image_3RR, 2 * side)
    quarters = [whole[:, top : top + side, left : left + side] for top in (0, side) for left in (0, side)]
    return [resize(image_3RR, side), *quarters]


def split_images(pieces: Sequence[Piece], *, side: int, last: int | None = None) -> list[Piece]:
    """The pieces of a document with images in fives, all (3, side, side); of `last`, only those of the last images.

    The others are resized to `side`: the mixed resolution of few-shot prompts after fine-tuning.
    """
    images = [number for number, piece in enumerate(pieces) if piece.image is not None]
    chosen = set(images if last is None else images[len(images) - min(last, len(images)) :])
    found: list[Piece] = []
    for number, piece in enumerate(pieces):
        if piece.image is None:
            found.append(piece)
        elif number in chosen:
            found += [replace(piece, image=image) for image in sub_images(piece.image, side=side)]
        else:
            found.append(replace(piece, image=resize(piece.image, side)))
    return found


def resize(image_3RR: Tensor, side: int) -> Tensor:
    """(3, side, side) in 0..1, bicubic with anti-aliasing; the same where the size is right."""
    if image_3RR.shape[-2:] == (side, side):
        return image_3RR
    found = F.interpolate(image_3RR[None], size=(side, side), mode="bicubic", antialias=True, align_corners=False)
    return found[0].clamp(0, 1)

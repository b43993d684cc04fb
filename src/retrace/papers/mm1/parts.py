"""Procedural documents in part: captions of digits alone, words without images. For the parts' own pre-training.

Where captions name everything, color and shape tell nearly all images of a batch apart, and contrastive pre-training
has little reason to read all four digits. Batches that name digits alone give one.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from retrace.papers.mm1.documents import ProceduralSource, encode
from retrace.papers.mm1.packing import Draft, Picture
from retrace.papers.mm1.rows import Piece
from retrace.papers.mm1.world import Scene

BLOCK = 64  # images in a row whose captions name the same things: a batch of the laptop scale
DIGIT_BLOCKS = 3  # for each one that names everything


@dataclass(frozen=True)
class PartsSource(ProceduralSource):
    """Captions that name everything, or the digits alone, block by block."""

    def drafts(self, mark: tuple[int, ...] = ()) -> Iterator[tuple[tuple[int, ...], Draft]]:
        """As those of the whole captions, with the same marks."""
        for (index,), made in super().drafts(mark):
            (picture,) = (part for part in made.parts if isinstance(part, Picture))
            scene: Scene = picture.what
            named = " ".join(scene.digits) if (index // BLOCK) % (DIGIT_BLOCKS + 1) else scene.caption
            yield (index,), Draft([made.parts[0], picture, encode(named), made.parts[-1]], made.source)


@dataclass(frozen=True)
class WordsSource(ProceduralSource):
    """What documents say, without their images: web text has captions in it, and a decoder knows their form."""

    def drafts(self, mark: tuple[int, ...] = ()) -> Iterator[tuple[tuple[int, ...], Draft]]:
        """As those with images, with the same marks."""
        for place, made in super().drafts(mark):
            yield place, Draft([part for part in made.parts if isinstance(part, Piece)], made.source)

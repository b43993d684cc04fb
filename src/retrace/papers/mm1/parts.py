"""Procedural documents for the parts' own pre-training: captions in blocks of like images, words without images.

Where images of a batch differ in everything, contrastive pre-training learns what tells most of them apart, color and
shape, and has no reason to read digits. So images come in blocks, and a batch lies in one. The first blocks have
captions of digits alone; in later ones images share all but one part of what they show, and the caption, whole again,
is told by it.
"""

from __future__ import annotations

import random
from collections.abc import Iterator
from dataclasses import dataclass

from retrace.papers.mm1.choices import PARTS_BLOCK
from retrace.papers.mm1.documents import ProceduralSource, encode
from retrace.papers.mm1.packing import Draft, Picture
from retrace.papers.mm1.rows import Piece
from retrace.papers.mm1.world import Scene, draw_scene

DIGIT_BLOCKS = 300  # at the start, until digits are read; with color in the captions they are not, in 1000 steps
SCENE = (0, 1)  # places in a caption; a pair of color and shape stays one that is trained on
DIGIT_PAIRS = ((2, 3), (4, 5))  # top and bottom
SCENE_SHARE = 0.5  # of the later blocks, whose images differ in it; in those of the others one pair of digits does


@dataclass(frozen=True)
class PartsSource(ProceduralSource):
    """Images with captions, block by block."""

    def drafts(self, mark: tuple[int, ...] = ()) -> Iterator[tuple[tuple[int, ...], Draft]]:
        """As those of the whole captions, with the same marks."""
        for (index,), made in super().drafts(mark):
            (picture,) = (part for part in made.parts if isinstance(part, Picture))
            scene, said = self._in_block(picture.what, index // PARTS_BLOCK)
            yield (index,), Draft([made.parts[0], Picture(scene), encode(said), made.parts[-1]], made.source)

    def _in_block(self, scene: Scene, block: int) -> tuple[Scene, str]:
        """What of a scene is shown in a block, and the caption's words."""
        if block < DIGIT_BLOCKS:
            return scene, " ".join(scene.digits)
        rng = random.Random(f"block/{self.config.world_seed}/{self.seed}/{block}")
        varied = SCENE if rng.random() < SCENE_SHARE else rng.choice(DIGIT_PAIRS)
        shared = draw_scene(self.config, rng)
        own, others = (scene.color, scene.shape, *scene.digits), (shared.color, shared.shape, *shared.digits)
        color, shape, a, b, c, d = (own[place] if place in varied else others[place] for place in range(len(own)))
        shown = Scene(color, shape, (a, b, c, d), scene.seed)
        return shown, shown.caption


@dataclass(frozen=True)
class WordsSource(ProceduralSource):
    """What documents say, without their images: web text has captions in it, and a decoder knows their form."""

    def drafts(self, mark: tuple[int, ...] = ()) -> Iterator[tuple[tuple[int, ...], Draft]]:
        """As those with images, with the same marks."""
        for place, made in super().drafts(mark):
            yield place, Draft([part for part in made.parts if isinstance(part, Piece)], made.source)

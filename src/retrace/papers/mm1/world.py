"""The procedural world: scenes of a shape and four digits, which pairs are held out, and their words. No torch.

A scene is legible in three degrees (Section 5): its color at any resolution, its shape at most, its digits only where
resolution and image tokens suffice.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Literal, Self

from pydantic import Field, model_validator

from retrace.core.config import Frozen


def _words(text: str) -> tuple[str, ...]:
    return tuple(text.split(" "))


COLORS = {
    "red": (0.9, 0.1, 0.1),
    "green": (0.1, 0.7, 0.15),
    "blue": (0.15, 0.25, 0.95),
    "yellow": (0.95, 0.9, 0.1),
    "purple": (0.6, 0.1, 0.8),
    "cyan": (0.1, 0.85, 0.85),
    "orange": (1.0, 0.55, 0.05),
    "black": (0.02, 0.02, 0.02),
}
SHAPES = ("circle", "square", "triangle", "diamond", "cross", "ring", "bar", "pillar")
DIGITS = tuple("0123456789")
NAMES = _words("blick dax fep gazzer koba lorp mib nonny pilk quoz runt seld toma vash wug zorch")
FILLER = _words("our best day at home with some old friends and one more in here")
KEYS = _words("door lamp river chair stone cloud glass horse paper wheel bread tower")
CHAIN = _words("we walk then they rest while rain falls over hills near sleepy towns until night comes")
FORMS = _words("a photo of question : what shape color first last digit ? short answer = , ; + .")
NATIVE = 96  # pixels a side that an image is drawn with
PAD, BOS, EOS, UNKNOWN, IMAGE = "<pad>", "<bos>", "<eos>", "<unk>", "<image>"
NEWLINE = "\n"  # a word like others: it parts the turns of a document
CHAIN_HABIT = 0.75  # probability of a word's usual successor

Attribute = Literal["color", "shape", "first", "last", "corner", "name"]
ATTRIBUTES: tuple[Attribute, ...] = ("color", "shape", "first", "last", "corner", "name")


class WorldConfig(Frozen):
    """All that decides what the procedural documents say."""

    kind: Literal["procedural"]
    world_seed: int = Field(ge=0)  # which pairs of color and shape are held out, and the words' usual successors
    held_out_shapes: int = Field(ge=1, le=len(SHAPES) - 1)  # of each color, never drawn for training
    noisy_share: float = Field(ge=0, le=1)  # of the captions: filler in place of the scene, or a part of it
    min_images: int = Field(ge=2)  # of an interleaved document
    max_images: int = Field(ge=2)

    @model_validator(mode="after")
    def _images_are_a_range(self) -> Self:
        if self.max_images < self.min_images:
            raise ValueError(f"max_images={self.max_images} is below min_images={self.min_images}: give a range")
        return self


@dataclass(frozen=True)
class Scene:
    """What an image shows; `seed` decides its jitter and noise."""

    color: str
    shape: str
    digits: tuple[str, str, str, str]  # by corner: top left, top right, bottom left, bottom right
    seed: int

    @property
    def caption(self) -> str:
        """The words of a true and whole caption."""
        return " ".join((self.color, self.shape, *self.digits))


@lru_cache(maxsize=1)
def vocabulary() -> dict[str, int]:
    """Word -> id; the special tokens come first."""
    special = (PAD, BOS, EOS, UNKNOWN, IMAGE, NEWLINE)
    words = {*COLORS, *SHAPES, *DIGITS, *NAMES, *FILLER, *KEYS, *CHAIN, *FORMS}
    return {word: number for number, word in enumerate([*special, *sorted(words)])}


@lru_cache(maxsize=8)
def colors_of(world_seed: int, num_shapes: int, *, unseen: bool) -> dict[str, tuple[str, ...]]:
    """Shape -> the colors it is drawn in: for training, or where `unseen` those that no training document shows.

    `num_shapes` shapes of each color are held out, and as many colors of each shape.
    """
    order = random.Random(f"held out/{world_seed}").sample(range(len(SHAPES)), len(SHAPES))
    kept = {
        (color, SHAPES[(start + step) % len(SHAPES)])
        for color, start in zip(COLORS, order, strict=True)
        for step in range(num_shapes)
    }
    return {shape: tuple(color for color in COLORS if ((color, shape) in kept) == unseen) for shape in SHAPES}


def draw_scene(
    config: WorldConfig,
    rng: random.Random,
    *,
    unseen: bool = False,
    shapes: Sequence[str] = SHAPES,
    digits: Sequence[str] = DIGITS,
) -> Scene:
    """A random scene whose pair of color and shape is held out (`unseen`) or is not."""
    shape = rng.choice(shapes)
    color = rng.choice(colors_of(config.world_seed, config.held_out_shapes, unseen=unseen)[shape])
    a, b, c, d = rng.choices(digits, k=4)
    return Scene(color, shape, (a, b, c, d), rng.getrandbits(48))


def draw_turns(config: WorldConfig, rng: random.Random, *, attribute: Attribute, count: int) -> list[tuple[Scene, str]]:
    """Scenes with the same attribute of each, which only the earlier turns tell.

    "corner" is the digit of one corner, in scenes with two digits alone: each turn rules out some of the other corners.
    "name" is an invented word that stands for a shape in this document; the last scene's shape has been named before.
    """
    shapes = rng.sample(SHAPES, 3) if attribute == "name" else SHAPES
    digits = rng.sample(DIGITS, 2) if attribute == "corner" else DIGITS
    place = {"first": 0, "last": 3}.get(attribute, rng.randrange(4))
    names = dict(zip(shapes, rng.sample(NAMES, len(shapes)), strict=True))
    scenes = [draw_scene(config, rng, shapes=shapes, digits=digits) for _ in range(count - 1)]
    named = sorted({scene.shape for scene in scenes}) if attribute == "name" and scenes else shapes
    scenes.append(draw_scene(config, rng, shapes=named, digits=digits))

    def answer(scene: Scene) -> str:
        given = {"color": scene.color, "shape": scene.shape, "name": names[scene.shape]}
        return given.get(attribute, scene.digits[place])

    return [(scene, answer(scene)) for scene in scenes]


@lru_cache(maxsize=8)
def successors(world_seed: int) -> dict[str, str]:
    """The usual next word of each word of the Markov chain: one cycle through all of them."""
    order = random.Random(f"chain/{world_seed}").sample(CHAIN, len(CHAIN))
    return dict(zip(order, [*order[1:], order[0]], strict=True))


def draw_text(config: WorldConfig, rng: random.Random, *, family: str) -> tuple[str, str]:
    """A text of a family ("keys", "sums", "chain") in two parts: what it says, and the answer that follows from it."""
    if family == "keys":
        pairs = dict(zip(rng.sample(KEYS, rng.randint(3, 5)), rng.choices(DIGITS, k=5), strict=False))
        asked = rng.choice(list(pairs))
        said = " , ".join(f"{key} = {value}" for key, value in pairs.items())
        return f"{said} ; {asked} ?", pairs[asked]
    if family == "sums":
        numbers = [rng.randrange(10) for _ in range(rng.randint(2, 3))]
        return " + ".join(map(str, numbers)) + " =", " ".join(str(sum(numbers)))
    usual = successors(config.world_seed)
    words = [rng.choice(CHAIN)]
    for _ in range(rng.randint(6, 16)):
        words.append(usual[words[-1]] if rng.random() < CHAIN_HABIT else rng.choice(CHAIN))
    return " ".join(words), usual[words[-1]]

"""Documents of the procedural world, and its tokenizer: captions, interleaved turns, text, instructions (Section 5).

Document `index` of a kind is a pure function of (config, seed, kind, index), so the stream is endless and has no
position to save.
"""

from __future__ import annotations

import itertools
import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Literal

from tokenizers import Tokenizer, models, pre_tokenizers
from torch import Tensor
from transformers import PreTrainedTokenizerFast

from retrace.papers.mm1 import images
from retrace.papers.mm1.packing import Draft, Picture
from retrace.papers.mm1.rows import Piece
from retrace.papers.mm1.world import (
    ATTRIBUTES,
    BOS,
    EOS,
    FILLER,
    IMAGE,
    NEWLINE,
    PAD,
    UNKNOWN,
    Scene,
    WorldConfig,
    draw_scene,
    draw_text,
    draw_turns,
    vocabulary,
)

Kind = Literal["caption", "synthetic", "interleaved", "text", "instruction"]
TEXT_FAMILIES = ("keys", "sums", "chain")
CAPTION = "a photo of"  # what stands between an image and its caption (Section 3.4)
QUESTIONS = {
    "question : what color ? short answer :": lambda scene: scene.color,
    "question : what shape ? short answer :": lambda scene: scene.shape,
    "question : first digit ? short answer :": lambda scene: scene.digits[0],
    "question : last digit ? short answer :": lambda scene: scene.digits[3],
}


@lru_cache(maxsize=1)
def build_tokenizer() -> PreTrainedTokenizerFast:
    """One token a word; words are parted by single spaces, and a newline is a word."""
    tokenizer = Tokenizer(models.WordLevel(vocabulary(), unk_token=UNKNOWN))
    tokenizer.pre_tokenizer = pre_tokenizers.Split(" ", behavior="removed")
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token=PAD,
        bos_token=BOS,
        eos_token=EOS,
        unk_token=UNKNOWN,
        additional_special_tokens=[IMAGE],
        clean_up_tokenization_spaces=False,
    )


def encode(text: str, *, learned: bool = True) -> Piece:
    """What the tokenizer makes of a text, in a fraction of its time. Raises KeyError for a word that is not known."""
    ids = vocabulary()
    return Piece(tuple(ids[word] for word in text.split(" ")), learned=learned)


def draft(config: WorldConfig, *, kind: Kind, seed: int, index: int) -> Draft:
    """Document `index` of the endless training documents of one kind."""
    rng = random.Random(f"document/{config.world_seed}/{seed}/{kind}/{index}")
    parts: list[Piece | Picture]
    if kind == "caption" or kind == "synthetic":
        scene = draw_scene(config, rng)
        noisy = kind == "caption" and rng.random() < config.noisy_share
        parts = [Picture(scene), encode(f"{CAPTION} {_noisy(scene, rng) if noisy else scene.caption}")]
    elif kind == "interleaved":
        count = rng.randint(config.min_images, config.max_images)
        parts = join(draw_turns(config, rng, attribute=rng.choice(ATTRIBUTES), count=count))
    elif kind == "text":
        parts = [encode(" ".join(draw_text(config, rng, family=rng.choice(TEXT_FAMILIES))))]
    else:
        scene = draw_scene(config, rng)
        asked = rng.sample(list(QUESTIONS), rng.randint(1, len(QUESTIONS)))
        parts = [Picture(scene)]
        for number, question in enumerate(asked):
            parts += [encode(f"{NEWLINE} {question}" if number else question, learned=False)]
            parts += [encode(QUESTIONS[question](scene))]
    ids = vocabulary()
    return Draft([Piece((ids[BOS],), learned=False), *parts, Piece((ids[EOS],))], kind)


def join(turns: Sequence[tuple[Scene, str]]) -> list[Piece | Picture]:
    """Images with what is said of each, a newline between the turns."""
    parts: list[Piece | Picture] = []
    for number, (scene, said) in enumerate(turns, start=1):
        parts += [Picture(scene), encode(said if number == len(turns) else f"{said} {NEWLINE}")]
    return parts


def _noisy(scene: Scene, rng: random.Random) -> str:
    """A caption as the web has them: of something else, or of a part of what is seen."""
    if rng.random() < 0.5:
        return " ".join(rng.choices(FILLER, k=rng.randint(2, 6)))
    return rng.choice((scene.color, scene.shape, f"{scene.color} {scene.shape}"))


@dataclass(frozen=True)
class ProceduralSource:
    """The documents of one kind as a source of rows."""

    config: WorldConfig
    kind: Kind
    seed: int

    def drafts(self, mark: tuple[int, ...] = ()) -> Iterator[tuple[tuple[int, ...], Draft]]:
        """Documents with their marks, from a mark on."""
        for index in itertools.count(*mark):
            yield (index,), draft(self.config, kind=self.kind, seed=self.seed, index=index)

    def load(self, pictures: Sequence[Picture], *, image_size: int) -> list[Tensor | None]:
        """Images (3, R, R); each is there."""
        return list(images.draw([picture.what for picture in pictures], image_size=image_size))

    def notes(self) -> dict[str, int]:
        """Nothing is ever wrong with what was made here."""
        return {}

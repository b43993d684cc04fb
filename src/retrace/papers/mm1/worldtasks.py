"""The procedural world's tasks: captions and in-context attributes (MMCore), texts (TextCore), questions after SFT.

Scenes are new in their digits, places and noise. "caption_unseen" shows pairs of color and shape that no training
document shows; it is a group of its own, since a model that sees colors alone does worse than chance on its shapes.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from functools import partial

from torch import Tensor

from retrace.papers.mm1 import images
from retrace.papers.mm1.documents import CAPTION, QUESTIONS, TEXT_FAMILIES
from retrace.papers.mm1.fewshot import Episode, Form, Item, Task
from retrace.papers.mm1.packing import Picture
from retrace.papers.mm1.world import (
    ATTRIBUTES,
    NEWLINE,
    Attribute,
    Scene,
    WorldConfig,
    draw_scene,
    draw_text,
    draw_turns,
)

SHOTS = (0, 4, 8)
WORD = Form("{question}", stop=(NEWLINE,), max_new_tokens=4, after=f" {NEWLINE}")
NEXT = Form("{question}", stop=(NEWLINE,), max_new_tokens=1)  # a chain goes on behind the word that is asked for
WORDS = Form(CAPTION, stop=(NEWLINE,), max_new_tokens=8, after=f" {NEWLINE}")


def world_tasks(
    config: WorldConfig, *, image_size: int, count: int, seed: int, shots: Sequence[int] = SHOTS
) -> list[Task]:
    """`count` episodes of every task; they depend on the world and `seed` alone, so runs with one seed are paired.

    Attributes are told by demonstrations, so they are asked with one or more; captions with any number.
    """

    def load(pictures: Sequence[Picture]) -> list[Tensor | None]:
        return list(images.draw([picture.what for picture in pictures], image_size=image_size))

    def task(
        name: str, group: str, form: Form, own: Sequence[int], draw: Callable[[random.Random, int], Episode]
    ) -> Task:
        def episodes(num_shots: int) -> list[Episode]:
            key = f"evaluation/{config.world_seed}/{seed}/{name}"
            return [draw(random.Random(f"{key}/{index}"), num_shots) for index in range(count)]

        score = score_caption if form is WORDS else score_words
        return Task(name, group, form, tuple(own), episodes, score, load)  # type: ignore[arg-type]

    told = [number for number in shots if number > 0]
    return [
        task("caption", "mmcore", WORDS, shots, partial(_caption, config, False)),
        task(
            "caption_unseen",
            "unseen",
            WORDS,
            [number for number in shots if number == 0],
            partial(_caption, config, True),
        ),
        *(task(name, "mmcore", WORD, told, partial(_attribute, config, name)) for name in ATTRIBUTES),
        *(
            task(name, "textcore", NEXT if name == "chain" else WORD, (0,), partial(_text, config, name))
            for name in TEXT_FAMILIES
        ),
        *(task(f"ask_{key}", "sft", WORD, (0,), partial(_question, config, asked)) for key, asked in _questions()),
    ]


def _questions() -> list[tuple[str, str]]:
    return list(zip(("color", "shape", "first", "last"), QUESTIONS, strict=True))


def _caption(config: WorldConfig, unseen: bool, rng: random.Random, shots: int) -> Episode:
    query, *shown = [draw_scene(config, rng, unseen=unseen and number == 0) for number in range(shots + 1)]
    return Episode(
        tuple(Item(Picture(scene), (scene.caption,)) for scene in shown), Item(Picture(query), (query.caption,))
    )


def _attribute(config: WorldConfig, attribute: Attribute, rng: random.Random, shots: int) -> Episode:
    turns = draw_turns(config, rng, attribute=attribute, count=shots + 1)
    *shown, query = [Item(Picture(scene), (said,)) for scene, said in turns]
    return Episode(tuple(shown), query)


def _text(config: WorldConfig, family: str, rng: random.Random, shots: int) -> Episode:
    assert shots == 0, "texts bring what they ask for"
    said, wanted = draw_text(config, rng, family=family)
    return Episode((), Item(None, (wanted,), said))


def _question(config: WorldConfig, asked: str, rng: random.Random, shots: int) -> Episode:
    assert shots == 0, "tuned models are asked without demonstrations"
    scene: Scene = draw_scene(config, rng)
    return Episode((), Item(Picture(scene), (QUESTIONS[asked](scene),), asked))


def score_words(answers: Sequence[str], asked: Sequence[Item]) -> dict[str, list[float]]:
    """Whether the answer is the one wanted, word by word: 0 or 1."""
    return {"acc": [float(given == item.answers[0]) for given, item in zip(answers, asked, strict=True)]}


def score_caption(answers: Sequence[str], asked: Sequence[Item]) -> dict[str, list[float]]:
    """Of the six words of a caption the share that is right ("acc"), and color, shape and digits apart."""
    right = []
    for given, item in zip(answers, asked, strict=True):
        wanted, words = item.answers[0].split(" "), given.split(" ")
        right.append([float(number < len(words) and words[number] == word) for number, word in enumerate(wanted)])
    return {
        "acc": [sum(row) / len(row) for row in right],
        "color": [row[0] for row in right],
        "shape": [row[1] for row in right],
        "digits": [sum(row[2:]) / 4 for row in right],
        "all": [float(all(row)) for row in right],
    }

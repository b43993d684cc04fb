"""A procedural corpus on which thoughts can help: easy prose, number stories and chained facts about invented people.

A tiny model memorises single steps quickly, but cannot do several of them in the one forward pass that an answer gives
it. Some texts of the base split spell the steps out in an aside between the answer marker and the answer, as people do
on the web; continued training has no asides, so that the model must think them. A share of the compositions, chosen by
hash, is held out of every training text and is asked at evaluation.

Everything is a pure function of the config, a seed, a split and an index; nothing is read from disk.
"""

from __future__ import annotations

import itertools
import random
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

from retrace.papers.quietstar import words
from retrace.papers.quietstar.texts import Split
from retrace.papers.quietstar.world import Composition, CorpusConfig, Family, draw, world

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

FAMILIES: tuple[Family, ...] = ("prose", "arithmetic", "facts")
LETTERS = "ABCDE"  # of the options, which are the five colors in their order
SENTENCES_PER_DOCUMENT = 3  # of prose, or of single facts
ENCODED_AT_ONCE = 256  # documents
OPEN_WINDOWS = 8  # of which the fullest is closed when a document fits into none


@dataclass(frozen=True)
class Question:
    """A composition in words: `prompt` ends with the answer marker, `answer` is what follows a space."""

    prompt: str
    aside: str
    answer: str
    document: dict[str, Any]  # in the form of the GSM8K and CommonsenseQA datasets


def ask(composition: Composition, rng: random.Random) -> Question:
    """Words around a composition; `rng` chooses what stands beside it."""
    (ending,) = rng.choices(tuple(words.ENDINGS), tuple(words.ENDINGS.values()))
    aside = f"({' '.join(composition.values)}{ending})"
    if composition.family == "facts":
        return _chained_facts(composition, aside)
    return _number_story(composition, aside, rng)


def _in_order(steps: Sequence[str]) -> str:
    return ", ".join(f"{order} {step}" for order, step in zip(words.ORDER, steps, strict=False))


def _number_story(composition: Composition, aside: str, rng: random.Random) -> Question:
    person, thing = rng.choice(words.PERSONS), rng.choice(words.THINGS)
    start = words.NUMBERS.index(composition.start)
    question = f"{person} has {start} {thing}, {_in_order(composition.steps)}. How many now?"
    answer = str(words.NUMBERS.index(composition.answer))
    document = {"question": question, "answer": f"{aside}\n#### {answer}", "hops": len(composition.steps)}
    return Question(f"Q: {question}\nA:", aside, answer, document)


def _chained_facts(composition: Composition, aside: str) -> Question:
    question = f"From {composition.start}, {_in_order([f'the {step}' for step in composition.steps])}. What is it?"
    listed = "".join(f"\n({letter}) {color}" for letter, color in zip(LETTERS, words.COLORS, strict=True))
    answer = LETTERS[words.COLORS.index(composition.answer)]
    document = {
        "question": question,
        "choices": {"label": list(LETTERS), "text": list(words.COLORS)},
        "answerKey": answer,
        "hops": len(composition.steps),
    }
    return Question(f"Q: {question}{listed}\nA:", aside, answer, document)


@dataclass(frozen=True)
class Document:
    """One text, with what it is made of."""

    text: str
    family: Family
    compositions: tuple[Composition, ...]
    has_aside: bool


def document(config: CorpusConfig, *, split: Split, seed: int, index: int) -> Document:
    """Document `index` of the infinite split; `seed` is the run's, so that runs with other seeds read other texts."""
    rng = random.Random(f"document/{config.world_seed}/{seed}/{split}/{index}")
    shares = config.mixture
    (family,) = rng.choices(FAMILIES, (shares.prose, shares.arithmetic, shares.facts))
    if family == "prose":
        return Document(_prose(config, rng), "prose", (), False)
    if rng.random() < config.single_share:
        singles = tuple(draw(config, rng, family, num_steps=1, held_out=False) for _ in range(SENTENCES_PER_DOCUMENT))
        return Document(" ".join(_state(single, rng) for single in singles) + "\n", family, singles, False)
    num_steps = rng.randint(config.min_hops, config.max_hops)
    composition = draw(config, rng, family, num_steps=num_steps, held_out=split == "heldout")
    question = ask(composition, rng)
    has_aside = split == "base" and rng.random() < config.aside_share
    parts = [question.prompt, question.aside, question.answer] if has_aside else [question.prompt, question.answer]
    return Document(" ".join(parts) + "\n", family, (composition,), has_aside)


def _state(single: Composition, rng: random.Random) -> str:
    (step,) = single.steps
    if single.family == "facts":
        return f"{single.start}'s {step} is {single.answer}."
    person, thing = rng.choice(words.PERSONS), rng.choice(words.THINGS)
    start = words.NUMBERS.index(single.start)
    return f"{person} has {start} {thing}, {_in_order(single.steps)}. Now it is {single.answer}."


def _prose(config: CorpusConfig, rng: random.Random) -> str:
    noun = rng.choice(words.NOUNS)
    habits = world(config).habits[noun]
    sentences = rng.sample(words.PROSE, SENTENCES_PER_DOCUMENT)
    said = {"noun": noun, "time": rng.choice(words.TIMES), "person": rng.choice(words.PERSONS), **habits}
    return " ".join(sentence.format(**said) for sentence in sentences) + "\n"


def questions(config: CorpusConfig, *, family: Literal["arithmetic", "facts"], count: int) -> list[dict[str, Any]]:
    """`count` different held-out questions, the same for every run, as far as it goes equally many of each length.

    Keys: hops, and those of GSM8K (question, answer after "####") or CommonsenseQA (question, choices, answerKey).
    Raises ValueError where the world holds out too few compositions.
    """
    rng = random.Random(f"questions/{config.world_seed}/{family}")
    found: dict[Composition, dict[str, Any]] = {}
    for num_steps in itertools.islice(itertools.cycle(range(config.min_hops, config.max_hops + 1)), 20 * count):
        composition = draw(config, rng, family, num_steps=num_steps, held_out=True)
        found.setdefault(composition, ask(composition, rng).document)
        if len(found) == count:
            return list(found.values())
    raise ValueError(f"{count} {family} questions are wanted, but about {len(found)} are held out: ask for fewer")


def windows(
    config: CorpusConfig, tokenizer: PreTrainedTokenizerBase, *, split: Split, seed: int, count: int
) -> list[list[int]]:
    """The first `count` windows of a split: lists of at most `seq_len` token ids.

    Each document, within <bos> and <eos>, goes into the first of a few open windows that has room; none is split, since
    an answer without its question, or a question without its options, would teach nothing.
    Raises ValueError where a document is longer than a window.
    """
    packed: list[list[int]] = []
    open_rows: list[list[int]] = []
    for first in itertools.count(step=ENCODED_AT_ONCE):
        texts = [document(config, split=split, seed=seed, index=first + i).text for i in range(ENCODED_AT_ONCE)]
        for ids in tokenizer(texts)["input_ids"]:
            ids = [*ids, tokenizer.eos_token_id]
            if len(ids) > config.seq_len:
                raise ValueError(f"seq_len={config.seq_len} is too short for a document of {len(ids)} tokens: raise it")
            row = next((row for row in open_rows if len(row) + len(ids) <= config.seq_len), None)
            if row is None:
                open_rows.append(ids)
            else:
                row += ids
            if len(open_rows) > OPEN_WINDOWS:
                fullest = max(open_rows, key=len)
                open_rows.remove(fullest)
                packed.append(fullest)
                if len(packed) == count:
                    return packed
    raise AssertionError("an infinite stream ended")

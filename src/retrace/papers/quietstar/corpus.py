"""A procedural corpus on which thoughts can help: easy prose, number stories and chained facts about invented people.

A tiny model memorises single steps quickly, but cannot do several of them in the one forward pass that an answer gives
it. Some texts of the base split spell the steps out in an aside between the answer marker and the answer, as people do
on the web; continued training has no asides, so that the model must think them. A share of the compositions, chosen by
hash, is held out of every training text and is asked at evaluation.

Everything is a pure function of the config, a seed, a split and an index; nothing is read from disk.
"""

from __future__ import annotations

import hashlib
import itertools
import math
import random
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import TYPE_CHECKING, Any, Literal, Self

from pydantic import Field, model_validator

from retrace.core.config import Frozen
from retrace.papers.quietstar import words

Split = Literal["base", "continued", "heldout"]
Family = Literal["prose", "arithmetic", "facts"]
if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

LETTERS = "ABCDE"
SENTENCES_PER_DOCUMENT = 3  # of prose, or of single facts
ENCODED_AT_ONCE = 256  # documents
OPEN_WINDOWS = 8  # of which the fullest is closed when a document fits into none


class Mixture(Frozen):
    """Shares of the documents; they sum to 1."""

    prose: float = Field(ge=0, le=1)
    arithmetic: float = Field(ge=0, le=1)
    facts: float = Field(ge=0, le=1)

    @model_validator(mode="after")
    def _sums_to_one(self) -> Self:
        total = self.prose + self.arithmetic + self.facts
        if not math.isclose(total, 1.0, abs_tol=1e-6):
            raise ValueError(f"the shares of prose, arithmetic and facts must sum to 1, but sum to {total:g}")
        return self


class CorpusConfig(Frozen):
    """All that decides what the procedural corpus says."""

    world_seed: int = Field(ge=0)  # which facts hold, and which compositions are held out
    num_entities: int = Field(ge=len(LETTERS), le=len(words.ENTITIES))
    num_relations: int = Field(ge=1, le=len(words.RELATIONS))
    min_hops: int = Field(ge=2, le=6)  # steps of a composition, in both question families
    max_hops: int = Field(ge=2, le=6)
    max_number: int = Field(ge=3, le=len(words.NUMBERS) - 1)  # no total of a number story exceeds it
    mixture: Mixture
    lookup_share: float = Field(ge=0, le=1)
    single_share: float = Field(ge=0, le=1)  # of the questions that have one step; they are never held out
    aside_share: float = Field(ge=0, le=1)  # of the base split's questions that spell their steps out
    holdout_share: float = Field(gt=0, lt=1)  # of the compositions
    seq_len: int = Field(ge=32, le=4096)  # tokens of a training window

    @model_validator(mode="after")
    def _hops_are_a_range(self) -> Self:
        if self.max_hops < self.min_hops:
            raise ValueError(f"max_hops={self.max_hops} is below min_hops={self.min_hops}: give a range of steps")
        return self


@dataclass(frozen=True)
class Composition:
    """A start and the steps taken from it; `values` holds what each step leads to, the answer last."""

    family: Family
    start: str
    steps: tuple[str, ...]
    values: tuple[str, ...]

    @property
    def answer(self) -> str:
        return self.values[-1] if self.values else self.start


@dataclass(frozen=True)
class World:
    """What is true: where each step leads from each value, and what the prose says of each noun."""

    steps: dict[str, dict[str, dict[str, str]]]  # family -> value -> step -> value
    habits: dict[str, dict[str, str]]  # noun -> slot -> word


@lru_cache(maxsize=8)
def world(config: CorpusConfig) -> World:
    """Every relation is a random permutation of the entities, so that no answer is likelier than another."""
    rng = random.Random(f"world/{config.world_seed}")
    entities = words.ENTITIES[: config.num_entities]
    facts: dict[str, dict[str, str]] = {entity: {} for entity in entities}
    for relation in words.RELATIONS[: config.num_relations]:
        for entity, other in zip(entities, rng.sample(entities, len(entities)), strict=True):
            facts[entity][relation] = other
    sums: dict[str, dict[str, str]] = {}
    for number in range(config.max_number + 1):
        results = {sentence: change(number) for sentence, change in words.OPERATIONS.items()}
        sums[words.NUMBERS[number]] = {
            sentence: words.NUMBERS[result]
            for sentence, result in results.items()
            if result is not None and 0 <= result <= config.max_number
        }
    slots = {"verb": words.VERBS, "place": words.PLACES, "adjective": words.ADJECTIVES}
    habits = {noun: {slot: rng.choice(choices) for slot, choices in slots.items()} for noun in words.NOUNS}
    return World(steps={"facts": facts, "arithmetic": sums}, habits=habits)


def is_held_out(config: CorpusConfig, composition: Composition) -> bool:
    """Whether a composition of two or more steps is kept for evaluation; single steps never are."""
    if len(composition.steps) < 2:
        return False
    key = "/".join((str(config.world_seed), composition.family, composition.start, *composition.steps))
    return int.from_bytes(hashlib.sha256(key.encode()).digest()[:8], "big") < config.holdout_share * 2**64


def is_trainable(config: CorpusConfig, composition: Composition) -> bool:
    """Whether training texts may contain it: neither it nor a beginning of it, which it spells out, is held out."""
    ends = range(2, len(composition.steps) + 1)
    return not any(is_held_out(config, _first_steps(composition, end)) for end in ends)


def _first_steps(composition: Composition, count: int) -> Composition:
    return Composition(
        composition.family, composition.start, composition.steps[:count], composition.values[:count]
    )


def _draw(config: CorpusConfig, rng: random.Random, family: Family, *, num_steps: int, held_out: bool) -> Composition:
    """A random composition of this many steps, from the held-out ones or from those that may be trained on."""
    table = world(config).steps[family]
    starts = tuple(table)
    while True:
        start = rng.choice(starts)
        steps, values, value = [], [], start
        for _ in range(num_steps):
            step = rng.choice(tuple(table[value]))
            value = table[value][step]
            steps.append(step)
            values.append(value)
        composition = Composition(family, start, tuple(steps), tuple(values))
        if is_held_out(config, composition) if held_out else is_trainable(config, composition):
            return composition


@dataclass(frozen=True)
class Question:
    """A composition in words: `prompt` ends with the answer marker, `answer` is what follows a space."""

    prompt: str
    aside: str
    answer: str
    document: dict[str, Any]  # in the form of the GSM8K and CommonsenseQA datasets


def ask(config: CorpusConfig, composition: Composition, rng: random.Random) -> Question:
    """Words around a composition; `rng` chooses what is said beside it (who, what, the order of the options)."""
    aside = f"({' '.join(composition.values)})"
    if composition.family == "arithmetic":
        return _number_story(composition, aside, rng)
    return _chained_facts(config, composition, aside, rng)


def _in_order(steps: Sequence[str]) -> str:
    return ", ".join(f"{order} {step}" for order, step in zip(words.ORDER, steps, strict=False))


def _number_story(composition: Composition, aside: str, rng: random.Random) -> Question:
    person, thing = rng.choice(words.PERSONS), rng.choice(words.THINGS)
    start = words.NUMBERS.index(composition.start)
    question = f"{person} has {start} {thing}, {_in_order(composition.steps)}. How many now?"
    answer = str(words.NUMBERS.index(composition.answer))
    document = {"question": question, "answer": f"{aside}\n#### {answer}", "hops": len(composition.steps)}
    return Question(f"Q: {question}\nA:", aside, answer, document)


def _chained_facts(config: CorpusConfig, composition: Composition, aside: str, rng: random.Random) -> Question:
    entities = words.ENTITIES[: config.num_entities]
    others = rng.sample([entity for entity in entities if entity != composition.answer], len(LETTERS) - 1)
    options = rng.sample([composition.answer, *others], len(LETTERS))
    steps = _in_order([f"the {step}" for step in composition.steps])
    question = f"From {composition.start}, {steps}. Who is it?" if steps else f"Who is {composition.start}?"
    listed = "".join(f"\n({letter}) {option}" for letter, option in zip(LETTERS, options, strict=True))
    answer = LETTERS[options.index(composition.answer)]
    document = {
        "question": question,
        "choices": {"label": list(LETTERS), "text": options},
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
    (family,) = rng.choices(("prose", "arithmetic", "facts"), (shares.prose, shares.arithmetic, shares.facts))
    if family == "prose":
        return Document(_prose(config, rng), "prose", (), False)
    if family == "facts" and rng.random() < config.lookup_share:
        return Document(_roll(config, rng), family, (), False)
    if rng.random() < config.single_share:
        singles = tuple(_draw(config, rng, family, num_steps=1, held_out=False) for _ in range(SENTENCES_PER_DOCUMENT))
        return Document(" ".join(_state(single, rng) for single in singles) + "\n", family, singles, False)
    num_steps = rng.randint(config.min_hops, config.max_hops)
    composition = _draw(config, rng, family, num_steps=num_steps, held_out=split == "heldout")
    question = ask(config, composition, rng)
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


def _roll(config: CorpusConfig, rng: random.Random) -> str:
    """Options, and which letter each of them has."""
    chosen = rng.sample(words.ENTITIES[: config.num_entities], len(LETTERS))
    pairs = list(zip(LETTERS, chosen, strict=True))
    listed = "".join(f"({letter}) {entity}\n" for letter, entity in pairs)
    return listed + " ".join(f"{entity} is {letter}." for letter, entity in rng.sample(pairs, len(pairs))) + "\n"


def _prose(config: CorpusConfig, rng: random.Random) -> str:
    noun = rng.choice(words.NOUNS)
    habits = world(config).habits[noun]
    sentences = rng.sample(words.PROSE, SENTENCES_PER_DOCUMENT)
    said = {"noun": noun, "time": rng.choice(words.TIMES), "person": rng.choice(words.PERSONS), **habits}
    return " ".join(sentence.format(**said) for sentence in sentences) + "\n"


def questions(config: CorpusConfig, *, family: Literal["arithmetic", "facts"], count: int) -> list[dict[str, Any]]:
    """`count` different held-out questions, the same for every run, with equally many of each number of steps.

    Keys are those of GSM8K (question, answer after "####") or of CommonsenseQA (question, choices, answerKey), and hops.
    Raises ValueError where the world holds out too few compositions.
    """
    rng = random.Random(f"questions/{config.world_seed}/{family}")
    found: dict[Composition, dict[str, Any]] = {}
    hops = itertools.cycle(range(config.min_hops, config.max_hops + 1))
    for num_steps in itertools.islice(hops, 20 * count):
        composition = _draw(config, rng, family, num_steps=num_steps, held_out=True)
        if composition not in found:
            found[composition] = ask(config, composition, rng).document
        if len(found) == count:
            return list(found.values())
    raise ValueError(f"{count} {family} questions are wanted, but about {len(found)} are held out: ask for fewer")


def windows(
    config: CorpusConfig, tokenizer: PreTrainedTokenizerBase, *, split: Split, seed: int, count: int
) -> list[list[int]]:
    """The first `count` windows of a split: lists of `seq_len` token ids, padded on the right.

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
            if row is not None:
                row += ids
                continue
            open_rows.append(ids)
            if len(open_rows) > OPEN_WINDOWS:
                fullest = max(open_rows, key=len)
                open_rows.remove(fullest)
                packed.append(fullest + [tokenizer.pad_token_id] * (config.seq_len - len(fullest)))
                if len(packed) == count:
                    return packed
    raise AssertionError("an infinite stream ended")

"""The invented world that the procedural corpus tells of: its steps, their compositions, and which are held out."""

from __future__ import annotations

import hashlib
import itertools
import math
import random
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Literal, Self

from pydantic import Field, model_validator

from retrace.core.config import Frozen
from retrace.papers.quietstar import words

Family = Literal["prose", "arithmetic", "facts"]
COLOR = "color"  # the last step of every chain of facts
MOST_DRAWS = 10_000  # before the world is said to have no such composition


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

    kind: Literal["procedural"]
    world_seed: int = Field(ge=0)  # which facts hold, and which compositions are held out
    num_entities: int = Field(ge=len(words.COLORS), le=len(words.ENTITIES))
    num_relations: int = Field(ge=1, le=len(words.RELATIONS))
    min_hops: int = Field(ge=2, le=6)  # steps of a composition, in both question families
    max_hops: int = Field(ge=2, le=6)
    max_number: int = Field(ge=3, le=len(words.NUMBERS) - 1)  # no total of a number story exceeds it
    mixture: Mixture
    single_share: float = Field(ge=0, le=1)  # of the texts on numbers and facts: single steps, never held out
    aside_share: float = Field(ge=0, le=1)  # of the base split's questions, which spell their steps out
    holdout_share: float = Field(gt=0, lt=1)  # of the compositions
    seq_len: int = Field(ge=64, le=4096)  # tokens of a training window

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
        return self.values[-1]


@dataclass(frozen=True)
class World:
    """What is true: where each step leads from each value, and what the prose says of each noun."""

    steps: dict[str, dict[str, dict[str, str]]]  # family -> value -> step -> value
    habits: dict[str, dict[str, str]]  # noun -> slot -> word


@lru_cache(maxsize=8)
def world(config: CorpusConfig) -> World:
    """Relations are random permutations of the entities, and colors are as equally common as their number allows."""
    rng = random.Random(f"world/{config.world_seed}")
    entities = words.ENTITIES[: config.num_entities]
    facts: dict[str, dict[str, str]] = {entity: {} for entity in entities}
    for relation in words.RELATIONS[: config.num_relations]:
        for entity, other in zip(entities, rng.sample(entities, len(entities)), strict=True):
            facts[entity][relation] = other
    colors = rng.sample(list(itertools.islice(itertools.cycle(words.COLORS), len(entities))), len(entities))
    for entity, color in zip(entities, colors, strict=True):
        facts[entity][COLOR] = color
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
    beginnings = (
        replace(composition, steps=composition.steps[:end], values=composition.values[:end])
        for end in range(2, len(composition.steps) + 1)
    )
    return not any(is_held_out(config, beginning) for beginning in beginnings)


def draw(config: CorpusConfig, rng: random.Random, family: Family, *, num_steps: int, held_out: bool) -> Composition:
    """A random composition of this many steps, from the held-out ones or from those that may be trained on.

    Raises ValueError where the world has none.
    """
    table = world(config).steps[family]
    for _ in range(MOST_DRAWS):
        start = rng.choice(tuple(table))
        steps, values, value = [], [], start
        for index in range(num_steps):
            step = rng.choice(_next_steps(family, table[value], num_steps=num_steps, index=index))
            value = table[value][step]
            steps.append(step)
            values.append(value)
        composition = Composition(family, start, tuple(steps), tuple(values))
        if is_held_out(config, composition) if held_out else is_trainable(config, composition):
            return composition
    raise ValueError(
        f"no {family} composition of {num_steps} steps is {'held out' if held_out else 'left for training'}: "
        "choose more num_entities or num_relations, or another holdout_share"
    )


def _next_steps(family: Family, known: dict[str, str], *, num_steps: int, index: int) -> tuple[str, ...]:
    """The steps that may be taken from a value: a chain of facts goes from person to person and ends in a color."""
    if family == "arithmetic" or num_steps == 1:
        return tuple(known)
    return (COLOR,) if index == num_steps - 1 else tuple(step for step in known if step != COLOR)

"""Moments of summed embedding tables: how often two positions use the same row. Section 1.4. No torch."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from retrace.papers.deepscalelm.components import Moments
from retrace.papers.deepscalelm.correlations import check_dropout, harmonic

POSITIONS = 0.0  # no two positions share a row of learned positions
SEGMENTS = 2 / 3  # two segments cut at an even random place


class Table(NamedTuple):
    """One table: variance of its entries, and the chance that two positions of a sequence use the same row."""

    var: float
    collision: float


def embeddings(tables: Sequence[Table], *, dropout: float = 0.0) -> Moments:
    """The sum of the tables' rows, after dropout. Section 1.4, tag B. Raises ValueError where no table varies."""
    kept = 1 - check_dropout(dropout)
    total = sum(table.var for table in tables)
    if not (total > 0 and all(table.var >= 0 for table in tables)):
        raise ValueError(f"tables={list(tables)}: expected variances that are not negative, one of them positive")
    shared = sum(table.var * table.collision for table in tables)
    return Moments(0.0, total / kept, kept * shared / total)


def zipf_collision(vocab_size: int) -> float:
    """The chance that two tokens drawn from Zipf's law are the same, sum p_i^2 = H_2 / H_1^2: exact. Section 1.4, B."""
    _check_vocab(vocab_size)
    squares = float((1 / np.arange(1, vocab_size + 1, dtype=np.float64) ** 2).sum())
    return squares / harmonic(vocab_size) ** 2


def zipf_collision_approximate(vocab_size: int, *, euler: bool = True) -> float:
    """(pi^2/6) / (ln V + 0.5772)^2; without Euler's constant as in the paper's first version, 11 % high at V = 30522.

    Section 1.4, tags B and C. Good to 1 % from V = 100 on.
    """
    _check_vocab(vocab_size)
    return math.pi**2 / 6 / (math.log(vocab_size) + (np.euler_gamma if euler else 0.0)) ** 2


def sentence_collision(num_sentences: int) -> float:
    """Of token types where n equally long sentences are cut at one of their ends: 2/3 - 1/(3n). Section 1.4, tag B."""
    if num_sentences < 2:
        raise ValueError(f"num_sentences={num_sentences}: expected at least 2; one sentence has no cut")
    return 2 / 3 - 1 / (3 * num_sentences)


def bert_corr0(vocab_size: int) -> float:
    """r0 of BERT's three equal tables before dropout, Section 1.4: 0.2268 at V = 30522; the official code has 0.221."""
    equal = [Table(1.0, zipf_collision(vocab_size)), Table(1.0, POSITIONS), Table(1.0, SEGMENTS)]
    return float(embeddings(equal).corr)


def _check_vocab(vocab_size: int) -> None:
    if vocab_size < 2:
        raise ValueError(f"vocab_size={vocab_size}: expected at least 2 tokens")

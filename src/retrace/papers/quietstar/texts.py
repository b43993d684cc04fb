"""Quiet-STaR's corpora of real text: sources for each split, cut into training windows.

The windows of a split follow from the config, the seed and the text alone.
"""

from __future__ import annotations

import itertools
import random
from collections.abc import Iterator
from typing import TYPE_CHECKING, Literal

from pydantic import Field

from retrace.core.config import Frozen
from retrace.core.texts import HubText, LocalText, Source, encoded, packed

if TYPE_CHECKING:
    import numpy as np
    from transformers import PreTrainedTokenizerBase

Split = Literal["base", "continued", "heldout"]


class TextCorpusConfig(Frozen):
    """Real text for the three splits, and how it becomes windows."""

    kind: Literal["text"]
    seq_len: int = Field(ge=16, le=32768)  # tokens of a training window
    windows: Literal["packed", "spans"]  # documents end to end; or, as the paper, one random span of each document
    vocab_size: int | None = Field(ge=262)  # of a byte-level BPE trained on `base`; null: the base brings its tokenizer
    base: tuple[Source, ...] = ()
    continued: tuple[Source, ...] = Field(min_length=1)
    heldout: tuple[Source, ...] = Field(min_length=1)

    def sources(self, split: Split) -> tuple[LocalText | HubText, ...]:
        """Where the documents of a split come from."""
        found: tuple[LocalText | HubText, ...] = getattr(self, split)
        return found

    def documents(self, split: Split) -> Iterator[str]:
        """All texts of a split, source after source."""
        return itertools.chain.from_iterable(source.documents() for source in self.sources(split))

    def every_source(self) -> list[LocalText | HubText]:
        return [*self.base, *self.continued, *self.heldout]


def windows(
    config: TextCorpusConfig, tokenizer: PreTrainedTokenizerBase, *, split: Split, seed: int, count: int
) -> list[list[int]]:
    """`count` windows of a split in an order that follows from `seed`: lists of at most `seq_len` token ids.

    Raises ValueError where the text gives fewer.
    """
    rng = random.Random(f"windows/{seed}/{split}")
    found = (
        _spans(config, tokenizer, split, rng)
        if config.windows == "spans"
        else packed(config.documents(split), tokenizer, seq_len=config.seq_len, rng=rng)
    )
    if len(found) < count:
        raise ValueError(
            f"{count} windows of the {split} text are wanted, but it gives {len(found)} of {config.seq_len} tokens: "
            "ask for fewer, or name more text"
        )
    rng.shuffle(found)
    return [window.tolist() for window in found[:count]]


def _spans(
    config: TextCorpusConfig, tokenizer: PreTrainedTokenizerBase, split: Split, rng: random.Random
) -> list[np.ndarray]:
    """One random span of every document, the whole of a short one."""
    found = []
    for ids in encoded(config.documents(split), tokenizer):
        start = rng.randrange(max(1, len(ids) - config.seq_len + 1))
        found.append(ids[start : start + config.seq_len])
    return found

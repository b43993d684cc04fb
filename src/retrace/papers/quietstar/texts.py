"""Corpora of real text: files below RETRACE_DATA or datasets of the hub, cut into training windows.

A source gives documents in its own order; `start` and `stop` choose a range of them, so that splits of one source stay
apart. The windows of a split follow from the config, the seed and the text alone.
"""

from __future__ import annotations

import gzip
import hashlib
import itertools
import json
import random
import string
from collections.abc import Iterator
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal, Self

import numpy as np
from pydantic import Field, field_validator, model_validator

from retrace.core.config import Frozen, data_root
from retrace.core.tasks import require_hub

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

Split = Literal["base", "continued", "heldout"]
SUFFIXES = (".jsonl", ".jsonl.gz", ".txt")
ENCODED_AT_ONCE = 64  # documents


class Range(Frozen):
    """Which documents of a source are read, and how a row of fields becomes text."""

    template: str = Field("{text}", min_length=1)  # {field} stands for a field of the row; a .txt file has only {text}
    start: int = Field(0, ge=0)
    stop: int | None = Field(None, ge=1)  # the first document that is not read; null: to the end

    @field_validator("template")
    @classmethod
    def _names_fields(cls, template: str) -> str:
        fields = [name for _, name, _, _ in string.Formatter().parse(template) if name is not None]
        if not fields or not all(name.isidentifier() for name in fields):
            raise ValueError("expected names of fields in braces, as in 'Q: {question}', and {{ }} for braces of text")
        return template

    @model_validator(mode="after")
    def _is_a_range(self) -> Self:
        if self.stop is not None and self.stop <= self.start:
            raise ValueError(f"stop={self.stop} is not above start={self.start}: give a range of documents")
        return self

    def cut(self, rows: Iterator[dict[str, Any]], *, name: str) -> Iterator[str]:
        """The chosen rows as text; raises ValueError for a field that a row does not have."""
        for row in itertools.islice(rows, self.start, self.stop):
            try:
                yield self.template.format(**row)
            except KeyError as missing:
                fields = ", ".join(sorted(row))
                raise ValueError(
                    f"{name}: template {self.template!r} names {missing}; the fields are: {fields}"
                ) from None


class LocalText(Range):
    """A file below RETRACE_DATA: JSON lines, or plain text whose documents are parted by blank lines."""

    kind: Literal["local"]
    path: str = Field(min_length=1)

    def documents(self) -> Iterator[str]:
        """Texts in the order of the file."""
        return self.cut(_rows(self.file()), name=self.path)

    def check(self) -> None:
        """Raise ValueError where the file is missing or of another kind."""
        self.file()

    def file(self) -> Path:
        root = data_root()
        if root is None:
            raise ValueError(f"{self.path}: RETRACE_DATA is not set: set it to the folder that holds this file")
        file = root / self.path
        if not self.path.endswith(SUFFIXES):
            raise ValueError(f"{self.path}: not a text source: expected a file that ends in {', '.join(SUFFIXES)}")
        if not file.is_file():
            raise ValueError(f"{file} is missing: put it there, or set RETRACE_DATA to the folder that holds it")
        return file


class HubText(Range):
    """A dataset of the hub, read as a stream, so that no more is fetched than the range needs."""

    kind: Literal["hub"]
    dataset: str = Field(min_length=1)
    subset: str | None = None  # the dataset's config name
    split: str = "train"
    revision: str = Field(min_length=1)  # a commit fixes the text; a branch does not

    def documents(self) -> Iterator[str]:
        """Texts in the order of the dataset; raises ValueError where they can't be fetched."""
        import datasets

        try:
            rows = datasets.load_dataset(
                self.dataset, self.subset, split=self.split, revision=self.revision, streaming=True
            )
            yield from self.cut(iter(rows), name=self.dataset)
        except (OSError, datasets.exceptions.DatasetsError) as error:
            reason = " ".join(str(error).split()) or type(error).__name__
            raise ValueError(f"{self.dataset}: {reason.rstrip('.')}; {self._instead}") from error

    def check(self) -> None:
        """Raise ValueError where the hub does not answer, within seconds, or does not give the first document."""
        require_hub(self.dataset, self._instead)
        if next(self.documents(), None) is None:
            raise ValueError(f"{self.dataset}: no document from number {self.start} on: choose another range")

    @property
    def _instead(self) -> str:
        last = "the last" if self.stop is None else str(self.stop - 1)
        return (
            f"where it can be reached, write documents {self.start} to {last} of split {self.split} as JSON lines, "
            "copy the file below RETRACE_DATA, and name it instead of this source: {kind: local, path: FILE.jsonl}"
        )


Source = Annotated[LocalText | HubText, Field(discriminator="kind")]


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


def fingerprints(config: TextCorpusConfig) -> dict[str, str]:
    """Twelve hex digits of every local file that the corpus reads and that is here: part of a run's identity."""
    root = data_root()
    files = sorted({source.path for source in config.every_source() if isinstance(source, LocalText)})
    return {name: _digest(root / name) for name in files if root is not None and (root / name).is_file()}


@lru_cache(maxsize=256)
def _digest(file: Path) -> str:
    with open(file, "rb") as opened:
        return hashlib.file_digest(opened, "sha256").hexdigest()[:12]


def windows(
    config: TextCorpusConfig, tokenizer: PreTrainedTokenizerBase, *, split: Split, seed: int, count: int
) -> list[list[int]]:
    """`count` windows of a split in an order that follows from `seed`: lists of at most `seq_len` token ids.

    Raises ValueError where the text gives fewer.
    """
    rng = random.Random(f"windows/{seed}/{split}")
    found = (
        _spans(config, tokenizer, split, rng) if config.windows == "spans" else _packed(config, tokenizer, split, rng)
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
    for ids in _encoded(config, tokenizer, split):
        start = rng.randrange(max(1, len(ids) - config.seq_len + 1))
        found.append(ids[start : start + config.seq_len])
    return found


def _packed(
    config: TextCorpusConfig, tokenizer: PreTrainedTokenizerBase, split: Split, rng: random.Random
) -> list[np.ndarray]:
    """Documents end to end, each closed by the end-of-sequence token, cut into full windows; the rest is dropped."""
    documents = [np.append(ids, np.int32(tokenizer.eos_token_id)) for ids in _encoded(config, tokenizer, split)]
    rng.shuffle(documents)
    stream = np.concatenate(documents) if documents else np.empty(0, np.int32)
    return list(stream[: len(stream) // config.seq_len * config.seq_len].reshape(-1, config.seq_len))


def _encoded(config: TextCorpusConfig, tokenizer: PreTrainedTokenizerBase, split: Split) -> Iterator[np.ndarray]:
    documents = (text for text in config.documents(split) if text.strip())
    while texts := list(itertools.islice(documents, ENCODED_AT_ONCE)):
        yield from (np.array(ids, np.int32) for ids in tokenizer(texts, verbose=False)["input_ids"])


def _rows(file: Path) -> Iterator[dict[str, Any]]:
    opener = gzip.open if file.suffix == ".gz" else open
    with opener(file, "rt", encoding="utf-8") as lines:
        if file.suffix == ".txt":
            for blank, block in itertools.groupby(lines, lambda line: not line.strip()):
                if not blank:
                    yield {"text": "".join(block)}
            return
        for number, line in enumerate(lines, start=1):
            try:
                yield json.loads(line)
            except json.JSONDecodeError as error:
                raise ValueError(f"{file}: line {number} is not JSON: {error}") from None

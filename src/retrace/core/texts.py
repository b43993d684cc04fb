"""Real text: files below RETRACE_DATA or datasets of the hub, and a tokenizer's view of them.

A source gives documents in its own order; `start` and `stop` choose a range of them, so that splits of one source stay
apart.
"""

from __future__ import annotations

import gzip
import itertools
import random
import string
from collections.abc import Iterable, Iterator
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal, Self

from pydantic import Field, field_validator, model_validator

from retrace.core.config import Frozen, data_root
from retrace.core.files import fingerprint, json_lines
from retrace.core.tasks import open_stream, require_hub

if TYPE_CHECKING:
    import numpy as np
    from transformers import PreTrainedTokenizerBase

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
            rows = open_stream(self.dataset, self.subset, split=self.split, revision=self.revision)
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


def fingerprints(sources: Iterable[LocalText | HubText]) -> dict[str, str]:
    """Twelve hex digits of every local file among them that is here: part of a run's identity."""
    root = data_root()
    files = sorted({source.path for source in sources if isinstance(source, LocalText)})
    return {name: _digest(root / name) for name in files if root is not None and (root / name).is_file()}


@lru_cache(maxsize=256)
def _digest(file: Path) -> str:
    return fingerprint(file)[:12]


def encoded(texts: Iterable[str], tokenizer: PreTrainedTokenizerBase) -> Iterator[np.ndarray]:
    """Token ids (int32) of each text that is more than blanks."""
    import numpy as np  # 0.1 s, and a plan needs none of it

    documents = (text for text in texts if text.strip())
    while some := list(itertools.islice(documents, ENCODED_AT_ONCE)):
        yield from (np.array(ids, np.int32) for ids in tokenizer(some, verbose=False)["input_ids"])


def packed(
    texts: Iterable[str], tokenizer: PreTrainedTokenizerBase, *, seq_len: int, rng: random.Random
) -> list[np.ndarray]:
    """Documents end to end in a random order, each closed by the end-of-sequence token, cut into windows of `seq_len`.

    What is left of the last window is dropped.
    """
    import numpy as np

    documents = [np.append(ids, np.int32(tokenizer.eos_token_id)) for ids in encoded(texts, tokenizer)]
    rng.shuffle(documents)
    stream = np.concatenate(documents) if documents else np.empty(0, np.int32)
    return list(stream[: len(stream) // seq_len * seq_len].reshape(-1, seq_len))


def _rows(file: Path) -> Iterator[dict[str, Any]]:
    opener = gzip.open if file.suffix == ".gz" else open
    with opener(file, "rt", encoding="utf-8") as lines:
        if file.suffix == ".txt":
            for blank, block in itertools.groupby(lines, lambda line: not line.strip()):
                if not blank:
                    yield {"text": "".join(block)}
            return
        yield from json_lines(lines, path=file)

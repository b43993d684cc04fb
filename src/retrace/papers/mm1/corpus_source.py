"""Rows of a corpus as drafts, epoch after epoch: what is broken is left out and counted."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Sequence
from typing import Any, TypeGuard

from torch import Tensor
from transformers import PreTrainedTokenizerBase

from retrace.core.data import shuffled
from retrace.papers.mm1.corpora import HubDataset, ImageFolder, LocalShards
from retrace.papers.mm1.lines import EndsEarly, Row
from retrace.papers.mm1.packing import Draft, Picture
from retrace.papers.mm1.photos import Photos
from retrace.papers.mm1.rows import Piece

log = logging.getLogger(__name__)


def is_said(text: Any) -> TypeGuard[str]:
    """Whether it is a text, and not blank."""
    return isinstance(text, str) and bool(text.strip())


def plain_ids(text: str, tokenizer: PreTrainedTokenizerBase) -> tuple[int, ...]:
    """Tokens of a text without the special ones that it names: "<image>" in it is no image, "<eos>" ends nothing."""
    special = {*tokenizer.all_special_ids} - {tokenizer.unk_token_id}  # a word that is not known is one that is said
    special |= {tokenizer.bos_token_id, tokenizer.eos_token_id}
    return tuple(token for token in tokenizer.encode(text, add_special_tokens=False) if token not in special)


def warn_of_end(name: str, number: int, error: EndsEarly) -> None:
    """Say that a shard is damaged behind its first `number` rows."""
    log.warning("%s: ends early, behind %d rows (%s): the run goes on without the rest", name, number, error)


class CorpusSource:
    """An endless stream of a corpus' documents: epoch after epoch, the shards of each in an order of its own."""

    def __init__(
        self,
        config: ImageFolder | LocalShards | HubDataset,
        tokenizer: PreTrainedTokenizerBase,
        *,
        seed: int,
    ) -> None:
        self.config, self.tokenizer, self.seed = config, tokenizer, seed
        self._shards = config.shards()
        self._short: dict[str, int] = {}  # shard that ends early -> its rows
        self._why = "they are empty"
        self._empty = 0  # documents without text
        self._counted: tuple[int, ...] = ()  # the mark of the last of them, so that each is counted once
        self._photos = Photos(max_bad_share=config.max_bad_share)
        for what, count in config.notes().items():
            if count:
                log.warning("%s: %d files are left out", what, count)

    def drafts(self, mark: tuple[int, ...] = ()) -> Iterator[tuple[tuple[int, ...], Draft]]:
        """Documents with their marks (epoch, place of the shard in it, row). Raises ValueError where there are none."""
        epoch, first, start = mark or (0, 0, 0)
        count = len(self._shards)
        while True:
            found = bool(mark)
            rows = range(epoch * count, (epoch + 1) * count)
            order = shuffled(rows, num_rows=count, seed=self.seed, purpose="shards").tolist() if count else []
            for place in range(first, count):
                for number, row in self._rows(order[place], start):
                    draft = self._draft(row, self._shards[order[place]].name)
                    if draft is None:
                        self._note_empty((epoch, place, number), self._shards[order[place]].name)
                        continue
                    found = True
                    yield (epoch, place, number), draft
                start = 0
            if not found:
                raise ValueError(f"{self.config.document}: no document in {count} shards: {self._why}")
            mark, first, epoch = (), 0, epoch + 1

    def _rows(self, shard: int, start: int) -> Iterator[tuple[int, Row]]:
        """Rows of a shard with their numbers; where it is damaged it ends, with one warning."""
        name = self._shards[shard].name
        if self._short.get(name) == 0:
            return
        number = start
        try:
            for row in self._shards[shard].rows(start):
                yield number, row
                number += 1
        except EndsEarly as error:
            if name not in self._short:
                warn_of_end(name, number, error)
            self._short[name], self._why = number, str(error)

    def _draft(self, row: Row, name: str) -> Draft | None:
        """A row as a document, None where it says nothing or lacks a field."""
        config, folder = self.config, row.get("__folder__", "")
        if any(field not in row for field in config.fields):
            return None
        image, text = row.get(config.image_field), row[config.text_field]
        if isinstance(text, list) and config.document != "interleaved":
            raise ValueError(
                f"{name}: {config.text_field} is a list of texts, and a {config.document} that is trained on has one: "
                "write a row for each"
            )
        parts: list[Piece | Picture] = []
        if config.document == "interleaved":
            if not isinstance(image, list) or not isinstance(text, list) or len(image) != len(text):
                raise ValueError(
                    f"{name}: expected lists of one length in {config.image_field} and {config.text_field}"
                )
            for shown, said in zip(image, text, strict=True):
                parts += [Picture((shown, folder))] if shown is not None else []
                parts += self._pieces(said)
        elif config.document == "text":
            parts += self._pieces(text)
        else:
            asked: list[Piece] = []
            if config.document == "instruction":
                question = row[config.question_field]
                asked = self._pieces(f"{question}\n", learned=False) if is_said(question) else []
            said = self._pieces(text)
            parts = [Picture((image, folder)), *asked, *said] if said else []
        if not any(isinstance(part, Piece) for part in parts):
            return None
        start = self.tokenizer.bos_token_id
        opening = [] if start is None else [Piece((start,), learned=False)]
        return Draft([*opening, *parts, Piece((self.tokenizer.eos_token_id,))], config.document)

    def _pieces(self, text: Any, *, learned: bool = True) -> list[Piece]:
        """A text as one piece, or none."""
        ids = plain_ids(text, self.tokenizer) if is_said(text) else ()
        return [Piece(ids, learned=learned)] if ids else []

    def _note_empty(self, mark: tuple[int, int, int], shard: str) -> None:
        if not self._empty:
            log.warning("%s: row %d has no text, or lacks a field: left out; others are only counted", shard, mark[2])
        if mark > self._counted:
            self._empty, self._counted = self._empty + 1, mark

    def load(self, pictures: Sequence[Picture], *, image_size: int) -> list[Tensor | None]:
        """Images (3, R, R); None for one that can't be read. Raises ValueError where too many can't be."""
        return self._photos.load(pictures, image_size=image_size)

    def notes(self) -> dict[str, int]:
        """Counts of what was wrong with the data so far, in this process."""
        return {
            **self._photos.counts,
            "without_text": self._empty,
            "short_shards": len(self._short),
            **self.config.notes(),
        }

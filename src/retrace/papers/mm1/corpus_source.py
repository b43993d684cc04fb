"""Rows of a corpus as drafts, and its image files as tensors: what is broken is left out, counted, and has a limit."""

from __future__ import annotations

import io
import logging
import os
from collections import Counter
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image, ImageOps
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from retrace.core.data import shuffled
from retrace.papers.mm1.corpora import EndsEarly, HubDataset, ImageFolder, LocalShards, Row, require_fields
from retrace.papers.mm1.packing import Draft, Picture
from retrace.papers.mm1.rows import Piece

LEAST_SEEN = 100  # images that `max_bad_share` is a share of at the least: one broken one of three is not a third
UNREADABLE = (OSError, SyntaxError, ValueError, EOFError, TypeError, Image.DecompressionBombError)
log = logging.getLogger(__name__)


class CorpusSource:
    """An endless stream of a corpus' documents: epoch after epoch, the shards of each in an order of its own."""

    def __init__(
        self,
        config: ImageFolder | LocalShards | HubDataset,
        tokenizer: PreTrainedTokenizerBase,
        *,
        image_id: int,
        seed: int,
    ) -> None:
        self.config, self.tokenizer, self.image_id, self.seed = config, tokenizer, image_id, seed
        self._shards = config.shards()
        self._short: dict[str, int] = {}  # shard that ends early -> its rows
        self._why = "they are empty"
        self._empty: set[tuple[int, int]] = set()  # (shard, row) without text
        self._counts: Counter[str] = Counter()
        self._pool = ThreadPoolExecutor(max_workers=os.cpu_count())

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
                        self._note_empty(order[place], number)
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
                log.warning(
                    "%s: ends early, behind %d rows (%s): the run goes on without the rest", name, number, error
                )
            self._short[name], self._why = number, str(error)

    def _draft(self, row: Row, name: str) -> Draft | None:
        """A row as a document, None where it says nothing."""
        config, folder = self.config, row.get("__folder__", "")
        require_fields(config, row, name=name)
        image, text = row.get(config.image_field), row[config.text_field]
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
            asked = (
                self._pieces(f"{row[config.question_field]}\n", learned=False)
                if config.document == "instruction"
                else []
            )
            said = self._pieces(text)
            parts = [Picture((image, folder)), *asked, *said] if said else []
        if not parts:
            return None
        start = self.tokenizer.bos_token_id
        opening = [] if start is None else [Piece((start,), learned=False)]
        return Draft([*opening, *parts, Piece((self.tokenizer.eos_token_id,))], config.document)

    def _pieces(self, text: Any, *, learned: bool = True) -> list[Piece]:
        """A text as one piece, or none; what a text says of images by their token is not an image."""
        if not isinstance(text, str) or not text.strip():
            return []
        ids = self.tokenizer.encode(text, add_special_tokens=False)
        return [Piece(tuple(token for token in ids if token != self.image_id), learned=learned)]

    def _note_empty(self, shard: int, row: int) -> None:
        if not self._empty:
            log.warning("%s: row %d has no text: left out; others are only counted", self._shards[shard].name, row)
        self._empty.add((shard, row))

    def load(self, pictures: Sequence[Picture], *, image_size: int) -> list[Tensor | None]:
        """Images (3, R, R), resized to a square; None for one that can't be read.

        Raises ValueError where more than `max_bad_share` of all images so far, and of a hundred, can't be.
        """
        loaded: list[Tensor | None] = []
        for picture, result in zip(pictures, self._pool.map(lambda p: _try(p, image_size), pictures), strict=True):
            self._counts["images"] += 1
            if isinstance(result, Exception):
                self._refuse(picture, result)
            loaded.append(None if isinstance(result, Exception) else result)
        return loaded

    def _refuse(self, picture: Picture, error: Exception) -> None:
        self._counts["unreadable"] += 1
        bad, seen = self._counts["unreadable"], self._counts["images"]
        said = f"{_name(picture)}: {' '.join(str(error).split()) or type(error).__name__}"
        if bad > self.config.max_bad_share * max(seen, LEAST_SEEN):
            raise ValueError(
                f"{bad} of {seen} images can't be read, more than max_bad_share={self.config.max_bad_share:g}; "
                f"the last is {said}: mend the data, or allow for more"
            ) from error
        if bad == 1:
            log.warning("%s: can't be read, so its document is left out; others are only counted", said)

    def notes(self) -> dict[str, int]:
        """Counts of what was wrong with the data so far, in this process."""
        return {
            "images": self._counts["images"],
            "unreadable": self._counts["unreadable"],
            "without_text": len(self._empty),
            "short_shards": len(self._short),
            **self.config.notes(),
        }


def load_image(file: Any, *, image_size: int) -> Tensor:
    """An image file (path, bytes, or a row's {"bytes", "path"}) as (3, R, R) in 0..1.

    Upright as its EXIF data says, in RGB, resized to a square without regard to its sides (Section 2.1; the policy is
    not published), antialiased. Raises one of `UNREADABLE`.
    """
    if isinstance(file, dict):
        file = file["bytes"] if file.get("bytes") is not None else file["path"]
    if isinstance(file, str) and file.startswith(("http:", "https:")):
        raise ValueError("a link and no image: fetch the images first")
    with Image.open(io.BytesIO(file) if isinstance(file, bytes) else file) as opened:
        upright = ImageOps.exif_transpose(opened).convert("RGB")
    resized = upright.resize((image_size, image_size), Image.Resampling.BICUBIC)
    return torch.from_numpy(np.asarray(resized).copy()).permute(2, 0, 1).float() / 255


def _try(picture: Picture, image_size: int) -> Tensor | Exception:
    file, folder = picture.what
    try:
        return load_image(
            Path(folder) / file if isinstance(file, str) and "://" not in file else file, image_size=image_size
        )
    except UNREADABLE as error:
        return error


def _name(picture: Picture) -> str:
    file, _ = picture.what
    return str(file.get("path")) if isinstance(file, dict) else str(file)[:200]

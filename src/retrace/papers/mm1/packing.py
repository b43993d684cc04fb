"""Documents become packed rows of one length (Section 2.3).

A draft is a document whose images are not loaded yet. Drafts are put into rows by their sizes alone; images are loaded
afterwards, so a broken one leaves padding where its document would have been and moves nothing else.
"""

from __future__ import annotations

from bisect import bisect_left, insort
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from retrace.papers.mm1.rows import IGNORED, Document, PackedBatch, Piece


@dataclass(frozen=True)
class Picture:
    """An image that is not loaded: a scene, a path, or the bytes of a file."""

    what: Any


@dataclass(frozen=True)
class Draft:
    """A document before its images are loaded; fields as in `Document`."""

    parts: Sequence[Piece | Picture]
    source: str


@dataclass(frozen=True)
class Window:
    """What a row holds. A document that is too long is cut between its parts or within text, or trimmed."""

    seq_len: int  # positions
    image_tokens: int  # positions of an image
    max_images: int
    pad_id: int
    image_id: int
    sub_images: int = 1  # that an image of a draft becomes (Section 2.4); each takes `image_tokens`
    too_long: Literal["cut", "trim"] = "cut"  # into rows of its own; or to its beginning

    def __post_init__(self) -> None:
        if self.image_tokens * self.sub_images >= self.seq_len or self.max_images < 1:
            raise ValueError(
                f"image_tokens={self.image_tokens} of {self.sub_images} sub-images with seq_len={self.seq_len} and "
                f"max_images={self.max_images}: a row must hold one image and one more token; choose longer rows or "
                "fewer image tokens"
            )

    def size(self, draft: Draft | Document) -> tuple[int, int]:
        """Positions, and images."""
        parts = draft.parts if isinstance(draft, Draft) else draft.pieces
        images = sum(isinstance(part, Picture) or part.image is not None for part in parts)
        text = sum(len(part.token_ids) for part in parts if isinstance(part, Piece))
        tokens = self.image_tokens * (self.sub_images if isinstance(draft, Draft) else 1)
        return text + images * tokens, images

    def fits(self, size: tuple[int, int]) -> bool:
        return size[0] <= self.seq_len and size[1] <= self.max_images

    def cut(self, draft: Draft) -> list[Draft]:
        """The draft itself, or pieces of it that fit. No image is cut in two, and nothing is lost unless trimmed."""
        if self.fits(self.size(draft)):
            return [draft]
        pieces = list(self._pieces(draft))
        return pieces[:1] if self.too_long == "trim" else pieces

    def _pieces(self, draft: Draft) -> Iterator[Draft]:
        held: list[Piece | Picture] = []
        room, images = self.seq_len, self.max_images
        todo = list(reversed(draft.parts))
        while todo:
            part = todo.pop()
            if isinstance(part, Piece) and 0 < room < len(part.token_ids):  # as much of the text as there is room for
                todo.append(Piece(part.token_ids[room:], learned=part.learned))
                part = Piece(part.token_ids[:room], learned=part.learned)
            tokens, pictures = self.size(Draft([part], draft.source))
            if tokens > room or pictures > images:
                yield Draft(held, draft.source)
                held, room, images = [], self.seq_len, self.max_images
                todo.append(part)
                continue
            held.append(part)
            room, images = room - tokens, images - pictures
        yield Draft(held, draft.source)


def fill(sizes: Sequence[tuple[int, int]], window: Window) -> list[list[int]]:
    """Indices of documents by row: each, the longest first, goes into the fullest row that has room for it."""
    rows: list[list[int]] = []
    images_left: list[int] = []
    rooms: list[tuple[int, int]] = []  # (positions left, row), sorted
    for index in sorted(range(len(sizes)), key=lambda i: (-sizes[i][0], i)):
        tokens, images = sizes[index]
        start = bisect_left(rooms, (tokens, 0))
        place = next((p for p in range(start, len(rooms)) if images_left[rooms[p][1]] >= images), None)
        if place is None:
            rows.append([])
            images_left.append(window.max_images)
            room, row = window.seq_len, len(rows) - 1
        else:
            room, row = rooms.pop(place)
        rows[row].append(index)
        images_left[row] -= images
        insort(rooms, (room - tokens, row))
    return rows


def collate(rows: Sequence[Sequence[Document]], window: Window, *, image_size: int) -> PackedBatch:
    """Documents that share rows as a batch; a row with room left is padded, and may hold no document at all.

    The label of a position is the token behind it in the same document, where that is learned text: the last position
    of an image is the one that predicts the text behind it (Section 2.1).
    """
    shape = (len(rows), window.seq_len)
    ids, labels = torch.full(shape, window.pad_id), torch.full(shape, IGNORED)
    positions, numbers = torch.zeros(shape, dtype=torch.long), torch.zeros(shape, dtype=torch.long)
    images: list[Tensor] = []
    for row, documents in enumerate(rows):
        start = 0
        for number, document in enumerate(documents, start=1):
            tokens, targets = _flat(document, window)
            end = start + len(tokens)
            assert end <= window.seq_len, "rows are filled by size"
            ids[row, start:end] = torch.tensor(tokens)
            labels[row, start : end - 1] = torch.tensor(targets[1:], dtype=torch.long)
            positions[row, start:end] = torch.arange(len(tokens))
            numbers[row, start:end] = number
            images += [piece.image for piece in document.pieces if piece.image is not None]
            start = end
    stacked = torch.stack(images) if images else torch.zeros(0, 3, image_size, image_size)
    return PackedBatch(ids, positions, numbers, labels, stacked)


def _flat(document: Document, window: Window) -> tuple[list[int], list[int]]:
    """Token ids of a document, and the same with `IGNORED` where nothing is to be learned."""
    tokens: list[int] = []
    targets: list[int] = []
    for piece in document.pieces:
        own = [window.image_id] * window.image_tokens if piece.image is not None else list(piece.token_ids)
        tokens += own
        targets += own if piece.learned and piece.image is None else [IGNORED] * len(own)
    return tokens, targets

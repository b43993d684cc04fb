"""The rows that a run trains on: a mixture of sources, packed; row i is a pure function of (config, seed, i).

Each source's documents are read in blocks that fill a number of rows, and a block is packed by itself. Where a block
begins is a mark: a fact, not a state, so that marks kept in a file let a resumed run start near its row, and a run
without the file reads its way to it.
"""

from __future__ import annotations

import json
import logging
import random
from bisect import bisect_right, insort
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path
from typing import Protocol

from torch import Tensor

from retrace.papers.mm1.mixture import Draws, Mixture
from retrace.papers.mm1.packing import Draft, Picture, Window, collate, fill
from retrace.papers.mm1.rows import Document, Piece

OWN = ("images", "unreadable", "left_out")  # counted where images are loaded; the rest alike in all processes
BLOCK_ROWS = 128  # rows' worth of documents that are packed together; one row of a block may stay part empty
Mark = tuple[int, ...]
log = logging.getLogger(__name__)


class Source(Protocol):
    """Documents in an order of their own, without end, and their images."""

    def drafts(self, mark: Mark = ()) -> Iterator[tuple[Mark, Draft]]:
        """Documents with their marks, from a mark on; () is the beginning."""
        ...

    def load(self, pictures: Sequence[Picture], *, image_size: int) -> list[Tensor | None]:
        """Images (3, R, R) in 0..1; None for one that can't be read, which the source counts."""
        ...

    def notes(self) -> dict[str, int]:
        """Counts of what was wrong with the data so far."""
        ...


class Reader:
    """The packed rows of one source, by number."""

    def __init__(
        self,
        name: str,
        source: Source,
        window: Window,
        *,
        seed: int,
        marks: Path | None = None,
        write: bool = True,
        in_order: bool = False,
    ) -> None:
        """`marks` is read; and added to with `write`, by one process of several.

        `in_order`: a document a row, in the source's order, in the place of packing and shuffling.
        """
        self.name, self.source, self.window, self.seed, self.file = name, source, window, seed, marks
        self.write, self.in_order = write, in_order
        self.too_long = 0  # documents that did not fit into a row as a whole
        self._counted: Mark = ()  # the last of them, so that what is read twice is counted once
        self._marks = self._read_marks()
        self._starts = sorted(self._marks)
        self._rows: list[list[Draft]] = []  # of the block that was packed last
        self._first = 0  # its first row
        self._stream: Iterator[tuple[Mark, Draft]] | None = None
        self._next: tuple[Mark, Draft] | None = None

    def row(self, number: int) -> list[Draft]:
        """The documents of one row; quickest where numbers rise."""
        end = self._first + len(self._rows)
        if self._stream is None or not self._first <= number < end + BLOCK_ROWS:
            jump = self._starts[bisect_right(self._starts, number) - 1]
            if self._stream is None or number < self._first or jump > end:
                self._stream = self.source.drafts(self._marks[jump])
                self._next, self._first, self._rows = next(self._stream), jump, []
        while number >= self._first + len(self._rows):
            self._pack()
        return self._rows[number - self._first]

    def _pack(self) -> None:
        """Read and pack the next block."""
        assert self._stream is not None
        assert self._next is not None
        first, (begin, _) = self._first + len(self._rows), self._next
        drafts: list[Draft] = []
        tokens = images = 0
        while tokens < BLOCK_ROWS * self.window.seq_len and images < BLOCK_ROWS * self.window.max_images:
            mark, draft = self._next
            pieces = self.window.cut(draft)
            if not self.window.fits(self.window.size(draft)):
                self._note_cut(mark)
            for piece in pieces:
                size = self.window.size(piece)
                tokens, images = tokens + size[0], images + size[1]
            drafts += pieces
            self._next = next(self._stream)
        self._rows = [[draft] for draft in drafts] if self.in_order else self._packed(drafts, first)
        self._first = first
        self._keep_mark(first, begin)

    def _packed(self, drafts: Sequence[Draft], first: int) -> list[list[Draft]]:
        rng = random.Random(f"rows/{self.seed}/{self.name}/{first}")
        chosen = fill([self.window.size(draft) for draft in drafts], self.window)
        rng.shuffle(chosen)
        return [[drafts[index] for index in rng.sample(row, len(row))] for row in chosen]

    def _note_cut(self, mark: Mark) -> None:
        if not self.too_long:
            log.warning(
                "%s: a document longer than a row of %d tokens and %d images is %s; others are only counted "
                "(data/%s/too_long)", self.name, self.window.seq_len, self.window.max_images,
                "cut into several" if self.window.too_long == "cut" else "trimmed", self.name,
            )  # fmt: skip
        if mark > self._counted:
            self.too_long, self._counted = self.too_long + 1, mark

    def _read_marks(self) -> dict[int, Mark]:
        """First row of a block -> its mark; lines that a killed run has torn are skipped."""
        marks: dict[int, Mark] = {0: ()}
        if self.file is not None and self.file.is_file():
            for line in self.file.read_text(encoding="utf-8").splitlines():
                with suppress(json.JSONDecodeError):
                    first, mark = json.loads(line)
                    marks[first] = tuple(mark)
        return marks

    def _keep_mark(self, first: int, mark: Mark) -> None:
        if first in self._marks:
            return
        self._marks[first] = mark
        insort(self._starts, first)
        if self.file is not None and self.write:
            self.file.parent.mkdir(parents=True, exist_ok=True)
            with open(self.file, "a", encoding="utf-8") as file:
                file.write(json.dumps([first, mark]) + "\n")


class Stream:
    """`rows(range)` of the training loop: called with row numbers, it gives the fields of a `PackedBatch`."""

    def __init__(
        self,
        mixture: Mixture,
        sources: Mapping[str, Source],
        *,
        window: Window,
        image_size: int,
        seed: int,
        marks: Path | None = None,
        write: bool = True,
        split: Callable[[Sequence[Piece]], list[Piece]] | None = None,
        in_order: bool = False,
    ) -> None:
        """`marks`: a folder of the run's own, which one process writes; `split`, as `split_images`, makes sub-images.

        `in_order`: a document a row, in the order of its source.

        Raises ValueError where the mixture names a source that is not there.
        """
        for name in mixture.used:
            if name not in sources:
                raise ValueError(
                    f"weights name {name}, but the sources are {', '.join(sources)}: add it, or weigh it 0"
                )
        self.window, self.image_size, self.split = window, image_size, split
        self.draws = Draws(mixture, seed=seed)
        self.readers = {
            name: Reader(
                name,
                sources[name],
                window,
                seed=seed,
                marks=marks / f"{name}.jsonl" if marks else None,
                write=write,
                in_order=in_order,
            )
            for name in mixture.used
        }
        self._left_out: Counter[str] = Counter()  # documents of each source, for an image that can't be read
        self._first: int | None = None  # of the rows that were asked for here

    def __call__(self, rows: range) -> dict[str, Tensor]:
        side = self.image_size if self.split is None else self.image_size // 2  # of what the encoder gets
        return dict(vars(collate(self.documents(rows), self.window, image_size=side)))

    def documents(self, rows: range) -> list[list[Document]]:
        """The rows' documents with their images; one with an image that can't be read is left out, and counted."""
        self._first = rows.start if self._first is None else min(self._first, rows.start)
        places = [self.draws.place(row) for row in rows]
        drafts = [self.readers[name].row(number) for name, number in places]
        loaded: dict[str, Iterator[Tensor | None]] = {}
        for name, reader in self.readers.items():  # the images of a source together: drawing is quicker by the dozen
            parts = [
                p for (own, _), row in zip(places, drafts, strict=True) if own == name for d in row for p in d.parts
            ]
            pictures = [part for part in parts if isinstance(part, Picture)]
            loaded[name] = iter(reader.source.load(pictures, image_size=self.image_size))
        return [
            [document for draft in row if (document := self._realize(name, draft, loaded[name])) is not None]
            for (name, _), row in zip(places, drafts, strict=True)
        ]

    def _realize(self, name: str, draft: Draft, loaded: Iterator[Tensor | None]) -> Document | None:
        """The draft with its images, or None where one of them is not there."""
        pieces = [Piece(image=next(loaded)) if isinstance(part, Picture) else part for part in draft.parts]
        if any(piece.image is None and not piece.token_ids for piece in pieces):
            self._left_out[name] += 1
            return None
        return Document(pieces if self.split is None else self.split(pieces), draft.source)

    def notes(self, num_rows: int) -> dict[str, int]:
        """For a run's record: rows by source among the first `num_rows`, and what was wrong with the data read here.

        Read here is all from row `data/from_row` on: a resumed process has not seen what was before it.
        """
        counts = {f"data/{name}/rows": count for name, count in self.draws.counts(num_rows).items()}
        for name, reader in self.readers.items():
            counts[f"data/{name}/too_long"] = reader.too_long
            counts[f"data/{name}/left_out"] = self._left_out[name]
            counts |= {f"data/{name}/{what}": count for what, count in reader.source.notes().items()}
        return {**counts, "data/from_row": self._first or 0}


def together(notes: Sequence[Mapping[str, int]]) -> dict[str, int]:
    """The notes of all processes as those of one: each has read every row, and loaded the images of its own."""

    def joined(name: str) -> int:
        values = [found[name] for found in notes]
        kind = name.rpartition("/")[2]
        return sum(values) if kind in OWN else min(values) if kind == "from_row" else max(values)

    return {name: joined(name) for name in notes[0]}


class Ahead:
    """Computes the next batch in a thread while the model works on this one: rows are pure, so guessing is harmless."""

    def __init__(self, rows: Callable[[range], Mapping[str, Tensor]], *, between: int, end: int) -> None:
        """`between`: rows from one batch to the next, of which other processes may read some.

        `end`: behind the last row that will be asked for, so that none is read and counted beyond it.
        """
        self.rows, self.between, self.end = rows, between, end
        self._pool = ThreadPoolExecutor(max_workers=1)
        self._guess: tuple[range, Future[Mapping[str, Tensor]]] | None = None

    def __call__(self, rows: range) -> Mapping[str, Tensor]:
        """The batch of these rows."""
        if self._guess is not None and self._guess[0] == rows:
            pending = self._guess[1]
        else:
            pending = self._pool.submit(self.rows, rows)
        batch = pending.result()
        following = range(rows.start + self.between, rows.stop + self.between)
        wanted = following.stop <= self.end
        self._guess = (following, self._pool.submit(self.rows, following)) if wanted else None
        return batch

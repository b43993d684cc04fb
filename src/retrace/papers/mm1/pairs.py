"""Images with their captions, one a row: what a vision encoder is pre-trained on (Section 1.2)."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from retrace.papers.mm1.mixture import Mixture
from retrace.papers.mm1.packing import Window
from retrace.papers.mm1.rows import Document, Piece
from retrace.papers.mm1.stream import Source, Stream


class Pairs:
    """`rows(range)` of the training loop; row i is the source's i-th pair, so that who orders them orders batches.

    Captions are cut to `max_tokens`, counted as `Stream` does. A pair whose image can't be read is left out; where none
    is left, a blank one that is not `real` stands in, so that a process does as much as the others, which wait for it.
    """

    def __init__(
        self,
        source: Source,
        *,
        max_tokens: int,
        image_size: int,
        pad_id: int,
        image_id: int,
        seed: int,
        marks: Path | None = None,
        write: bool = True,
    ) -> None:
        # a row of one image and as many tokens is a pair
        window = Window(max_tokens + 1, 1, 1, pad_id=pad_id, image_id=image_id, too_long="trim")
        self.pad_id, self.max_tokens = pad_id, max_tokens
        self._blank = Document([Piece(image=torch.zeros(3, image_size, image_size)), Piece((pad_id,))], "none")
        self.stream = Stream(
            Mixture(weights={"pairs": 1.0}),
            {"pairs": source},
            window=window,
            image_size=image_size,
            seed=seed,
            marks=marks,
            write=write,
            in_order=True,
        )

    def __call__(self, rows: range) -> dict[str, Tensor]:
        """images_B3RR, captions as input_ids_BT and attention_mask_BT, padded to `max_tokens`, and real_B (1 or 0)."""
        found = [document for row in self.stream.documents(rows) for document in row]
        documents = found or [self._blank]
        images = [_only(document.pieces) for document in documents]
        captions = [
            torch.tensor([t for piece in d.pieces for t in piece.token_ids], dtype=torch.long) for d in documents
        ]
        longest = torch.full((self.max_tokens,), self.pad_id)  # so that every batch has one length
        ids_BT = pad_sequence([*captions, longest], batch_first=True, padding_value=self.pad_id)[:-1]
        lengths_B = torch.tensor([len(caption) for caption in captions])
        mask_BT = (torch.arange(self.max_tokens) < lengths_B[:, None]).long()
        real_B = torch.ones(len(documents)) if found else torch.zeros(1)
        words = {"input_ids_BT": ids_BT, "attention_mask_BT": mask_BT}
        return {"images_B3RR": torch.stack(images), **words, "real_B": real_B}


def _only(pieces: Sequence[Piece]) -> Tensor:
    """The one image of a pair; raises ValueError where a document has none, as plain text has."""
    images = [piece.image for piece in pieces if piece.image is not None]
    if len(images) != 1:
        raise ValueError(f"a document with {len(images)} images is no pair: pre-train encoders on captioned images")
    return images[0]

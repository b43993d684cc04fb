"""Rows of a split, for any corpus: the windows over and over, in another order each time."""

from __future__ import annotations

import torch
from transformers import PreTrainedTokenizerBase

from retrace.core.data import shuffled
from retrace.core.train import Batch
from retrace.papers.quietstar import corpus, texts
from retrace.papers.quietstar.config import Corpus
from retrace.papers.quietstar.texts import Split, TextCorpusConfig


class Windows:
    """A pure function of the row's number, padded on the right."""

    def __init__(
        self, config: Corpus, tokenizer: PreTrainedTokenizerBase, *, split: Split, seed: int, count: int
    ) -> None:
        if isinstance(config, TextCorpusConfig):
            found = texts.windows(config, tokenizer, split=split, seed=seed, count=count)
        else:
            found = corpus.windows(config, tokenizer, split=split, seed=seed, count=count)
        self._ids = torch.full((count, config.seq_len), tokenizer.pad_token_id, dtype=torch.int32)
        for row, ids in enumerate(found):
            self._ids[row, : len(ids)] = torch.tensor(ids, dtype=torch.int32)
        self._lengths = torch.tensor([len(ids) for ids in found])
        self._order = (seed, f"order of {split}")

    def __call__(self, rows: range) -> Batch:
        """`input_ids` and `attention_mask` (B, T) of these rows of the infinite stream."""
        return self._batch(shuffled(rows, num_rows=len(self._ids), seed=self._order[0], purpose=self._order[1]))

    def every(self) -> Batch:
        """All windows once, in their own order."""
        return self._batch(torch.arange(len(self._ids)))

    def _batch(self, chosen: torch.Tensor) -> Batch:
        ids, ends = self._ids[chosen].long(), self._lengths[chosen][:, None]
        return {"input_ids": ids, "attention_mask": (torch.arange(ids.shape[1]) < ends).long()}

"""Windows of tokens of either corpus, by split.

Held-out windows are the same for every seed. Of procedural text a seed has training windows of its own; of real text it
has an order of its own.
"""

from __future__ import annotations

import random
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import PreTrainedTokenizerFast

from retrace.core.bpe import train_bpe
from retrace.core.data import shuffled
from retrace.core.store import RunDir
from retrace.core.texts import packed
from retrace.core.train import Batch
from retrace.core.weights import load_pretrained
from retrace.papers.deepscalelm.config import SPLITS, Corpus, PrepareConfig, RealText, Split
from retrace.papers.deepscalelm.sentences import World

HELDOUT_SEED = 0
FOLDER, WINDOWS = "text", "windows.safetensors"


class Rows:
    """Training windows over and over, in another order each time: a pure function of the row's number."""

    def __init__(self, ids_WT: Tensor, *, seed: int) -> None:
        self._ids_WT, self._seed = ids_WT, seed

    def __call__(self, rows: range) -> Batch:
        """`input_ids` (B, T) of these rows of the infinite stream."""
        chosen = shuffled(rows, num_rows=len(self._ids_WT), seed=self._seed, purpose="order of train")
        return {"input_ids": self._ids_WT[chosen].long()}


def windows(
    corpus: Corpus, split: Split, *, count: int, length: int, seed: int, parents: Mapping[str, RunDir]
) -> Tensor:
    """`count` windows (count, length) of a split; of real text, those that the parent `text` has prepared."""
    if isinstance(corpus, RealText):
        found: Tensor = load_file(parents["text"].path / FOLDER / WINDOWS)[split]
        assert found.shape == (count, length), (found.shape, count, length)
        return found
    own = seed if split == "train" else HELDOUT_SEED
    return World(corpus).texts(count, length=length, seed=own, purpose=split)


def prepare(config: PrepareConfig, folder: Path) -> None:
    """Train the tokenizer, cut every split into windows, and leave both in `folder`.

    Raises ValueError where a split has less text than is wanted.
    """
    corpus = config.corpus
    first = (text for _, text in zip(range(corpus.num_bpe_documents), corpus.documents("train"), strict=False))
    tokenizer = train_bpe(
        first,
        vocab_size=config.vocab_size,
        key="model.vocab_size",
        mask_token="<mask>",
        bos_token="<bos>",
        eos_token="<eos>",
    )
    found = {}
    for split in SPLITS:
        count = config.num_windows if split == "train" else config.num_heldout
        rng = random.Random(f"windows of {split}")
        cut = packed(corpus.documents(split), tokenizer, seq_len=config.seq_len, rng=rng)
        if len(cut) < count:
            raise ValueError(
                f"{count} windows of the {split} text are wanted, but it gives {len(cut)} of {config.seq_len} tokens: "
                "ask for fewer, or name more text"
            )
        rng.shuffle(cut)
        found[split] = torch.from_numpy(np.stack(cut[:count]).astype(np.int32))
    save_file(found, folder / WINDOWS)
    tokenizer.save_pretrained(folder)


def load_tokenizer(parents: Mapping[str, RunDir]) -> PreTrainedTokenizerFast:
    """That of the prepared text."""
    found: PreTrainedTokenizerFast = load_pretrained(PreTrainedTokenizerFast, parents["text"].path / FOLDER)
    return found


def unigram(ids_WT: Tensor, *, vocab_size: int) -> Tensor:
    """Log-probabilities (V) of single tokens, from counts of the training windows, each plus one."""
    counts_V = torch.bincount(ids_WT.flatten().long(), minlength=vocab_size) + 1
    return (counts_V.double() / counts_V.sum()).log().float()

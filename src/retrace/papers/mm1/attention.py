"""Packed documents in one row of tokens, and attention that stays within each of them (Section 2.3).

Rows of a batch are laid end to end without their padding, so that no layer computes any. Attention gathers documents of
similar length into small batches, each under plain causal attention: exact, and cheaper than one mask over a row, whose
forbidden pairs are computed too (on a CPU with 2048 tokens of 128 a document by a factor of 6, with 128 of 20 by none).
It is registered with transformers under the name below; without `documents`, as in generation, it is their SDPA.

Shapes: B rows of L positions, T tokens that are no padding, A attention heads, G key-value heads, E head size, N
documents of a bucket, K the longest of them.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

from retrace.papers.mm1.rows import PackedBatch

NAME = "retrace_documents"
SHORTEST = 0.6  # of the longest document of its bucket


@dataclass(frozen=True)
class Documents:
    """Where documents are among T tokens: the tokens of each bucket, and each token's place in all buckets together."""

    buckets_NK: tuple[Tensor, ...]
    places_T: Tensor
    longest: int

    @classmethod
    def of(cls, lengths: list[int], *, device: torch.device | str = "cpu") -> Documents:
        """Documents of these lengths, one behind the other."""
        starts, total = [0], sum(lengths)
        for length in lengths:
            starts.append(starts[-1] + length)
        buckets: list[Tensor] = []
        tokens: list[Tensor] = []
        order = sorted(range(len(lengths)), key=lambda number: -lengths[number])
        while order:
            longest = lengths[order[0]]
            chosen = [number for number in order if lengths[number] >= SHORTEST * longest]
            order = order[len(chosen) :]
            steps_K = torch.arange(longest)
            rows_NK = torch.tensor([starts[number] for number in chosen])[:, None] + steps_K
            real_NK = steps_K < torch.tensor([lengths[number] for number in chosen])[:, None]
            tokens.append(rows_NK.where(real_NK, -1).flatten())
            buckets.append(rows_NK.where(real_NK, 0).to(device))  # what stands behind a document is never read
        slots = torch.cat(tokens)
        places_T = torch.empty(total, dtype=torch.long)
        filled = (slots >= 0).nonzero()[:, 0]
        places_T[slots[filled]] = filled
        return cls(tuple(buckets), places_T.to(device), max(lengths))


@dataclass(frozen=True)
class Tokens:
    """The T tokens of a batch that are no padding."""

    input_ids_T: Tensor
    position_ids_T: Tensor
    labels_T: Tensor
    documents: Documents
    kept_T: Tensor  # their places among the B * L positions

    @classmethod
    def of(cls, batch: PackedBatch) -> Tokens:
        """Of padding alone, as where no document could be read, the first position: without a label, it is no loss."""
        length = batch.document_ids_BL.shape[1]
        kept_T = batch.document_ids_BL.flatten().nonzero()[:, 0]
        kept_T = kept_T if len(kept_T) else kept_T.new_zeros(1)  # other processes wait for a pass
        owner_T = batch.document_ids_BL.flatten()[kept_T] + (kept_T // length) * (length + 1)
        lengths = owner_T.unique_consecutive(return_counts=True)[1].tolist()
        texts = (batch.input_ids_BL, batch.position_ids_BL, batch.labels_BL)
        ids_T, positions_T, labels_T = (x.flatten()[kept_T] for x in texts)
        return cls(ids_T, positions_T, labels_T, Documents.of(lengths, device=kept_T.device), kept_T)


def attention(
    module: nn.Module,
    query_BATE: Tensor,
    key_BGTE: Tensor,
    value_BGTE: Tensor,
    attention_mask: Tensor | None,
    *,
    documents: Documents | None = None,
    scaling: float | None = None,
    dropout: float = 0.0,
    **options: Any,
) -> tuple[Tensor, None]:
    """(B, T, A, E), as transformers calls it. With `documents` B is 1, and causal attention stays within each."""
    if documents is None:
        return sdpa_attention_forward(
            module, query_BATE, key_BGTE, value_BGTE, attention_mask, dropout=dropout, scaling=scaling, **options
        )
    window = options.get("sliding_window")
    if window is not None and documents.longest > window:
        raise ValueError(
            f"a document of {documents.longest} tokens in a decoder with a window of {window}: cut it shorter"
        )
    several = query_BATE.shape[1] != key_BGTE.shape[1]
    tokens = [x[0].transpose(0, 1) for x in (query_BATE, key_BGTE, value_BGTE)]  # (T, A or G, E)
    found = []
    for rows_NK in documents.buckets_NK:
        q, k, v = (x[rows_NK].transpose(1, 2) for x in tokens)
        mixed_NAKE = F.scaled_dot_product_attention(
            q, k, v, dropout_p=dropout, is_causal=True, scale=scaling, enable_gqa=several
        )
        found.append(mixed_NAKE.transpose(1, 2).flatten(0, 1))
    return torch.cat(found)[documents.places_T][None], None


AttentionInterface.register(NAME, attention)
AttentionMaskInterface.register(NAME, sdpa_mask)

"""Blocks of positions: the attention weights of threads, a few positions of a few sequences at a time.

All thread tokens of a block are rows of one matrix product with the text keys up to its last position, the scores of
the own keys stand beside it, and one softmax runs over both, which is the log-sum-exp merge of specification 6.4
without its extra pass.

Shapes: B sequences, T text tokens, N positions that think, P thoughts per position, Q thoughts in a pass (P, or 1
while they still share their tokens), K tokens of a thread in a pass, J tokens of a thread that are looked at, G
key-value heads, R query heads per key-value head, D head size. X = B * G; I = N * Q * K * R rows of queries;
Y = X * N * Q threads. In a block: n positions, i of the rows, W text keys.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from retrace.papers.quietstar.memory import LayerMemory, Reach

BLOCK_SCORES = {"cpu": 2**19}  # scores alive at a time: on CPU they stay in cache
BLOCK_SCORES_ELSEWHERE = 2**28
LEAST_POSITIONS = 16  # of a block: fewer are not worth its overhead
MOST_POSITIONS = {"cpu": 32}  # more would multiply with too many keys that causality hides
LEAST_OWN = 8  # own keys to multiply with: torch does smaller batched products in a slow loop


@dataclass(frozen=True)
class Block:
    """Some sequences' heads, and of them the rows of some positions, which see text keys before `end`."""

    batch: slice
    rows: slice
    end: int


@dataclass(frozen=True)
class ThreadPass:
    """One pass of threads through one layer: its operands as the matrix products want them, and its blocks."""

    memory: LayerMemory
    reach: Reach
    sizes: tuple[int, int, int, int, int, int]  # B, G, N, Q, K, R
    num_done: int
    window: int | None
    softcap: float | None

    @property
    def num_own(self) -> int:
        return self.num_done + self.sizes[4]

    @property
    def num_read(self) -> int:
        """Own keys that are looked at; those behind `num_own` are masked."""
        return min(self.memory.own_BGNPJD[0].shape[4], max(self.num_own, LEAST_OWN))

    @property
    def dtype(self) -> torch.dtype:
        """Of the products. A CPU gains nothing from less than fp32; softmax is in fp32 or wider everywhere."""
        stored = self.memory.text_BGTD[0]
        return torch.promote_types(stored.dtype, torch.float32) if stored.device.type == "cpu" else stored.dtype

    def rows(self, heads_BGNQKRD: Tensor) -> Tensor:
        """(X, I, D), position by position."""
        return heads_BGNQKRD.to(self.dtype).flatten(2, 5).flatten(0, 1).contiguous()

    def threads(self, rows_XID: Tensor) -> Tensor:
        """The same rows, thread by thread: (Y, K * R, D)."""
        return rows_XID.view(-1, self.sizes[4] * self.sizes[5], rows_XID.shape[-1])

    def thread_rows(self, threads: Tensor) -> Tensor:
        """The inverse of `threads`, for any last dimension."""
        return threads.view(self.sizes[0] * self.sizes[1], -1, threads.shape[-1])

    def text(self, which: int) -> Tensor:
        """Keys (0) or values (1) of the text, (X, T, D)."""
        return self.memory.text_BGTD[which][:, :, : self.reach.num_text].to(self.dtype).flatten(0, 1)

    def own(self, which: int) -> Tensor:
        """Keys (0) or values (1) of the threads, (Y, J, D)."""
        return self._per_thread(self.memory.own_BGNPJD[which]).to(self.dtype)

    def gradients(self) -> tuple[tuple[Tensor, Tensor], tuple[Tensor, Tensor]]:
        """Where the gradients of `text` and `own` gather, as views of the same shapes."""
        text_key, text_value, own_key, own_value = self.memory.gathered()
        text = (text_key.flatten(0, 1), text_value.flatten(0, 1))
        return text, (self._per_thread(own_key), self._per_thread(own_value))

    def _per_thread(self, own_BGNPJD: Tensor) -> Tensor:
        return own_BGNPJD[:, :, :, : self.sizes[3]].flatten(0, 3)[:, : self.num_read]

    def own_scores(self, rows_XID: Tensor) -> Tensor:
        """Scores of a thread's own keys, (Y, K * R, J)."""
        return self.threads(rows_XID) @ self.own(0).mT

    def blocks(self, rows_XID: Tensor, own_scores: Tensor) -> Iterator[tuple[Block, Tensor, Tensor | None]]:
        """Every block with its weights (X, i, W + J), and with soft-capping the slope of each score."""
        _, num_heads, _, q, k, r = self.sizes
        hidden_KJ, text_key, wide = self._hidden_own(), self.text(0), torch.promote_types(self.dtype, torch.float32)
        for sequences, start, stop in self._cuts():
            batch = slice(sequences.start * num_heads, sequences.stop * num_heads)
            block = Block(batch, slice(start * q * k * r, stop * q * k * r), self.reach.last(start, stop))
            at, end = (block.batch, block.rows), block.end
            own = self.thread_rows(own_scores)[at]
            scores, slope = side_by_side(rows_XID[at], text_key[batch, :end], own, dtype=wide), None
            if self.softcap is not None:
                scores = scores.div_(self.softcap).tanh_()
                slope = 1 - scores.square()
                scores *= self.softcap
            hidden = self._hidden_text(sequences, start, stop, end)
            if hidden is not None:
                shape = (hidden.shape[0], -1, stop - start, q, k, r, hidden.shape[-1])
                scores[..., end - hidden.shape[-1] : end].view(shape).add_(hidden)
            if hidden_KJ is not None:
                scores[..., end:].view(len(scores), -1, k, r, self.num_read).add_(hidden_KJ[:, None])
            yield block, torch.softmax(scores, -1).to(self.dtype), slope

    def _cuts(self) -> Iterator[tuple[slice, int, int]]:
        """Sequences and positions [start, stop) of every block."""
        batch, num_heads, num_positions, q, k, r = self.sizes
        device = self.memory.text_BGTD[0].device.type
        room = BLOCK_SCORES.get(device, BLOCK_SCORES_ELSEWHERE)
        scores = num_heads * q * k * r * (self.reach.num_text + self.num_read)  # of one position
        most = MOST_POSITIONS.get(device, num_positions)
        num_block = max(LEAST_POSITIONS, min(most, room // scores))
        num_batch = max(1, room // (scores * num_block))
        for first in range(0, batch, num_batch):
            for start in range(0, num_positions, num_block):
                yield slice(first, min(first + num_batch, batch)), start, min(start + num_block, num_positions)

    def _hidden_text(self, sequences: slice, start: int, stop: int, end: int) -> Tensor | None:
        """-inf where a text key is out of reach, else 0: (B or 1, 1, n, 1, K or 1, 1, W), or only the last of the W.

        Positions in a row without padding before them see all but the last n - 1 of the keys.
        """
        reach, device = self.reach, self.memory.text_BGTD[0].device
        if isinstance(reach.positions, range) and self.window is None and reach.text_allowed_BT is None:
            return self._causal[:, :, : stop - start, ..., : stop - start - 1] if stop - start > 1 else None
        if isinstance(reach.positions, range):
            chosen = reach.positions[start:stop]
            position_Bn = torch.arange(chosen.start, chosen.stop, device=device)[None]
        else:
            position_Bn = reach.positions[sequences, start:stop]
        position, index_W = position_Bn[:, None, :, None, None, None, None], torch.arange(end, device=device)
        hidden = index_W > position
        if self.window is not None:  # the distance that a plain run of [text .. position, thread] would have
            slot_K = torch.arange(self.num_done, self.num_own, device=device)
            hidden = hidden | (position + 1 + slot_K[:, None, None] - index_W >= self.window)
        if reach.text_allowed_BT is not None:
            hidden = hidden | ~reach.text_allowed_BT[sequences, None, None, None, None, None, :end]
        return _minus_infinity(hidden, self.dtype)

    @cached_property
    def _causal(self) -> Tensor:
        """-inf for the later ones of n positions in a row, seen from each of them: (1, 1, n, 1, 1, 1, n - 1)."""
        size = max(stop - start for _, start, stop in self._cuts())
        later = torch.ones(size, size, dtype=torch.bool, device=self.memory.text_BGTD[0].device).triu(1)[:, 1:]
        return _minus_infinity(later, self.dtype)[None, None, :, None, None, None]

    def _hidden_own(self) -> Tensor | None:
        """-inf where an own key is later, too far back, or not there yet, else 0: (K, J), None where none is."""
        if self.num_read == self.num_own and self.sizes[4] == 1 and self.window is None:
            return None
        device = self.memory.text_BGTD[0].device
        slot_K = torch.arange(self.num_done, self.num_own, device=device)
        distance_KJ = slot_K[:, None] - torch.arange(self.num_read, device=device)
        hidden_KJ = distance_KJ < 0
        if self.window is not None:
            hidden_KJ = hidden_KJ | (distance_KJ >= self.window)
        return _minus_infinity(hidden_KJ, self.dtype)


def _minus_infinity(hidden: Tensor, dtype: torch.dtype) -> Tensor:
    """To be added to scores: several times faster on a CPU than to fill by a mask."""
    wide = torch.promote_types(dtype, torch.float32)
    return torch.zeros(hidden.shape, dtype=wide, device=hidden.device).masked_fill_(hidden, -torch.inf)


def side_by_side(rows_XiD: Tensor, text_XWD: Tensor, own_XiJ: Tensor, *, dtype: torch.dtype | None = None) -> Tensor:
    """[rows @ text^T | own] as one tensor (X, i, W + J)."""
    num_text = text_XWD.shape[1]
    result = rows_XiD.new_empty(*rows_XiD.shape[:2], num_text + own_XiJ.shape[2], dtype=dtype or rows_XiD.dtype)
    if result.dtype == rows_XiD.dtype:
        torch.bmm(rows_XiD, text_XWD.mT, out=result[..., :num_text])
    else:
        result[..., :num_text] = rows_XiD @ text_XWD.mT
    result[..., num_text:] = own_XiJ
    return result


def add_product(total: Tensor, left: Tensor, right: Tensor) -> None:
    """total += left @ right, in place."""
    if total.dtype == left.dtype:
        total.baddbmm_(left, right)
    else:
        total += left @ right

"""The attention of threads as an autograd function: blocks of positions, recomputed weights, gathered gradients.

Scores exist only for one block of positions at a time: all thread tokens of a block are rows of one matrix product
with the text keys, the own keys are a small batched product beside it, and one softmax runs over both, which is the
log-sum-exp merge of specification 6.4 without its extra pass. The backward pass recomputes them. Keys and values stand
once in buffers that later passes read and backward passes add gradients to, so what is kept is linear in the length of
a thought.

Shapes: B sequences, T text tokens, N positions that think, P thoughts per position, Q thoughts in a pass (P, or 1
while they still share their tokens), K tokens of a thread in a pass, J tokens of a thread up to and with that pass,
G key-value heads, R query heads per key-value head, D head size. In a block: X sequences x key-value heads,
n positions, W text keys.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

BLOCK_SCORES = {"cpu": 2**18}  # scores alive at a time: on CPU they fit the second-level cache
BLOCK_SCORES_ELSEWHERE = 2**26


@dataclass
class LayerMemory:
    """Keys and values of one layer for later passes, and where their gradients gather during the backward pass."""

    text_BGTD: tuple[Tensor, Tensor]
    own_BGNPJD: tuple[Tensor, Tensor]
    gradients: list[Tensor] | None = None

    def gathered(self) -> list[Tensor]:
        """Gradients of (text key, text value, own key, own value), zero at first, in fp32 or wider."""
        if self.gradients is None:
            wide = torch.promote_types(self.text_BGTD[0].dtype, torch.float32)
            self.gradients = [torch.zeros_like(x, dtype=wide) for x in (*self.text_BGTD, *self.own_BGNPJD)]
        return self.gradients


@dataclass(frozen=True)
class Reach:
    """Which text keys a thread may see.

    `text_allowed_BT` is False at padding that stands before real text, and None where causality already hides it all.
    `positions_BN` are the text positions that think, None for all of them.
    """

    num_text: int
    text_allowed_BT: Tensor | None = None
    positions_BN: Tensor | None = None

    @property
    def num_positions(self) -> int:
        return self.num_text if self.positions_BN is None else self.positions_BN.shape[1]


class KeptText(torch.autograd.Function):
    """Hands the text's keys and values the gradients that all threads gathered.

    The tensor returned is a link without a value: every pass of threads takes that of the pass before and returns its
    own, so that the backward passes run in the opposite order and each finds the gradients of later ones complete.
    """

    @staticmethod
    def forward(ctx: Any, key_BGTD: Tensor, value_BGTD: Tensor, memory: LayerMemory) -> Tensor:
        ctx.memory, ctx.dtype = memory, value_BGTD.dtype
        return key_BGTD.new_zeros(())

    @staticmethod
    def backward(ctx: Any, *_: Tensor) -> tuple[Tensor | None, ...]:
        key, value, *_own = ctx.memory.gathered()
        ctx.memory.gradients = None
        return key.to(ctx.dtype), value.to(ctx.dtype), None


class ThreadAttention(torch.autograd.Function):
    """Attention of the next K tokens of every thread; keeps its queries and recomputes weights in the backward pass."""

    @staticmethod
    def forward(
        ctx: Any,
        query_BGNQKRD: Tensor,
        key_BGNQKD: Tensor,
        value_BGNQKD: Tensor,
        link: Tensor,
        memory: LayerMemory,
        num_done: int,
        reach: Reach,
        window: int | None,
        scale: float,
    ) -> tuple[Tensor, Tensor]:
        num_own = num_done + key_BGNQKD.shape[4]
        for buffer, new in zip(memory.own_BGNPJD, (key_BGNQKD, value_BGNQKD), strict=True):
            buffer[:, :, :, :, num_done:num_own] = new  # one thread that serves all thoughts is spread over them
        ctx.save_for_backward(query_BGNQKRD)
        ctx.memory, ctx.reach, ctx.scale, ctx.num_done, ctx.num_own = memory, reach, scale, num_done, num_own
        ctx.window = None if window is None or window >= reach.num_text + num_own else window
        b, g, n, q, k, r, size = query_BGNQKRD.shape
        output_BNQKGRD = query_BGNQKRD.new_empty(b, n, q, k, g, r, size)
        output = output_BNQKGRD.movedim(4, 1)
        with torch.autocast(query_BGNQKRD.device.type, enabled=False):
            for block, (query, _, text_value, _, own_value), probs in _blocks(ctx, query_BGNQKRD):
                text = probs[..., : block.end] @ text_value
                own = _per_thread(probs, block, query) @ own_value
                at = output[block.batch, :, block.start : block.stop]
                at.copy_((text.view(query.shape) + own.view(query.shape)).view(at.shape))
        return output_BNQKGRD, torch.zeros_like(link)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        (query_BGNQKRD,) = ctx.saved_tensors
        d_output, num_q = grads[0].movedim(4, 1), query_BGNQKRD.shape[3]
        d_text_key, d_text_value, *d_own = ctx.memory.gathered()
        d_own_key, d_own_value = (x[:, :, :, :num_q, : ctx.num_own] for x in d_own)
        d_query = torch.empty_like(query_BGNQKRD)
        for block, (query, text_key, text_value, own_key, own_value), probs in _blocks(ctx, query_BGNQKRD):
            at = (block.batch, slice(None), slice(block.start, block.stop))
            keys = (block.batch, slice(None), slice(0, block.end))
            d_out = d_output[at].to(query.dtype).reshape(query.shape[0], -1, query.shape[-1])
            d_out_own, query_own = (x.reshape(len(own_key), -1, x.shape[-1]) for x in (d_out, query))
            d_text_value[keys] += (probs[..., : block.end].mT @ d_out).view_as(d_text_value[keys])
            d_own_value[at] += (_per_thread(probs, block, query).mT @ d_out_own).view_as(d_own_value[at])
            d_probs = _side_by_side(d_out, text_value, d_out_own, own_value)
            d_scores = torch._softmax_backward_data(d_probs, probs, -1, probs.dtype)
            d_scores_own = _per_thread(d_scores, block, query)
            d_rows = (d_scores[..., : block.end] @ text_key).view(query.shape)
            d_rows += (d_scores_own @ own_key).view(query.shape)
            d_query[at] = d_rows.mul_(ctx.scale).view_as(d_query[at])
            d_text_key[keys] += (d_scores[..., : block.end].mT @ query.flatten(1, 4)).view_as(d_text_key[keys])
            d_own_key[at] += (d_scores_own.mT @ query_own).view_as(d_own_key[at])
        new = (x[:, :, :, :, ctx.num_done : ctx.num_own].to(query_BGNQKRD.dtype) for x in d_own)
        d_key, d_value = (x.sum(3, keepdim=True) if num_q == 1 else x for x in new)
        return d_query, d_key, d_value, grads[1], None, None, None, None, None


@dataclass(frozen=True)
class Block:
    """Positions [start, stop) of some sequences; text keys [free, end) need a mask, those before do not."""

    batch: slice
    start: int
    stop: int
    free: int
    end: int


def _blocks(ctx: Any, query_BGNQKRD: Tensor) -> Iterator[tuple[Block, tuple[Tensor, ...], Tensor]]:
    """Every block with its operands and weights.

    The operands are scaled queries (X, n, Q, K, R, D), text keys and values (X, W, D), own ones (X * n * Q, J, D).
    """
    reach: Reach = ctx.reach
    batch, num_heads, _, num_q, k, r, size = query_BGNQKRD.shape
    device, wide = query_BGNQKRD.device.type, torch.promote_types(query_BGNQKRD.dtype, torch.float32)
    own = [x[:, :, :, :num_q, : ctx.num_own] for x in ctx.memory.own_BGNPJD]
    num_batch = 1 if device == "cpu" else batch  # one sequence at a time stays in cache; a GPU wants all at once
    scores_per_position = num_batch * num_heads * num_q * k * r * (reach.num_text + ctx.num_own)
    num_block = max(8, BLOCK_SCORES.get(device, BLOCK_SCORES_ELSEWHERE) // scores_per_position)
    for first in range(0, batch, num_batch):
        sequences = slice(first, first + num_batch)
        for start in range(0, reach.num_positions, num_block):
            stop = min(start + num_block, reach.num_positions)
            block = Block(sequences, start, stop, 0, reach.num_text)
            if reach.positions_BN is None:
                free = start if ctx.window is None and reach.text_allowed_BT is None else 0
                block = Block(sequences, start, stop, free, stop)
            at = (sequences, slice(None), slice(start, stop))
            query = (query_BGNQKRD[at].to(wide) * ctx.scale).flatten(0, 1).contiguous()
            text_parts = [x[sequences, :, : block.end].to(wide).flatten(0, 1) for x in ctx.memory.text_BGTD]
            own_parts = [x[at].to(wide).reshape(-1, ctx.num_own, size) for x in own]
            yield block, (query, *text_parts, *own_parts), _probs(block, query, text_parts[0], own_parts[0], ctx)


def _side_by_side(rows: Tensor, text: Tensor, own_rows: Tensor, own: Tensor) -> Tensor:
    """[rows @ text^T | own_rows @ own^T] as one tensor (X, rows, W + J)."""
    num_text, num_own = text.shape[1], own.shape[1]
    result = rows.new_empty(*rows.shape[:2], num_text + num_own)
    torch.bmm(rows, text.mT, out=result[..., :num_text])
    result[..., num_text:] = (own_rows @ own.mT).view(*rows.shape[:2], num_own)
    return result


def _probs(block: Block, query: Tensor, text_key: Tensor, own_key: Tensor, ctx: Any) -> Tensor:
    """Attention weights (X, rows, W + J) of a block, rows being (n, Q, K, R)."""
    num_x, n, q, k, r, size = query.shape
    scores = _side_by_side(query.flatten(1, 4), text_key, query.view(num_x * n * q, k * r, size), own_key)
    slot_K = torch.arange(ctx.num_done, ctx.num_own, device=query.device)
    if block.free < block.end:
        hidden = _hidden_text(block, ctx.reach, ctx.window, slot_K)
        view = scores[..., block.free : block.end].view(hidden.shape[0], -1, n, q, k, r, block.end - block.free)
        view.masked_fill_(hidden, -torch.inf)
    if k > 1 or ctx.window is not None:
        distance_KJ = slot_K[:, None] - torch.arange(ctx.num_own, device=query.device)
        hidden_KJ = distance_KJ < 0 if ctx.window is None else (distance_KJ < 0) | (distance_KJ >= ctx.window)
        view = scores[..., block.end :].view(num_x, n * q, k, r, ctx.num_own)
        view.masked_fill_(hidden_KJ[:, None], -torch.inf)
    return torch.softmax(scores, -1)


def _hidden_text(block: Block, reach: Reach, window: int | None, slot_K: Tensor) -> Tensor:
    """True where a text key is out of reach: (B or 1, 1, n, 1, K or 1, 1, W - free)."""
    index_W = torch.arange(block.free, block.end, device=slot_K.device)
    if reach.positions_BN is None:
        position_Bn = torch.arange(block.start, block.stop, device=slot_K.device)[None]
    else:
        position_Bn = reach.positions_BN[block.batch, block.start : block.stop]
    position = position_Bn[:, None, :, None, None, None, None]
    hidden = index_W > position
    if window is not None:  # the distance that a plain run of [text .. position, thread] would have
        hidden = hidden | (position + 1 + slot_K[:, None, None] - index_W >= window)
    if reach.text_allowed_BT is not None:
        hidden = hidden | ~reach.text_allowed_BT[block.batch, None, None, None, None, None, block.free : block.end]
    return hidden


def _per_thread(weights: Tensor, block: Block, query: Tensor) -> Tensor:
    """The weights (or scores) of own keys, (X * n * Q, K * R, J), out of those of a block."""
    num_x, n, q, k, r, _ = query.shape
    return weights[..., block.end :].reshape(num_x * n * q, k * r, -1)

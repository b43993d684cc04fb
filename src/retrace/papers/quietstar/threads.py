"""The attention of threads as an autograd function: recomputed weights, gathered gradients.

Scores exist only for one block of positions at a time, and the backward pass recomputes them. Keys and values stand
once in buffers that later passes read and backward passes add gradients to, so what is kept is linear in the length of
a thought.

Shapes: B sequences, T text tokens, N positions that think, Q thoughts in a pass, K tokens of a thread in a pass, G
key-value heads, R query heads per key-value head, D head size. X = B * G; I = N * Q * K * R rows of queries.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from retrace.papers.quietstar.blocks import ThreadPass, add_product, side_by_side
from retrace.papers.quietstar.memory import LayerMemory, Reach


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
        softcap: float | None,
        scale: float,
    ) -> tuple[Tensor, Tensor]:
        b, g, n, q, k, r, _ = query_BGNQKRD.shape
        for buffer, new in zip(memory.own_BGNPJD, (key_BGNQKD, value_BGNQKD), strict=True):
            buffer[:, :, :, :, num_done : num_done + k] = new  # one thread that serves all thoughts is spread over them
        window = None if window is None or window >= reach.num_text + num_done + k else window
        ctx.here = here = ThreadPass(memory, reach, (b, g, n, q, k, r), num_done, window, softcap)
        with torch.autocast(query_BGNQKRD.device.type, enabled=False):
            rows_XID = here.rows(query_BGNQKRD) * scale
            own_probs, text_value, own_value = here.own_scores(rows_XID), here.text(1), here.own(1)
            output_XID = rows_XID.new_empty(*rows_XID.shape[:2], text_value.shape[2])
            for block, probs, _ in here.blocks(rows_XID, own_probs):
                text = probs[..., : block.end]
                torch.bmm(text, text_value[block.batch, : block.end], out=output_XID[block.batch, block.rows])
                here.thread_rows(own_probs)[block.batch, block.rows] = probs[..., block.end :]
            output_XID += here.thread_rows(own_probs @ own_value)
        ctx.save_for_backward(rows_XID)
        ctx.scale, ctx.dtype = scale, query_BGNQKRD.dtype
        output = output_XID.to(ctx.dtype).view(b, g, n, q, k, r, -1)
        return output.permute(0, 2, 3, 4, 1, 5, 6).contiguous(), torch.zeros_like(link)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        (rows_XID,), here = ctx.saved_tensors, ctx.here
        d_output_XID, d_rows_XID = here.rows(grads[0].movedim(4, 1)), torch.empty_like(rows_XID)
        (d_text_key, d_text_value), (d_own_key, d_own_value) = here.gradients()
        text_key, text_value, own_key = here.text(0), here.text(1), here.own(0)
        own_probs, d_own = here.own_scores(rows_XID), here.threads(d_output_XID) @ here.own(1).mT
        for block, probs, slope in here.blocks(rows_XID, own_probs):
            at, keys = (block.batch, block.rows), (block.batch, slice(0, block.end))
            here.thread_rows(own_probs)[at] = probs[..., block.end :]
            d_probs = side_by_side(d_output_XID[at], text_value[keys], here.thread_rows(d_own)[at])
            d_scores = torch._softmax_backward_data(d_probs, probs, -1, d_probs.dtype)
            d_scores = d_scores if slope is None else d_scores.mul_(slope)
            here.thread_rows(d_own)[at] = d_scores[..., block.end :]
            d_scores_text = d_scores[..., : block.end]
            torch.bmm(d_scores_text, text_key[keys], out=d_rows_XID[at])
            add_product(d_text_value[keys], probs[..., : block.end].mT, d_output_XID[at])
            add_product(d_text_key[keys], d_scores_text.mT, rows_XID[at])
        d_rows_XID += here.thread_rows(d_own @ own_key)
        d_own_key += d_own.mT @ here.threads(rows_XID)
        d_own_value += own_probs.mT @ here.threads(d_output_XID)
        b, g, n, q, k, r = here.sizes
        d_query = (d_rows_XID * ctx.scale).to(ctx.dtype).view(b, g, n, q, k, r, -1)
        new = (x[:, :, :, :, here.num_done : here.num_own].to(ctx.dtype) for x in here.memory.gathered()[2:])
        d_key, d_value = (x.sum(3, keepdim=True) if q == 1 else x for x in new)
        return d_query, d_key, d_value, grads[1], *([None] * 6)

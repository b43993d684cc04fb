"""Sub-blocks of a transformer: attention, feed-forward, and how each joins the residual stream.

Shapes: B sequences, T positions, S positions of an encoder that is looked at, D hidden_size, H heads, E head size.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from retrace.papers.deepscalelm.dropout import dropout
from retrace.papers.deepscalelm.scheme import Residual
from retrace.papers.deepscalelm.shape import ModelShape

ROPE_BASE = 10_000.0
Rotation = tuple[Tensor, Tensor]  # cosines and sines, [T, E]


class Linear(nn.Linear):
    """torch's, without its first draw of weights: the model makes the only one."""

    def reset_parameters(self) -> None:
        pass


class Embedding(nn.Embedding):
    """As `Linear`."""

    def reset_parameters(self) -> None:
        pass


def make_norm(shape: ModelShape, size: int, *, wanted: bool = True) -> nn.Module:
    """The shape's norm; a module that does nothing where none is wanted, so that hooks find the same places."""
    if not wanted:
        return nn.Identity()
    return nn.LayerNorm(size) if shape.norm == "layernorm" else nn.RMSNorm(size, eps=1e-5)


class Attention(nn.Module):
    """Self-attention, or cross-attention to `memory`; queries, keys and values are rows of one matrix."""

    def __init__(self, shape: ModelShape, *, causal: bool, cross: bool = False, inner_norm: bool = False) -> None:
        super().__init__()
        size = shape.hidden_size
        self.num_heads, self.dropout, self.causal = shape.num_heads, shape.attention_dropout, causal
        self.query = Linear(size, size) if cross else None
        self.rows = Linear(size, 2 * size if cross else 3 * size)
        self.inner_norm = make_norm(shape, size) if inner_norm else None
        self.output = Linear(size, size)

    def forward(self, x_BTD: Tensor, context: Context) -> Tensor:
        if self.query is None:
            q, k, v = self._heads(self.rows(x_BTD))
            if context.rotation is not None:
                q, k = rotate(q, context.rotation), rotate(k, context.rotation)
            mask = context.mask
        else:
            assert context.memory_BSD is not None
            (q,) = self._heads(self.query(x_BTD))
            k, v = self._heads(self.rows(context.memory_BSD))
            mask = context.memory_mask
        out_BTD = self._attend(q, k, v, mask).transpose(1, 2).reshape(x_BTD.shape)
        return self.output(out_BTD if self.inner_norm is None else self.inner_norm(out_BTD))

    def _heads(self, rows: Tensor) -> tuple[Tensor, ...]:
        """[B, T, n * D] as n tensors [B, H, T, E]."""
        num_batch, length, width = rows.shape
        size = self.output.in_features
        split = rows.view(num_batch, length, width // size, self.num_heads, size // self.num_heads)
        return split.permute(2, 0, 3, 1, 4).unbind(0)

    def _attend(self, q_BHTE: Tensor, k_BHSE: Tensor, v_BHSE: Tensor, mask: Tensor | None) -> Tensor:
        p = self.dropout if self.training else 0.0
        if p == 0 or q_BHTE.device.type != "cpu" or torch.compiler.is_compiling():
            alone = self.causal and mask is None
            if self.causal and mask is not None:
                mask = mask + later(q_BHTE)
            return F.scaled_dot_product_attention(q_BHTE, k_BHSE, v_BHSE, attn_mask=mask, dropout_p=p, is_causal=alone)
        return self._attend_dropping(q_BHTE, k_BHSE, v_BHSE, mask, p)

    def _attend_dropping(self, q_BHTE: Tensor, k_BHSE: Tensor, v_BHSE: Tensor, mask: Tensor | None, p: float) -> Tensor:
        """The same with dropout on a CPU, where torch has no fused kernel for it and its masks are slow."""
        batch, heads, length, size = q_BHTE.shape
        q, k, v = (t.reshape(batch * heads, -1, size) for t in (q_BHTE, k_BHSE, v_BHSE))
        hidden = later(q) if self.causal else None
        if mask is not None:
            each = mask.expand(batch, heads, 1, -1).reshape(batch * heads, 1, -1)
            hidden = each if hidden is None else each + hidden
        scale = 1 / math.sqrt(size)
        if hidden is None:
            scores = torch.bmm(q * scale, k.mT)
        else:
            scores = torch.baddbmm(hidden, q, k.mT, alpha=scale)
        return torch.bmm(dropout(scores.softmax(-1), p), v).view(batch, heads, length, size)


def later(like: Tensor) -> Tensor:
    """-inf where a key stands behind a query, else 0: [T, T]."""
    length = like.shape[-2]
    return torch.full((length, length), -torch.inf, dtype=like.dtype, device=like.device).triu_(1)


class FeedForward(nn.Module):
    """D -> intermediate -> D; SwiGLU's gate stands before its other half in `inner`."""

    def __init__(self, shape: ModelShape, *, inner_norm: bool = False) -> None:
        super().__init__()
        self.activation = shape.activation
        size, wide = shape.hidden_size, shape.intermediate_size
        self.inner = Linear(size, 2 * wide if shape.activation == "swiglu" else wide)
        self.inner_norm = make_norm(shape, wide) if inner_norm else None
        self.outer = Linear(wide, size)

    def forward(self, x_BTD: Tensor, _: Context) -> Tensor:
        wide = activate(self.inner(x_BTD), self.activation)
        return self.outer(wide if self.inner_norm is None else self.inner_norm(wide))


def activate(x: Tensor, activation: str) -> Tensor:
    """ReLU, exact GeLU, or SwiGLU of two halves side by side."""
    if activation == "swiglu":
        gate, up = x.chunk(2, -1)
        return F.silu(gate) * up
    return F.relu(x) if activation == "relu" else F.gelu(x)


@dataclass(frozen=True)
class Context:
    """What the layers of a stack share in one pass. Masks hold 0 or -inf: [B, 1, 1, T] and [B, 1, 1, S]."""

    mask: Tensor | None = None
    rotation: Rotation | None = None
    memory_BSD: Tensor | None = None
    memory_mask: Tensor | None = None


def additive(mask_BT: Tensor | None, dtype: torch.dtype) -> Tensor | None:
    """A mask of real positions as what is added to scores; None where all are real."""
    if mask_BT is None:
        return None
    padded = mask_BT == 0
    return torch.zeros(padded.shape, dtype=dtype, device=padded.device).masked_fill_(padded, -torch.inf)[:, None, None]


class SubBlock(nn.Module):
    """skip * x + dropout(scale * branch(x)), with the norm before the branch ("pre") or behind the sum ("post")."""

    def __init__(self, branch: nn.Module, residual: Residual, *, shape: ModelShape, norms: bool) -> None:
        super().__init__()
        self.branch, self.placement, self.dropout = branch, shape.placement, shape.dropout
        self.norm = make_norm(shape, shape.hidden_size, wanted=norms)
        self.fixed = residual
        trained = {"none": None, "scale": (1,)}.get(residual.trained, (shape.hidden_size,))
        start = residual.skip if residual.trained == "skip_vector" else residual.scale
        self.trained = None if trained is None else nn.Parameter(torch.full(trained, start))

    def forward(self, x_BTD: Tensor, context: Context) -> Tensor:
        if self.placement == "pre":
            return self.join(x_BTD, self.branch(self.norm(x_BTD), context))
        return self.norm(self.join(x_BTD, self.branch(x_BTD, context)))

    def join(self, x_BTD: Tensor, branch_BTD: Tensor) -> Tensor:
        """The sum, in one pass more over memory with a skip than without: the backward one; biases are scaled too."""
        skip, scale, p = self.fixed.skip, self.fixed.scale, self.dropout if self.training else 0.0
        if self.trained is None:
            return torch.add(dropout(branch_BTD, p, scale=scale), x_BTD, alpha=skip)
        if self.fixed.trained == "skip_vector":
            return torch.addcmul(dropout(branch_BTD, p, scale=scale), x_BTD, self.trained)
        return torch.addcmul(x_BTD if skip == 1 else x_BTD * skip, dropout(branch_BTD, p), self.trained)


def rotation(length: int, head_size: int, *, like: Tensor) -> Rotation:
    """Rotary embeddings of positions 0 ... length-1 (RoPE, halves rotated as in Llama)."""
    frequency = ROPE_BASE ** (-torch.arange(0, head_size, 2, device=like.device, dtype=torch.float32) / head_size)
    angle = torch.outer(torch.arange(length, device=like.device, dtype=torch.float32), frequency).repeat(1, 2)
    return angle.cos().to(like.dtype), angle.sin().to(like.dtype)


def rotate(x_BHTE: Tensor, tables: Rotation) -> Tensor:
    cosines_TE, sines_TE = tables
    first, second = x_BHTE.chunk(2, -1)
    return torch.addcmul(x_BHTE * cosines_TE, torch.cat((-second, first), -1), sines_TE)

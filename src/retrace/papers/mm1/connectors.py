"""Connectors: the patch features of an image to as many tokens as the decoder is to get (Section 2.2).

    average_pool      adaptive average pooling, one linear layer; with as many tokens as patches a linear connector
    attention_pool    learned queries, one multi-head cross-attention to the normalised features, a linear layer
    c_abstractor      Honeybee's: bottlenecks, adaptive average pooling, bottlenecks, a two-layer read-out;
                      of depth 0 it is pooling with that read-out, the MLP connector

Maps are kept with the channels last, so that a 1x1 convolution is a linear layer and a LayerNorm is torch's own. What
the paper does not disclose is chosen here: attention has heads of 64, at least 4, and queries that start as N(0, 1).

Shapes: M images, P = g * g patches in raster order, D the encoder's size, H the bottlenecks' size, N = n * n tokens, C
the decoder's size.
"""

from __future__ import annotations

from itertools import pairwise

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from retrace.core.data import derive_seed
from retrace.papers.mm1.encoder import interpolated
from retrace.papers.mm1.shape import ConnectorShape

EPSILON = 1e-6  # of attention's LayerNorm over channels
SQUEEZE = 0.25  # of a bottleneck's input channels
HEAD_SIZE, LEAST_HEADS = 64, 4


class AveragePool(nn.Module):
    """Adaptive average pooling to n x n, and one linear layer."""

    def __init__(self, side: int, *, in_size: int, out_size: int) -> None:
        super().__init__()
        self.side = side
        self.project = nn.Linear(in_size, out_size)

    def forward(self, features_MPD: Tensor) -> Tensor:
        """(M, N, C)."""
        found: Tensor = self.project(pooled(_square(features_MPD), self.side).flatten(1, 2))
        return found


class AttentionPool(nn.Module):
    """One cross-attention of learned queries to the features; takes any number of tokens."""

    def __init__(self, num_tokens: int, *, in_size: int, out_size: int) -> None:
        super().__init__()
        most = max(LEAST_HEADS, in_size // HEAD_SIZE)
        heads = next(count for count in range(most, 0, -1) if in_size % count == 0)
        self.queries = nn.Parameter(torch.randn(num_tokens, in_size))
        self.norm = nn.LayerNorm(in_size, eps=EPSILON)
        self.attention = nn.MultiheadAttention(in_size, heads, batch_first=True)
        self.project = nn.Linear(in_size, out_size)

    def forward(self, features_MPD: Tensor) -> Tensor:
        """(M, N, C)."""
        keys_MPD = self.norm(features_MPD)
        queries_MND = self.queries.expand(len(keys_MPD), -1, -1)
        found: Tensor = self.project(self.attention(queries_MND, keys_MPD, keys_MPD, need_weights=False)[0])
        return found


class Bottleneck(nn.Module):
    """RegNet's block: 1x1, depth-wise 3x3, squeeze and excite, 1x1, shortcut; SiLU and LayerNorm over channels."""

    def __init__(self, in_size: int, out_size: int, *, epsilon: float, zero_init: bool) -> None:
        super().__init__()
        squeezed = round(SQUEEZE * in_size)
        self.reduce = nn.Linear(in_size, out_size, bias=False)
        self.reduce_norm = nn.LayerNorm(out_size, eps=epsilon)
        self.mix = nn.Conv2d(out_size, out_size, 3, padding=1, groups=out_size, bias=False)
        self.mix_norm = nn.LayerNorm(out_size, eps=epsilon)
        self.squeeze = nn.Linear(out_size, squeezed)
        self.excite = nn.Linear(squeezed, out_size)
        self.expand = nn.Linear(out_size, out_size, bias=False)
        self.expand_norm = nn.LayerNorm(out_size, eps=epsilon)
        if zero_init:
            nn.init.zeros_(self.expand_norm.weight)
        self.shortcut: nn.Module = nn.Identity()
        if in_size != out_size:
            self.shortcut = nn.Sequential(nn.Linear(in_size, out_size, bias=False), nn.LayerNorm(out_size, eps=epsilon))

    def forward(self, map_MggD: Tensor) -> Tensor:
        """(M, g, g, H)."""
        x_MggH = F.silu(self.reduce_norm(self.reduce(map_MggD)))
        x_MggH = self.mix(x_MggH.permute(0, 3, 1, 2)).permute(0, 2, 3, 1)
        x_MggH = F.silu(self.mix_norm(x_MggH))
        gate_M11H = self.excite(F.silu(self.squeeze(x_MggH.mean((1, 2), keepdim=True)))).sigmoid()
        x_MggH = self.expand_norm(self.expand(x_MggH * gate_M11H))
        return F.silu(x_MggH + self.shortcut(map_MggD))


class CAbstractor(nn.Module):
    """Honeybee's locality-keeping abstractor, `depth` bottlenecks on either side of the pooling."""

    def __init__(self, shape: ConnectorShape, *, grid: int, in_size: int, out_size: int) -> None:
        super().__init__()
        depth = shape.depth
        self.side = shape.side
        self.positions = nn.Parameter(torch.empty(grid * grid, in_size).normal_(std=0.02)) if depth else None
        inner = shape.hidden_size if depth else in_size
        sizes = [in_size] + [inner] * (2 * depth)
        blocks = [
            Bottleneck(before, after, epsilon=shape.norm_epsilon, zero_init=shape.zero_init)
            for before, after in pairwise(sizes)
        ]
        self.before, self.behind = nn.Sequential(*blocks[:depth]), nn.Sequential(*blocks[depth:])
        self.read_out = nn.Sequential(nn.Linear(inner, out_size), nn.SiLU(), nn.Linear(out_size, out_size))

    @torch.no_grad()
    def resize(self, grid: int) -> None:
        """Positions for another grid from now on, to be trained there; frozen ones stay frozen."""
        if self.positions is not None:
            found, trained = interpolated(self.positions, grid=grid).clone(), self.positions.requires_grad
            self.positions = nn.Parameter(found, requires_grad=trained)

    def forward(self, features_MPD: Tensor) -> Tensor:
        """(M, N, C)."""
        map_MggD = _square(features_MPD)
        if self.positions is not None:
            grid, size = map_MggD.shape[2:]
            map_MggD = map_MggD + interpolated(self.positions, grid=grid).view(grid, grid, size)
        map_MnnH = self.behind(pooled(self.before(map_MggD), self.side))
        found: Tensor = self.read_out(map_MnnH.flatten(1, 2))
        return found


def build_connector(shape: ConnectorShape, *, grid: int, in_size: int, out_size: int, seed: int) -> nn.Module:
    """(M, P, in_size) -> (M, num_tokens, out_size), with random weights that follow from the seed.

    `grid` is that of the encoder; images of another resolution have another one, which all connectors take. Raises
    ValueError for more tokens than the grid has patches, where pooling is to give them.
    """
    torch.manual_seed(derive_seed(seed, "connector"))
    if shape.kind == "attention_pool":
        return AttentionPool(shape.num_tokens, in_size=in_size, out_size=out_size)
    if shape.side > grid:
        raise ValueError(
            f"num_tokens={shape.num_tokens} with kind={shape.kind}: a grid of {grid}x{grid} patches gives at most "
            f"{grid * grid}; use fewer, a higher resolution or attention_pool"
        )
    if shape.kind == "average_pool":
        return AveragePool(shape.side, in_size=in_size, out_size=out_size)
    return CAbstractor(shape, grid=grid, in_size=in_size, out_size=out_size)


def pooled(map_MggD: Tensor, side: int) -> Tensor:
    """Means over windows [floor(i g / n), ceil((i + 1) g / n)): (M, n, n, D), for every g and n."""
    if map_MggD.shape[1] == side:
        return map_MggD
    return F.adaptive_avg_pool2d(map_MggD.permute(0, 3, 1, 2), side).permute(0, 2, 3, 1)


def _square(features_MPD: Tensor) -> Tensor:
    """(M, g, g, D)."""
    grid = round(features_MPD.shape[1] ** 0.5)
    return features_MPD.unflatten(1, (grid, grid))

"""Weights at random: each matrix has numbers of its own, of a seed and its name, whatever else is drawn."""

from __future__ import annotations

import hashlib

import torch
from torch import Tensor


def generator_of(name: str, *, seed: int) -> torch.Generator:
    key = hashlib.blake2b(f"{seed}/{name}".encode(), digest_size=8).digest()
    return torch.Generator().manual_seed(int.from_bytes(key, "big") >> 1)


@torch.no_grad()
def fill(matrix: Tensor, std: float, generator: torch.Generator, *, uniform: bool = False) -> None:
    """In place, from N(0, std^2), or evenly with that standard deviation; drawn on the CPU wherever `matrix` is."""
    drawn = matrix if matrix.device.type == "cpu" else torch.empty(matrix.shape, dtype=matrix.dtype)
    if uniform:
        drawn.uniform_(-(3**0.5) * std, 3**0.5 * std, generator=generator)
    else:
        drawn.normal_(0, std, generator=generator)
    if drawn is not matrix:
        matrix.copy_(drawn)

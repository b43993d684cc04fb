"""Dropout whose masks cost a quarter on a CPU, where torch draws one number at a time and a mask takes twice as long as
the matrix product before it. Elsewhere, and in a compiled model, it is torch's own.
"""

from __future__ import annotations

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

LEVELS = 2**16  # a mask is made of 16 random bits an element: p is rounded to a multiple of 1/65536
LEAST = 2**13  # elements: below it, seeding a generator costs more than torch's draws


def dropout(x: Tensor, p: float, *, scale: float = 1.0) -> Tensor:
    """scale * x, each element dropped with probability p, and those kept divided by 1-p. `scale` is free on a CPU.

    Masks are a function of torch's random state alone, so whatever restores that repeats them.
    """
    if p == 0:
        return x if scale == 1 else x * scale
    if x.device.type != "cpu" or x.numel() < LEAST or torch.compiler.is_compiling():
        dropped = F.dropout(x, p)
        return dropped if scale == 1 else dropped * scale
    return x * keep(x, p, scale=scale)


def keep(x: Tensor, p: float, *, scale: float = 1.0) -> Tensor:
    """0 with probability p, else scale / (1-p); of the shape and type of `x`, on the CPU."""
    size, limit = x.numel(), round(p * LEVELS)
    seed = int(torch.randint(2**62, ()).item())
    words = np.random.SFC64(seed).random_raw(-(-size // 4))
    bits = torch.from_numpy(words.view(np.int16))[:size].view(x.shape)
    kept = bits >= limit - LEVELS // 2
    return kept.view(torch.uint8).to(x.dtype).mul_(scale * LEVELS / (LEVELS - limit))

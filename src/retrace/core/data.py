"""Which rows a step trains on, and which noise it uses: pure functions of (seed, step).

The number of processes changes neither. Nothing here has a position to save: a run that resumes at step 70 asks for the
rows of step 70.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator

import torch
from torch import Tensor

GROUP = 64  # tokens that are summed first when one is drawn


def derive_seed(seed: int, *purpose: str | int) -> int:
    """One seed split by purpose: 63 bits that differ for any two purposes."""
    text = ":".join(str(part) for part in (seed, *purpose))
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "big") >> 1


def generator(seed: int, *purpose: str | int, device: torch.device | str = "cpu") -> torch.Generator:
    """A generator seeded by `derive_seed`."""
    return torch.Generator(device=device).manual_seed(derive_seed(seed, *purpose))


def draw(scores_RV: Tensor, noise_RD: Tensor) -> Tensor:
    """Tokens (R, D) from scores (logits or log-probabilities) and uniform noise, by inversion of the distribution.

    First the group of W tokens is found, then the token in it: one pass over the probabilities and no sum of thousands.
    """
    width = min(GROUP, scores_RV.shape[1] & -scores_RV.shape[1])  # a power of two that divides the vocabulary
    probs_RGW = scores_RV.float().softmax(-1).view(len(scores_RV), -1, width)
    group_RD, rest_RD = _invert(probs_RGW.sum(-1), noise_RD)
    own_RDW = probs_RGW.gather(1, group_RD[..., None].expand(-1, -1, width))
    within, _ = _invert(own_RDW.flatten(0, 1), rest_RD.reshape(-1, 1))
    return group_RD * width + within.view_as(group_RD)


def _invert(weights_RV: Tensor, noise_RD: Tensor) -> tuple[Tensor, Tensor]:
    """Where uniform noise falls among weights, and where in its interval: (R, D) indices and noise anew on [0, 1)."""
    cumulative_RV = weights_RV.cumsum(-1)
    total_R1 = cumulative_RV[:, -1:]
    # rounding must not reach the total itself: the first index above it may have weight 0
    below_R1 = torch.nextafter(total_R1, torch.zeros_like(total_R1))
    threshold_RD = torch.minimum(noise_RD * total_R1, below_R1)
    index_RD = torch.searchsorted(cumulative_RV, threshold_RD, right=True)
    weight_RD = weights_RV.gather(1, index_RD)
    return index_RD, (1 - (cumulative_RV.gather(1, index_RD) - threshold_RD) / weight_RD).clamp(0, 1)


def micro_batches(
    step: int, *, batch_size: int, micro_batch_size: int, rank: int = 0, num_processes: int = 1
) -> Iterator[tuple[int, range]]:
    """(index of the micro-batch, its rows in the infinite stream) of one step, for one process.

    Micro-batches are dealt to processes in turn, so the global batch is the same for any number of processes.
    Raises ValueError where the global batch does not divide.
    """
    per_round = micro_batch_size * num_processes
    if batch_size % per_round:
        raise ValueError(
            f"batch_size={batch_size} does not divide into micro-batches of {micro_batch_size} on {num_processes} "
            f"processes: choose micro_batch_size so that {per_round} divides the batch"
        )
    for index in range(rank, batch_size // micro_batch_size, num_processes):
        start = step * batch_size + index * micro_batch_size
        yield index, range(start, start + micro_batch_size)


def shuffled(rows: range, *, num_rows: int, seed: int, purpose: str) -> Tensor:
    """Indices below `num_rows` for these rows of an infinite stream: each epoch is its own permutation."""
    epochs = range(rows.start // num_rows, -(-rows.stop // num_rows))
    orders = [torch.randperm(num_rows, generator=generator(seed, purpose, epoch)) for epoch in epochs]
    start = rows.start - epochs.start * num_rows
    return torch.cat(orders)[start : start + len(rows)]

"""Which rows a step trains on, and which noise it uses: pure functions of (seed, step).

The number of processes changes neither. Nothing here has a position to save: a run that resumes at step 70 asks for the
rows of step 70.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator

import torch
from torch import Tensor


def derive_seed(seed: int, *purpose: str | int) -> int:
    """One seed split by purpose: 63 bits that differ for any two purposes."""
    text = ":".join(str(part) for part in (seed, *purpose))
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "big") >> 1


def generator(seed: int, *purpose: str | int, device: torch.device | str = "cpu") -> torch.Generator:
    """A generator seeded by `derive_seed`."""
    return torch.Generator(device=device).manual_seed(derive_seed(seed, *purpose))


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

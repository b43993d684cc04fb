"""Which source a row comes from: drawn by weight for every row, a pure function of (seed, row). No torch."""

from __future__ import annotations

import math
from collections import Counter
from functools import lru_cache
from typing import Self

import numpy as np
import numpy.typing as npt
from pydantic import model_validator

from retrace.core.config import Frozen

ROWS_AT_ONCE = 4096


class Mixture(Frozen):
    """Probability of each source, for a row (Section 1.1: captioned 0.45, interleaved 0.45, text 0.10)."""

    weights: dict[str, float]

    @model_validator(mode="after")
    def _sums_to_one(self) -> Self:
        negative = {name: weight for name, weight in self.weights.items() if weight < 0}
        total = math.fsum(self.weights.values())
        if negative or not math.isclose(total, 1.0, abs_tol=1e-6):
            given = ", ".join(f"{name}={weight:g}" for name, weight in self.weights.items())
            raise ValueError(
                f"weights {given}: expected probabilities that sum to 1, and these sum to {total:g}"
                + (f", with {' and '.join(negative)} below 0" if negative else "")
                + ": change one of them"
            )
        return self

    @property
    def used(self) -> list[str]:
        """Sources with a weight above 0."""
        return [name for name, weight in self.weights.items() if weight > 0]


class Draws:
    """The source of every row, and how many rows of that source came before: rows are numbered within their source."""

    def __init__(self, mixture: Mixture, *, seed: int) -> None:
        self.used, self.seed = mixture.used, seed
        self._edges = np.cumsum([mixture.weights[name] for name in self.used])[:-1]
        self._before = [np.zeros(len(self.used), np.int64)]  # rows of each source before a block of rows
        self._block = lru_cache(maxsize=2)(self._draw)

    def place(self, row: int) -> tuple[str, int]:
        """Name of a row's source, and the row's number among those of the source."""
        block, offset = divmod(row, ROWS_AT_ONCE)
        source = int(self._block(block)[offset])
        return self.used[source], int(self._counts(row)[source])

    def counts(self, num_rows: int) -> Counter[str]:
        """Rows of each source among the first `num_rows`."""
        return Counter(dict(zip(self.used, self._counts(num_rows).tolist(), strict=True)))

    def _counts(self, num_rows: int) -> npt.NDArray[np.int64]:
        block, offset = divmod(num_rows, ROWS_AT_ONCE)
        while len(self._before) <= block:
            whole = self._draw(len(self._before) - 1)
            self._before.append(self._before[-1] + np.bincount(whole, minlength=len(self.used)))
        return self._before[block] + np.bincount(self._block(block)[:offset], minlength=len(self.used))

    def _draw(self, block: int) -> npt.NDArray[np.int64]:
        """Index of the source of each of these rows."""
        rng = np.random.default_rng(np.random.SeedSequence(self.seed, spawn_key=(block,)))
        return np.searchsorted(self._edges, rng.random(ROWS_AT_ONCE), side="right")

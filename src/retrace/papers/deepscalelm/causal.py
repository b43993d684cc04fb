"""What causal attention passes on, layer by layer, position by position: DSLM's gains for decoders. No torch.

Position i averages i keys, so early positions get the variance of single values and late ones only what they all share,
and two late ones share nearly all. One correlation for all pairs (Section 3.6, tag S) misses that: in a stack of 12
layers with k = 2 and no dropout, branches come out between 0.74 and 1.36 where they should be 1. Here pairs have a
correlation each, at G groups of neighbouring positions, finer at the start.

Arrays: [G] of a group's positions, [G, G] of two different positions.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from retrace.papers.deepscalelm.correlations import Array
from retrace.papers.deepscalelm.gains import Gain

GROUPS = 64  # at most: 32 single positions, then wider and wider


@dataclass(frozen=True)
class Attended:
    """Mean-one outputs: their variance [G], their covariance [G, G], and the variance before, `passed`."""

    var: Array
    cov: Array
    passed: float


class Positions:
    """Groups of the positions of a sequence, and how each averages those before it."""

    def __init__(self, seq_len: int) -> None:
        single = np.arange(min(seq_len, GROUPS // 2) + 1, dtype=np.float64)
        wide = np.geomspace(single[-1], seq_len, GROUPS // 2 + 1)[1:]
        edges = np.unique(np.round(np.concatenate((single, wide))))
        self.weight = np.diff(edges) / seq_len  # share of the positions
        keys = np.tril(np.broadcast_to(np.diff(edges), (len(edges) - 1,) * 2), -1) + np.diag((np.diff(edges) + 1) / 2)
        self.count = keys.sum(1)  # keys that a group's middle position sees
        self.average = keys / self.count[:, None]

    def attend(self, corr: Array, *, score_var: float, attention_dropout: float) -> Attended:
        """Of inputs of variance one and correlation `corr`; the weights' spread as in Sections 1.7 and 1.9."""
        shared = self.average @ corr @ self.average.T
        own = np.diag(shared)
        spread = np.exp((1 - own) * score_var)
        squares = spread / (self.count - 1 + spread) / (1 - attention_dropout)  # of the weights; of one key, 1
        var = own + (1 - own) * squares
        index = np.arange(len(own))
        first = np.minimum(index[:, None], index)
        joint = np.exp(own * (1 - own) * score_var)[first] * (1 - own)[first]
        cov = shared + joint / np.maximum(self.count[:, None], self.count)
        passed = float(self.weight @ var)
        return Attended(var / passed, cov / passed, passed)

    def mean_corr(self, var: Array, cov: Array) -> float:
        return float(self.weight @ cov @ self.weight) / float(self.weight @ var)


def causal_gains(
    num_layers: int,
    *,
    gain: Gain,
    beta_sq: float,
    corr0: float,
    dropout: float,
    attention_dropout: float,
    seq_len: int,
    score_var: float,
    parallel: bool = False,
    cross: bool = False,
) -> tuple[Array, float]:
    """The variance that each layer's attention passes on, [num_layers], and the mean correlation behind the stack.

    Each branch is made to have mean variance one by dividing by just that. `parallel`: both branches of a layer read
    the same point; `cross`: a branch that is the same at all positions but for dropout stands between the two.
    """
    positions, kept = Positions(seq_len), 1 - dropout
    size = len(positions.weight)
    var, cov = np.ones(size), np.full((size, size), corr0 * kept)
    found = np.empty(num_layers)
    skip = 1 - beta_sq * (2 if parallel else 1)
    for layer in range(num_layers):
        corr = _corr(var, cov)
        attended = positions.attend(corr, score_var=score_var, attention_dropout=attention_dropout)
        found[layer] = attended.passed
        var, cov = skip * var + beta_sq * attended.var, skip * cov + beta_sq * kept * attended.cov
        if parallel:
            var, cov = var + beta_sq, cov + beta_sq * kept * gain.kernel(corr)
            continue
        if cross:
            var, cov = skip * var + beta_sq, skip * cov + beta_sq * kept
        var, cov = skip * var + beta_sq, skip * cov + beta_sq * kept * gain.kernel(_corr(var, cov))
    return found, positions.mean_corr(var, cov)


def _corr(var: Array, cov: Array) -> Array:
    """At most 1, which rounding can pass."""
    return np.minimum(cov / np.sqrt(var[:, None] * var), 1.0)

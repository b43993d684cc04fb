"""How softmax spreads attention over keys: the averages that the moments of attention need. No torch.

A query with i keys has weights w = softmax(s), s normal, of variance `spread` = (1-r) S around the part all keys share
(Sections 1.5 and 1.6). The Jacobian of softmax is P = diag(w) - w w^T. Two ways to the averages:

- `lognormal`: the spec's closed forms for equally long contexts, e^spread / L; good up to spread = 1.
- `exact`: integrals over the Laplace transform of a sum, E[f(w)] from 1/Z^k = int t^(k-1) e^(-tZ) dt / (k-1)!, for
  contexts of any length and any spread; derived here, tag B. What two queries share is good to 10 % up to a score
  variance of 4 and too large beyond; in causal attention it is first order in their scores' covariance.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import lru_cache

import numpy as np

from retrace.papers.deepscalelm.correlations import Array, Value

MAX_SPREAD = 64.0  # beyond it softmax picks one key, and more changes little
DEGREE = 18  # of the polynomial in log(1 + spread) that stands for the integrals: error below 1e-4
CONTEXTS = 48  # lengths of contexts, evenly on a logarithmic scale, at which causal averages are integrated


@dataclass(frozen=True)
class WeightStatistics:
    """Means over queries i (`shared`: over keys; `pair`: over pairs of queries) of averages over scores."""

    square: Array  # sum_j w_ij^2, the chance that two draws from the weights meet
    jacobian: Array  # tr P^2
    trace: Array  # (tr P)^2
    pair: Array  # sum_j w_ij w_kj of two queries i, k
    shared: Array  # sum over pairs i, k of w_ij w_kj at a key j
    shared_jacobian: Array  # the same of (P_i P_k)_jj


def lognormal(spread: Value, cross: Value, *, num_keys: int, num_queries: int | None = None) -> WeightStatistics:
    """Closed forms of Sections 1.7, 1.8 and, with `num_queries`, 1.10: every query sees all keys.

    `cross` is r (1-r) S, the covariance of two queries' scores of one key, around what keys share.
    """
    e, c = np.exp(spread), np.exp(cross)
    shared = c if num_queries is None else c * num_queries / num_keys * (num_queries - 1) / num_keys
    return WeightStatistics(e / num_keys, e / num_keys, np.ones_like(e), c / num_keys, shared, shared)


def exact(
    spread: Value, cross: Value, *, num_keys: int, num_queries: int | None = None, causal: bool = False
) -> WeightStatistics:
    """Integrals: `num_queries` (default: as many) see all keys; if `causal`, query i sees keys 1..i.

    A spread beyond MAX_SPREAD counts as MAX_SPREAD.
    """
    assert not causal or num_queries in (None, num_keys)
    s = np.clip(spread, 0.0, MAX_SPREAD)
    square, jacobian, trace = (np.exp(_at(fit, s)) for fit in _fits(num_keys, causal))
    if not causal:
        # what two queries share is the average over what they do not: weights of a smaller spread, `cross`
        pair, joint, _ = (np.exp(_at(fit, np.clip(cross, 0.0, MAX_SPREAD))) for fit in _fits(num_keys, causal))
        queries = num_queries or num_keys
        pairs = queries * (queries - 1) / num_keys
        return WeightStatistics(square, jacobian, trace, pair, pair * pairs, joint * pairs)
    # E[w_ij w_kj] summed over j is e^(cross (1 - 1/i)) / k for i < k, to first order in the scores' covariance.
    i = np.arange(1, num_keys + 1)
    later = np.append(np.cumsum((1 / i)[::-1])[::-1][1:], 0.0)  # sum over k > i of 1/k
    grown = np.exp(np.multiply.outer(np.asarray(cross, dtype=np.float64), 1 - 1 / i))
    shared = 2 / num_keys * grown @ later
    centred = 2 / num_keys * grown @ (later * (1 - 1 / i))
    return WeightStatistics(square, jacobian, trace, shared / (num_keys - 1), shared, centred)


def _at(coefficients: Array, spread: Array) -> Array:
    x = 2 * np.log1p(spread) / math.log1p(MAX_SPREAD) - 1
    return np.asarray(np.polynomial.chebyshev.chebval(x, coefficients))


@lru_cache(maxsize=64)
def _fits(num_keys: int, causal: bool) -> tuple[Array, Array, Array]:
    """Polynomials for the logarithms of `square`, `jacobian` and `trace`."""
    nodes = np.polynomial.chebyshev.chebpts1(DEGREE + 1)
    spreads = np.expm1((nodes + 1) / 2 * math.log1p(MAX_SPREAD))
    values = np.log([_integrate(float(s), num_keys, causal) for s in spreads])
    first, second, third = np.polynomial.chebyshev.chebfit(nodes, values, DEGREE).T
    return first, second, third


def _integrate(spread: float, seq_len: int, causal: bool) -> tuple[float, float, float]:
    """Means over queries of sum w^2, tr P^2 and (tr P)^2 for scores of variance `spread`."""
    lengths = np.unique(np.geomspace(1, seq_len, CONTEXTS).round()) if causal else np.array([float(seq_len)])
    square, cube, square_sq = _powers(spread, lengths)
    jacobian, trace = square - 2 * cube + square_sq, 1 - 2 * square + square_sq
    if not causal:
        return float(square[0]), float(jacobian[0]), float(trace[0])
    i = np.arange(1, seq_len + 1)

    def mean(values: Array) -> float:  # values * i vary slowly in log i
        return float((np.interp(np.log(i), np.log(lengths), values * lengths) / i).mean())

    return mean(square), mean(jacobian), 1 - 2 * mean(square) + mean(square_sq)


def _powers(spread: float, lengths: Array) -> tuple[Array, Array, Array]:
    """E sum w^2, E sum w^3 and E (sum w^2)^2 for each number of keys; shape [len(lengths)]."""
    deviation = math.sqrt(spread)
    z = np.linspace(-7, 7, 60 + int(50 * deviation))
    weight = np.exp(-(z**2) / 2)
    weight /= weight.sum()
    ends = 7 * deviation + 6, 7 * deviation + 8 + math.log(lengths[-1])
    log_t = np.linspace(-ends[1], ends[0], int(4 * sum(ends)))
    step = log_t[1] - log_t[0]
    log_te = log_t[:, None] + deviation * z
    te = np.exp(log_te)
    p0, p2, p3, p4 = (np.exp(k * log_te - te) @ weight for k in (0, 2, 3, 4))  # t^k E[e^(kx) e^(-t e^x)]
    i = lengths[:, None]
    others = p0 ** (i - 1)
    square = (i * others * p2).sum(1) * step
    cube = (i * others * p3 / 2).sum(1) * step
    pairs = i * (i - 1) * p0 ** np.maximum(i - 2, 0) * p2**2
    square_sq = ((i * others * p4 + pairs) / 6).sum(1) * step
    return square, cube, square_sq

"""Statistics over seeds: functions of values alone, on scipy.special, which is imported where it is needed.

Missing is missing: nothing here fills a gap, one value has no interval, and equal values have no spread to estimate.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from importlib.metadata import version

from retrace.core.memo import remember

CONFIDENCE = 0.95  # of every interval in the reports, two-sided
POWER = 0.80  # at which a detectable effect is stated
_ROUNDING = 1e-12  # a range below this share of the largest value is floating-point rounding, not spread


@dataclass(frozen=True)
class Estimate:
    """Mean of `n` samples. `sd` and the 95 % t interval `low`..`high` are None for one sample.

    Where all samples are equal, `sd` is 0 and the interval is a point. That is absence of spread, not precision: three
    equal outcomes say little about a fourth. Callers must tell the two apart, see `has_spread`.
    """

    mean: float
    n: int
    sd: float | None
    low: float | None
    high: float | None

    @property
    def has_spread(self) -> bool:
        """Whether there is variance from which an interval could be estimated."""
        return self.sd is not None and self.sd > 0

    @property
    def side(self) -> int:
        """+1 or -1 where the whole interval lies above or below zero, else 0."""
        if self.low is None or self.high is None:
            return 0
        return int(self.low > 0) - int(self.high < 0)

    def contains(self, value: float) -> bool:
        """Whether the interval holds `value`; False without an interval."""
        return self.low is not None and self.high is not None and self.low <= value <= self.high


def estimate(values: Iterable[float]) -> Estimate | None:
    """Mean with Student's t interval; None without values. Raises ValueError for a value that is not finite."""
    samples = list(values)
    if not all(map(math.isfinite, samples)):
        raise ValueError(f"samples={samples}: statistics need finite numbers; leave a missing value out")
    if not samples:
        return None
    n, mean = len(samples), math.fsum(samples) / len(samples)
    if n == 1:
        return Estimate(mean, 1, None, None, None)
    if max(samples) - min(samples) <= _ROUNDING * max(map(abs, samples)):
        return Estimate(mean, n, 0.0, mean, mean)
    sd = math.dist(samples, [mean] * n) / math.sqrt(n - 1)
    half = t_quantile(n - 1) * sd / math.sqrt(n)
    return Estimate(mean, n, sd, mean - half, mean + half)


def t_quantile(degrees: int) -> float:
    """The value that |t| with so many degrees of freedom stays under with probability `CONFIDENCE`."""
    return _special("stdtrit", degrees, (1 + CONFIDENCE) / 2)


@cache
def _special(name: str, *arguments: float) -> float:
    """A function of scipy.special, which takes half a second to import; a report needs a few values, kept on disk."""

    def make() -> str:
        import scipy.special

        return json.dumps(float(getattr(scipy.special, name)(*arguments)))

    text = remember(_scipy(), json.dumps([name, *arguments]), make)
    assert text is not None
    return float(json.loads(text))


@cache
def _scipy() -> str:
    return hashlib.sha256(f"scipy.special {version('scipy')}".encode()).hexdigest()


def paired_differences(a: Mapping[int, float], b: Mapping[int, float]) -> dict[int, float]:
    """a - b for every seed that both have, by seed. Arms with one seed share base model and data order, hence pairs."""
    return {seed: a[seed] - b[seed] for seed in sorted(a.keys() & b.keys())}


def trend_slopes(arms: Sequence[Mapping[int, float]]) -> dict[int, float]:
    """Least-squares slope over the rank of the arm (0, 1, 2, ...), for every seed that all arms have.

    The linear-trend contrast: the mean change from one arm to the next, all arms counted. Raises ValueError for fewer
    than two arms.
    """
    if len(arms) < 2:
        raise ValueError(f"trend over {len(arms)} arm(s): a slope needs two or more")
    centred = [rank - (len(arms) - 1) / 2 for rank in range(len(arms))]
    norm = math.fsum(weight**2 for weight in centred)
    seeds = sorted(set.intersection(*(set(arm) for arm in arms)))
    return {s: math.fsum(w * arm[s] for w, arm in zip(centred, arms, strict=True)) / norm for s in seeds}


def detectable_effect(*, sd: float, n: int) -> float | None:
    """Smallest true mean difference that `n` pairs with standard deviation `sd` would have called in its direction.

    With probability `POWER`, by the two-sided t test at `CONFIDENCE` (noncentral t). None where it can't be known, with
    fewer than two pairs or without spread.
    """
    if n < 2 or sd <= 0:
        return None
    return _special("nctdtrinc", n - 1, 1 - POWER, t_quantile(n - 1)) * sd / math.sqrt(n)


def seeds_needed(*, mean: float, sd: float, low: float, high: float) -> int | None:
    """Fewest pairs whose 95 % t interval lies wholly between `low` and `high` with probability `POWER` or more.

    `mean`, `sd`: the true difference and its standard deviation over seeds; `low` or `high` may be infinite. None where
    `mean` does not lie between them, so that more pairs do not help, or where a million do not suffice.
    """
    if sd <= 0 or not low < mean < high:
        return None
    from scipy.special import nctdtr, stdtrit

    def chance(n: int) -> float:
        distances = ((mean - low) * math.sqrt(n) / sd, (high - mean) * math.sqrt(n) / sd)
        t = stdtrit(n - 1, (1 + CONFIDENCE) / 2)
        return 1 - sum(float(nctdtr(n - 1, d, t)) for d in distances if math.isfinite(d))

    few, many = 2, 3  # fewer pairs call nothing
    while chance(many) < POWER:
        few, many = many, 2 * many
        if many > 1_000_000:
            return None
    while many - few > 1:
        middle = (few + many) // 2
        few, many = (few, middle) if chance(middle) >= POWER else (middle, many)
    return many


def spread_range(*, sd: float, n: int) -> tuple[float, float]:
    """The 80 % interval of a standard deviation that was estimated from `n` normal samples, two or more."""
    from scipy.special import chdtri

    return tuple(sd * math.sqrt((n - 1) / float(chdtri(n - 1, p))) for p in (0.1, 0.9))  # type: ignore[return-value]


def sign_test(n: int) -> float:
    """Two-sided p of `n` samples that all have the same sign, where each sign is a fair coin."""
    return min(1.0, 2.0 ** (1 - n))

"""What became of a claim: `judge(claim, samples) -> Verdict`, pure.

    reproduced                direction as claimed, interval clear of zero, and the printed value, if any, inside it
    direction only            direction as claimed; the printed value is outside, or can't be judged at this scale
    contradicted              interval clear of zero, on the other side
    inconclusive              interval holds zero, or fewer than three pairs of seeds
    not tested at this scale  the claim does not name this scale
    no records                an arm has no run on record

That something makes no difference is claimed with `expect: {direction: none, margin: m}` and is an equivalence test: it
is reproduced where the whole interval lies within -m..m, contradicted where it lies outside, else inconclusive. With
`unit: share`, m is a share of the second arm's mean.

Where every seed gives the same difference there is no spread to take an interval from (a run diverges or it does not).
Then the direction stands if at least three seeds agree, and the sign test's p is stated beside it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal, get_args

from retrace.core.claims import Claim
from retrace.core.record import Record
from retrace.core.samples import DIVERGED, Sample, Samples
from retrace.core.stats import Estimate, detectable_effect, estimate, paired_differences, sign_test, trend_slopes

MIN_PAIRS = 3
VALUE_SCALES = ("paper",)  # smaller scales can show a direction; a printed number needs the printed model and data

Outcome = Literal[
    "reproduced", "direction only", "contradicted", "inconclusive", "not tested at this scale", "no records"
]
OUTCOMES: tuple[Outcome, ...] = get_args(Outcome)
JUDGED: tuple[Outcome, ...] = OUTCOMES[:4]  # those that say something of the claim


@dataclass(frozen=True)
class ArmSamples:
    """What one arm of a claim came to. `missing` says of seeds without a value why: diverged, failed or not run."""

    arm: str
    metric: str
    samples: Mapping[int, Sample]
    missing: Mapping[int, str]

    @property
    def values(self) -> dict[int, float]:
        return {seed: sample.value for seed, sample in self.samples.items()}

    @property
    def estimate(self) -> Estimate | None:
        return estimate(self.values.values())


@dataclass(frozen=True)
class Verdict:
    """What became of a claim at one scale, with everything that it was computed from.

    `differences`: a - b (less c - d), or the slope, by seed. `detectable`: smallest true difference that this design
    would have called with 80 % power, in units of the metric; None where the spread is not known.
    """

    claim: Claim
    scale: str
    outcome: Outcome
    reason: str  # one sentence
    arms: tuple[ArmSamples, ...]
    differences: Mapping[int, float]
    estimate: Estimate | None
    detectable: float | None

    @property
    def margin(self) -> float | None:
        """See `margin_of`."""
        return margin_of(self.claim, self.arms)

    @property
    def seeds(self) -> tuple[int, ...]:
        return tuple(self.differences)

    @property
    def records(self) -> tuple[Record, ...]:
        """The records that the verdict was computed from: those of the paired seeds."""
        used = (arm.samples[seed].record for arm in self.arms for seed in self.differences)
        return tuple({record.id: record for record in used}.values())

    @property
    def hardware(self) -> tuple[str, ...]:
        return tuple(sorted({str(record.provenance.get("hardware", "unknown")) for record in self.records}))

    @property
    def missing(self) -> tuple[str, ...]:
        """A phrase for the seeds of an arm that could not be paired, and why."""
        groups: dict[tuple[str, str], list[int]] = {}
        for arm in self.arms:
            for seed, why in arm.missing.items():
                groups.setdefault((arm.arm, why), []).append(seed)
        return tuple(
            f"{arm} seed{'s' * (len(seeds) > 1)} {', '.join(map(str, seeds))}: {why}"
            for (arm, why), seeds in groups.items()
        )


def judge(claim: Claim, samples: Samples) -> Verdict:
    """What the samples of one scale say of a claim."""
    arms = tuple(_arm(claim, arm, metric, samples) for arm, metric in claim.cells)
    values = [arm.values for arm in arms]
    differences = paired_differences(*values[:2]) if claim.compare else trend_slopes(values)
    if claim.beyond:
        differences = paired_differences(differences, paired_differences(*values[2:]))
    found = estimate(differences.values())
    outcome, reason = _decide(claim, arms, found, scale=samples.scale)
    sd = found.sd if found and claim.expect.margin is None else None
    detectable = None if found is None or sd is None else detectable_effect(sd=sd, n=found.n)
    return Verdict(claim, samples.scale, outcome, reason, arms, differences, found, detectable)


def _arm(claim: Claim, arm: str, metric: str, samples: Samples) -> ArmSamples:
    found = samples.values(claim.ablation, arm, metric)
    trouble = samples.trouble(claim.ablation, arm)
    seeds = {seed for other, _ in claim.cells for seed in samples.chains.get(claim.ablation, {}).get(other, {})}
    lacking = sorted((seeds | trouble.keys()) - found.keys())
    missing = {seed: trouble.get(seed, f"no {metric} on record") for seed in lacking}
    return ArmSamples(arm, metric, found, missing)


def _decide(claim: Claim, arms: Sequence[ArmSamples], found: Estimate | None, *, scale: str) -> tuple[Outcome, str]:
    if scale not in claim.testable_at:
        return "not tested at this scale", f"this claim can be judged at scale {' or '.join(claim.testable_at)}"
    empty = [arm for arm in arms if not arm.samples]
    for arm in empty:
        if arm.missing and set(arm.missing.values()) == {DIVERGED}:
            return "inconclusive", f"every run of arm {arm.arm} diverged, so there is no {arm.metric} to compare"
    if empty:
        return "no records", f"no {empty[0].metric} on record for arm {' and '.join(arm.arm for arm in empty)}"
    if found is None or found.n < MIN_PAIRS:
        pairs = 0 if found is None else found.n
        have = f"{pairs} seeds have" if pairs != 1 else "1 seed has"
        return "inconclusive", f"only {have} a value in every arm, and a verdict needs {MIN_PAIRS}"
    if claim.expect.margin is not None:
        return _decide_equivalence(found, margin_of(claim, arms))
    if not found.has_spread:
        return _decide_without_spread(claim, found, scale=scale)
    if found.side == 0:
        return "inconclusive", "the interval holds zero"
    if found.side != claim.sign:
        return "contradicted", f"the interval lies wholly {'above' if found.mean > 0 else 'below'} zero"
    return _judge_value(claim, found, scale=scale, why="the interval is clear of zero, on the side that is claimed")


def margin_of(claim: Claim, arms: Sequence[ArmSamples]) -> float | None:
    """Of a claim that something makes no difference, in units of the metric; None where its arm has no run."""
    if claim.expect.margin is None or claim.expect.unit == "metric":
        return claim.expect.margin
    level = arms[1].estimate
    return None if level is None else claim.expect.margin * abs(level.mean)


def _decide_equivalence(found: Estimate, margin: float | None) -> tuple[Outcome, str]:
    """Of three or more pairs. The 95 % interval within the margin is a two-sided test at 2.5 % on each side."""
    assert margin is not None
    assert found.low is not None
    assert found.high is not None
    if max(-found.low, found.high) <= margin:
        return "reproduced", f"the whole interval lies within the margin of {margin:.3g} on either side of zero"
    if found.low > margin or found.high < -margin:
        return "contradicted", f"the whole interval lies outside of the margin of {margin:.3g}"
    return "inconclusive", f"the interval reaches across the margin of {margin:.3g}"


def _decide_without_spread(claim: Claim, found: Estimate, *, scale: str) -> tuple[Outcome, str]:
    p = sign_test(found.n)
    agree = f"all {found.n} seeds give the same difference, so there is no interval; the sign test gives p = {p:.2g}"
    if found.mean == 0:
        return "inconclusive", f"no difference at all in any of {found.n} seeds"
    if claim.sign * found.mean < 0:
        return "contradicted", agree
    return _judge_value(claim, found, scale=scale, why=agree)


def _judge_value(claim: Claim, found: Estimate, *, scale: str, why: str) -> tuple[Outcome, str]:
    if claim.value is None:
        return "reproduced", why
    if scale not in VALUE_SCALES:
        where = " or ".join(VALUE_SCALES)
        return "direction only", f"{why}; the paper's number can't be judged at scale {scale}, only at {where}"
    if found.contains(claim.value):
        return "reproduced", f"{why}, and the paper's number is inside it"
    return "direction only", f"{why}; the paper's number is outside it"

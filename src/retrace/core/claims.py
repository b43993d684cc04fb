"""Claims of a paper and what became of them: the schema of claims.yaml, and `judge(claim, records) -> Verdict`, pure.

A claim compares two arms, `compare: [a, b]` (a against b), or orders several, `trend: [a, b, c]`. Verdicts:

    reproduced                direction as claimed, interval clear of zero, and the printed value, if any, inside it
    direction only            direction as claimed; the printed value is outside, or can't be judged at this scale
    contradicted              interval clear of zero, on the other side
    inconclusive              interval holds zero, or fewer than three pairs of seeds
    not tested at this scale  the claim does not name this scale
    no records                an arm has no run on record

Where every seed gives the same difference there is no spread to take an interval from (a run diverges or it does not).
Then the direction stands if at least three seeds agree, and the sign test's p is stated beside it.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import yaml
from pydantic import Field, model_validator

from retrace.core.config import Frozen, Scale, validate
from retrace.core.record import Record
from retrace.core.samples import DIVERGED, Planned, Sample, Samples
from retrace.core.stats import Estimate, detectable_effect, estimate, paired_differences, sign_test, trend_slopes

MIN_PAIRS = 3
VALUE_SCALES = ("paper",)  # smaller scales can show a direction; a printed number needs the printed model and data

Outcome = Literal[
    "reproduced", "direction only", "contradicted", "inconclusive", "not tested at this scale", "no records"
]
OUTCOMES: tuple[Outcome, ...] = (
    "reproduced",
    "direction only",
    "contradicted",
    "inconclusive",
    "not tested at this scale",
    "no records",
)


class Expect(Frozen):
    """What the paper says of the difference a - b, or of the slope from arm to arm."""

    direction: Literal["up", "down"]
    value: float | None = None  # the difference as the paper prints it; null: the paper prints none
    unit: Literal["metric", "points"] = "metric"  # of `value`; points: hundredths of the metric, as in "+5.0 points"


class Claim(Frozen):
    """One entry of claims.yaml. With two metrics, the first is read in arm a and the second in arm b."""

    id: str = Field(pattern=r"^[a-z][a-z0-9_]*$")
    says: str = Field(min_length=1)  # in our words
    locus: str = Field(min_length=1)
    ablation: str
    metric: str | tuple[str, str]
    compare: tuple[str, str] | None = None
    trend: tuple[str, ...] | None = None
    expect: Expect
    testable_at: tuple[Scale, ...] = Field(min_length=1)
    paper: str | None = None  # values as the paper prints them, and how sure we are of them
    note: str | None = None

    @model_validator(mode="after")
    def _one_question(self) -> Claim:
        if (self.compare is None) == (self.trend is None):
            raise ValueError("give either compare: [arm, against] or trend: [arm, arm, ...], and not both")
        if self.trend is not None:
            if len(self.trend) < 3 or len(set(self.trend)) < len(self.trend):
                raise ValueError(f"trend={list(self.trend)}: expected three or more different arms; two are a compare")
            if self.expect.value is not None or not isinstance(self.metric, str):
                raise ValueError("a trend has one metric and expect.value: null; the paper prints values of arms")
        if self.compare is not None and len(set(self.cells)) == 1:
            raise ValueError(f"compare={list(self.compare)}: an arm against itself; give two arms or two metrics")
        if "smoke" in self.testable_at:
            raise ValueError("testable_at: scale smoke shows that the code runs and judges nothing; remove it")
        return self

    @property
    def cells(self) -> tuple[tuple[str, str], ...]:
        """(arm, metric) of every sample that the claim needs, in its order."""
        arms = self.compare or self.trend or ()
        metrics = (self.metric,) * len(arms) if isinstance(self.metric, str) else self.metric
        return tuple(zip(arms, metrics, strict=True))

    @property
    def sign(self) -> int:
        """+1 where the claim expects a positive difference, else -1."""
        return 1 if self.expect.direction == "up" else -1

    @property
    def value(self) -> float | None:
        """The printed difference in units of the metric."""
        value = self.expect.value
        return value / 100 if value is not None and self.expect.unit == "points" else value


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

    `differences`: a - b, or the slope, by seed. `detectable`: smallest true difference that this design would have
    called with 80 % power, in units of the metric; None where the spread is not known.
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


def load_claims(path: Path, *, arms: Mapping[str, Collection[str]] | None = None) -> tuple[Claim, ...]:
    """The claims of a claims.yaml, in its order; `arms` (ablation -> its arms) lets names be checked.

    Raises ValueError of one sentence for a wrong key, value, a second claim of one id, an unknown ablation or arm.
    """
    try:
        entries: Any = yaml.safe_load(path.read_text())
    except yaml.YAMLError as error:
        raise ValueError(f"{path}: not readable as YAML: {' '.join(str(error).split())}") from None
    if not isinstance(entries, list) or not all(isinstance(entry, dict) for entry in entries):
        raise ValueError(f"{path}: expected a list of claims, each beginning with '- id: ...'")
    claims: dict[str, Claim] = {}
    for number, entry in enumerate(entries, start=1):
        source = f"{path.name}: claim {entry.get('id', f'number {number}')}"
        claim = validate(Claim, entry, source=source)
        if claim.id in claims:
            raise ValueError(f"{source}: a second claim of this id; every claim needs its own")
        if arms is not None:
            _check_names(claim, arms, source)
        claims[claim.id] = claim
    return tuple(claims.values())


def _check_names(claim: Claim, arms: Mapping[str, Collection[str]], source: str) -> None:
    if claim.ablation not in arms:
        raise ValueError(f"{source}: ablation={claim.ablation!r}: no such ablation; there are: {', '.join(arms)}")
    for arm, _ in claim.cells:
        if arm not in arms[claim.ablation]:
            known = ", ".join(arms[claim.ablation])
            raise ValueError(f"{source}: arm {arm!r} is not in ablation {claim.ablation}; its arms are: {known}")


def judge_all(
    claims: Sequence[Claim], records: Iterable[Record], *, scale: str, planned: Sequence[Planned] = ()
) -> tuple[Verdict, ...]:
    """A verdict for every claim, from the records of one scale, which are indexed once."""
    samples = Samples(records, scale=scale, planned=planned)
    return tuple(judge(claim, samples) for claim in claims)


def judge(claim: Claim, samples: Samples) -> Verdict:
    """What the samples of one scale say of a claim."""
    arms = tuple(_arm(claim, arm, metric, samples) for arm, metric in claim.cells)
    values = [arm.values for arm in arms]
    differences = paired_differences(*values) if claim.compare else trend_slopes(values)
    found = estimate(differences.values())
    outcome, reason = _decide(claim, arms, found, scale=samples.scale)
    sd = found.sd if found else None
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
    if not found.has_spread:
        return _decide_without_spread(claim, found, scale=scale)
    if found.side == 0:
        return "inconclusive", "the interval holds zero"
    if found.side != claim.sign:
        return "contradicted", f"the interval lies wholly {'above' if found.mean > 0 else 'below'} zero"
    return _judge_value(claim, found, scale=scale, why="the interval is clear of zero, on the side that is claimed")


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

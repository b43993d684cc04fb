"""How many seeds would make each claim decidable: the power plan of a scale, from the spread seen there or below it.

A claim is decided by a two-sided 95 % t interval of paired differences that lies on the claimed side of zero, or within
the margin of a claim of no difference. The plan takes the difference and the spread that were seen for the true ones,
and asks with how many seeds the interval would lie there with a probability of 80 %, or, where the difference speaks
against the claim, wholly on the other side. A claim that no smaller scale asks takes them from one on the same arms and
kind of metric, such as accuracy on another test, which is said.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

from rich.console import Console
from rich.table import Table
from rich.text import Text

from retrace.core.claims import Claim
from retrace.core.config import SCALES
from retrace.core.cost import Expected
from retrace.core.plan import RunSpec
from retrace.core.planview import cost_of, expected_times, records_of
from retrace.core.record import Label
from retrace.core.reportview import show as texts_of
from retrace.core.results import load_results
from retrace.core.stats import POWER, seeds_needed, spread_range
from retrace.core.store import Store
from retrace.core.units import say
from retrace.core.verdicts import MIN_PAIRS, Verdict, margin_of


@dataclass(frozen=True)
class Power:
    """What deciding one claim would take. `seen`: its verdict at the scale that the spread is taken from.

    `needed`: seeds that bring it back, or, where the mean speaks `against` it, contradict it; `fewest`..`most` for the
    ends of the spread's 80 % interval. None where a million is not enough, or the mean takes no side. `planned`: the
    seeds of the plan. `hours`: of all processors, for one seed, with all that its runs build on.
    """

    claim: Claim
    seen: Verdict
    against: bool
    needed: int | None
    fewest: int | None
    most: int | None
    planned: int
    hours: float | None
    at_least: bool  # `hours` leave out runs of unknown time


@dataclass(frozen=True)
class PowerPlan:
    """`unknown`: claims of the plan of which no spread is on record at its scale or a smaller one."""

    known: tuple[Power, ...]
    unknown: tuple[Claim, ...]


def print_power(specs: Sequence[RunSpec], *, store: Store, console: Console) -> None:
    """How many seeds would decide the claims on the planned runs, from the records of their scale and smaller ones."""
    times = expected_times(specs, {spec.id: cost_of(spec) for spec in specs}, records_of(specs, store=store))
    for slug, scale in dict.fromkeys((spec.paper, spec.scale) for spec in specs):
        own = [spec for spec in specs if (spec.paper, spec.scale) == (slug, scale)]
        results = load_results(slug, store=store)
        found = plan_power(results.claims, results.judged, own, times, scale=scale)
        show(slug, found, scale, unit=f"{own[0].hardware.unit}-hours", console=console)


def plan_power(
    claims: Sequence[Claim],
    verdicts: Mapping[str, Sequence[Verdict]],
    specs: Sequence[RunSpec],
    times: Mapping[str, Expected | None],
    *,
    scale: str,
) -> PowerPlan:
    """The claims that `scale` can judge and that planned runs are for. `verdicts`: by scale. `times`: of the runs."""
    smaller = list(reversed(SCALES[: SCALES.index(scale) + 1]))
    known: list[Power] = []
    unknown: list[Claim] = []
    labels = [(spec, Label.parse(text)) for spec in specs for text in spec.labels]
    for claim in claims:
        arms = {f"{claim.ablation}/{arm}" for arm, _ in claim.cells}
        asked = [(spec, label) for spec, label in labels if label.ablation_arm in arms]
        runs = list({spec.id: spec for spec, _ in asked}.values())
        if scale not in claim.testable_at or not runs:
            continue
        seen = _seen(claim, [v for name in smaller for v in verdicts.get(name, ())])
        if seen is None:
            unknown.append(claim)
        else:
            planned = len({label.seed for _, label in asked})
            hours, partial = _hours_of_a_seed(runs, times, planned), any(times[run.id] is None for run in runs)
            known.append(Power(claim, seen, *_seeds(claim, seen), planned=planned, hours=hours, at_least=partial))
    return PowerPlan(tuple(known), tuple(unknown))


def _seen(claim: Claim, verdicts: Sequence[Verdict]) -> Verdict | None:
    """The verdict that tells the spread: the claim's own, at the first scale that has it, or the widest of its like."""
    known = [v for v in verdicts if v.estimate is not None and v.estimate.sd is not None]
    own = [v for v in known if v.claim.id == claim.id]
    like = [v for v in known if _kind(v.claim) == _kind(claim)]
    return (
        own[0] if own else max(like, key=lambda v: v.estimate.sd if v.estimate and v.estimate.sd else 0, default=None)
    )


def _kind(claim: Claim) -> object:
    """What claims share that differ in the test alone: the ablation, and each arm with the last part of its metric."""
    return claim.ablation, claim.sign, [(arm, metric.rpartition("/")[2]) for arm, metric in claim.cells]


def _hours_of_a_seed(runs: Sequence[RunSpec], times: Mapping[str, Expected | None], seeds: int) -> float | None:
    known = [time.seconds * run.hardware.processes for run in runs if (time := times[run.id]) is not None]
    return sum(known) / 3600 / seeds if known else None


def _seeds(claim: Claim, seen: Verdict) -> tuple[bool, int | None, int | None, int | None]:
    """`against`, `needed`, `fewest` and `most` of `Power`."""
    found = seen.estimate
    assert found is not None
    assert found.sd is not None
    low, high = _side(claim, seen)
    against = not low < found.mean < high
    if against:
        low, high = (high, math.inf) if found.mean >= high else (-math.inf, low)
    if not found.has_spread:
        enough = MIN_PAIRS if low < found.mean < high else None
        return against, enough, enough, enough
    narrow, wide = spread_range(sd=found.sd, n=found.n)
    few, needed, many = (seeds_needed(mean=found.mean, sd=sd, low=low, high=high) for sd in (narrow, found.sd, wide))
    return against, needed, few, many


def _side(claim: Claim, seen: Verdict) -> tuple[float, float]:
    """Between what the interval has to lie."""
    margin = margin_of(claim, seen.arms)
    if margin is not None:
        return -margin, margin
    return (0.0, math.inf) if claim.sign > 0 else (-math.inf, 0.0)


def show(slug: str, plan: PowerPlan, scale: str, *, unit: str, console: Console) -> None:
    """A line for each claim, and what the numbers rest on. `unit`: of hours."""
    if not plan.known and not plan.unknown:
        console.print(f"{slug}: the planned runs are for no claim that scale {scale} can judge", highlight=False)
        return
    if plan.known:
        table = Table(box=None, header_style="bold", pad_edge=False)
        for name in ("claim", "difference seen", "where", "verdict there"):
            table.add_column(name, no_wrap=True)
        for name in ("seeds planned", "seeds to decide", f"{unit} a seed"):
            table.add_column(name, justify="right", no_wrap=True)
        for power in plan.known:
            table.add_row(*map(Text, _cells(power)))
        console.print(table)
    for text in _told(plan, scale):
        say(console, text)


def _cells(power: Power) -> tuple[str, ...]:
    seen, shown = power.seen, texts_of(power.seen.estimate, sign=True)
    where = f"{seen.scale}, n={len(seen.seeds)}" + ("" if seen.claim.id == power.claim.id else f", {seen.claim.id}")
    hours = "-" if power.hours is None else f"{'at least ' * power.at_least}{power.hours:,.3g}"
    difference = f"{shown.mean} {shown.interval}"
    return power.claim.id, difference, where, seen.outcome, str(power.planned), _needed(power), hours


def _needed(power: Power) -> str:
    if power.needed is None:
        return "over a million" if power.seen.estimate and power.seen.estimate.has_spread else "none: no seed differs"
    against, most = "against: " * power.against, "millions" if power.most is None else f"{power.most:,}"
    return f"{against}{power.needed:,}" + ("" if power.fewest == power.most else f" ({power.fewest:,} to {most})")


def _told(plan: PowerPlan, scale: str) -> Iterator[str]:
    if plan.known:
        sources = " and ".join(dict.fromkeys(power.seen.scale for power in plan.known))
        yield (
            f"how: with so many seeds the 95 % interval lies where the claim wants it, with {100 * POWER:.0f} % "
            "probability; in brackets for the ends of the 80 % interval of the spread"
        )
        yield f"assumed: at scale {scale} the true difference and its spread over seeds are those seen at {sources}"
    if any(power.against for power in plan.known):
        yield "against: what was seen speaks against the claim, and with so many seeds would contradict it"
    if any(power.seen.claim.id != power.claim.id for power in plan.known):
        yield "where a second claim is named, the numbers are its: the same arms and kind of metric, on another test"
    if plan.unknown:
        names = ", ".join(claim.id for claim in plan.unknown)
        yield f"spread not known, as nothing like it is on record with two seeds at scale {scale} or below: {names}"

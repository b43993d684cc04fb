"""Every sample of an ablation as a figure: a dot for every seed, the mean with its 95 % interval, the baseline marked.

A few arms stand side by side, and thin lines join the runs of one seed. Many arms, or arms with long names, stand one
below the other, so that every name can be read.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import pairwise

from retrace.core.figures import BOTTOM, HEIGHT, LEFT, MANY_SEEDS, RIGHT, TOP, WIDTH, Scale, frame, heading, value_range
from retrace.core.stats import Estimate, estimate
from retrace.core.svg import Figure, decimals, dot, figure, line, number, points, polyline, shorten, text

LETTER = 6.6  # width of a letter of an arm's name, at most
SPREAD = 5.0  # between the dots of two seeds
ROW = 28.0  # height of an arm that has a row of its own
DECADES = 30.0  # largest over smallest value from which on an axis is logarithmic, where the largest is as large


@dataclass(frozen=True)
class ArmValues:
    """One arm of a sample figure: values by seed, and the seeds that diverged."""

    arm: str
    values: Mapping[int, float]
    diverged: tuple[int, ...] = ()

    @cached_property
    def estimate(self) -> Estimate | None:
        return estimate(self.values.values())


def sample_figure(name: str, title: str, arms: Sequence[ArmValues], *, baseline: str) -> Figure:
    """All samples of one metric. `title`: the metric in words, with its unit."""
    column = (WIDTH - LEFT - RIGHT) / max(1, len(arms))
    beside = all(len(arm.arm) * LETTER <= column for arm in arms)
    drawn = _columns(title, arms, column, baseline) if beside else _rows(title, arms, baseline)
    height = HEIGHT if beside else TOP + ROW * len(arms) + BOTTOM
    alt = "; ".join(f"{arm.arm}: {_spoken(arm)}" for arm in arms)
    return figure(name, f"{title}, by arm, a dot for every seed. {alt}.", width=WIDTH, height=height, parts=drawn)


def _spoken(arm: ArmValues) -> str:
    found = arm.estimate
    lost = f", {len(arm.diverged)} diverged" if arm.diverged else ""
    if found is None:
        return f"no value{lost}"
    places = decimals(arm.values.values())
    return f"mean {number(found.mean, places)} of {found.n} seed{'s' * (found.n != 1)}{lost}"


def _scale(arms: Sequence[ArmValues], *, start: float, end: float, may_be_log: bool) -> Scale:
    """The axis of all samples and intervals; logarithmic where positive values span decades."""
    values = [value for arm in arms for value in arm.values.values()]
    logarithmic = may_be_log and bool(values) and min(values) > 0 and max(values) >= DECADES * max(1.0, min(values))
    ends = [end for arm in arms if (e := arm.estimate) is not None for end in (e.low, e.high) if end is not None]
    shown = [*values, *ends]
    if logarithmic:
        shown = [math.log10(value) for value in shown if value > min(values) / 2]
    return Scale(*value_range(shown), start=start, end=end, logarithmic=logarithmic)


def _shifts(arms: Sequence[ArmValues], room: float) -> dict[int, float]:
    """How far the dots of each seed stand from the middle of their arm."""
    seeds = sorted({seed for arm in arms for seed in (*arm.values, *arm.diverged)})
    step = min(SPREAD, room / (2 * max(1, len(seeds))))
    return {seed: (index - (len(seeds) - 1) / 2) * step for index, seed in enumerate(seeds)}


def _columns(title: str, arms: Sequence[ArmValues], column: float, baseline: str) -> Iterator[str]:
    y = _scale(arms, start=HEIGHT - BOTTOM, end=TOP, may_be_log=False)
    shift = {seed: by - column / 12 for seed, by in _shifts(arms, column).items()}
    centre = {arm.arm: LEFT + column * (index + 0.5) for index, arm in enumerate(arms)}
    yield from frame(title, y)
    for arm in arms:
        if arm.arm == baseline and arm.estimate is not None:
            yield line(LEFT, y(arm.estimate.mean), WIDTH - RIGHT, y(arm.estimate.mean), "base")
    for seed in shift if len(shift) <= MANY_SEEDS else ():
        for one, two in pairwise(arm for arm in arms if seed in arm.values):
            yield polyline([(centre[arm.arm] + shift[seed], y(arm.values[seed])) for arm in (one, two)], "pair")
    for arm in arms:
        x = centre[arm.arm]
        places = {seed: (x + shift[seed], y(value)) for seed, value in arm.values.items()}
        yield from _dots(arm, places, hollow=arm.arm == baseline)
        found, at = arm.estimate, x + column / 5
        if found is not None:
            yield line(at - 6, y(found.mean), at + 6, y(found.mean), "mean")
            if found.low is not None and found.high is not None:
                yield line(at, y(found.low), at, y(found.high), "range")
        yield from _crosses((x + shift[seed], TOP - 4) for seed in arm.diverged)
        if arm.diverged:
            yield text(x + max(shift.values()) + 8, TOP - 1, "diverged", "tick")
        yield text(x, HEIGHT - 22, arm.arm, "strong", anchor="middle")
        if arm.arm == baseline:
            yield text(x, HEIGHT - 8, "baseline", "tick", anchor="middle")


def _rows(title: str, arms: Sequence[ArmValues], baseline: str) -> Iterator[str]:
    left = min(14 + LETTER * max(10, *(len(arm.arm) for arm in arms)), WIDTH * 0.5)
    x = _scale(arms, start=left, end=WIDTH - RIGHT - 4, may_be_log=True)
    shift = _shifts(arms, ROW * 0.6)
    bottom = TOP + ROW * len(arms) + 4
    yield from heading(title)
    for mark, label in x.marks():
        yield line(x(mark), TOP - 2, x(mark), bottom, "grid")
        yield text(x(mark), bottom + 14, label, "tick", anchor="middle")
    if x.logarithmic:
        yield text(WIDTH - RIGHT, bottom + 28, "logarithmic axis", "tick", anchor="end")
    for index, arm in enumerate(arms):
        middle = TOP + ROW * (index + 0.5)
        found = arm.estimate
        if arm.arm == baseline:
            if found is not None:
                yield line(x(found.mean), TOP - 2, x(found.mean), bottom, "base")
            yield text(left - 8, middle + 11, "baseline", "tick", anchor="end")
        name = shorten(arm.arm, int((left - 12) / LETTER))
        yield text(left - 8, middle + (-1 if arm.arm == baseline else 4), name, "strong", anchor="end")
        places = {seed: (x(value), middle - 4 + shift[seed] / 2) for seed, value in arm.values.items()}
        yield from _dots(arm, places, hollow=arm.arm == baseline)
        if found is not None:
            yield from _mean_below(found.mean, found.low, found.high, x, middle + 6)
        yield from _crosses((left + 8 + 9 * rank, middle) for rank, _ in enumerate(arm.diverged))
        if arm.diverged:
            yield text(left + 8 + 9 * len(arm.diverged), middle + 4, "diverged", "tick")


def _mean_below(mean: float, low: float | None, high: float | None, x: Scale, at: float) -> Iterator[str]:
    if low is not None and high is not None:
        yield line(x(low), at, x(high), at, "range")
    yield line(x(mean), at - 4, x(mean), at + 4, "mean")


def _dots(arm: ArmValues, places: Mapping[int, tuple[float, float]], *, hollow: bool) -> Iterator[str]:
    """A dot for every seed; of many, all in one mark, which weighs a tenth."""
    if len(places) > MANY_SEEDS:
        yield points(places.values(), "dots c0", title=f"{arm.arm}, {len(places)} seeds")
        return
    for seed, (x, y) in places.items():
        tip = f"{arm.arm}, seed {seed}: {arm.values[seed]:.4g}"
        yield dot(x, y, "sample hollow" if hollow else "sample", title=tip)


def _crosses(places: Iterator[tuple[float, float]]) -> Iterator[str]:
    for x, y in places:
        yield line(x - 3.5, y - 3.5, x + 3.5, y + 3.5, "cross")
        yield line(x - 3.5, y + 3.5, x + 3.5, y - 3.5, "cross")

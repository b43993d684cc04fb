"""The report's figures: every sample of an ablation, curves over training, and the verdicts at a glance.

Drawn by hand as SVG, so that they follow light and dark, weigh a few kB and never differ from one build to the next.
"""

from __future__ import annotations

import math
import textwrap
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise

from retrace.core.stats import estimate
from retrace.core.svg import (
    NUM_COLOURS,
    Figure,
    decimals,
    dot,
    figure,
    line,
    num,
    number,
    polyline,
    shorten,
    text,
    tick_places,
    ticks,
)
from retrace.core.verdicts import VALUE_SCALES, Verdict

Curve = Sequence[tuple[int, float]]
WIDTH, HEIGHT = 350.0, 236.0
LEFT, RIGHT, TOP, BOTTOM = 50.0, 12.0, 34.0, 40.0
_SPREAD = 5.0  # between the dots of two seeds


@dataclass(frozen=True)
class ArmValues:
    """One column of a sample figure: values by seed, and the seeds that diverged."""

    arm: str
    values: Mapping[int, float]
    diverged: tuple[int, ...] = ()


def axis(low: float, high: float, start: float, end: float) -> Callable[[float], float]:
    """The map from `low`..`high` onto `start`..`end`."""
    return lambda value: start + (value - low) / (high - low) * (end - start)


def value_range(values: Iterable[float]) -> tuple[float, float]:
    """A range with some air; a single value gets a range around it."""
    found = list(values) or [0.0, 1.0]
    low, high = min(found), max(found)
    air = (high - low) * 0.07 or abs(low) * 0.1 or 1.0
    return low - air, high + air


def frame(title: str, low: float, high: float) -> Iterator[str]:
    """Title, horizontal grid and its numbers."""
    y = axis(low, high, HEIGHT - BOTTOM, TOP)
    marks = ticks(low, high)
    places = tick_places(marks)
    yield text(2, 15, shorten(title, 48), "title")
    for mark in marks:
        yield line(LEFT, y(mark), WIDTH - RIGHT, y(mark), "grid")
        yield text(LEFT - 7, y(mark) + 3.8, number(mark, places), "tick", anchor="end")


def sample_figure(name: str, metric: str, arms: Sequence[ArmValues], *, baseline: str) -> Figure:
    """A dot for every seed, thin lines between equal seeds, mean with 95 % interval; the baseline's mean dashed."""
    found = {arm.arm: estimate(arm.values.values()) for arm in arms}
    ends = [v for e in found.values() if e is not None for v in (e.low, e.high) if v is not None]
    low, high = value_range([*ends, *(value for arm in arms for value in arm.values.values())])
    y = axis(low, high, HEIGHT - BOTTOM, TOP)
    column = (WIDTH - LEFT - RIGHT) / max(1, len(arms))
    centre = {arm.arm: LEFT + column * (index + 0.5) for index, arm in enumerate(arms)}
    seeds = sorted({seed for arm in arms for seed in (*arm.values, *arm.diverged)})
    shift = {seed: (index - (len(seeds) - 1) / 2) * min(_SPREAD, column / (2 * len(seeds))) - column / 12
             for index, seed in enumerate(seeds)}  # fmt: skip

    def draw() -> Iterator[str]:
        yield from frame(metric, low, high)
        base = found.get(baseline)
        if base is not None:
            yield line(LEFT, y(base.mean), WIDTH - RIGHT, y(base.mean), "base")
        for seed in seeds:
            for one, two in pairwise(arm for arm in arms if seed in arm.values):
                ends = [(centre[arm.arm] + shift[seed], y(arm.values[seed])) for arm in (one, two)]
                yield polyline(ends, "pair")
        for arm in arms:
            yield from _column(arm, centre[arm.arm], column, y, shift, hollow=arm.arm == baseline)
        for arm in arms:
            label = shorten(arm.arm, max(4, int(column / 6)))
            yield text(centre[arm.arm], HEIGHT - 22, label, "strong", anchor="middle")
            if arm.arm == baseline:
                yield text(centre[arm.arm], HEIGHT - 8, "baseline", "tick", anchor="middle")

    alt = "; ".join(f"{arm.arm}: {_spoken(arm, metric)}" for arm in arms)
    return figure(name, f"{metric} by arm, a dot for every seed. {alt}.", width=WIDTH, height=HEIGHT, parts=draw())


def _spoken(arm: ArmValues, metric: str) -> str:
    found = estimate(arm.values.values())
    lost = f", {len(arm.diverged)} diverged" if arm.diverged else ""
    if found is None:
        return f"no {metric}{lost}"
    places = decimals(arm.values.values())
    return f"mean {number(found.mean, places)} of {found.n} seed{'s' * (found.n != 1)}{lost}"


def _column(
    arm: ArmValues, x: float, width: float, y: Callable[[float], float], shift: Mapping[int, float], *, hollow: bool
) -> Iterator[str]:
    kind = "sample hollow" if hollow else "sample"
    for seed, value in arm.values.items():
        yield dot(x + shift[seed], y(value), kind, title=f"{arm.arm}, seed {seed}: {value:.4g}")
    found = estimate(arm.values.values())
    if found is not None:
        at = x + width / 5
        yield line(at - 6, y(found.mean), at + 6, y(found.mean), "mean")
        if found.low is not None and found.high is not None:
            yield line(at, y(found.low), at, y(found.high), "range")
    for seed in arm.diverged:
        left, top = x + shift[seed], TOP - 4
        yield line(left - 3.5, top - 3.5, left + 3.5, top + 3.5, "cross")
        yield line(left - 3.5, top + 3.5, left + 3.5, top - 3.5, "cross")
    if arm.diverged:
        yield text(x + max(shift.values()) + 8, TOP - 1, "diverged", "tick")


def curve_figure(name: str, metric: str, arms: Mapping[str, Sequence[Curve]]) -> Figure:
    """A line for every seed, coloured and dashed by arm, over optimizer steps."""
    points = [point for curves in arms.values() for curve in curves for point in curve]
    low, high = value_range(value for _, value in points)
    first, last = min((step for step, _ in points), default=0), max((step for step, _ in points), default=1)
    x = axis(first, max(last, first + 1), LEFT, WIDTH - RIGHT)
    y = axis(low, high, HEIGHT - BOTTOM, TOP)

    def draw() -> Iterator[str]:
        yield from frame(metric, low, high)
        for mark in ticks(first, last):
            yield text(x(mark), HEIGHT - BOTTOM + 14, number(mark, 0), "tick", anchor="middle")
        yield text(WIDTH - RIGHT, HEIGHT - 6, "step", "tick", anchor="end")
        left = LEFT
        for index, (arm, curves) in enumerate(arms.items()):
            kind = f"curve c{index % NUM_COLOURS}"
            for curve in curves:
                yield polyline(((x(step), y(value)) for step, value in curve), kind)
            yield line(left, HEIGHT - 10, left + 18, HEIGHT - 10, kind)
            yield text(left + 22, HEIGHT - 6, shorten(arm, 14), "strong")
            left += 36 + 6.4 * min(14, len(arm))

    alt = f"{metric} over {last} training steps for {', '.join(arms)}, a line for every seed."
    return figure(name, alt, width=WIDTH, height=HEIGHT, parts=draw())


def verdict_bar(verdict: Verdict, *, width: float = 230.0) -> Figure:
    """The differences of one claim from zero on a scale of its own; right is always the side that is claimed."""
    alt = f"{verdict.outcome}: {verdict.reason}"
    parts = _bar(verdict, 0, 17, width)
    return figure(f"verdict--{verdict.claim.id}", alt, width=width, height=34, parts=parts)


def _bar(verdict: Verdict, left: float, middle: float, width: float) -> Iterator[str]:
    centre, found, margin = left + width / 2, verdict.estimate, verdict.claim.expect.margin
    printed = verdict.claim.value if verdict.scale in VALUE_SCALES else None
    ends = (found.low, found.high) if found else ()
    shown = [*verdict.differences.values(), *(v for v in (*ends, printed, margin) if v is not None)]
    reach = max(map(abs, shown), default=0.0) or 1.0
    half = verdict.claim.sign * (width / 2 - 7)
    x = axis(-reach, reach, centre - half, centre + half)
    first, last = (centre, left + width) if margin is None else (x(-margin), x(margin))
    yield f'<rect x="{num(first)}" y="{num(middle - 15)}" width="{num(last - first)}" height="30" class="wash"/>'
    yield line(centre, middle - 15, centre, middle + 15, "zero")
    if found is None:
        return
    for seed, value in verdict.differences.items():
        yield dot(x(value), middle + 8, "sample", radius=2.6, title=f"seed {seed}: {value:+.4g}")
    if found.low is not None and found.high is not None:
        yield line(x(found.low), middle - 3, x(found.high), middle - 3, "range")
        for end in (found.low, found.high):
            yield line(x(end), middle - 7, x(end), middle + 1, "range")
    at = x(found.mean)
    yield f'<path d="M{num(at)} {num(middle - 8)}l5 5l-5 5l-5 -5z" class="diamond"/>'
    if printed is not None:
        yield dot(x(printed), middle - 3, "printed", radius=5, title=f"the paper: {printed:+.4g}")


def forest_figure(verdicts: Sequence[Verdict]) -> Figure:
    """All verdicts in one picture, for pages that can't hold drawings in a table."""
    row, width = 56.0, 860.0

    def draw() -> Iterator[str]:
        yield text(438, 14, "against the claim", "tick", anchor="end")
        yield text(462, 14, "as claimed", "tick")
        for index, verdict in enumerate(verdicts):
            top = 24 + index * row
            yield line(0, top, width, top, "grid")
            says = textwrap.wrap(verdict.claim.says, 46, max_lines=3, placeholder=" \u2026")
            for rank, words in enumerate(says):
                yield text(2, top + row / 2 + 4 + 15.5 * (rank - (len(says) - 1) / 2), words, "strong")
            yield from _bar(verdict, 310, top + row / 2, 280)
            yield text(612, top + row / 2 - 4, verdict.outcome, "title")
            yield text(612, top + row / 2 + 13, shorten(_numbers(verdict), 44), "tick")

    spoken = "; ".join(f"{verdict.claim.says.rstrip('.')}: {verdict.outcome}" for verdict in verdicts)
    height = 26 + row * len(verdicts)
    return figure("verdicts", f"Verdicts. {spoken}.", width=width, height=height, parts=draw())


def _numbers(verdict: Verdict) -> str:
    found = verdict.estimate
    if found is None:
        return "no difference on record"
    places = decimals([found.mean, found.low or 0.0, found.high or 0.0])
    mean = number(found.mean, places, sign=True)
    if found.low is None or found.high is None:
        return f"{mean}, n = {found.n}"
    return f"{mean} [{number(found.low, places, sign=True)}, {number(found.high, places, sign=True)}], n = {found.n}"


def joint_figure(
    name: str,
    title: str,
    *,
    x_edges: Sequence[float],
    y_edges: Sequence[float],
    counts: Sequence[Sequence[int]],
    x_label: str,
    y_label: str,
) -> Figure:
    """A distribution over two values as cells, the darker the more; shades follow the logarithm of the counts.

    `counts[i][j]` lies between the y edges i - 1 and i and the x edges j - 1 and j; the first and last bins are open.
    Cells are equally large whatever their bins, so that bins may be narrow where much happens.
    """
    total, most = sum(map(sum, counts)), max((count for row in counts for count in row), default=0)
    width = (WIDTH - LEFT - RIGHT) / (len(x_edges) + 1)
    height = (HEIGHT - TOP - BOTTOM) / (len(y_edges) + 1)
    floor = HEIGHT - BOTTOM

    def draw() -> Iterator[str]:
        yield text(2, 15, shorten(title, 48), "title")
        for i, row in enumerate(counts):
            for j, count in enumerate(row):
                if count:
                    shade = 0.08 + 0.92 * math.log1p(count) / math.log1p(most)
                    tip = f"{x_label} {_bin(x_edges, j)}, {y_label} {_bin(y_edges, i)}: {count / total:.2%}"
                    yield (
                        f'<rect x="{num(LEFT + j * width)}" y="{num(floor - (i + 1) * height)}" width="{num(width)}" '
                        f'height="{num(height)}" class="cell" fill-opacity="{num(shade)}"><title>{tip}</title></rect>'
                    )
        for j, edge in enumerate(x_edges, start=1):
            x = LEFT + j * width
            yield line(x, floor, x, floor + 3, "grid")
            if j % 2 == 1 or len(x_edges) < 8:  # else they would touch
                yield text(x, floor + 14, f"{edge:g}".replace("-", "\u2212"), "tick", anchor="middle")
        for i, edge in enumerate(y_edges, start=1):
            yield text(LEFT - 7, floor - i * height + 3.8, f"{edge:g}", "tick", anchor="end")
        if 0 < sum(edge < 0 for edge in x_edges) < len(x_edges):
            zero = LEFT + width * (sum(edge < 0 for edge in x_edges) + 0.5)
            yield line(zero, TOP - 4, zero, floor, "base")
        yield text(WIDTH - RIGHT, HEIGHT - 6, x_label, "tick", anchor="end")
        yield text(2, TOP - 4, y_label, "tick")

    positive = sum(sum(row[j] for j in range(len(row)) if j > 0 and x_edges[j - 1] >= 0) for row in counts)
    share = f"{positive / total:.0%} of {total} right of the middle" if total else "none"
    return figure(name, f"{title}: {y_label} against {x_label}, {share}.", width=WIDTH, height=HEIGHT, parts=draw())


def _bin(edges: Sequence[float], index: int) -> str:
    if index == 0:
        return f"below {edges[0]:g}"
    return f"from {edges[-1]:g}" if index == len(edges) else f"{edges[index - 1]:g} to {edges[index]:g}"

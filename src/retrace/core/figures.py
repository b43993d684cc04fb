"""Parts that the report's figures share, and one of them: curves over training.

Drawn by hand as SVG, so that they follow light and dark, weigh a few kB and never differ from one build to the next.
"""

from __future__ import annotations

import hashlib
import math
import textwrap
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from statistics import median

from retrace.core.svg import NUM_COLOURS, Figure, figure, line, number, polyline, shorten, text, tick_places, ticks

Curve = Sequence[tuple[int, float]]
WIDTH, HEIGHT = 350.0, 246.0
LEFT, RIGHT, TOP, BOTTOM = 50.0, 12.0, 44.0, 40.0
_TITLE = 45  # letters of a line of a title
_NAME = 24  # letters of a name in a legend
_FILE_NAME = 120  # characters of a file's name: file systems take 255 bytes
_MARKS = 5  # powers of ten on a logarithmic axis, at most
MANY_SEEDS = 24  # more than an eye tells apart: curves become a band, and dots of one arm one mark


def file_name(*parts: str) -> str:
    """A name for a figure's file; a long one, as of an arm with many overrides, is cut and told apart by a hash."""
    name = "--".join("".join(c if c.isalnum() or c in "_." else "-" for c in part) for part in parts)
    if len(name) <= _FILE_NAME:
        return name
    return f"{name[:_FILE_NAME]}-{hashlib.sha256(name.encode()).hexdigest()[:8]}"


def axis(low: float, high: float, start: float, end: float) -> Callable[[float], float]:
    """The map from `low`..`high` onto `start`..`end`."""
    return lambda value: start + (value - low) / (high - low) * (end - start)


def value_range(values: Iterable[float]) -> tuple[float, float]:
    """A range with some air; a single value gets a range around it."""
    found = list(values) or [0.0, 1.0]
    low, high = min(found), max(found)
    air = (high - low) * 0.07 or abs(low) * 0.1 or 1.0
    return low - air, high + air


@dataclass(frozen=True)
class Scale:
    """An axis: called with a value, it gives the place. `low` and `high` are logarithms where it is logarithmic."""

    low: float
    high: float
    start: float
    end: float
    logarithmic: bool = False

    def __call__(self, value: float) -> float:
        """The place of a value; what lies outside, as the end of an interval may, is drawn at the edge."""
        if self.logarithmic:
            value = math.log10(value) if value > 0 else self.low
        value = min(max(value, self.low), self.high)
        return self.start + (value - self.low) / (self.high - self.low) * (self.end - self.start)

    def marks(self) -> list[tuple[float, str]]:
        """Round values on the axis with their labels; between powers of ten, where the range holds less than two."""
        if not self.logarithmic:
            marks = ticks(self.low, self.high)
            places = tick_places(marks)
            return [(mark, number(mark, places)) for mark in marks]
        first, last = math.ceil(self.low), math.floor(self.high)
        if last - first < 1:
            found = [factor * 10.0**power for power in (first - 1, first) for factor in (1, 1.2, 1.5, 2, 3, 5, 7)]
            return [(mark, f"{mark:g}") for mark in found if self.low <= math.log10(mark) <= self.high]
        step = max(1, math.ceil((last - first) / _MARKS))
        return [(10.0**power, _power(power)) for power in range(first, last + 1, step)]


def _power(power: int) -> str:
    return f"{10.0**power:g}" if -3 <= power <= 3 else f"1e{power}".replace("-", "\u2212")


def heading(title: str) -> Iterator[str]:
    """A title of one line or two."""
    for rank, words in enumerate(textwrap.wrap(title, _TITLE, max_lines=2, placeholder=" \u2026")):
        yield text(2, 14 + 15 * rank, words, "title")


def frame(title: str, y: Scale) -> Iterator[str]:
    """Title, horizontal grid and its numbers."""
    yield from heading(title)
    for mark, label in y.marks():
        yield line(LEFT, y(mark), WIDTH - RIGHT, y(mark), "grid")
        yield text(LEFT - 7, y(mark) + 3.8, label, "tick", anchor="end")


def legend(names: Sequence[str], top: float) -> Iterator[str]:
    """A name behind a stroke of its colour for each arm, in as many lines as it takes."""
    for index, (name, (left, row)) in enumerate(zip(names, _places(names), strict=True)):
        at = top + 15 * row
        yield line(left, at, left + 18, at, f"curve c{index % NUM_COLOURS}")
        yield text(left + 22, at + 4, shorten(name, _NAME), "strong")


def legend_height(names: Sequence[str]) -> float:
    """What `legend` takes."""
    return 15.0 * (1 + max((row for _, row in _places(names)), default=0))


def _places(names: Sequence[str]) -> Iterator[tuple[float, int]]:
    """Where each entry of a legend begins: across, and in which line."""
    left, row = 2.0, 0
    for name in names:
        wide = 34 + 6.4 * min(_NAME, len(name))
        if left > 2 and left + wide > WIDTH:
            left, row = 2.0, row + 1
        yield left, row
        left += wide


def curve_figure(name: str, title: str, arms: Mapping[str, Sequence[Curve]]) -> Figure:
    """A line for every seed, coloured and dashed by arm, over optimizer steps. `title`: what is drawn, in words.

    Of more than `MANY_SEEDS` seeds, the median at each step, in a band from the lowest to the highest.
    """
    points = [point for curves in arms.values() for curve in curves for point in curve]
    steps, values = [step for step, _ in points], [value for _, value in points]
    first, last = min(steps, default=0), max(steps, default=1)
    x = axis(first, max(last, first + 1), LEFT, WIDTH - RIGHT)
    y = Scale(*value_range(values), start=HEIGHT - BOTTOM, end=TOP)

    def draw() -> Iterator[str]:
        yield from frame(title, y)
        for mark in ticks(first, last):
            yield text(x(mark), HEIGHT - BOTTOM + 14, number(mark, 0), "tick", anchor="middle")
        yield text(WIDTH - RIGHT, HEIGHT - BOTTOM + 27, "training step", "tick", anchor="end")
        for index, curves in enumerate(arms.values()):
            colour, lines = f"c{index % NUM_COLOURS}", curves
            if len(curves) > MANY_SEEDS:
                low, middle, high = _band(curves)
                yield polyline(((x(step), y(value)) for step, value in (*low, *reversed(high))), f"band {colour}")
                lines = [middle]
            for curve in lines:
                yield polyline(((x(step), y(value)) for step, value in curve), f"curve {colour}")
        yield from legend(tuple(arms), HEIGHT + 2)

    many = any(len(curves) > MANY_SEEDS for curves in arms.values())
    lines = "the median of the seeds in a band that holds all of them" if many else "a line for every seed"
    alt = f"{title} over {last} training steps for {', '.join(arms)}, {lines}."
    height = HEIGHT - 4 + legend_height(tuple(arms))
    return figure(name, alt, width=WIDTH, height=height, parts=draw())


def _band(curves: Sequence[Curve]) -> tuple[Curve, Curve, Curve]:
    """(lowest, median, highest) at each step, of the curves that have it."""
    found: dict[int, list[float]] = {}
    for curve in curves:
        for step, value in curve:
            found.setdefault(step, []).append(value)
    steps = [(step, sorted(values)) for step, values in sorted(found.items())]
    return (
        [(step, values[0]) for step, values in steps],
        [(step, median(values)) for step, values in steps],
        [(step, values[-1]) for step, values in steps],
    )

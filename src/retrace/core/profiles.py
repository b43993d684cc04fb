"""Figures of quantities over the depth of a model: what was measured, upon what was predicted.

A run hands them to its record as the note `profiles`: {title: {"log": bool, "measured": [[x, y], ...],
"predicted": [[x, y], ...]}}, where x is depth as a share of the model's and `predicted` may be empty.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass

from retrace.core.figures import BOTTOM, HEIGHT, LEFT, RIGHT, TOP, WIDTH, axis, frame, value_range
from retrace.core.svg import NUM_COLOURS, Figure, figure, line, number, polyline, shorten, text

Points = Sequence[tuple[float, float]]
DECADES = 5  # numbers on a logarithmic axis, at most


@dataclass(frozen=True)
class ArmProfile:
    """One arm: a measured curve for every seed, and at most one that was predicted."""

    arm: str
    measured: Sequence[Points]
    predicted: Points = ()


def arm_profiles(notes: Mapping[str, Sequence[Mapping[str, object]]]) -> dict[str, tuple[bool, list[ArmProfile]]]:
    """Of each title whether its axis is logarithmic, and its arms. `notes`: the records' notes by arm, a seed each."""
    found: dict[str, tuple[bool, list[ArmProfile]]] = {}
    for arm, seeds in notes.items():
        for title in dict.fromkeys(title for note in seeds for title in note):
            parts = [part for note in seeds if isinstance(part := note.get(title), Mapping)]
            predicted = next((part["predicted"] for part in parts if part["predicted"]), ())
            profile = ArmProfile(arm, [part["measured"] for part in parts], predicted)
            found.setdefault(title, (bool(parts[0]["log"]), []))[1].append(profile)
    return found


def every_profile(name: str, notes: Mapping[str, Sequence[Mapping[str, object]]]) -> Iterator[Figure]:
    """All figures of an ablation; their names begin with `name`."""
    for title, (logarithmic, arms) in arm_profiles(notes).items():
        word = "".join(c if c.isalnum() else "-" for c in title)
        yield from profile_figures(f"{name}--{word}", title, arms, logarithmic=logarithmic)


def profile_figures(name: str, title: str, arms: Sequence[ArmProfile], *, logarithmic: bool) -> Iterator[Figure]:
    """One figure for every few arms, as many as there are colours; all on one scale."""
    values = [y for arm in arms for curve in (*arm.measured, arm.predicted) for _, y in curve]
    parts = [arms[first : first + NUM_COLOURS] for first in range(0, len(arms), NUM_COLOURS)]
    for index, part in enumerate(parts, start=1):
        several = len(parts) > 1
        yield _figure(
            f"{name}--{index}" if several else name,
            f"{title} ({index} of {len(parts)})" if several else title,
            part,
            values=values,
            logarithmic=logarithmic,
        )


def _figure(name: str, title: str, arms: Sequence[ArmProfile], *, values: Iterable[float], logarithmic: bool) -> Figure:
    usable = [value for value in values if math.isfinite(value) and (value > 0 or not logarithmic)]
    low, high = value_range(map(math.log10, usable) if logarithmic else usable)
    x, y = axis(0.0, 1.0, LEFT, WIDTH - RIGHT), axis(low, high, HEIGHT - BOTTOM, TOP)

    def path(points: Points, kind: str) -> str:
        good = [(a, b) for a, b in points if math.isfinite(b) and (b > 0 or not logarithmic)]
        return polyline(((x(a), y(math.log10(b) if logarithmic else b)) for a, b in good), kind)

    def draw() -> Iterator[str]:
        yield from _decades(title, low, high) if logarithmic else frame(title, low, high)
        for mark in (0.0, 0.5, 1.0):
            anchor = "end" if mark == 1 else "middle"
            yield text(x(mark), HEIGHT - BOTTOM + 14, number(mark, 1), "tick", anchor=anchor)
        yield text(WIDTH - RIGHT, HEIGHT - BOTTOM + 25, "depth", "tick", anchor="end")
        for index, arm in enumerate(arms):
            yield path(arm.predicted, f"theory c{index}")
        left, row = 2.0, 0
        for index, arm in enumerate(arms):
            for curve in arm.measured:
                yield path(curve, f"curve c{index}")
            wide = 30 + 6.0 * min(16, len(arm.arm))
            if left + wide > WIDTH - 30 and row == 0:
                left, row = 2.0, 1
            at = HEIGHT + 2 + 15 * row
            yield line(left, at, left + 16, at, f"curve c{index}")
            yield text(left + 20, at + 4, shorten(arm.arm, 16), "strong")
            left += wide

    spoken = "; ".join(_spoken(arm) for arm in arms)
    alt = f"{title} over the depth of the model; wide bands are predicted, lines measured. {spoken}."
    return figure(name, alt, width=WIDTH, height=HEIGHT + 26, parts=draw())


def _decades(title: str, low: float, high: float) -> Iterator[str]:
    """Title, and a grid at powers of ten; at 1, 2 and 5 times them where the range holds less than two."""
    y = axis(low, high, HEIGHT - BOTTOM, TOP)
    yield text(2, 15, shorten(title, 48), "title")
    first, last = math.ceil(low), math.floor(high)
    if last - first < 1:
        spread = [(math.log10(factor) + power, f"{factor * 10.0**power:g}") for power in (first - 1, first, last)
                  for factor in (1, 1.2, 1.5, 2, 3, 5, 7)]  # fmt: skip
        marks = {mark: label for mark, label in spread if low <= mark <= high}
    else:
        step = max(1, math.ceil((last - first) / DECADES))
        marks = {float(power): f"1e{power}".replace("-", "\u2212") for power in range(first, last + 1, step)}
    for mark, label in marks.items():
        yield line(LEFT, y(mark), WIDTH - RIGHT, y(mark), "grid")
        yield text(LEFT - 7, y(mark) + 3.8, label, "tick", anchor="end")


def _spoken(arm: ArmProfile) -> str:
    ends = [(curve[0][1], curve[-1][1]) for curve in arm.measured if curve]
    if not ends:
        return f"{arm.arm}: nothing measured"
    first, last = (sum(side) / len(ends) for side in zip(*ends, strict=True))
    return f"{arm.arm}: from {first:.3g} to {last:.3g}"

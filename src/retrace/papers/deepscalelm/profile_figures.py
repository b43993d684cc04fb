"""Figures of quantities over the depth of a model: what was measured, upon what was predicted.

A run hands them to its record as the note `profiles`: {title: {"log": bool, "measured": [[x, y], ...],
"predicted": [[x, y], ...]}}, where x is depth as a share of the model's and `predicted` may be empty.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from statistics import median

from retrace.core.figures import (
    BOTTOM,
    HEIGHT,
    LEFT,
    RIGHT,
    TOP,
    WIDTH,
    Scale,
    axis,
    file_name,
    frame,
    legend,
    legend_height,
    value_range,
)
from retrace.core.paper import Panel
from retrace.core.samples import Samples
from retrace.core.svg import NUM_COLOURS, Figure, figure, line, number, points, polyline, shorten, text

Points = Sequence[tuple[float, float]]
EVERY = 3  # places of a profile of which one is a dot in the figure of measured against predicted
SAYS = (
    "Over the depth of the model: lines are measured, a seed each; wide bands are predicted. Dots: every third place "
    "of every seed, on the dashed line where prediction and measurement agree."
)


def panels(arms: Mapping[str, Sequence[str]], samples: Samples) -> dict[str, list[Panel]]:
    """What the report shows of each ablation whose runs have noted profiles."""
    found = {}
    for ablation, names in arms.items():
        notes = {arm: samples.notes(ablation, arm, "profiles") for arm in names}
        if figures := tuple(every_profile(ablation, notes)):
            found[ablation] = [Panel(SAYS, figures)]
    return found


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


def every_profile(ablation: str, notes: Mapping[str, Sequence[Mapping[str, object]]]) -> Iterator[Figure]:
    """All figures of an ablation: the profiles, and behind them measured against predicted."""
    found = arm_profiles(notes)
    names = {title: file_name(ablation, "profile", title) for title in found}
    for title, (logarithmic, arms) in found.items():
        yield from profile_figures(names[title], title, arms, logarithmic=logarithmic)
    for title, (logarithmic, arms) in found.items():
        drawn = agreement_figure(names[title], title, arms, logarithmic=logarithmic)
        if drawn is not None:
            yield drawn


def profile_figures(name: str, title: str, arms: Sequence[ArmProfile], *, logarithmic: bool) -> Iterator[Figure]:
    """One figure for every few arms, at most as many as there are colours; all on one scale."""
    values = [y for arm in arms for curve in (*arm.measured, arm.predicted) for _, y in curve]
    size = math.ceil(len(arms) / math.ceil(len(arms) / NUM_COLOURS))
    parts = [arms[first : first + size] for first in range(0, len(arms), size)]
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
    x = axis(0.0, 1.0, LEFT, WIDTH - RIGHT)
    y = _scale(values, start=HEIGHT - BOTTOM, end=TOP, logarithmic=logarithmic)

    def path(points: Points, kind: str) -> str:
        return polyline(((x(a), y(b)) for a, b in points if _usable(b, logarithmic=logarithmic)), kind)

    def draw() -> Iterator[str]:
        yield from frame(title, y)
        for mark in (0.0, 0.5, 1.0):
            anchor = "end" if mark == 1 else "middle"
            yield text(x(mark), HEIGHT - BOTTOM + 14, number(mark, 1), "tick", anchor=anchor)
        yield text(WIDTH - RIGHT, HEIGHT - BOTTOM + 27, "depth, as a share of the model's", "tick", anchor="end")
        for index, arm in enumerate(arms):
            yield path(arm.predicted, f"theory c{index}")
        for index, arm in enumerate(arms):
            for curve in arm.measured:
                yield path(curve, f"curve c{index}")
        yield from legend([arm.arm for arm in arms], HEIGHT + 2)

    spoken = "; ".join(_spoken(arm) for arm in arms)
    alt = f"{title} over the depth of the model; wide bands are predicted, lines measured. {spoken}."
    height = HEIGHT - 4 + legend_height([arm.arm for arm in arms])
    return figure(name, alt, width=WIDTH, height=height, parts=draw())


def _usable(value: float, *, logarithmic: bool) -> bool:
    return math.isfinite(value) and (value > 0 or not logarithmic)


def _scale(values: Iterable[float], *, start: float, end: float, logarithmic: bool) -> Scale:
    usable = [value for value in values if _usable(value, logarithmic=logarithmic)]
    low, high = value_range(map(math.log10, usable) if logarithmic else usable)
    return Scale(low, high, start, end, logarithmic)


def agreement_figure(name: str, title: str, arms: Sequence[ArmProfile], *, logarithmic: bool) -> Figure | None:
    """Measured against predicted: a dot for every arm, seed and `EVERY`-th place of the depth; on the line they agree.

    Of arms with a prediction other than zero, of which an error can be a share; None where there is no such arm.
    """
    pairs = {arm.arm: [p for p in _pairs(arm) if all(_usable(v, logarithmic=logarithmic) for v in p)] for arm in arms}
    pairs = {arm: found for arm, found in pairs.items() if any(predicted for predicted, _ in found)}
    if not pairs:
        return None
    values = [value for found in pairs.values() for pair in found for value in pair]
    x = _scale(values, start=LEFT, end=WIDTH - RIGHT, logarithmic=logarithmic)
    y = _scale(values, start=HEIGHT - BOTTOM, end=TOP, logarithmic=logarithmic)
    errors = {arm: median(abs(m / p - 1) for p, m in found if p) for arm, found in pairs.items()}
    worst = max(errors, key=lambda arm: errors[arm])
    everything = median(abs(m / p - 1) for found in pairs.values() for p, m in found if p)
    told = f"median error {everything:.1%}; largest of an arm {errors[worst]:.1%}, {worst}".replace("%", " %")

    def draw() -> Iterator[str]:
        yield from frame(f"{title}: measured against predicted", y)
        for mark, label in x.marks():
            yield text(x(mark), HEIGHT - BOTTOM + 14, label, "tick", anchor="middle")
        yield line(LEFT, HEIGHT - BOTTOM, WIDTH - RIGHT, TOP, "base")
        for index, (arm, found) in enumerate(pairs.items()):
            yield points(((x(p), y(m)) for p, m in found), f"dots c{index % NUM_COLOURS}", title=arm)
        yield text(LEFT, HEIGHT - BOTTOM + 27, shorten(told, 52), "tick")

    return figure(f"{name}--agreement", f"{title}, measured against predicted: {told}.", width=WIDTH, height=HEIGHT,
                  parts=draw())  # fmt: skip


def _pairs(arm: ArmProfile) -> Iterator[tuple[float, float]]:
    """(predicted, measured) of an arm's seeds, at places that both have (their shares of the depth are rounded)."""
    predicted = {round(place, 2): value for place, value in arm.predicted}
    for curve in arm.measured:
        for place, value in curve[::EVERY]:
            if round(place, 2) in predicted:
                yield predicted[round(place, 2)], value


def _spoken(arm: ArmProfile) -> str:
    ends = [(curve[0][1], curve[-1][1]) for curve in arm.measured if curve]
    if not ends:
        return f"{arm.arm}: nothing measured"
    first, last = (sum(side) / len(ends) for side in zip(*ends, strict=True))
    return f"{arm.arm}: from {first:.3g} to {last:.3g}"

"""Verdicts as drawings: the differences of one claim on its own scale, and all claims in one picture."""

from __future__ import annotations

import textwrap
from collections.abc import Iterator, Sequence

from retrace.core.figures import axis
from retrace.core.svg import Figure, decimals, dot, figure, line, num, number, shorten, text
from retrace.core.verdicts import VALUE_SCALES, Verdict


def verdict_bar(verdict: Verdict, *, width: float = 230.0) -> Figure:
    """The differences of one claim from zero on a scale of its own; right is always the side that is claimed."""
    alt = f"{verdict.outcome}: {verdict.reason}"
    parts = _bar(verdict, 0, 17, width)
    return figure(f"verdict--{verdict.claim.id}", alt, width=width, height=34, parts=parts)


def _bar(verdict: Verdict, left: float, middle: float, width: float) -> Iterator[str]:
    centre, found, margin = left + width / 2, verdict.estimate, verdict.margin
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
            yield text(612, top + row / 2 + 13, shorten(numbers(verdict), 44), "tick")

    spoken = "; ".join(f"{verdict.claim.says.rstrip('.')}: {verdict.outcome}" for verdict in verdicts)
    height = 26 + row * len(verdicts)
    return figure("verdicts", f"Verdicts. {spoken}.", width=width, height=height, parts=draw())


def numbers(verdict: Verdict) -> str:
    """The difference with its interval and the number of seeds, as text."""
    found = verdict.estimate
    if found is None:
        return "no difference on record"
    places = decimals([found.mean, found.low or 0.0, found.high or 0.0])
    mean = number(found.mean, places, sign=True)
    if found.low is None or found.high is None:
        return f"{mean}, n = {found.n}"
    return f"{mean} [{number(found.low, places, sign=True)}, {number(found.high, places, sign=True)}], n = {found.n}"

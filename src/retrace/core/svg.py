"""Small building blocks of hand-made SVG: one style for light, dark and print, ticks, numbers; always the same bytes.

In a page the drawing takes the page's style; `standalone` puts the same style into the file for use as an image.
"""

from __future__ import annotations

import html
import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path

STYLE = (Path(__file__).parent / "templates" / "figure.css").read_text()
NUM_COLOURS = 6  # classes c0..c5 in figure.css


@dataclass(frozen=True)
class Figure:
    """A drawing with its text alternative. `name`: file name without ending."""

    name: str
    alt: str
    svg: str

    def standalone(self) -> str:
        """The drawing as a file of its own."""
        head, _, rest = self.svg.partition(">")
        return f"{head}>\n<style>{STYLE}</style>{rest}\n"


def figure(name: str, alt: str, *, width: float, height: float, parts: Iterable[str]) -> Figure:
    """Parts drawn on a `width` x `height` canvas that scales with its container."""
    size = f'viewBox="0 0 {num(width)} {num(height)}" width="{num(width)}" height="{num(height)}"'
    label = f'role="img" aria-label="{html.escape(alt)}"'
    body = "".join(parts)
    return Figure(name, alt, f'<svg xmlns="http://www.w3.org/2000/svg" class="figure" {size} {label}>{body}</svg>')


def num(value: float) -> str:
    """A coordinate: one decimal at most."""
    return f"{value:.1f}".removesuffix(".0")


def text(x: float, y: float, content: str, kind: str, *, anchor: str = "start") -> str:
    return f'<text x="{num(x)}" y="{num(y)}" class="{kind}" text-anchor="{anchor}">{html.escape(content)}</text>'


def line(x1: float, y1: float, x2: float, y2: float, kind: str) -> str:
    return f'<line x1="{num(x1)}" y1="{num(y1)}" x2="{num(x2)}" y2="{num(y2)}" class="{kind}"/>'


def dot(x: float, y: float, kind: str, *, radius: float = 3.2, title: str = "") -> str:
    tip = f"<title>{html.escape(title)}</title>" if title else ""
    return f'<circle cx="{num(x)}" cy="{num(y)}" r="{num(radius)}" class="{kind}">{tip}</circle>'


def polyline(points: Iterable[tuple[float, float]], kind: str) -> str:
    """An open line through points, to a tenth of a unit, in steps from each to the next: so it takes few bytes."""
    steps, at = [], (0, 0)
    for x, y in points:
        now = (round(10 * x), round(10 * y))
        steps.append(_tenths(now[0] - at[0]) + _tenths(now[1] - at[1], follows=True))
        at = now
    path = f"M{steps[0]}" + (f"l{' '.join(steps[1:])}" if len(steps) > 1 else "") if steps else ""
    return f'<path d="{path}" class="{kind}"/>'


def points(places: Iterable[tuple[float, float]], kind: str, *, title: str) -> str:
    """Many dots of one kind in one path: strokes of no length, whose round ends are the dots."""
    path, at = [], (0, 0)
    for x, y in places:
        now = (round(10 * x), round(10 * y))
        path.append(f"m{_tenths(now[0] - at[0])}{_tenths(now[1] - at[1], follows=True)}h0")
        at = now
    return f'<path d="{"".join(path)}" class="{kind}"><title>{html.escape(title)}</title></path>'


@cache
def _tenths(value: int, *, follows: bool = False) -> str:
    """A number of tenths, as short as SVG reads it; one that follows another needs a minus or a space before it."""
    shown = f"{abs(value) / 10:g}".removeprefix("0") or "0"
    return ("-" if value < 0 else " " if follows else "") + shown


def shorten(content: str, length: int) -> str:
    return content if len(content) <= length else content[: length - 1] + "\u2026"


def ticks(low: float, high: float, *, count: int = 4) -> list[float]:
    """About `count` round numbers that lie within `low`..`high`."""
    if not high > low:
        return [low]
    rough = (high - low) / count
    power = 10.0 ** math.floor(math.log10(rough))
    step = next(power * factor for factor in (1, 2, 2.5, 5, 10) if power * factor >= rough * (1 - 1e-9))
    return [index * step for index in range(math.ceil(low / step - 1e-9), math.floor(high / step + 1e-9) + 1)]


def tick_places(marks: Sequence[float]) -> int:
    """Decimal places that tell the marks of an axis apart."""
    step = marks[1] - marks[0] if len(marks) > 1 else abs(marks[0]) if marks else 1.0
    return next((places for places in range(8) if abs(round(step, places) - step) < 1e-6 * step), 8)


def decimals(values: Iterable[float]) -> int:
    """Decimal places with which the largest of `values` shows three significant digits."""
    largest = max(map(abs, values), default=0.0)
    return 3 if largest == 0 else min(8, max(0, 2 - math.floor(math.log10(largest))))


def number(value: float, places: int, *, sign: bool = False) -> str:
    """A number with a real minus sign; never a negative zero."""
    shown = f"{value:+.{places}f}" if sign else f"{value:.{places}f}"
    if float(shown) == 0:
        shown = f"{0:.{places}f}"
    return shown.replace("-", "\u2212")

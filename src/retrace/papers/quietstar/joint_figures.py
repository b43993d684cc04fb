"""Figures of how the gain from thoughts and a token's difficulty go together, an arm each, all its seeds.

A run hands them to its record as the note `joint`, which `difficulty.joint_distribution` makes.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from retrace.core.figures import BOTTOM, HEIGHT, LEFT, RIGHT, TOP, WIDTH, file_name, heading
from retrace.core.paper import Panel
from retrace.core.samples import Samples
from retrace.core.svg import Figure, figure, line, num, text

SAYS = "Joint distributions over the items of a run, an arm each"


def panels(arms: Mapping[str, Sequence[str]], samples: Samples) -> dict[str, list[Panel]]:
    """What the report shows of each ablation; of runs that several share, only the first."""
    found: dict[str, list[Panel]] = {}
    drawn: dict[frozenset[str], str] = {}  # runs -> the ablation that shows theirs
    for ablation, names in arms.items():
        figures, elsewhere = [], []
        for arm in names:
            notes = samples.notes(ablation, arm, "joint")
            chains = samples.chains.get(ablation, {}).get(arm, {}).values()
            runs = frozenset(r.id for chain in chains for r in chain.records if "joint" in r.provenance)
            if notes and drawn.setdefault(runs, ablation) == ablation:
                figures.append(_summed(file_name(ablation, "joint", arm), arm, notes))
            elif notes:
                elsewhere.append(arm)
        if figures or elsewhere:
            told = f"The runs of {', '.join(elsewhere)} are those of an earlier ablation, which shows theirs."
            found[ablation] = [Panel(SAYS, tuple(figures), folded=True, note=told if elsewhere else "")]
    return found


def _summed(name: str, arm: str, notes: Sequence[Mapping[str, Any]]) -> Figure:
    """The counts of all seeds together, whose bins are the same."""
    rows = zip(*(note["counts"] for note in notes), strict=True)
    first = notes[0]
    return joint_figure(
        name,
        f"{arm}: {first['title']}",
        x_edges=first["x_edges"],
        y_edges=first["y_edges"],
        counts=[[sum(cells) for cells in zip(*row, strict=True)] for row in rows],
        x_label=first["x_label"],
        y_label=first["y_label"],
    )


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
        yield from heading(title)
        yield '<g class="cell">'
        for i, row in enumerate(counts):
            for j, count in enumerate(row):
                if count:
                    shade = 0.08 + 0.92 * math.log1p(count) / math.log1p(most)
                    place = f"M{num(LEFT + j * width)} {num(floor - (i + 1) * height)}"
                    tip = f"{_bin(x_edges, j)}; {_bin(y_edges, i)}: {count / total:.2%}"
                    box = f'd="{place}h{num(width)}v{num(height)}h-{num(width)}z" fill-opacity="{shade:.2f}"'
                    yield f"<path {box}><title>{tip}</title></path>"
        yield "</g>"
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
        yield text(2, TOP - 7, y_label, "tick")

    positive = sum(sum(row[j] for j in range(len(row)) if j > 0 and x_edges[j - 1] >= 0) for row in counts)
    share = f"{positive / total:.0%} of {total} right of the middle" if total else "none"
    return figure(name, f"{title}: {y_label} against {x_label}, {share}.", width=WIDTH, height=HEIGHT, parts=draw())


def _bin(edges: Sequence[float], index: int) -> str:
    if index == 0:
        return f"below {edges[0]:g}"
    return f"from {edges[-1]:g}" if index == len(edges) else f"{edges[index - 1]:g} to {edges[index]:g}"

"""A profile of predicted moments as a table and as a figure."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence

import numpy as np
from rich.table import Table

from retrace.core.svg import NUM_COLOURS, Figure, figure, line, num, number, polyline, shorten, text, tick_places, ticks
from retrace.papers.deepscalelm.correlations import Array
from retrace.papers.deepscalelm.recursion import Profile

WIDTH, HEIGHT = 300.0, 216.0  # of a panel
LEFT, RIGHT, TOP, BOTTOM = 46.0, 10.0, 30.0, 28.0
PANELS: Sequence[tuple[str, Callable[[Profile], Array]]] = (
    ("variance of the residual", lambda profile: profile.var),
    ("correlation of positions", lambda profile: profile.corr),
    ("variance of the gradient", lambda profile: profile.grad_var),
    ("correlation of gradients", lambda profile: profile.grad_corr),
)
_POINTS = 400  # of a line at most


def table(profile: Profile, *, title: str, rows: int, sub_blocks: bool = False) -> Table:
    """A row for the embeddings and for each layer's end (or each sub-block), thinned out evenly to about `rows`."""
    shown = [
        i for i, place in enumerate(profile.places) if sub_blocks or place.endswith(("embeddings", "feed_forward"))
    ]
    if len(shown) > rows:
        shown = [shown[i] for i in np.unique(np.linspace(0, len(shown) - 1, rows).round().astype(int))]
    made = Table("behind", title=title, title_justify="left", box=None)
    for name in ("variance", "correlation", "of the branch", "gradient variance", "its correlation"):
        made.add_column(name, justify="right")
    columns = (profile.var, profile.corr, profile.branch_var, profile.grad_var, profile.grad_corr)
    for i in shown:
        label = profile.places[i] if sub_blocks else profile.places[i].replace(".feed_forward", "")
        made.add_row(label, *("" if np.isnan(column[i]) else f"{column[i]:.4g}" for column in columns))
    return made


def profile_figure(profiles: Mapping[str, Profile]) -> Figure:
    """Four panels over the places of the model, a line for each profile; logarithmic where values span decades."""

    def draw() -> Iterator[str]:
        for index, (title, values) in enumerate(PANELS):
            x, y = index % 2 * WIDTH, index // 2 * HEIGHT
            yield f'<g transform="translate({num(x)} {num(y)})">'
            yield from _panel(title, [values(profile) for profile in profiles.values()])
            yield "</g>"
        for index, name in enumerate(profiles):
            x, y = 10 + index % 3 * 200, 2 * HEIGHT + 14 + index // 3 * 18
            yield line(x, y - 4, x + 22, y - 4, f"curve c{index % NUM_COLOURS}")
            yield text(x + 28, y, shorten(name, 26), "strong")

    spoken = "; ".join(f"{name}: {_spoken(profile)}" for name, profile in profiles.items())
    height = 2 * HEIGHT + 10 + 18 * (1 + (len(profiles) - 1) // 3)
    alt = f"Predicted moments along the residual stream. {spoken}."
    return figure("moments", alt, width=2 * WIDTH, height=height, parts=draw())


def _spoken(profile: Profile) -> str:
    return (
        f"variance {profile.var[0]:.3g} to {profile.var[-1]:.3g}, correlation {profile.corr[0]:.3g} to "
        f"{profile.corr[-1]:.3g}, gradient variance {profile.grad_var[0]:.3g} at the bottom"
    )


def _panel(title: str, lines: Sequence[Array]) -> Iterator[str]:
    positive = np.concatenate([values[values > 0] for values in lines])
    logarithmic = positive.size > 0 and positive.max() / positive.min() > 30 and title.startswith("variance")
    shown = [np.log10(np.where(values > 0, values, np.nan)) if logarithmic else values for values in lines]
    every = np.concatenate(shown)
    low, high = float(np.nanmin(every)), float(np.nanmax(every))
    air = (high - low) * 0.07 or abs(low) * 0.1 or 1.0
    low, high = low - air, high + air

    def y(value: float) -> float:
        return HEIGHT - BOTTOM - (value - low) / (high - low) * (HEIGHT - BOTTOM - TOP)

    yield text(2, 15, f"log10 of {title}" if logarithmic else title, "title")
    marks = ticks(low, high)
    for mark in marks:
        yield line(LEFT, y(mark), WIDTH - RIGHT, y(mark), "grid")
        yield text(LEFT - 6, y(mark) + 3.8, number(mark, tick_places(marks)), "tick", anchor="end")
    for index, values in enumerate(shown):
        kept = np.unique(np.linspace(0, len(values) - 1, _POINTS).round().astype(int))
        step = (WIDTH - LEFT - RIGHT) / max(1, len(values) - 1)
        points = [(LEFT + i * step, y(float(values[i]))) for i in kept if np.isfinite(values[i])]
        yield polyline(points, f"curve c{index % NUM_COLOURS}")
    yield text(LEFT, HEIGHT - 10, "embeddings", "tick")
    yield text(WIDTH - RIGHT, HEIGHT - 10, "last layer", "tick", anchor="end")

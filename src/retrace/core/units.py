"""Words for people: time, SI prefixes, and lines on a console."""

from __future__ import annotations

from rich.console import Console


def say(console: Console, text: str) -> None:
    """Print a text as it is: brackets are no markup, numbers have no colours, and a terminal wraps it itself."""
    console.print(text, highlight=False, markup=False, soft_wrap=True)


def duration(seconds: float | None) -> str:
    """'123 days', '1h 02m', '3m 20s', '12s', or '-' for what is not known."""
    if seconds is None:
        return "-"
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    if hours >= 100:
        return f"{hours / 24:,.0f} days"
    if hours:
        return f"{hours}h {minutes:02d}m"
    return f"{minutes}m {rest:02d}s" if minutes else f"{rest}s"


def si(value: float) -> str:
    """'1.2M', '3.4G': three digits with an SI prefix."""
    for factor, unit in ((1e21, "Z"), (1e18, "E"), (1e15, "P"), (1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k")):
        if value >= factor:
            return f"{value / factor:.3g}{unit}"
    return f"{value:.3g}"

"""The templates of the generated pages: one style, and what text needs to stay text in HTML and in Markdown."""

from __future__ import annotations

import re
from collections.abc import Iterable
from functools import lru_cache
from html import escape
from pathlib import Path
from typing import Any

from retrace.core.reportruns import Run
from retrace.core.svg import STYLE
from retrace.core.units import duration, si
from retrace.core.verdictfigures import numbers
from retrace.core.verdicts import JUDGED, OUTCOMES

TEMPLATES = Path(__file__).parent / "templates"
OUTCOME_SYMBOLS = dict(zip(OUTCOMES, ("\u2713", "\u2197", "\u2717", "?", "\u2013", "\u2013"), strict=True))


@lru_cache(maxsize=1)
def environment() -> Any:
    """The templates of all pages, with the filters that they use."""
    import jinja2

    templates = jinja2.Environment(
        loader=jinja2.FileSystemLoader(TEMPLATES),
        autoescape=lambda name: (name or "").endswith(".html.j2"),
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )
    templates.filters |= {
        "md": markdown,
        "code": _code,
        "si": _si,
        "arrow": _arrow,
        "duration": duration,
        "word": _word,
        "cells": _cells,
        "md_cells": _markdown_cells,
        "ledger_row": _ledger_row,
        "md_ledger_row": _markdown_ledger_row,
        "plain": _plain,
        "hours": _hours,
        "numbers": numbers,
    }
    style = (TEMPLATES / "page.css").read_text() + STYLE
    templates.globals |= {"symbols": OUTCOME_SYMBOLS, "style": style, "outcomes": OUTCOMES, "judged_outcomes": JUDGED}
    return templates


def markdown(content: object) -> str:
    """Text that stays text in Markdown, in a table as well."""
    escaped = re.sub(r"([\\`*_\[\]|~#])", r"\\\1", str(content).replace("&", "&amp;").replace("<", "&lt;"))
    return " ".join(escaped.split())


def _cells(cells: Iterable[tuple[str, str | None]]) -> Any:
    """Table cells, each a number that leads to its run, or why there is none. A report has up to 100,000 of them."""
    from markupsafe import Markup

    return Markup(
        "".join(
            f'<td><a href="#{run}">{escape(text)}</a></td>'
            if run
            else f'<td><span class="soft">{escape(text)}</span></td>'
            for text, run in cells
        )
    )


def _markdown_cells(cells: Iterable[tuple[str, str | None]]) -> str:
    """The same in a Markdown table."""
    return "".join(f" [{text}][{run}] |" if run else f" {text} |" for text, run in cells)


def _ledger_row(run: Run) -> Any:
    """A run in the table of every run; like the cells, of thousands of rows a template would take its time for each."""
    from markupsafe import Markup

    links = "".join(f' <a href="{escape(link.href)}">{escape(_plain(link.name))}</a>' for link in run.pages)
    return Markup(
        f'<tr id="{run.anchor}"><th scope="row"><a href="records/{run.id}.json">{run.id}</a>{links}</th>'
        f"<td><code>{escape(run.command)}</code></td><td>{run.users}</td><td>{run.status}</td>"
        f"<td>{duration(run.seconds)}</td></tr>"
    )


def _markdown_ledger_row(run: Run) -> str:
    """The same in Markdown."""
    links = "".join(f", [{markdown(_plain(link.name))}]({link.href})" for link in run.pages)
    cells = (f"[{run.id}](records/{run.id}.json){links}", _code(run.command), run.users, run.status)
    return f"| {' | '.join(map(str, cells))} | {duration(run.seconds)} |"


def _arrow(content: str) -> str:
    """ASCII arrows of the claims file as arrows."""
    return content.replace("->", "\u2192")


def _code(content: object) -> str:
    """A code span; a bar would end a table's cell."""
    return "`" + " ".join(str(content).replace("`", "'").replace("|", "\\|").split()) + "`"


def _si(value: float | None) -> str:
    return "\u2013" if value is None else si(value)


def _word(outcome: str) -> str:
    """An outcome as one word, for classes of the style sheet."""
    return outcome.replace(" ", "-")


def _plain(name: str) -> str:
    """A name from a config, for reading."""
    return name.replace("_", " ")


def _hours(value: float | None) -> str:
    return "not known" if value is None else f"{value:,.0f}" if value >= 100 else f"{value:.2g}"

"""Records and claims to REPORT.md and one self-contained index.html, beside the records that every number links to.

    build_report(paper, claims=..., ablations=..., records=..., scale="laptop", now=..., out=Path("results/<slug>"))

`render` is pure: the same values give the same bytes. No network, no clock, nothing that is not in the records.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from statistics import median
from typing import Any

from rich.console import Console
from rich.table import Table
from rich.text import Text

from retrace.core.claims import Claim
from retrace.core.figures import forest_figure
from retrace.core.paper import Paper
from retrace.core.plan import Ablation
from retrace.core.record import Record
from retrace.core.reportview import gaps, main_pages, page_links, summary, view_ablation, view_verdict
from retrace.core.samples import Planned, Samples
from retrace.core.svg import STYLE
from retrace.core.units import duration, si
from retrace.core.verdicts import OUTCOMES, Verdict, judge

TEMPLATES = Path(__file__).parent / "templates"
SYMBOLS = dict(zip(OUTCOMES, ("\u2713", "\u2197", "\u2717", "?", "\u2013", "\u2013"), strict=True))
_COLOURS = dict(zip(OUTCOMES, ("green", "blue", "red", "yellow", "dim", "dim"), strict=True))


@dataclass(frozen=True)
class ProgramCost:
    """What the runs of one program used; None where no run says."""

    program: str
    runs: int
    seconds: float | None
    tokens: float | None
    flops: float | None
    mfu: float | None


def build_report(
    paper: Paper,
    *,
    claims: Sequence[Claim],
    ablations: Sequence[Ablation],
    records: Iterable[Record],
    scale: str,
    now: datetime,
    out: Path,
    planned: Sequence[Planned] = (),
) -> tuple[Verdict, ...]:
    """Judge every claim at one scale and write REPORT.md, index.html and figures/ into `out`.

    `planned`: the runs that the ablation files ask for today; only their records count for their labels, and those
    without a result are named in the report. Figures of an earlier report are removed. Of the pages that records name,
    those that lie in `out`/pages are linked.
    """
    samples = Samples(records, scale=scale, planned=planned)
    verdicts = tuple(judge(claim, samples) for claim in claims)
    pages = frozenset(path.name for path in (out / "pages").glob("*.html"))
    files = render(paper, verdicts=verdicts, ablations=ablations, samples=samples, now=now, pages=pages)
    (out / "figures").mkdir(parents=True, exist_ok=True)
    for old in (out / "figures").glob("*.svg"):
        if f"figures/{old.name}" not in files:
            old.unlink()
    for name, content in files.items():
        (out / name).write_text(content, encoding="utf-8")
    return verdicts


def render(
    paper: Paper,
    *,
    verdicts: Sequence[Verdict],
    ablations: Sequence[Ablation],
    samples: Samples,
    now: datetime,
    pages: frozenset[str],
) -> dict[str, str]:
    """Every file of a report: relative path -> content. `pages`: files beside it that records may name."""
    wanted: dict[str, list[str]] = {}
    for verdict in verdicts:
        wanted.setdefault(verdict.claim.ablation, []).extend(metric for _, metric in verdict.claim.cells)
    everywhere = [metric for metrics in wanted.values() for metric in metrics]
    views = [
        view_ablation(ablation, samples, own=wanted.get(ablation.name, ()), others=everywhere) for ablation in ablations
    ]
    overview = forest_figure(verdicts)
    page: dict[str, Any] = {
        "paper": paper,
        "scale": samples.scale,
        "now": now.strftime("%Y-%m-%d %H:%M %Z").strip(),
        "summary": summary(verdicts, scale=samples.scale),
        "counts": {outcome: sum(v.outcome == outcome for v in verdicts) for outcome in OUTCOMES},
        "verdicts": [view_verdict(verdict) for verdict in verdicts],
        "overview": overview,
        "ablations": views,
        "main_pages": main_pages(ablations, samples, pages),
        "gaps": gaps(ablations, samples),
        "samples": samples,
        "costs": _costs(samples.used),
        "origin": _origin(samples.used),
    }
    environment = _environment()
    environment.filters["pages"] = lambda record: page_links(record, pages)
    figures = [
        overview,
        *(figure for view in views for figure in (*view.figures, *view.curves, *view.profiles, *view.joints)),
    ]
    files = {f"figures/{figure.name}.svg": figure.standalone() for figure in figures}
    files["REPORT.md"] = re.sub(r"\n{3,}", "\n\n", environment.get_template("report.md.j2").render(page))
    files["index.html"] = environment.get_template("index.html.j2").render(page)
    return files


def _environment() -> Any:
    import jinja2

    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(TEMPLATES),
        autoescape=lambda name: (name or "").endswith(".html.j2"),
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )
    environment.filters |= {
        "md": _markdown,
        "code": _code,
        "si": _si,
        "arrow": _arrow,
        "duration": duration,
        "anchor": _anchor,
    }
    style = (TEMPLATES / "page.css").read_text() + STYLE
    environment.globals |= {"symbols": SYMBOLS, "style": style, "outcomes": OUTCOMES}
    return environment


def _markdown(content: object) -> str:
    """Text that stays text in Markdown, in a table as well."""
    escaped = re.sub(r"([\\`*_\[\]|~#])", r"\\\1", str(content).replace("&", "&amp;").replace("<", "&lt;"))
    return " ".join(escaped.split())


def _arrow(content: str) -> str:
    """ASCII arrows of the claims file as arrows."""
    return content.replace("->", "\u2192")


def _code(content: object) -> str:
    """A code span; a bar would end a table's cell."""
    return "`" + " ".join(str(content).replace("`", "'").replace("|", "\\|").split()) + "`"


def _si(value: float | None) -> str:
    return "\u2013" if value is None else si(value)


def _anchor(outcome: str) -> str:
    return outcome.replace(" ", "-")


def _total(values: Iterable[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return sum(known) if known else None


def _costs(records: Sequence[Record]) -> list[ProgramCost]:
    """What the runs used, by program, and for all of them in the last entry."""
    programs = dict.fromkeys(record.program for record in records)
    groups = [(program, [r for r in records if r.program == program]) for program in programs]
    costs = []
    for program, runs in [*groups, ("all runs", list(records))]:
        used = [run.cost for run in runs]
        rates = [cost.mfu for cost in used if cost.mfu is not None]
        totals = (_total(c.seconds for c in used), _total(c.tokens for c in used), _total(c.flops for c in used))
        costs.append(ProgramCost(program, len(runs), *totals, median(rates) if rates else None))
    return costs


def _origin(records: Sequence[Record]) -> dict[str, str]:
    """Where the records come from: each distinct value that their provenance holds."""

    def all_of(key: str) -> str:
        return ", ".join(sorted({str(r.provenance[key]) for r in records if r.provenance.get(key) is not None}))

    packages: dict[str, set[str]] = {}
    for record in records:
        for name, version in (record.provenance.get("packages") or {}).items():
            packages.setdefault(name, set()).add(str(version))
    dirty = sum(bool(record.provenance.get("dirty")) for record in records)
    finished = sorted(str(r.provenance["finished"]) for r in records if r.provenance.get("finished"))
    origin = {
        "Hardware": all_of("hardware"),
        "Platform": all_of("platform"),
        "Python": all_of("python"),
        "Packages": ", ".join(f"{name} {'/'.join(sorted(versions))}" for name, versions in sorted(packages.items())),
        "Code (git)": all_of("git") + (f"; {dirty} of {len(records)} runs with uncommitted changes" if dirty else ""),
        "Recipe": ", ".join(sorted({str(record.recipe) for record in records})),
        "Finished": " to ".join(dict.fromkeys((finished[0], finished[-1]))) if finished else "",
    }
    return {name: value for name, value in origin.items() if value}


def print_verdicts(verdicts: Sequence[Verdict], *, console: Console) -> None:
    """The verdict table in a terminal, with the sentence that sums it up."""
    table = Table(box=None, header_style="bold", pad_edge=False)
    for name in ("verdict", "claim", "paper", "here"):
        table.add_column(name, overflow="fold")
    table.add_column("seeds", justify="right")
    for view in map(view_verdict, verdicts):
        verdict, claim = view.verdict, view.verdict.claim
        shown = Text(f"{SYMBOLS[verdict.outcome]} {verdict.outcome}", style=_COLOURS[verdict.outcome])
        here = view.shown.mean if verdict.estimate is None else f"{view.shown.mean} {view.shown.interval}"
        if verdict.outcome == "inconclusive" and view.detectable:
            here += f" (detectable: {view.detectable})"
        says, paper = Text(f"{claim.says.rstrip('.')} ({claim.locus})"), Text(claim.paper or claim.expected)
        table.add_row(shown, says, paper, Text(here), str(len(verdict.seeds)))
    console.print(table)
    if verdicts:
        console.print(summary(verdicts, scale=verdicts[0].scale), highlight=False, markup=False)

"""A paper's results as REPORT.md and one self-contained index.html, and those of all papers as one page over them.

    report_papers(["<slug>"], scale="laptop", now=..., store=Store(), console=Console())    what `retrace report` does
    build_report(results, scale="laptop", now=..., out=Path("results/<slug>"))
    build_overview([results, ...], now=..., out=Path("results"))

The same values give the same bytes. No network, no clock, nothing that is not in the records.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from datetime import datetime
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table
from rich.text import Text

from retrace.core.discovery import papers
from retrace.core.outlook import Outlook, outlooks
from retrace.core.pages import OUTCOME_SYMBOLS, environment
from retrace.core.plan import Ablation
from retrace.core.reportruns import costs, gaps, ledger, main_pages, origin, origins
from retrace.core.reportview import VerdictView, arms_of, summary, view_ablation, view_verdict
from retrace.core.results import PaperResults, load_results, scales_of
from retrace.core.scales import compare_scales
from retrace.core.store import Store
from retrace.core.svg import Figure
from retrace.core.units import say
from retrace.core.verdictfigures import forest_figure
from retrace.core.verdicts import JUDGED, OUTCOMES, Verdict

_COLOURS = dict(zip(OUTCOMES, ("green", "blue", "red", "yellow", "dim", "dim"), strict=True))


def report_papers(slugs: Sequence[str] | None, *, scale: str, now: datetime, store: Store, console: Console) -> None:
    """Judge papers at a scale, all that have records where none is named; print the verdicts, write the pages.

    A paper whose records are all of other scales keeps the report that it has. Raises ValueError where it is named.
    """
    asked = slugs or [slug for slug in papers() if store.has_records(slug)]
    shown = [slug for slug in papers() if slug in asked or (store.results / slug).is_dir()]
    known = {slug: load_results(slug, store=store, scale=scale if slug in asked else None) for slug in shown}
    without = [slug for slug in asked if known[slug].records and scale not in known[slug].recorded_scales]
    if slugs and without:
        there = ", ".join(known[without[0]].recorded_scales)
        raise ValueError(f"--scale {scale}: {without[0]} has no records of that scale; there are records of: {there}")
    for slug in without:
        say(console, f"{slug}: no records at scale {scale}, so its report stays as it is")
    for slug in [slug for slug in asked if slug not in without]:
        results, out = known[slug], store.results / slug
        store.remove_orphaned_pages(slug)
        outlook = outlooks(slug, results.claims, scales=scales_of(slug), records=results.records)
        build_report(results, scale=scale, now=now, out=out, outlook=outlook)
        print_verdicts(results.verdicts[scale], console=console)
        say(console, f"\nreport: {out / 'index.html'} and REPORT.md beside it")
    build_overview(list(known.values()), now=now, out=store.results)
    say(console, f"all papers: {store.results / 'index.html'} and README.md beside it")


def build_report(
    results: PaperResults, *, scale: str, now: datetime, out: Path, outlook: Sequence[Outlook] = ()
) -> None:
    """Write REPORT.md, index.html and figures/ into `out`, in place of those of an earlier report.

    `outlook`: what was not run. Of the pages that records name, those that lie in `out`/pages are linked.
    """
    samples, verdicts = results.samples[scale], results.verdicts[scale]
    pages = frozenset(path.name for path in (out / "pages").glob("*.html"))
    shown = [view_verdict(verdict) for verdict in verdicts]
    asked = _ablations(results, scale)
    rank = {name: at for at, name in enumerate(dict.fromkeys(claim.ablation for claim in results.claims))}
    ordered = sorted(asked, key=lambda ablation: rank.get(ablation.name, len(rank)))  # as the paper's claims come
    panels = results.paper.draw({ablation.name: arms_of(ablation, samples) for ablation in ordered}, samples)
    views = [
        view_ablation(ablation, results, samples, verdicts=shown, panels=panels.get(ablation.name, ()))
        for ablation in ordered
    ]
    overview = forest_figure([verdict for verdict in verdicts if verdict.outcome in JUDGED])
    looked_at, looks = main_pages(ordered, samples, pages)
    page: dict[str, Any] = _counted(shown, scale) | {
        "paper": results.paper,
        "now": _minute(now),
        "waiting": [view for view in shown if view.verdict.outcome not in JUDGED],
        "overview": overview,
        "ablations": views,
        "looked_at": looked_at,
        "looks": looks,
        "gaps": gaps(asked, samples),
        "outlook": outlook,
        "comparison": compare_scales(results.verdicts),
        "runs": ledger(results.paper.slug, ordered, samples, pages),
        "samples": samples,
        "costs": costs(samples.used),
        "origin": origin(samples.used),
    }
    _write_figures(out / "figures", [overview, *(figure for view in views for figure in view.drawn)])
    _write(out, {"REPORT.md": "report.md.j2", "index.html": "index.html.j2"}, page)


def build_overview(papers: Sequence[PaperResults], *, now: datetime, out: Path) -> None:
    """Write index.html and README.md into `out`, the folder that holds the papers' reports."""
    last = [_last_outcomes(results.judged) for results in papers]
    page = {
        "papers": [
            {
                "paper": results.paper,
                "scales": [_at(results, scale) for scale in results.judged],
                "comparison": compare_scales(results.judged),
            }
            for results in papers
        ],
        "now": _minute(now),
        "reproduced": sum(outcome == "reproduced" for outcomes in last for outcome in outcomes.values()),
        "judged": sum(map(len, last)),
        "without": [results.paper for results in papers if not results.judged],
    }
    out.mkdir(parents=True, exist_ok=True)
    _write(out, {"index.html": "overview.html.j2", "README.md": "overview.md.j2"}, page)


def _ablations(results: PaperResults, scale: str) -> list[Ablation]:
    """Those that are asked at a scale or have runs of it, in the order of their files."""
    ran = results.samples[scale].chains
    return [ablation for ablation in results.ablations if scale in ablation.scales or ablation.name in ran]


def _last_outcomes(verdicts: Mapping[str, Sequence[Verdict]]) -> dict[str, str]:
    """Of each claim that was judged, by id, at the largest scale that judged it."""
    return {v.claim.id: v.outcome for at in verdicts.values() for v in at if v.outcome in JUDGED}


def _at(results: PaperResults, scale: str) -> dict[str, Any]:
    """A paper at one scale, for the overview."""
    runs = [record for record in results.records if record.scale == scale]
    counted = _counted([view_verdict(verdict) for verdict in results.verdicts[scale]], scale)
    hardware, cost = origins(runs, "hardware"), costs(runs)[-1]
    return counted | {"runs": len(runs), "seconds": cost.seconds, "hardware": hardware}


def _counted(views: Sequence[VerdictView], scale: str) -> dict[str, Any]:
    """The verdicts of one scale in a sentence, in numbers, and those that say something of their claim."""
    outcomes = [view.verdict.outcome for view in views]
    return {
        "scale": scale,
        "summary": summary([view.verdict for view in views], scale=scale),
        "counts": {outcome: outcomes.count(outcome) for outcome in OUTCOMES},
        "judged": [view for view in views if view.verdict.outcome in JUDGED],
    }


def _minute(now: datetime) -> str:
    return now.strftime("%Y-%m-%d %H:%M %Z").strip()


def _write_figures(folder: Path, figures: Sequence[Figure]) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    files = {f"{figure.name}.svg": figure.standalone() for figure in figures}
    for old in folder.glob("*.svg"):
        if old.name not in files:
            old.unlink()
    for name, content in files.items():
        (folder / name).write_text(content, encoding="utf-8")


def _write(out: Path, templates: Mapping[str, str], page: Mapping[str, Any]) -> None:
    """`templates`: file -> template. Of the blank lines that the report's Markdown template leaves, one stays."""
    for name, template in templates.items():
        text = environment().get_template(template).render(page)
        if name == "REPORT.md":
            text = re.sub(r"\n{3,}", "\n\n", text)
        (out / name).write_text(text, encoding="utf-8")


def print_verdicts(verdicts: Sequence[Verdict], *, console: Console) -> None:
    """The verdict table in a terminal, with the sentence that sums it up."""
    table = Table(box=None, header_style="bold", pad_edge=False)
    for name in ("verdict", "claim", "paper", "here"):
        table.add_column(name, overflow="fold")
    table.add_column("seeds", justify="right")
    for view in map(view_verdict, verdicts):
        verdict, claim = view.verdict, view.verdict.claim
        shown = Text(f"{OUTCOME_SYMBOLS[verdict.outcome]} {verdict.outcome}", style=_COLOURS[verdict.outcome])
        here = view.shown.mean if verdict.estimate is None else f"{view.shown.mean} {view.shown.interval}"
        if verdict.outcome == "inconclusive" and view.detectable:
            here += f" (detectable: {view.detectable})"
        says, paper = Text(f"{claim.says.rstrip('.')} ({claim.locus})"), Text(claim.paper or "prints no number")
        table.add_row(shown, says, paper, Text(here), str(len(verdict.seeds)))
    console.print(table)
    if verdicts:
        console.print(summary(verdicts, scale=verdicts[0].scale), highlight=False, markup=False)

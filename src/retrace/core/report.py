"""Records and claims to REPORT.md and one self-contained index.html, beside the records that every number leads to.

    build_report(paper, claims=..., ablations=..., records=..., scale="laptop", now=..., out=Path("results/<slug>"))

`render` is pure: the same values give the same bytes. No network, no clock, nothing that is not in the records.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from datetime import datetime
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table
from rich.text import Text

from retrace.core.claims import Claim
from retrace.core.outlook import Outlook
from retrace.core.pages import OUTCOME_SYMBOLS, environment
from retrace.core.paper import Paper
from retrace.core.plan import Ablation
from retrace.core.record import Record
from retrace.core.reportruns import costs, gaps, ledger, main_pages, origin
from retrace.core.reportview import summary, view_ablation, view_verdict
from retrace.core.samples import Planned, Samples
from retrace.core.scales import compare_scales
from retrace.core.verdictfigures import forest_figure
from retrace.core.verdicts import JUDGED, OUTCOMES, Verdict, judge

_COLOURS = dict(zip(OUTCOMES, ("green", "blue", "red", "yellow", "dim", "dim"), strict=True))


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
    words: Mapping[str, str] | None = None,
    outlook: Sequence[Outlook] = (),
    elsewhere: Mapping[str, Sequence[Verdict]] | None = None,
) -> tuple[Verdict, ...]:
    """Judge every claim at one scale and write REPORT.md, index.html and figures/ into `out`.

    `planned`: the runs that the ablation files ask for today; only their records count for their labels, and those
    without a result are named in the report. `words`: what metrics are. `outlook`: what was not run. `elsewhere`: the
    verdicts of all scales that have records, smaller ones first; those of this one are taken from here. Figures of an
    earlier report are removed. Of the pages that records name, those that lie in `out`/pages are linked.
    """
    samples = Samples(records, scale=scale, planned=planned)
    verdicts = tuple(judge(claim, samples) for claim in claims)
    pages = frozenset(path.name for path in (out / "pages").glob("*.html"))
    files = render(
        paper,
        verdicts=verdicts,
        ablations=ablations,
        samples=samples,
        now=now,
        pages=pages,
        words=words or {},
        outlook=outlook,
        elsewhere=dict(elsewhere or {}) | {scale: verdicts},
    )
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
    words: Mapping[str, str],
    outlook: Sequence[Outlook],
    elsewhere: Mapping[str, Sequence[Verdict]],
) -> dict[str, str]:
    """Every file of a report: relative path -> content. `pages`: files beside it that records may name."""
    shown = [view_verdict(verdict) for verdict in verdicts]
    rank = {name: at for at, name in enumerate(dict.fromkeys(verdict.claim.ablation for verdict in verdicts))}
    ordered = sorted(ablations, key=lambda ablation: rank.get(ablation.name, len(rank)))  # as the paper's claims come
    drawn: dict[frozenset[str], str] = {}
    views = [
        view_ablation(
            ablation,
            samples,
            verdicts=[view for view in shown if view.verdict.claim.ablation == ablation.name],
            others=[metric for verdict in verdicts for _, metric in verdict.claim.cells],
            words=words,
            drawn=drawn,
        )
        for ablation in ordered
    ]
    looked_at, looks = main_pages(ordered, samples, pages)
    page: dict[str, Any] = {
        "paper": paper,
        "scale": samples.scale,
        "now": now.strftime("%Y-%m-%d %H:%M %Z").strip(),
        "summary": summary(verdicts, scale=samples.scale),
        "counts": {outcome: sum(v.outcome == outcome for v in verdicts) for outcome in OUTCOMES},
        "judged": [view for view in shown if view.verdict.outcome in JUDGED],
        "waiting": [view for view in shown if view.verdict.outcome not in JUDGED],
        "overview": forest_figure([verdict for verdict in verdicts if verdict.outcome in JUDGED]),
        "ablations": views,
        "looked_at": looked_at,
        "looks": looks,
        "gaps": gaps(ablations, samples),
        "outlook": outlook,
        "comparison": compare_scales(elsewhere),
        "runs": ledger(paper.slug, ordered, samples, pages),
        "samples": samples,
        "costs": costs(samples.used),
        "origin": origin(samples.used),
    }
    templates = environment()
    files = {f"figures/{figure.name}.svg": figure.standalone() for view in views for figure in view.drawn}
    files[f"figures/{page['overview'].name}.svg"] = page["overview"].standalone()
    files["REPORT.md"] = re.sub(r"\n{3,}", "\n\n", templates.get_template("report.md.j2").render(page))
    files["index.html"] = templates.get_template("index.html.j2").render(page)
    return files


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
        says, paper = Text(f"{claim.says.rstrip('.')} ({claim.locus})"), Text(claim.paper or claim.expected)
        table.add_row(shown, says, paper, Text(here), str(len(verdict.seeds)))
    console.print(table)
    if verdicts:
        console.print(summary(verdicts, scale=verdicts[0].scale), highlight=False, markup=False)

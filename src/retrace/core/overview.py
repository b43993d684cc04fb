"""One page for all papers, results/index.html and README.md: which claims came back, and where to read why."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Any

from retrace.core.pages import environment
from retrace.core.paper import Paper
from retrace.core.record import Record
from retrace.core.reportruns import costs, origin
from retrace.core.reportview import VerdictView, summary, view_verdict
from retrace.core.scales import Comparison, compare_scales
from retrace.core.verdicts import JUDGED, OUTCOMES, Verdict


@dataclass(frozen=True)
class Judged:
    """A paper, its verdicts at every scale that has records, smaller ones first, and all of its records."""

    paper: Paper
    verdicts: Mapping[str, Sequence[Verdict]]
    records: Sequence[Record]


@dataclass(frozen=True)
class ScaleView:
    """A paper at one scale, ready to be laid out."""

    scale: str
    summary: str
    counts: Mapping[str, int]
    judged: tuple[VerdictView, ...]
    runs: int
    seconds: float | None
    hardware: str


@dataclass(frozen=True)
class PaperView:
    paper: Paper
    scales: tuple[ScaleView, ...]
    comparison: Comparison | None


def build_overview(papers: Sequence[Judged], *, now: datetime, out: Path) -> None:
    """Write index.html and README.md into `out`, the folder that holds the papers' reports."""
    views = [_view(judged) for judged in papers]
    last = [_last_outcomes(judged.verdicts) for judged in papers]
    page: dict[str, Any] = {
        "papers": views,
        "now": now.strftime("%Y-%m-%d %H:%M %Z").strip(),
        "reproduced": sum(outcome == "reproduced" for outcomes in last for outcome in outcomes.values()),
        "judged": sum(map(len, last)),
        "without": [view.paper for view in views if not view.scales],
    }
    templates = environment()
    out.mkdir(parents=True, exist_ok=True)
    for name, template in (("index.html", "overview.html.j2"), ("README.md", "overview.md.j2")):
        (out / name).write_text(templates.get_template(template).render(page), encoding="utf-8")


def _last_outcomes(verdicts: Mapping[str, Sequence[Verdict]]) -> dict[str, str]:
    """Of each claim that was judged, by id, at the largest scale that judged it."""
    return {v.claim.id: v.outcome for at in verdicts.values() for v in at if v.outcome in JUDGED}


def _view(judged: Judged) -> PaperView:
    scales = tuple(_at(scale, verdicts, judged.records) for scale, verdicts in judged.verdicts.items())
    return PaperView(judged.paper, scales, compare_scales(judged.verdicts))


def _at(scale: str, verdicts: Sequence[Verdict], records: Sequence[Record]) -> ScaleView:
    runs = [record for record in records if record.scale == scale]
    return ScaleView(
        scale=scale,
        summary=summary(verdicts, scale=scale),
        counts={outcome: sum(verdict.outcome == outcome for verdict in verdicts) for outcome in OUTCOMES},
        judged=tuple(view_verdict(verdict) for verdict in verdicts if verdict.outcome in JUDGED),
        runs=len(runs),
        seconds=costs(runs)[-1].seconds,
        hardware=origin(runs).get("Hardware", ""),
    )

"""The W&B workspace and report of a paper, as code: built and validated without an account, saved by core/upload.py.

A paper prints differences between arms, so its line in a panel is the level that an arm would have at that difference:
a run of its own (`printed`), since W&B draws no line that no run has logged. Panels of samples have the seed on the x
axis: every sample is a point, and what the paper prints a horizontal line.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from retrace.core.claims import Claim
from retrace.core.mirrors import Card
from retrace.core.pages import OUTCOME_SYMBOLS, markdown
from retrace.core.plan import Ablation
from retrace.core.record import Label
from retrace.core.reportview import DIAGNOSTICS, summary, view_verdict
from retrace.core.results import PaperResults
from retrace.core.stats import estimate
from retrace.core.verdicts import Verdict

PRINTED = "printed"  # the job type of runs that carry what a paper prints
MAX_CURVES = 3  # of one program in one ablation; the workspace of W&B adds others by hand
MAX_LINES = 100


@dataclass(frozen=True)
class Printed:
    """What a paper prints of a claim, as a level: the mean of the arm that is compared against, and the difference."""

    claim: Claim
    scale: str
    arm: str  # what the line is called
    metric: str
    level: float
    seeds: tuple[int, ...]


@dataclass(frozen=True)
class Board:
    """What W&B is to show of a paper: objects of wandb_workspaces, whose models have been made once and are valid."""

    workspace: Any
    report: Any
    num_panels: int


def printed_levels(verdicts: Iterable[Verdict]) -> list[Printed]:
    """Of the claims with a printed difference and seeds on record, at the scale of each verdict."""
    found = []
    for verdict in verdicts:
        claim = verdict.claim
        if claim.value is None or claim.compare is None or claim.beyond is not None or not verdict.differences:
            continue
        against = estimate(verdict.arms[1].values[seed] for seed in verdict.seeds)
        assert against is not None
        arm = f"paper: {claim.compare[1]} {claim.expect.value:+g}" + " points" * (claim.expect.unit == "points")
        found.append(
            Printed(claim, verdict.scale, arm, claim.cells[0][1], against.mean + claim.value, verdict.seeds),
        )
    return found


def build_board(results: PaperResults, *, entity: str, project: str) -> Board:
    """The workspace and the report of a paper, at the scales that judge claims, or else at all of its records."""
    import wandb_workspaces.reports.v2 as wr
    import wandb_workspaces.workspaces as ws

    paper, verdicts = results.paper, results.judged
    shown = list(verdicts) or results.recorded_scales
    blocks: list[Any] = [
        wr.P(["arXiv ", wr.Link(text=paper.arxiv, url=f"https://arxiv.org/abs/{paper.arxiv}"), ". Written by ",
              wr.InlineCode(text=f"retrace publish {paper.slug}"), " from recorded runs; it writes this page anew, so "
              "keep notes elsewhere."]),
        wr.TableOfContents(),
    ]  # fmt: skip
    sections: list[Any] = []
    num_panels = 0
    for scale in shown:
        judged = verdicts.get(scale, ())
        blocks += [wr.H1(f"Scale {scale}"), wr.P(summary(judged, scale=scale))]
        blocks += [wr.MarkdownBlock(verdict_table(judged))] if judged else []
        for ablation in _ordered(results.ablations, judged):
            grids = list(_grids(results, ablation, scale, judged))
            if grids:
                blocks += [wr.H2(ablation.question), wr.P(f"Ablation {ablation.name}, {ablation.locus}.")]
                blocks += [wr.PanelGrid(runsets=[runset], panels=panels) for runset, panels in grids]
                num_panels += sum(len(panels) for _, panels in grids)
                # A panel belongs to one place, so the workspace has its own ones.
                again = _grids(results, ablation, scale, judged)
                panels = [panel for _, made in again for panel in made]
                sections.append(ws.Section(name=f"{ablation.name} ({scale})", panels=panels, is_open=not sections))
    report = wr.Report(
        project=project,
        entity=entity,
        title=f"{paper.title}: reproduction"[:128],
        description=f"Every claim of the paper with its verdict and the runs behind it (retrace, {paper.slug})",
        blocks=blocks,
        width="fluid",
    )
    workspace = ws.Workspace(
        entity=entity,
        project=project,
        name=f"retrace {paper.slug}",
        sections=sections,
        runset_settings=ws.RunsetSettings(
            filters=[ws.Config("paper") == paper.slug],
            pinned_columns=["run:displayName", "run:state", "run:jobType", "config:scale.value", "config:seed.value"],
        ),
    )
    for made in (report, workspace):
        made._to_model().model_dump_json(by_alias=True, exclude_none=True)  # what save() sends; raises where it can't
    return Board(workspace, report, num_panels)


def _ordered(ablations: Sequence[Ablation], verdicts: Sequence[Verdict]) -> list[Ablation]:
    """Those with claims first, in the claims' order."""
    rank = {name: at for at, name in enumerate(dict.fromkeys(verdict.claim.ablation for verdict in verdicts))}
    return sorted(ablations, key=lambda ablation: rank.get(ablation.name, len(rank)))


def _grids(
    results: PaperResults, ablation: Ablation, scale: str, verdicts: Sequence[Verdict]
) -> Iterable[tuple[Any, list[Any]]]:
    """For each program of an ablation that has something to show: the set of its runs, and panels."""
    import wandb_workspaces.reports.v2 as wr
    from wandb_workspaces import expr

    slug, words = results.paper.slug, results.words
    asked = [r for r in results.records if ablation.name in (Label.parse(label).ablation for label in r.labels)]
    runs = [r for r in asked if r.scale == scale]
    claimed = [
        (metric, next(iter(arm.samples.values())).record.program)
        for verdict in verdicts
        if verdict.claim.ablation == ablation.name
        for arm, (_, metric) in zip(verdict.arms, verdict.claim.cells, strict=True)
        if arm.samples
    ]
    for program in dict.fromkeys(record.program for record in runs):
        own = [record for record in runs if record.program == program]
        if len({Card.of(record).config["arms"][ablation.name] for record in own}) == 1:
            continue  # one arm, or a base that all arms share: nothing to compare
        metrics = list(dict.fromkeys(metric for metric, where in claimed if where == program))
        if not claimed:
            metrics = [metric for metric in words if any(metric in record.metrics for record in own)][:2]
        curves = {name for record in own for name in record.series if not name.startswith(DIAGNOSTICS)}
        drawn = [name for name in words if name in curves][:MAX_CURVES]
        panels = [*_samples(wr, metrics, ablation.name, words), *_curves(wr, drawn, ablation.name, words)]
        if panels:
            chosen = [
                expr.Config("paper") == slug,
                expr.Config("scale") == scale,
                expr.Metric("JobType").isin([program, PRINTED]),
                expr.Tags().isin([ablation.name]),
            ]
            yield wr.Runset(name=f"{ablation.name}, {program}, {scale}", filters=chosen), panels


def _samples(wr: Any, metrics: Sequence[str], ablation: str, words: Mapping[str, str]) -> Iterable[Any]:
    """Every sample over its seed, and the mean of every arm."""
    arm = wr.Config(f"arms.{ablation}")
    for metric in metrics:
        grouped = {"groupby": arm, "groupby_aggfunc": "mean", "max_runs_to_show": MAX_LINES}
        title = words.get(metric, metric)
        yield wr.LinePlot(
            title=title, x="seed", y=[metric], title_x="seed", title_y=metric, groupby_rangefunc="none",
            layout=wr.Layout(w=12, h=8), **grouped,
        )  # fmt: skip
        yield wr.BarPlot(
            title=f"{title}: mean of seeds", metrics=[metric], groupby_rangefunc="stddev", max_bars_to_show=MAX_LINES,
            layout=wr.Layout(w=12, h=8), **grouped,
        )  # fmt: skip


def _curves(wr: Any, names: Sequence[str], ablation: str, words: Mapping[str, str]) -> Iterable[Any]:
    """Over the steps of training: the mean of every arm's seeds, and their range."""
    for name in names:
        yield wr.LinePlot(
            title=words.get(name, name), x="step", y=[name], title_x="step", title_y=name,
            groupby=wr.Config(f"arms.{ablation}"), groupby_aggfunc="mean", groupby_rangefunc="minmax",
            max_runs_to_show=MAX_LINES, layout=wr.Layout(w=8, h=7),
        )  # fmt: skip


def verdict_table(verdicts: Sequence[Verdict]) -> str:
    """Every claim with its verdict, in Markdown; the same order and the same numbers as in REPORT.md."""
    lines = ["| verdict | claim | the paper says | came out here | seeds |", "|---|---|---|---|--:|"]
    for view in map(view_verdict, verdicts):
        verdict, claim = view.verdict, view.verdict.claim
        here = f"**{view.shown.mean}** {markdown(f'{view.shown.interval}: {view.told}')}"
        told = [
            f"{OUTCOME_SYMBOLS[verdict.outcome]} **{verdict.outcome}**",
            f"{markdown(claim.says)} ({markdown(claim.locus)})",
            f"{markdown(claim.paper or 'prints no number')}; expected {claim.expected}",
            here if verdict.estimate else markdown(verdict.reason),
            str(len(verdict.seeds)),
        ]
        lines.append(f"| {' | '.join(told)} |")
    return "\n".join(lines)

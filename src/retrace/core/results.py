"""From what is on disk to a report: a paper's claims, ablations, planned runs and records, at one scale."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from functools import lru_cache

from rich.console import Console

from retrace.core.claims import Claim, load_claims, load_words
from retrace.core.config import CONFIGS, SCALES, papers
from retrace.core.outlook import outlooks
from retrace.core.overview import Judged, build_overview
from retrace.core.paper import load_paper
from retrace.core.plan import RunSpec, load_ablations, plan
from retrace.core.report import build_report, print_verdicts
from retrace.core.samples import Planned
from retrace.core.store import Store
from retrace.core.verdicts import Verdict, judge_all


def report(slug: str, *, scale: str, store: Store, console: Console) -> tuple[Verdict, ...]:
    """Judge, print, and write REPORT.md and index.html into results/<slug>. Raises ValueError for an unknown scale."""
    paper, known = load_paper(slug), _scales(slug)
    if scale not in known:
        raise ValueError(f"--scale {scale}: {slug} has no such scale; there are: {', '.join(known)}")
    ablations, claims, records = load_ablations(slug), _claims(slug), store.records(slug)
    store.remove_orphaned_pages(slug)
    ran = {label.partition("/")[0] for record in records if record.scale == scale for label in record.labels}
    verdicts = build_report(
        paper,
        claims=claims,
        ablations=[ablation for name, ablation in ablations.items() if scale in ablation.scales or name in ran],
        records=records,
        scale=scale,
        now=datetime.now(UTC),
        out=store.results / slug,
        planned=planned_runs(slug, scale=scale, store=store),
        words=load_words(CONFIGS / slug / "metrics.yaml"),
        outlook=outlooks(slug, claims, scales=known, store=store),
        elsewhere=_verdicts(slug, claims, store=store),
    )
    print_verdicts(verdicts, console=console)
    console.print(f"\nreport: {store.results / slug / 'index.html'} and REPORT.md beside it", soft_wrap=True)
    return verdicts


def overview(*, store: Store, console: Console) -> None:
    """Write results/index.html and README.md: every paper, at every scale that has records."""
    judged = [
        Judged(load_paper(slug), _verdicts(slug, _claims(slug), store=store), tuple(store.records(slug)))
        for slug in papers()
    ]
    build_overview(judged, now=datetime.now(UTC), out=store.results)
    console.print(f"all papers: {store.results / 'index.html'} and README.md beside it", soft_wrap=True)


def judged(slug: str, *, store: Store) -> Mapping[str, tuple[Verdict, ...]]:
    """The verdicts of a paper at every scale that judges claims and has records, smaller scales first."""
    return _verdicts(slug, _claims(slug), store=store)


def _claims(slug: str) -> tuple[Claim, ...]:
    arms = {name: ablation.arms.keys() for name, ablation in load_ablations(slug).items()}
    return load_claims(CONFIGS / slug / "claims.yaml", arms=arms)


def _scales(slug: str) -> list[str]:
    """The scales that a paper has, smaller ones first."""
    return [name for name in SCALES if (CONFIGS / slug / "scale" / f"{name}.yaml").is_file()]


def _verdicts(slug: str, claims: Sequence[Claim], *, store: Store) -> Mapping[str, tuple[Verdict, ...]]:
    """The verdicts of every scale that judges claims and has records."""
    records = store.records(slug)
    judging = {scale for claim in claims for scale in claim.testable_at} & {record.scale for record in records}
    return {
        scale: judge_all(claims, records, scale=scale, planned=planned_runs(slug, scale=scale, store=store))
        for scale in _scales(slug)
        if scale in judging
    }


def planned_runs(slug: str, *, scale: str, store: Store) -> list[Planned]:
    """What the ablation files ask for today, and how far it is; a run recorded elsewhere counts as it was recorded."""
    recorded = {record.id: record.status for record in store.records(slug)}
    runs = []
    for spec in _specs(slug, scale):
        state = store.run(spec.id).state()
        status = recorded.get(spec.id, state.status)
        reason = "" if spec.id in recorded else state.reason
        runs.append(Planned(spec.id, spec.program, spec.labels, status, reason, spec.accepts_diverged))
    return runs


@lru_cache(maxsize=16)
def _specs(slug: str, scale: str) -> tuple[RunSpec, ...]:
    """Composing a paper takes seconds, and a report and the overview ask for the same."""
    return tuple(plan([slug], [f"scale={scale}"]))

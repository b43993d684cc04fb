"""From what is on disk to a report: a paper's claims, ablations, planned runs and records, at one scale."""

from __future__ import annotations

from collections.abc import Sequence
from datetime import UTC, datetime
from functools import lru_cache

from rich.console import Console

from retrace.core import power
from retrace.core.claims import Claim, load_claims, load_words
from retrace.core.config import SCALES
from retrace.core.discovery import configs_of
from retrace.core.outlook import outlooks
from retrace.core.overview import Judged, build_overview
from retrace.core.paper import load_paper
from retrace.core.plan import RunSpec, load_ablations, plan
from retrace.core.planview import cost_of, expected_times, records_of
from retrace.core.record import Record
from retrace.core.report import build_report, print_verdicts
from retrace.core.samples import Planned
from retrace.core.store import State, Store
from retrace.core.verdicts import Verdict, judge_all


def judge_paper(slug: str, *, store: Store) -> Judged:
    """A paper's records, read once, and its verdicts at every scale that judges claims and has records."""
    claims, records = _claims(slug), store.records(slug)
    judging = {scale for claim in claims for scale in claim.testable_at} & {record.scale for record in records}
    verdicts: dict[str, tuple[Verdict, ...]] = {
        scale: judge_all(claims, records, scale=scale, planned=planned_runs(slug, records, scale=scale, store=store))
        for scale in _scales(slug)
        if scale in judging
    }
    return Judged(load_paper(slug), verdicts, tuple(records))


def report(judged: Judged, *, scale: str, store: Store, console: Console) -> tuple[Verdict, ...]:
    """Print, and write REPORT.md and index.html into results/<slug>. Raises ValueError for an unknown scale."""
    paper, slug, records = judged.paper, judged.paper.slug, judged.records
    known = _scales(slug)
    if scale not in known:
        raise ValueError(f"--scale {scale}: {slug} has no such scale; there are: {', '.join(known)}")
    ablations, claims = load_ablations(slug), _claims(slug)
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
        planned=planned_runs(slug, records, scale=scale, store=store),
        words=load_words(configs_of(slug) / "metrics.yaml"),
        outlook=outlooks(slug, claims, scales=known, records=records),
        elsewhere=judged.verdicts,
    )
    print_verdicts(verdicts, console=console)
    console.print(f"\nreport: {store.results / slug / 'index.html'} and REPORT.md beside it", soft_wrap=True)
    return verdicts


def overview(judged: Sequence[Judged], *, store: Store, console: Console) -> None:
    """Write results/index.html and README.md: papers at every scale that has records."""
    build_overview(judged, now=datetime.now(UTC), out=store.results)
    console.print(f"all papers: {store.results / 'index.html'} and README.md beside it", soft_wrap=True)


def print_power(specs: Sequence[RunSpec], *, store: Store, console: Console) -> None:
    """How many seeds would decide the claims on the planned runs, from the records of their scale and smaller ones."""
    records = records_of(specs, store=store)
    times = expected_times(specs, {spec.id: cost_of(spec) for spec in specs}, records)
    for slug, scale in dict.fromkeys((spec.paper, spec.scale) for spec in specs):
        own = [spec for spec in specs if (spec.paper, spec.scale) == (slug, scale)]
        verdicts = judge_paper(slug, store=store).verdicts
        plan_ = power.plan_power(_claims(slug), verdicts, own, times, scale=scale)
        unit = "GPU-hours" if own[0].hardware.device == "cuda" else "core-hours"
        power.show(slug, plan_, scale, unit=unit, console=console)


def _claims(slug: str) -> tuple[Claim, ...]:
    arms = {name: ablation.arms.keys() for name, ablation in load_ablations(slug).items()}
    return load_claims(configs_of(slug) / "claims.yaml", arms=arms)


def _scales(slug: str) -> list[str]:
    """The scales that a paper has, smaller ones first."""
    return [name for name in SCALES if (configs_of(slug) / "scale" / f"{name}.yaml").is_file()]


def planned_runs(slug: str, records: Sequence[Record], *, scale: str, store: Store) -> list[Planned]:
    """What the ablation files ask for today, and how far it is; a run recorded elsewhere counts as it was recorded.

    `records`: all of the paper's.
    """
    recorded = {record.id: State(record.status) for record in records}
    runs = []
    for spec in _specs(slug, scale):
        state = recorded.get(spec.id) or store.run(spec.id).state()
        runs.append(Planned(spec.id, spec.program, spec.labels, state.status, state.reason, spec.accepts_diverged))
    return runs


@lru_cache(maxsize=16)
def _specs(slug: str, scale: str) -> tuple[RunSpec, ...]:
    """Composing a paper takes a second, and its verdicts and its report ask for the same."""
    return tuple(plan([slug], [f"scale={scale}"]))

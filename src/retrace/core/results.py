"""From what is on disk to a report: a paper's claims, ablations, planned runs and records, at one scale."""

from __future__ import annotations

from datetime import UTC, datetime

from rich.console import Console

from retrace.core.claims import load_claims
from retrace.core.config import CONFIGS, SCALES
from retrace.core.paper import load_paper
from retrace.core.plan import load_ablations, plan
from retrace.core.report import build_report, print_verdicts
from retrace.core.samples import Planned
from retrace.core.store import Store
from retrace.core.verdicts import Verdict


def report(slug: str, *, scale: str, store: Store, console: Console) -> tuple[Verdict, ...]:
    """Judge, print, and write REPORT.md and index.html into results/<slug>. Raises ValueError for an unknown scale."""
    paper = load_paper(slug)
    known = [name for name in SCALES if (CONFIGS / slug / "scale" / f"{name}.yaml").is_file()]
    if scale not in known:
        raise ValueError(f"--scale {scale}: {slug} has no such scale; there are: {', '.join(known)}")
    ablations = load_ablations(slug)
    claims = load_claims(CONFIGS / slug / "claims.yaml", arms={name: a.arms.keys() for name, a in ablations.items()})
    records = store.records(slug)
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
    )
    print_verdicts(verdicts, console=console)
    console.print(f"\nreport: {store.results / slug / 'index.html'} and REPORT.md beside it", soft_wrap=True)
    return verdicts


def planned_runs(slug: str, *, scale: str, store: Store) -> list[Planned]:
    """What the ablation files ask for today, and how far it is; a run recorded elsewhere counts as it was recorded."""
    recorded = {record.id: record.status for record in store.records(slug)}
    runs = []
    for spec in plan([slug], [f"scale={scale}"]):
        state = store.run(spec.id).state()
        status = recorded.get(spec.id, state.status)
        reason = "" if spec.id in recorded else state.reason
        runs.append(Planned(spec.id, spec.program, spec.labels, status, reason, spec.accepts_diverged))
    return runs

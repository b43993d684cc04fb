"""What is known of a paper: its claims and ablations, its records, and the verdicts on its claims at each scale.

    results = load_results("<slug>", store=Store(), scale="laptop")

It is made once for a paper, and read by the report, the overview, `publish`, and the plan of how many seeds to run.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from retrace.core.claims import Claim, load_claims, load_words
from retrace.core.config import SCALES
from retrace.core.discovery import configs_of
from retrace.core.outlook import runs_asked
from retrace.core.paper import Paper, load_paper
from retrace.core.plan import Ablation, load_ablations
from retrace.core.record import Record
from retrace.core.samples import Planned, Samples
from retrace.core.store import State, Store
from retrace.core.verdicts import Verdict, judge


@dataclass(frozen=True)
class PaperResults:
    """`records`: those of all scales. `samples`, `verdicts`: by scale, smaller ones first; a verdict on every claim.

    `words`: what metrics and curves are, in the order in which curves are shown.
    """

    paper: Paper
    claims: tuple[Claim, ...]
    ablations: tuple[Ablation, ...]
    words: Mapping[str, str]
    records: tuple[Record, ...]
    samples: Mapping[str, Samples]
    verdicts: Mapping[str, Sequence[Verdict]]

    @property
    def recorded_scales(self) -> list[str]:
        """The scales that have records, smaller ones first."""
        found = {record.scale for record in self.records}
        return [scale for scale in SCALES if scale in found]

    @property
    def judged(self) -> dict[str, Sequence[Verdict]]:
        """The verdicts at those scales that can judge claims and have records."""
        scales = _judging(self.claims, self.records)
        return {scale: verdicts for scale, verdicts in self.verdicts.items() if scale in scales}


def judge_paper(
    paper: Paper,
    *,
    claims: Iterable[Claim],
    ablations: Iterable[Ablation],
    records: Iterable[Record],
    planned: Mapping[str, Sequence[Planned]],
    words: Mapping[str, str] | None = None,
) -> PaperResults:
    """Judge every claim at the scales of `planned`, which are in the order of their size. Pure.

    `planned`: the runs that the ablation files ask for at a scale; where there are any for a label, only their records
    count for it.
    """
    claims, records = tuple(claims), tuple(records)
    samples = {scale: Samples(records, scale=scale, planned=runs) for scale, runs in planned.items()}
    verdicts = {scale: tuple(judge(claim, found) for claim in claims) for scale, found in samples.items()}
    return PaperResults(paper, claims, tuple(ablations), words or {}, records, samples, verdicts)


def load_results(slug: str, *, store: Store, scale: str | None = None) -> PaperResults:
    """A paper's files and records, read once, judged at `scale` and wherever claims can be judged from records.

    Raises ValueError where the paper has no such scale.
    """
    known = scales_of(slug)
    if scale is not None and scale not in known:
        raise ValueError(f"--scale {scale}: {slug} has no such scale; there are: {', '.join(known)}")
    ablations = load_ablations(slug)
    arms = {name: ablation.arms.keys() for name, ablation in ablations.items()}
    claims = load_claims(configs_of(slug) / "claims.yaml", arms=arms)
    records = store.records(slug)
    wanted = {scale, *_judging(claims, records)}
    return judge_paper(
        load_paper(slug),
        claims=claims,
        ablations=ablations.values(),
        records=records,
        planned={name: _planned(slug, name, records, store) for name in known if name in wanted},
        words=load_words(configs_of(slug) / "metrics.yaml"),
    )


def scales_of(slug: str) -> list[str]:
    """The scales that a paper has, smaller ones first."""
    return [name for name in SCALES if (configs_of(slug) / "scale" / f"{name}.yaml").is_file()]


def _judging(claims: Iterable[Claim], records: Iterable[Record]) -> set[str]:
    recorded = {record.scale for record in records}
    return {scale for claim in claims for scale in claim.testable_at if scale in recorded}


def _planned(slug: str, scale: str, records: Iterable[Record], store: Store) -> list[Planned]:
    """What the ablation files ask for today, and how far it is; a run recorded elsewhere counts as it was recorded."""
    recorded = {record.id: State(record.status) for record in records}
    runs = []
    for spec in runs_asked(slug, scale):
        state = recorded.get(spec.id) or store.run(spec.id).state()
        runs.append(Planned(spec.id, spec.program, spec.labels, state.status, state.reason, spec.accepts_diverged))
    return runs

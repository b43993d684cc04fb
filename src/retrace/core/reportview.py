"""What a report shows of verdicts and ablations: texts, tables and figures, ready to be laid out."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property

from retrace.core.claims import Claim
from retrace.core.figures import MANY_SEEDS
from retrace.core.paper import Panel
from retrace.core.plan import Ablation
from retrace.core.reportfigures import curves_of, samples_of
from retrace.core.reportruns import anchor
from retrace.core.results import PaperResults
from retrace.core.samples import DIVERGED, Sample, Samples
from retrace.core.stats import Estimate, estimate, paired_differences
from retrace.core.svg import Figure, decimals, number
from retrace.core.verdictfigures import verdict_bar
from retrace.core.verdicts import JUDGED, OUTCOMES, Verdict

DIAGNOSTICS = ("grad_norm/", "optim/", "speed/")  # curves for whoever debugs a run; W&B and metrics.jsonl have them


@dataclass(frozen=True)
class Shown:
    """A mean and its interval as text; `interval` is a phrase where there is none."""

    mean: str
    interval: str


@dataclass(frozen=True)
class Row:
    """One arm in a table of one metric. `cells`: for each seed shown a text and, if a run has it, its `anchor`."""

    arm: str
    is_baseline: bool
    shown: Shown
    gap: Shown  # difference from the baseline, paired by seed
    cells: tuple[tuple[str, str | None], ...]


@dataclass(frozen=True)
class Table:
    metric: str
    title: str  # the metric in words
    seeds: tuple[int, ...]  # that are shown one by one
    rows: tuple[Row, ...]


@dataclass(frozen=True)
class VerdictView:
    """A verdict with its texts, of numbers with `places` decimal places."""

    verdict: Verdict
    places: int
    shown: Shown
    detectable: str
    arms: tuple[tuple[str, Shown], ...]  # named with the metric where a claim has two
    told: str  # the means of the arms in one phrase

    @cached_property
    def bar(self) -> Figure:
        return verdict_bar(self.verdict)

    @cached_property
    def seeds(self) -> tuple[tuple[int, tuple[tuple[str, str], ...], str], ...]:
        """Per paired seed the cells of every arm and the difference."""
        arms, places = self.verdict.arms, self.places
        return tuple(
            (seed, tuple(_cell(arm.samples[seed], places) for arm in arms), number(value, places, sign=True))
            for seed, value in self.verdict.differences.items()
        )


@dataclass(frozen=True)
class AblationView:
    """One ablation. `key`, `figures`: metrics of its own claims; `other`, `more`: all further tables and figures."""

    ablation: Ablation
    verdicts: tuple[VerdictView, ...]  # of its own claims
    arms: tuple[str, ...]
    key: tuple[Table, ...]
    figures: tuple[Figure, ...]
    other: tuple[Table, ...]
    more: tuple[Figure, ...]
    curves: tuple[Figure, ...]  # over training, that which matters most first
    panels: tuple[Panel, ...]  # what this paper alone draws

    @property
    def drawn(self) -> tuple[Figure, ...]:
        """All of its figures."""
        own = (figure for panel in self.panels for figure in panel.figures)
        return (*self.figures, *self.more, *self.curves, *own)


def show(found: Estimate | None, *, places: int | None = None, sign: bool = False) -> Shown:
    """Texts of an estimate; a missing one stays missing."""
    if found is None:
        return Shown("\u2013", "no value")
    if places is None:
        places = decimals([found.mean, found.low or 0.0, found.high or 0.0])
    mean = number(found.mean, places, sign=sign)
    if found.low is None or found.high is None:
        return Shown(mean, "one seed, no interval")
    if not found.has_spread:
        return Shown(mean, "the same in every seed")
    return Shown(mean, f"[{number(found.low, places, sign=sign)}, {number(found.high, places, sign=sign)}]")


def view_verdict(verdict: Verdict) -> VerdictView:
    """A verdict's numbers with as many places as its difference needs."""
    found = verdict.estimate
    places = decimals([*verdict.differences.values(), *([found.low or 0.0, found.high or 0.0] if found else [])])
    one = isinstance(verdict.claim.metric, str)
    arms = tuple(
        (arm.arm if one else f"{arm.arm} {arm.metric}", show(arm.estimate, places=places)) for arm in verdict.arms
    )
    detectable = "" if verdict.detectable is None else number(verdict.detectable, places)
    return VerdictView(
        verdict,
        places,
        show(verdict.estimate, places=places, sign=True),
        detectable,
        arms,
        _told(verdict.claim, [f"{arm} {shown.mean}" for arm, shown in arms]),
    )


def _told(claim: Claim, arms: Sequence[str]) -> str:
    if claim.trend is not None:
        return f"{', '.join(arms)}; slope per arm"
    first, *second = (" against ".join(arms[at : at + 2]) for at in range(0, len(arms), 2))
    return f"{first}; less {second[0]}" if second else first


def _cell(sample: Sample, places: int) -> tuple[str, str]:
    return number(sample.value, places), anchor(sample.record)


def arms_of(ablation: Ablation, samples: Samples) -> tuple[str, ...]:
    """Its arms in the order of the file, and behind them those that only a command line made."""
    return (*ablation.arms, *sorted(samples.chains.get(ablation.name, {}).keys() - ablation.arms.keys()))


def view_ablation(
    ablation: Ablation,
    results: PaperResults,
    samples: Samples,
    *,
    verdicts: Sequence[VerdictView],
    panels: Sequence[Panel],
) -> AblationView:
    """Everything that the records say of an ablation, the metrics of its own claims first.

    `verdicts`: of all claims. `panels`: what its paper draws of it.
    """
    name, chains, words = ablation.name, samples.chains.get(ablation.name, {}), results.words
    verdicts = [view for view in verdicts if view.verdict.claim.ablation == name]
    arms = arms_of(ablation, samples)
    present = samples.metrics(name)
    own = [metric for view in verdicts for _, metric in view.verdict.claim.cells]
    key = [metric for metric in dict.fromkeys(own) if metric in present]
    all_metrics = (metric for claim in results.claims for _, metric in claim.cells)
    further = [metric for metric in dict.fromkeys(all_metrics) if metric in present]
    key = key or (further or [metric for metric in present if metric != DIVERGED])[:2]
    ordered = dict.fromkeys((*key, *(metric for metric in words if metric in present), *present))
    met = {seed for arm in arms for seed in (*chains.get(arm, ()), *samples.trouble(name, arm))}
    seeds = sorted(met.union(ablation.seeds))
    shown = {metric: seeds if metric in key or len(seeds) <= MANY_SEEDS else [] for metric in ordered}
    tables = {metric: _table(ablation, arms, samples, metric, words, shown[metric]) for metric in ordered}
    ranks = {curve: rank for rank, curve in enumerate(words)}
    curves = [curve for curve in samples.series(name) if not curve.startswith(DIAGNOSTICS)]
    return AblationView(
        ablation=ablation,
        verdicts=tuple(verdicts),
        arms=arms,
        key=tuple(tables[metric] for metric in key),
        figures=tuple(samples_of(ablation, arms, samples, metric, words) for metric in key),
        other=tuple(table for metric, table in tables.items() if metric not in key),
        more=tuple(samples_of(ablation, arms, samples, metric, words) for metric in further if metric not in key),
        curves=tuple(
            curves_of(name, arms, samples, curve, words)
            for curve in sorted(curves, key=lambda curve: ranks.get(curve, len(ranks)))
        ),
        panels=tuple(panels),
    )


def _table(
    ablation: Ablation,
    arms: Sequence[str],
    samples: Samples,
    metric: str,
    words: Mapping[str, str],
    seeds: Sequence[int],
) -> Table:
    """A row for each arm; `seeds`: those that are shown one by one."""
    found = {arm: samples.values(ablation.name, arm, metric) for arm in arms}
    trouble = {arm: samples.trouble(ablation.name, arm) for arm in arms}
    base = {seed: sample.value for seed, sample in found[ablation.baseline].items()}
    rows = []
    for arm in arms:
        values = {seed: sample.value for seed, sample in found[arm].items()}
        places = decimals(values.values())
        gap = Shown("", "baseline")
        if arm != ablation.baseline:
            gap = show(estimate(paired_differences(values, base).values()), sign=True)
        cells = tuple(
            _cell(found[arm][seed], places) if seed in found[arm] else (trouble[arm].get(seed, "\u2013"), None)
            for seed in seeds
        )
        rows.append(Row(arm, arm == ablation.baseline, show(estimate(values.values()), places=places), gap, cells))
    return Table(metric, words.get(metric, metric), tuple(seeds), tuple(rows))


def summary(verdicts: Sequence[Verdict], *, scale: str) -> str:
    """One sentence: how many of the judged claims came to what, and what keeps the others."""
    counts = {outcome: sum(verdict.outcome == outcome for verdict in verdicts) for outcome in OUTCOMES}
    judged = sum(counts[outcome] for outcome in JUDGED)
    if not verdicts:
        return f"No claims are listed for this paper (scale {scale})."
    told = [f"{counts['reproduced']} of {judged} judged claims reproduced"] if judged else ["no claim is judged yet"]
    told += [f"{counts['direction only']} in direction only"] * bool(counts["direction only"])
    told += [f"{counts[outcome]} {outcome}" for outcome in ("contradicted", "inconclusive") if counts[outcome]]
    waiting = [f"{counts['no records']} without records"] * bool(counts["no records"])
    untested = counts["not tested at this scale"]
    waiting += [f"{untested} need{'s' * (untested == 1)} another scale"] * bool(untested)
    return f"At scale {scale}, {', '.join(told)}{'; ' * bool(waiting)}{', '.join(waiting)}."

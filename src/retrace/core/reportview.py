"""What a report shows, computed from samples and verdicts: tables, figures, gaps and costs, ready to be laid out."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from retrace.core.claims import Claim
from retrace.core.figures import verdict_bar
from retrace.core.plan import Ablation
from retrace.core.record import Record
from retrace.core.reportfigures import curves_of, joint_of, profiles_of, samples_of
from retrace.core.samples import DIVERGED, Sample, Samples
from retrace.core.stats import Estimate, estimate, paired_differences
from retrace.core.svg import Figure, decimals, number
from retrace.core.verdicts import OUTCOMES, Verdict

DIAGNOSTICS = ("grad_norm/", "optim/", "speed/")  # curves for whoever debugs a run; W&B and metrics.jsonl have them


@dataclass(frozen=True)
class Shown:
    """A mean and its interval as text; `interval` is a phrase where there is none."""

    mean: str
    interval: str


@dataclass(frozen=True)
class Row:
    """One arm in a table of one metric. `cells`: (text, record or None) for every seed."""

    arm: str
    is_baseline: bool
    shown: Shown
    gap: Shown  # difference from the baseline, paired by seed
    cells: tuple[tuple[str, Record | None], ...]


@dataclass(frozen=True)
class Table:
    metric: str
    seeds: tuple[int, ...]
    rows: tuple[Row, ...]


@dataclass(frozen=True)
class AblationView:
    """One ablation. `key`: metrics of its own claims; `figures`: those of all claims; `other`: all further tables."""

    ablation: Ablation
    arms: tuple[str, ...]
    key: tuple[Table, ...]
    figures: tuple[Figure, ...]
    other: tuple[Table, ...]
    curves: tuple[Figure, ...]
    profiles: tuple[Figure, ...]  # of quantities over the depth of a model, some arms each
    joints: tuple[Figure, ...]  # how two values of a run's items go together, an arm each, all seeds
    records: tuple[tuple[str, int, Record], ...]  # (arm, seed, record), chains in order


@dataclass(frozen=True)
class VerdictView:
    """A verdict with its texts. `seeds`: per paired seed the cells of every arm and the difference."""

    verdict: Verdict
    shown: Shown
    detectable: str
    bar: Figure
    arms: tuple[tuple[str, Shown], ...]  # named with the metric where a claim has two
    told: str  # the means of the arms in one phrase
    seeds: tuple[tuple[int, tuple[tuple[str, Record], ...], str], ...]


@dataclass(frozen=True)
class PageLink:
    """A page that a run attached to its record. `label`: which run, for people."""

    name: str
    href: str
    label: str


@dataclass(frozen=True)
class Gap:
    """Arms whose same seeds have no full result, for the same reason."""

    ablation: str
    arms: tuple[str, ...]
    seeds: tuple[int, ...]
    why: str


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
    seeds = tuple(
        (seed, tuple(_cell(arm.samples[seed], places) for arm in verdict.arms), number(value, places, sign=True))
        for seed, value in verdict.differences.items()
    )
    detectable = "" if verdict.detectable is None else number(verdict.detectable, places)
    return VerdictView(
        verdict,
        show(verdict.estimate, places=places, sign=True),
        detectable,
        verdict_bar(verdict),
        arms,
        _told(verdict.claim, [f"{arm} {shown.mean}" for arm, shown in arms]),
        seeds,
    )


def _told(claim: Claim, arms: Sequence[str]) -> str:
    if claim.trend is not None:
        return f"{', '.join(arms)}; slope per arm"
    first, *second = (" against ".join(arms[at : at + 2]) for at in range(0, len(arms), 2))
    return f"{first}; less {second[0]}" if second else first


def _cell(sample: Sample, places: int) -> tuple[str, Record]:
    return number(sample.value, places), sample.record


def view_ablation(ablation: Ablation, samples: Samples, *, own: Sequence[str], others: Sequence[str]) -> AblationView:
    """Everything that the records say of an ablation, the metrics of its own claims and of other claims first."""
    name, chains = ablation.name, samples.chains.get(ablation.name, {})
    arms = (*ablation.arms, *sorted(chains.keys() - ablation.arms.keys()))
    present = samples.metrics(name)
    drawn = [metric for metric in dict.fromkeys((*own, *others)) if metric in present]
    drawn = drawn or [metric for metric in present if metric != DIVERGED][:2]
    key = [metric for metric in drawn if metric in own] or drawn[:1]
    tables = {metric: _table(ablation, arms, samples, metric) for metric in dict.fromkeys((*drawn, *present))}
    return AblationView(
        ablation=ablation,
        arms=arms,
        key=tuple(tables[metric] for metric in key),
        figures=tuple(samples_of(ablation, arms, samples, metric) for metric in drawn),
        other=tuple(table for metric, table in tables.items() if metric not in key),
        curves=tuple(
            curves_of(name, arms, samples, curve) for curve in samples.series(name) if not curve.startswith(DIAGNOSTICS)
        ),
        profiles=profiles_of(name, arms, chains),
        joints=tuple(figure for arm in arms if (figure := joint_of(name, arm, chains.get(arm, {}))) is not None),
        records=tuple(
            (arm, seed, record)
            for arm in arms
            for seed, chain in sorted(chains.get(arm, {}).items())
            for record in chain.records
        ),
    )


def _table(ablation: Ablation, arms: Sequence[str], samples: Samples, metric: str) -> Table:
    found = {arm: samples.values(ablation.name, arm, metric) for arm in arms}
    trouble = {arm: samples.trouble(ablation.name, arm) for arm in arms}
    seeds = sorted({seed for arm in arms for seed in (*found[arm], *trouble[arm])} | set(ablation.seeds))
    places = decimals(sample.value for by_seed in found.values() for sample in by_seed.values())
    base = {seed: sample.value for seed, sample in found[ablation.baseline].items()}
    rows = []
    for arm in arms:
        values = {seed: sample.value for seed, sample in found[arm].items()}
        gap = Shown("", "baseline")
        if arm != ablation.baseline:
            gap = show(estimate(paired_differences(values, base).values()), places=places, sign=True)
        cells = tuple(
            _cell(found[arm][seed], places) if seed in found[arm] else (trouble[arm].get(seed, "\u2013"), None)
            for seed in seeds
        )
        rows.append(Row(arm, arm == ablation.baseline, show(estimate(values.values()), places=places), gap, cells))
    return Table(metric, tuple(seeds), tuple(rows))


def page_links(record: Record, pages: frozenset[str]) -> tuple[PageLink, ...]:
    """The pages of a record, of those that are there."""
    files = {name: f"{record.id}--{name}.html" for name in record.pages}
    return tuple(PageLink(name, f"pages/{file}", record.labels[0]) for name, file in files.items() if file in pages)


def main_pages(ablations: Sequence[Ablation], samples: Samples, pages: frozenset[str]) -> tuple[PageLink, ...]:
    """The pages of the base config itself, which is every arm without overrides, at the first seed that has any."""
    plain = [(ablation.name, arm) for ablation in ablations for arm, lines in ablation.arms.items() if not lines]
    for name, arm in (*plain, ("main", "main")):
        for _, chain in sorted(samples.chains.get(name, {}).get(arm, {}).items()):
            if links := tuple(link for record in chain.records for link in page_links(record, pages)):
                return links
    return ()


def gaps(ablations: Sequence[Ablation], samples: Samples) -> tuple[Gap, ...]:
    """Every arm and seed of the files that has no full result: not run, running, failed, diverged."""
    reasons: dict[str, str] = {}
    for run in samples.planned:
        if run.status in ("FAILED", "RUNNING"):
            why = f"{run.program} {run.status.lower()}{': ' * bool(run.reason)}{run.reason}"
            reasons.update(dict.fromkeys(run.labels, why))
    found: dict[tuple[str, str, str], list[int]] = {}
    for ablation in ablations:
        for arm in ablation.arms:
            for seed in ablation.seeds:
                chain = samples.chains.get(ablation.name, {}).get(arm, {}).get(seed)
                if chain is not None and chain.diverged:
                    why = _diverged(chain.diverged)
                elif chain is not None and chain.complete:
                    continue
                else:
                    default = "not run" if chain is None else "not finished"
                    why = reasons.get(f"{ablation.name}/{arm}/s{seed}", default)
                found.setdefault((ablation.name, arm, why), []).append(seed)
    groups: dict[tuple[str, tuple[int, ...], str], list[str]] = {}
    for (name, arm, why), seeds in found.items():
        groups.setdefault((name, tuple(seeds), why), []).append(arm)
    return tuple(Gap(name, tuple(arms), seeds, why) for (name, seeds, why), arms in groups.items())


def _diverged(record: Record) -> str:
    step = record.metrics.get("diverged_at")
    return f"{record.program} diverged" + (f" at step {step:.0f}" if step is not None else "")


def summary(verdicts: Sequence[Verdict], *, scale: str) -> str:
    """One sentence: how many claims came to what."""
    counts = {outcome: sum(verdict.outcome == outcome for verdict in verdicts) for outcome in OUTCOMES}
    phrases = {
        "reproduced": "reproduced",
        "direction only": "in direction only",
        "contradicted": "contradicted",
        "inconclusive": "inconclusive",
        "not tested at this scale": "not testable at this scale",
        "no records": "without records",
    }
    told = [f"{count} {phrases[outcome]}" for outcome, count in counts.items() if count]
    total = f"Of {len(verdicts)} claim{'s' * (len(verdicts) != 1)}, judged at scale {scale}"
    return f"{total}: {', '.join(told)}." if told else f"No claims are listed for this paper (scale {scale})."

"""The runs behind a report: each with its record and the command that makes it again, those missing, what all cost."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from statistics import median

from retrace.core.plan import Ablation
from retrace.core.record import Record
from retrace.core.samples import Samples


@dataclass(frozen=True)
class PageLink:
    """A page that a run attached to its record."""

    name: str
    href: str


@dataclass(frozen=True)
class Run:
    """One line of the ledger. `command` runs it again, with what it builds on; `users`: arms and seeds that read it."""

    id: str
    anchor: str
    status: str
    seconds: float | None
    command: str
    users: int
    pages: tuple[PageLink, ...]


@dataclass(frozen=True)
class Gap:
    """Arms whose same seeds have no full result, for the same reason."""

    ablation: str
    arms: tuple[str, ...]
    seeds: tuple[int, ...]
    why: str


@dataclass(frozen=True)
class ProgramCost:
    """What the runs of one program used; None where no run says."""

    program: str
    runs: int
    seconds: float | None
    tokens: float | None
    flops: float | None
    mfu: float | None


def anchor(record: Record) -> str:
    """The name of a run's line in the ledger: its id without what all ids of its program begin with."""
    return record.id.removeprefix(f"{record.paper}-{record.program}-")


def ledger(slug: str, ablations: Sequence[Ablation], samples: Samples, pages: frozenset[str]) -> tuple[Run, ...]:
    """Every run that the report uses, once, chains in the order of the ablations and parents first."""
    order = [(ablation.name, arm) for ablation in ablations for arm in ablation.arms]
    present = [(name, arm) for name, arms in samples.chains.items() for arm in arms]
    known = set(order)
    found: dict[str, tuple[Record, str]] = {}
    users: Counter[str] = Counter()
    for name, arm in dict.fromkeys((*order, *present)):
        for seed, chain in sorted(samples.chains.get(name, {}).get(arm, {}).items()):
            again = f"retrace run {slug}/{name}/{arm} scale={samples.scale} seed={seed}"
            for record in chain.records:
                command = again if (name, arm) in known else str(record.provenance.get("command", ""))
                found.setdefault(record.id, (record, command))
                users[record.id] += 1
    return tuple(
        Run(r.id, anchor(r), r.status.lower(), r.cost.seconds, command, users[r.id], page_links(r, pages))
        for r, command in found.values()
    )


def page_links(record: Record, pages: frozenset[str]) -> tuple[PageLink, ...]:
    """The pages of a record, of those that are there."""
    files = {name: f"{record.id}--{name}.html" for name in record.pages}
    return tuple(PageLink(name, f"pages/{file}") for name, file in files.items() if file in pages)


def main_pages(
    ablations: Sequence[Ablation], samples: Samples, pages: frozenset[str]
) -> tuple[str, tuple[PageLink, ...]]:
    """(run, its pages) of the base config itself, which is every arm without overrides, at the first seed with any."""
    plain = [(ablation.name, arm) for ablation in ablations for arm, lines in ablation.arms.items() if not lines]
    for name, arm in (*plain, ("main", "main")):
        for seed, chain in sorted(samples.chains.get(name, {}).get(arm, {}).items()):
            if links := tuple(link for record in chain.records for link in page_links(record, pages)):
                return f"ablation {name}, arm {arm}, seed {seed}".replace("_", " "), links
    return "", ()


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


def _total(values: Iterable[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return sum(known) if known else None


def costs(records: Sequence[Record]) -> list[ProgramCost]:
    """What the runs used, by program, and for all of them in the last entry."""
    programs = dict.fromkeys(record.program for record in records)
    groups = [(program, [r for r in records if r.program == program]) for program in programs]
    found = []
    for program, runs in [*groups, ("all runs", list(records))]:
        used = [run.cost for run in runs]
        rates = [cost.mfu for cost in used if cost.mfu is not None]
        totals = (_total(c.seconds for c in used), _total(c.tokens for c in used), _total(c.flops for c in used))
        found.append(ProgramCost(program, len(runs), *totals, median(rates) if rates else None))
    return found


def origins(records: Sequence[Record], key: str) -> str:
    """Each distinct value that the records' provenance holds under a key."""
    return ", ".join(sorted({str(r.provenance[key]) for r in records if r.provenance.get(key) is not None}))


def _older_than_parents(records: Sequence[Record]) -> int:
    """How many records are older than one that they build on: that run was made again after them, perhaps elsewhere."""
    finished = {record.id: str(record.provenance.get("finished") or "") for record in records}
    known = [(finished[r.id], [finished.get(parent, "") for parent in r.parents.values()]) for r in records]
    return sum(bool(own) and max(parents, default="") > own for own, parents in known)


def origin(records: Sequence[Record]) -> dict[str, str]:
    """Where the records come from, in words for each kind of origin that is known."""
    packages: dict[str, set[str]] = {}
    installed = (record.provenance.get("packages") or {} for record in records)
    for name, version in {(name, str(version)) for found in installed for name, version in found.items()}:
        packages.setdefault(name, set()).add(version)
    dirty = sum(bool(record.provenance.get("dirty")) for record in records)
    unknown = sum(bool(r.provenance.get("git")) and r.provenance.get("dirty") is None for r in records)
    changed = f"; {dirty} of {len(records)} runs with uncommitted changes" if dirty else ""
    changed += f"; of {unknown} it is not known whether they had uncommitted changes" if unknown else ""
    finished = sorted(str(r.provenance["finished"]) for r in records if r.provenance.get("finished"))
    older = _older_than_parents(records)
    told = {
        "Hardware": origins(records, "hardware"),
        "Platform": origins(records, "platform"),
        "Python": origins(records, "python"),
        "Packages": ", ".join(f"{name} {'/'.join(sorted(versions))}" for name, versions in sorted(packages.items())),
        "Code (git)": origins(records, "git") + changed,
        "Recipe": ", ".join(sorted({str(record.recipe) for record in records})),
        "Finished": " to ".join(dict.fromkeys((finished[0], finished[-1]))) if finished else "",
        "Not of one piece": f"{older} records are older than the run that they build on, which was made again after "
        "them: `retrace run` makes those again whose folder is not in runs/"
        if older
        else "",
    }
    return {name: value for name, value in told.items() if value}

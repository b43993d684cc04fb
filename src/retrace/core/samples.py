"""Records as samples: which value each arm and seed has, at one scale, and why a value is not there.

A label "<ablation>/<arm>/s<seed>" stands on every record of a chain (base model, training, evaluation). The records of
a chain are read as one: a metric belongs to the last program that has it anywhere in the ablation, and of several runs
of a program in a chain to the last, so the loss of a base model never stands in for that of a training that is still
missing. Only DONE runs have metrics. A run that diverged is a result and not a gap: every chain has the metric
`diverged`, 1.0 as soon as one of its runs diverged, 0.0 once all of them are done, and missing before that. A diverged
run that another one of the chain has made use of, or will, does not count: such as one of several learning rates of
which the best is chosen.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, NamedTuple

from retrace.core.record import Label, Record

DIVERGED = "diverged"  # the metric that every finished chain has


@dataclass(frozen=True)
class Planned:
    """A run that the ablation files ask for, and how far it is."""

    id: str
    program: str
    labels: tuple[str, ...]
    status: str  # PLANNED, RUNNING, DONE, DIVERGED or FAILED
    reason: str = ""
    accepts_diverged: bool = False  # it makes use of parents that diverged


class Sample(NamedTuple):
    """One number and the record that it stands in; a report has 100,000 of them."""

    value: float
    record: Record


@dataclass(frozen=True)
class Chain:
    """The records of one label, parents before children.

    `complete`: every run of the chain is among them. `owners`: the program that each metric and curve is taken from.
    `last`: the ids of those that are the last of their program in the chain. `awaited`: of runs that are still to come
    and accept diverged parents.
    """

    records: tuple[Record, ...]
    complete: bool
    owners: Mapping[str, str]
    last: Collection[str]
    awaited: Collection[str] = ()

    def metrics(self) -> dict[str, Sample]:
        """Every metric of the chain; `Samples` keeps them by arm."""
        done = [record for record in self.records if record.status != "DIVERGED"]
        last = [record for record in done if record.id in self.last]
        owners = self.owners
        found = {name: Sample(v, r) for r in last for name, v in r.metrics.items() if owners[name] == r.program}
        if self.diverged is not None:
            found[DIVERGED] = Sample(1.0, self.diverged)
        elif self.complete:
            found[DIVERGED] = Sample(0.0, done[-1])
        return found

    @cached_property
    def series(self) -> dict[str, tuple[tuple[int, float], ...]]:
        """Every training curve of the chain, also of a run that diverged."""
        last = [record for record in self.records if record.id in self.last]
        return {name: r.series[name] for r in last for name in r.series if self.owners[name] == r.program}

    @cached_property
    def diverged(self) -> Record | None:
        """The run that diverged, if one did that no other run makes use of."""
        if self.awaited:
            return None
        used = {parent for record in self.records if record.status == "DONE" for parent in record.parents.values()}
        return next((r for r in self.records if r.status == "DIVERGED" and r.id not in used), None)


class Samples:
    """The records of one scale, read once: `chains[ablation][arm][seed]`.

    Where `planned` names runs for a label, only their records count. So after a change of a config, the records of the
    old one stay on file and out of the verdicts. Other labels (arms that only a command line made) take, of several
    records of one program, the one that finished last.
    """

    def __init__(self, records: Iterable[Record], *, scale: str, planned: Sequence[Planned] = ()) -> None:
        self.scale = scale
        self.chains: dict[str, dict[str, dict[int, Chain]]] = {}
        self.planned = tuple(planned)
        self._failed = [Label.parse(text) for run in planned if run.status == "FAILED" for text in run.labels]
        records = list(records)
        self.other_scales = sorted({record.scale for record in records} - {scale})
        self._by_id = {record.id: record for record in records if record.scale == scale}
        self._depths: dict[str, int] = {}
        self._fill(self._group())
        self._values: dict[tuple[str, str], dict[str, dict[int, Sample]]] = {}
        used = {record.id for chain in self._all() for record in chain.records}
        self.used = tuple(record for record in self._by_id.values() if record.id in used)
        self.unused = len(self._by_id) - len(self.used)

    def values(self, ablation: str, arm: str, metric: str) -> dict[int, Sample]:
        """The samples of a metric by seed; seeds without a value are left out."""
        return dict(self._by_metric(ablation, arm).get(metric, {}))

    def _by_metric(self, ablation: str, arm: str) -> dict[str, dict[int, Sample]]:
        if (ablation, arm) not in self._values:
            by_metric = self._values[ablation, arm] = {}
            for seed, chain in self.chains.get(ablation, {}).get(arm, {}).items():
                for name, sample in chain.metrics().items():
                    by_metric.setdefault(name, {})[seed] = sample
        return self._values[ablation, arm]

    def trouble(self, ablation: str, arm: str) -> dict[int, str]:
        """Seeds of an arm that 'diverged' or 'failed'. A failed run leaves no record; the plan knows of it."""
        chains = self.chains.get(ablation, {}).get(arm, {})
        found = {seed: DIVERGED for seed, chain in chains.items() if chain.diverged}
        return found | {int(label.seed): "failed" for label in self._failed if label[:2] == (ablation, arm)}

    def notes(self, ablation: str, arm: str, name: str) -> list[Any]:
        """What the runs of an arm have noted under a name, `ctx.notes`, seed by seed."""
        chains = self.chains.get(ablation, {}).get(arm, {}).values()
        return [r.provenance[name] for chain in chains for r in chain.records if name in r.provenance]

    def metrics(self, ablation: str) -> list[str]:
        """Names of all metrics of an ablation's runs, in the order of the alphabet."""
        return sorted(set().union(*(self._by_metric(ablation, arm) for arm in self.chains.get(ablation, {}))))

    def series(self, ablation: str) -> list[str]:
        """Names of all training curves of an ablation's runs; losses first."""
        arms = self.chains.get(ablation, {}).values()
        names = set().union(*(chain.series for seeds in arms for chain in seeds.values()))
        return sorted(names, key=lambda name: ("loss" not in name, name))

    def _all(self) -> Iterable[Chain]:
        return (chain for arms in self.chains.values() for seeds in arms.values() for chain in seeds.values())

    def _group(self) -> dict[str, dict[str, Record]]:
        """label -> id -> the records that count; for labels that are not planned, one of each program."""
        wanted: dict[str, set[str]] = {}
        asked = {run.id: run.labels for run in self.planned}  # a record may be older than what else asks for its run
        for run in self.planned:
            for label in run.labels:
                wanted.setdefault(label, set()).add(run.id)
        groups: dict[str, dict[str, Record]] = {}
        for record in sorted(self._by_id.values(), key=lambda r: (str(r.provenance.get("finished", "")), r.id)):
            for label in dict.fromkeys((*record.labels, *asked.get(record.id, ()))):
                if label not in wanted:
                    groups.setdefault(label, {})[record.program] = record
                elif record.id in wanted[label]:
                    groups.setdefault(label, {})[record.id] = record
        return groups

    def _fill(self, groups: dict[str, dict[str, Record]]) -> None:
        accepting = {run.id for run in self.planned if run.accepts_diverged}
        runs: dict[str, dict[str, str]] = {}  # label -> program of each run of its chain, parents first
        for run in self.planned:
            for label in run.labels:
                runs.setdefault(label, {})[run.id] = run.program
        seen: dict[str, list[Record]] = {}
        for label, group in groups.items():
            seen.setdefault(Label.parse(label).ablation, []).extend(group.values())
        owners = {ablation: self._owners(records) for ablation, records in seen.items()}
        everything = {ablation: {record.program for record in records} for ablation, records in seen.items()}
        for label, group in sorted(groups.items()):
            ablation, arm, seed = Label.parse(label)
            if not arm or not seed.isdigit():
                raise ValueError(f"label {label!r} on a record: expected <ablation>/<arm>/s<seed>; delete it and rerun")
            known = runs.get(label, {record.id: record.program for record in group.values()})
            last = {program: run_id for run_id, program in known.items()}
            chain = Chain(
                records=tuple(sorted(group.values(), key=lambda r: (self._depth(r), r.id))),
                complete=(known.keys() if label in runs else everything[ablation]) <= group.keys(),
                owners=owners[ablation],
                last=set(last.values()),
                awaited=accepting.intersection(known).difference(record.id for record in group.values()),
            )
            self.chains.setdefault(ablation, {}).setdefault(arm, {})[int(seed)] = chain

    def _owners(self, records: Iterable[Record]) -> dict[str, str]:
        found: dict[str, str] = {}
        for record in sorted(records, key=lambda r: (self._depth(r), r.program)):
            found.update(dict.fromkeys((*record.metrics, *record.series), record.program))
        return found

    def _depth(self, record: Record) -> int:
        if record.id not in self._depths:
            parents = [self._by_id[parent] for parent in record.parents.values() if parent in self._by_id]
            self._depths[record.id] = 1 + max(map(self._depth, parents), default=0)
        return self._depths[record.id]

"""The figures of a report's ablations, drawn from samples and from what runs have noted in their records."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from typing import Any

from retrace.core.figures import curve_figure, joint_figure
from retrace.core.plan import Ablation
from retrace.core.profiles import every_profile
from retrace.core.samplefigure import ArmValues, sample_figure
from retrace.core.samples import DIVERGED, Chain, Samples
from retrace.core.svg import Figure

MOST_NAME = 120  # characters of a figure's file name: file systems take 255 bytes


def samples_of(
    ablation: Ablation, arms: Sequence[str], samples: Samples, metric: str, words: Mapping[str, str]
) -> Figure:
    """A metric's samples, arm by arm."""
    columns = []
    for arm in arms:
        values = {seed: sample.value for seed, sample in samples.values(ablation.name, arm, metric).items()}
        lost = [seed for seed, why in samples.trouble(ablation.name, arm).items() if why == DIVERGED]
        columns.append(ArmValues(arm, values, tuple(seed for seed in lost if seed not in values)))
    title = words.get(metric, metric)
    return sample_figure(_file(ablation.name, metric), title, columns, baseline=ablation.baseline)


def curves_of(ablation: str, arms: Sequence[str], samples: Samples, name: str, words: Mapping[str, str]) -> Figure:
    """A curve over training, a line for each seed of each arm."""
    chains = samples.chains[ablation]
    curves = {arm: [c.series[name] for c in chains.get(arm, {}).values() if name in c.series] for arm in arms}
    shown = {arm: found for arm, found in curves.items() if found}
    return curve_figure(_file(ablation, "curve", name), words.get(name, name), shown)


def joints_of(
    ablation: str, arms: Sequence[str], chains: Mapping[str, Mapping[int, Chain]], drawn: dict[frozenset[str], str]
) -> tuple[tuple[Figure, ...], tuple[str, ...]]:
    """(figures, arms drawn elsewhere): the joint distributions of arms, except of runs that `drawn` has already."""
    figures, elsewhere = [], []
    for arm in arms:
        made = _joint_of(ablation, arm, chains.get(arm, {}))
        runs = frozenset(
            r.id for chain in chains.get(arm, {}).values() for r in chain.records if "joint" in r.provenance
        )
        if made is not None and drawn.setdefault(runs, ablation) == ablation:
            figures.append(made)
        elif made is not None:
            elsewhere.append(arm)
    return tuple(figures), tuple(elsewhere)


def _joint_of(ablation: str, arm: str, chains: Mapping[int, Chain]) -> Figure | None:
    """The joint distribution that an arm's records hold, its counts summed over the seeds; None where there is none."""
    notes = _notes(chains, "joint")
    if not notes:
        return None
    rows = zip(*(note["counts"] for note in notes), strict=True)  # of bins that are the same for all
    found = notes[0]
    return joint_figure(
        _file(ablation, "joint", arm),
        f"{arm}: {found['title']}",
        x_edges=found["x_edges"],
        y_edges=found["y_edges"],
        counts=[[sum(cells) for cells in zip(*row, strict=True)] for row in rows],
        x_label=found["x_label"],
        y_label=found["y_label"],
    )


def profiles_of(ablation: str, arms: Sequence[str], chains: Mapping[str, Mapping[int, Chain]]) -> tuple[Figure, ...]:
    """Quantities over the depth of a model, some arms each."""
    notes = {arm: _notes(chains.get(arm, {}), "profiles") for arm in arms}
    return tuple(every_profile(_file(ablation, "profile"), notes))


def _notes(chains: Mapping[int, Chain], name: str) -> list[Any]:
    """What the runs of an arm have noted under a name."""
    return [r.provenance[name] for chain in chains.values() for r in chain.records if name in r.provenance]


def _file(*parts: str) -> str:
    """A name for a figure's file; a long one, as of an arm with many overrides, is cut and told apart by a hash."""
    name = "--".join("".join(c if c.isalnum() or c in "_." else "-" for c in part) for part in parts)
    if len(name) <= MOST_NAME:
        return name
    return f"{name[:MOST_NAME]}-{hashlib.sha256(name.encode()).hexdigest()[:8]}"

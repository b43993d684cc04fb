"""The figures of a report's ablations, drawn from samples and from what runs have noted in their records."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from typing import Any

from retrace.core.figures import ArmValues, curve_figure, joint_figure, sample_figure
from retrace.core.plan import Ablation
from retrace.core.profiles import every_profile
from retrace.core.samples import DIVERGED, Chain, Samples
from retrace.core.svg import Figure

MOST_NAME = 120  # characters of a figure's file name: file systems take 255 bytes


def samples_of(ablation: Ablation, arms: Sequence[str], samples: Samples, metric: str) -> Figure:
    """A metric's samples, a column for each arm."""
    columns = []
    for arm in arms:
        values = {seed: sample.value for seed, sample in samples.values(ablation.name, arm, metric).items()}
        lost = [seed for seed, why in samples.trouble(ablation.name, arm).items() if why == DIVERGED]
        columns.append(ArmValues(arm, values, tuple(seed for seed in lost if seed not in values)))
    return sample_figure(_file(ablation.name, metric), metric, columns, baseline=ablation.baseline)


def curves_of(ablation: str, arms: Sequence[str], samples: Samples, name: str) -> Figure:
    """A curve over training, a line for each seed of each arm."""
    chains = samples.chains[ablation]
    curves = {arm: [c.series[name] for c in chains.get(arm, {}).values() if name in c.series] for arm in arms}
    return curve_figure(_file(ablation, "curve", name), name, {arm: found for arm, found in curves.items() if found})


def joint_of(ablation: str, arm: str, chains: Mapping[int, Chain]) -> Figure | None:
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

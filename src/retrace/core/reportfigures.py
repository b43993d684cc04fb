"""The figures that every ablation of a report has: samples and curves."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from retrace.core.figures import curve_figure, file_name
from retrace.core.plan import Ablation
from retrace.core.samplefigure import ArmValues, sample_figure
from retrace.core.samples import DIVERGED, Samples
from retrace.core.svg import Figure


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
    return sample_figure(file_name(ablation.name, metric), title, columns, baseline=ablation.baseline)


def curves_of(ablation: str, arms: Sequence[str], samples: Samples, name: str, words: Mapping[str, str]) -> Figure:
    """A curve over training, a line for each seed of each arm."""
    chains = samples.chains[ablation]
    curves = {arm: [c.series[name] for c in chains.get(arm, {}).values() if name in c.series] for arm in arms}
    shown = {arm: found for arm, found in curves.items() if found}
    return curve_figure(file_name(ablation, "curve", name), words.get(name, name), shown)

"""The best learning rate of a decoder size, and how far it is from the paper's law (Section 3.2)."""

from __future__ import annotations

import math
from collections.abc import Sequence
from statistics import fmean

from retrace.core.context import Context
from retrace.core.record import Record
from retrace.core.stats import t_quantile
from retrace.papers.mm1 import cost
from retrace.papers.mm1.program_configs import ChooseConfig, LawConfig

SLOPE, OFFSET = -0.4214, -0.5535  # ln of the peak rate = SLOPE * ln(parameters) + OFFSET


def law(num_parameters: int) -> float:
    """The paper's peak learning rate for a decoder of so many parameters, embeddings left out."""
    return math.exp(SLOPE * math.log(num_parameters) + OFFSET)


def choose_rate(config: ChooseConfig, ctx: Context) -> dict[str, float]:
    """The mean in decades of all rates whose score is near the best, as the paper keeps them before its regression."""
    if not ctx.is_main:
        return {}
    rates = config.rates.learning_rates
    records = [Record.load(ctx.parents[f"rate_{index}"].path / "record.json") for index in range(len(rates))]
    scores = [record.metrics[config.metric] for record in records]
    best = max(scores)
    kept = [rate for rate, score in zip(rates, scores, strict=True) if score >= best - config.rates.near * abs(best)]
    used = cost.choose_rate(config)
    ctx.cost.update(tokens=used.tokens, flops=used.flops)
    chosen = fmean(math.log10(rate) for rate in kept)
    return {
        "rate/log10": chosen,
        "rate/log10_over_law": chosen - math.log10(law(config.num_parameters)),
        "rate/log10_parameters": math.log10(config.num_parameters),
        "rate/score": best,
        "rate/kept": float(len(kept)),
        "rate/at_lowest": float(rates[0] in kept),
        "rate/at_highest": float(rates[-1] in kept),
    }


def fit_law(config: LawConfig, ctx: Context) -> dict[str, float]:
    """The law through the chosen rates of all sizes, beside the paper's constants; the seeds say how sure it is too."""
    if not ctx.is_main:
        return {}
    records = {name: Record.load(ctx.parents[name].path / "record.json") for name in config.num_parameters}
    sizes = [math.log(count) for count in config.num_parameters.values()]
    rates = [records[name].metrics["rate/log10"] * math.log(10) for name in config.num_parameters]
    slope, offset, half = line(sizes, rates)
    used = cost.fit_law(config)
    ctx.cost.update(tokens=used.tokens, flops=used.flops)
    return {
        "law/slope": slope,
        "law/slope_low": slope - half,
        "law/slope_high": slope + half,
        "law/offset": offset,
        "law/paper_slope": SLOPE,
        "law/paper_offset": OFFSET,
    }


def line(x: Sequence[float], y: Sequence[float]) -> tuple[float, float, float]:
    """Slope and offset by least squares, and half the width of the slope's 95 % t interval, from the residuals.

    Raises ValueError for fewer than three points, which leave no residual.
    """
    if len(x) < 3:
        raise ValueError(f"{len(x)} points: an interval of a slope needs three")
    mean_x, mean_y = fmean(x), fmean(y)
    spread = math.fsum((value - mean_x) ** 2 for value in x)
    slope = math.fsum((a - mean_x) * (b - mean_y) for a, b in zip(x, y, strict=True)) / spread
    offset = mean_y - slope * mean_x
    residual = math.fsum((b - offset - slope * a) ** 2 for a, b in zip(x, y, strict=True))
    degrees = len(x) - 2
    return slope, offset, t_quantile(degrees) * math.sqrt(residual / degrees / spread)

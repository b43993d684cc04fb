"""The best learning rate of a decoder size, and how far it is from the paper's law (Section 3.2)."""

from __future__ import annotations

import math
from statistics import fmean

from retrace.core.context import Context
from retrace.core.record import Record
from retrace.papers.mm1 import cost
from retrace.papers.mm1.program_configs import ChooseConfig

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

"""Moments of a fresh model, measured beside predicted: metrics, and profiles over its depth for the report."""

from __future__ import annotations

import logging
import math
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

from retrace.core.data import derive_seed, generator
from retrace.papers.deepscalelm.components import Moments as Predicted
from retrace.papers.deepscalelm.config import CorrelatedInput, MeasureConfig, ZipfInput
from retrace.papers.deepscalelm.inputs import Features, features, forward
from retrace.papers.deepscalelm.measure import Moments, measure
from retrace.papers.deepscalelm.model import Transformer
from retrace.papers.deepscalelm.recursion import Profile, profile
from retrace.papers.deepscalelm.scheme import ModelInit
from retrace.papers.deepscalelm.shape import ModelShape
from retrace.papers.deepscalelm.variants import make

log = logging.getLogger("retrace")
Array = NDArray[np.float64]
POINTS = 40  # of a curve in the record
DIGITS = 4
LEVEL = 0.3  # deviation of a logarithm below which a profile counts as level


def moments_at_start(config: MeasureConfig, *, device: str = "cpu") -> tuple[dict[str, float], dict[str, Any]]:
    """(metrics, profiles): one forward and one backward pass in training mode, from a top gradient of white noise."""
    shape, asked = config.model, config.moments
    found = None
    if not isinstance(asked.input, CorrelatedInput | ZipfInput):
        found = features(asked.input, num_sequences=asked.num_sequences, length=shape.seq_len, seed=config.seed)
    init = make(shape, config.method)
    if isinstance(asked.input, CorrelatedInput):
        init = make(shape, config.method, corr0=asked.input.corr / (1 - shape.dropout))
    elif found is not None:
        init = make(shape, config.method, corr0=summed_corr(init, shape, found))
    model = Transformer(shape, init, seed=config.seed).to(device).train()
    measured = _measure(model, config, found)
    try:
        predicted = profile(shape, init, inputs=_input_moments(config, init, found))
    except ValueError as outside:  # of what the formulas are good for, such as scores far above their softmax's range
        log.warning("no prediction: %s", outside)
        predicted = None
    return _compare(shape, measured, predicted, inputs=found)


def summed_corr(init: ModelInit, shape: ModelShape, found: Features) -> float:
    """Correlation of features and positions together, before dropout: rows of positions have none (Section 1.4)."""
    own = init.token_std**2
    positions = init.position_std**2 if shape.positions == "learned" else 0.0
    return own * found.corr / (own + positions)


def _input_moments(config: MeasureConfig, init: ModelInit, found: Features | None) -> Predicted | None:
    """What enters the first layer, where the theory is not left to work it out from Zipf's law."""
    given, shape = config.moments.input, config.model
    if isinstance(given, CorrelatedInput):
        return Predicted(0.0, 1.0, given.corr)
    if found is None:
        return None
    positions = init.position_std**2 if shape.positions == "learned" else 0.0
    var = (init.token_std**2 + positions) / (1 - shape.dropout)
    return Predicted(0.0, var, (1 - shape.dropout) * summed_corr(init, shape, found))


def _measure(model: Transformer, config: MeasureConfig, found: Features | None) -> Moments:
    torch.manual_seed(derive_seed(config.seed, "dropout"))
    asked = config.moments
    with measure(model) as seen:
        handles = [p.register_post_accumulate_grad_hook(_forget) for p in model.parameters()]
        hidden_BTD = forward(model, asked.input, num_sequences=asked.num_sequences, seed=config.seed, found=found)
        noise = generator(config.seed, "top gradient")
        hidden_BTD.backward(torch.randn(hidden_BTD.shape, generator=noise).to(hidden_BTD.device))
        for handle in handles:
            handle.remove()
    return seen.moments()


def _forget(parameter: nn.Parameter) -> None:
    """A gradient has been measured when this is called: all of them together would need as much memory as the model."""
    parameter.grad = None


def _compare(
    shape: ModelShape, measured: Moments, predicted: Profile | None, *, inputs: Features | None
) -> tuple[dict[str, float], dict[str, Any]]:
    """Every place from the input of the first sub-block on. Gradients are relative to that of the last place."""
    stream = measured.stream()
    sums = measured.sums() if measured.sums().names else None
    # In Post-LN the norm hides the variance, so it is that of the sums in front of it
    var = stream.var if sums is None else _behind_each(stream.names, sums)
    grad = stream.grad_var / stream.grad_var[-1]
    norms = measured.weight_grad_norms
    metrics = {
        "moments/var_last": float(var[-1]),
        "moments/var_min": float(np.nanmin(var[1:])),
        "moments/var_max": float(np.nanmax(var[1:])),
        "moments/var_decades": _decades(var[1:]),
        "moments/var_per_layer": float((var[-1] - var[1]) / max(1, shape.num_layers)),
        "moments/corr_last": float(stream.corr[-1]),
        "moments/log10_grad_bottom": float(np.log10(grad[2])),
        "moments/grad_decades": _decades(grad[2:]),
        "moments/weight_grad_decades": _decades(norms),
        "moments/log10_weight_grad_first_over_last": float(np.log10(norms[0] / norms[-1])),
    }
    theory: dict[str, Array | None] = {"var": None, "corr": None, "grad": None}
    if predicted is not None:
        theory = {"var": predicted.var[1:], "corr": predicted.corr, "grad": predicted.grad_var / predicted.grad_var[-1]}
        metrics |= _errors(var[1:], stream.corr, grad, predicted)
    if inputs is not None:
        metrics["moments/input_corr"] = inputs.corr
    profiles = {
        "variance of the residual": _profile(var[1:], theory["var"], log=True),
        "correlation along the sequence": _profile(stream.corr, theory["corr"], log=False),
        "variance of the gradient (top = 1)": _profile(grad, theory["grad"], log=True),
        "norm of a layer's weight gradient": _profile(norms / np.exp(np.log(norms).mean()), None, log=True),
    }
    return {name: value for name, value in metrics.items() if math.isfinite(value)}, profiles


def _errors(var: Array, corr: Array, grad: Array, predicted: Profile) -> dict[str, float]:
    """How far the theory is off: medians over sub-blocks of relative errors, and the gradient's at the bottom."""
    theory_grad = predicted.grad_var / predicted.grad_var[-1]
    return {
        "theory/var_error": _error(var, predicted.var[1:]),
        "theory/corr_error": _error(corr[1:], predicted.corr[1:]),
        "theory/grad_error": _error(grad[1:-1], theory_grad[1:-1]),
        "theory/log10_grad_bottom_error": abs(float(np.log10(grad[2] / theory_grad[2]))),
        "theory/log_var_r2": _r_squared(np.log(var), np.log(predicted.var[1:])),
    }


def _behind_each(names: tuple[str, ...], sums: Moments) -> Array:
    """For each place of the stream, the variance of the sum that it was normed from; NaN where it was not."""
    at = {name.removesuffix(".sum"): value for name, value in zip(sums.names, sums.var, strict=True)}
    before = [math.nan, *(at.get(name, math.nan) for name in names[:-1])]
    return np.array(before)


def _decades(values: Array) -> float:
    """Orders of magnitude between the largest and the smallest."""
    return float(np.log10(np.nanmax(values) / np.nanmin(values)))


def _error(measured: Array, predicted: Array) -> float:
    """Median relative error of what was predicted."""
    return float(np.nanmedian(np.abs(predicted / measured - 1)))


def _r_squared(measured: Array, predicted: Array) -> float:
    """Share of the variation that the prediction explains; NaN where there is next to nothing to explain."""
    kept = np.isfinite(measured) & np.isfinite(predicted)
    spread = np.square(measured[kept] - measured[kept].mean())
    if spread.mean() < LEVEL**2:
        return math.nan
    return 1 - float(np.square(measured[kept] - predicted[kept]).sum() / spread.sum())


def _profile(measured: Array, predicted: Array | None, *, log: bool) -> Mapping[str, Any]:
    """A curve over depth as a share of the model's, for a record: a few dozen points of a few digits."""
    places = np.unique(np.linspace(0, len(measured) - 1, min(POINTS, len(measured))).round().astype(int))

    def curve(values: Array) -> list[list[float]]:
        last = max(1, len(values) - 1)
        return [[round(int(i) / last, DIGITS), _short(values[i])] for i in places if math.isfinite(values[i])]

    return {"log": log, "measured": curve(measured), "predicted": [] if predicted is None else curve(predicted)}


def _short(value: float) -> float:
    return float(f"{value:.{DIGITS}g}")

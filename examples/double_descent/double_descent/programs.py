"""What a run does: (config, context) -> metrics. Imported where a run is carried out, so heavy imports belong here."""

from __future__ import annotations

import math

import numpy as np
from sklearn.datasets import load_digits

from double_descent import FitConfig, cost
from retrace.core.context import Context


def fit(config: FitConfig, ctx: Context) -> dict[str, float]:
    """Least squares on random Fourier features of images, ten outputs for ten digits, as in the paper's Figure 2."""
    noise = np.random.default_rng(config.seed)
    images, labels = load_digits(return_X_y=True)
    chosen = noise.permutation(len(images))[: config.data.num_train + config.data.num_test]
    x, y = images[chosen] / 16.0, np.eye(10)[labels[chosen]]
    n = config.data.num_train

    directions = noise.normal(size=(x.shape[1], config.num_features)) / config.features.bandwidth
    phases = noise.uniform(0.0, 2.0 * math.pi, config.num_features)
    features = np.cos(x @ directions + phases) * math.sqrt(2.0 / config.num_features)

    left, singular, right = np.linalg.svd(features[:n], full_matrices=False)
    kept = singular > singular[0] * n * np.finfo(float).eps
    inverse = np.where(kept, singular / (singular**2 + config.ridge), 0.0)
    coefficients = right.T @ (inverse[:, None] * (left.T @ y[:n]))

    predicted = features @ coefficients
    squared = ((predicted - y) ** 2).sum(axis=1)
    wrong = predicted.argmax(axis=1) != y.argmax(axis=1)
    ctx.cost["flops"] = cost(config).flops  # with the seconds, which are taken: how long the next one will take
    return {
        "train/loss": float(squared[:n].mean()),
        "test/log10_loss": math.log10(squared[n:].mean()),
        "test/wrong": float(wrong[n:].mean()),
        "coefficients/log10_norm": math.log10(np.linalg.norm(coefficients)),
    }

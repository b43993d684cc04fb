"""DeepScaleLM's rule for one layer: every branch has unit variance, and lambda^2 + beta^2 = 1. No torch.

p: dropout of the branches, d: hidden_size, f: intermediate_size, N: layers of a stack. Section 3; apply.py and
methods.py both ask here, so a transformers model gets what ours gets.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal, get_args

import numpy as np
from numpy.typing import ArrayLike

from retrace.papers.deepscalelm.causal import causal_gains
from retrace.papers.deepscalelm.correlations import (
    Array,
    dslm_correlations,
    effective_correlation,
)
from retrace.papers.deepscalelm.gains import Gain
from retrace.papers.deepscalelm.scheme import AttentionInit, FeedForwardInit, Residual

Reading = Literal["code", "layers2"]
READINGS: Mapping[Reading, float] = {"code": 1.0, "layers2": 2.0}  # k of the official code, and of other readers
SCORE_VAR = 1.0  # of queries and keys N(0, 1/d) on a normed input


@dataclass(frozen=True)
class Plan:
    """What a stack's layers need to know: beta^2, and the gain that value and output matrices have to make good."""

    beta_sq: float
    own: Array  # [num_layers]; of self-attention
    memory: float | None  # of cross-attention
    final_corr: float  # of what leaves the stack


def beta_squared(num_layers: int, *, k: float | Reading, alpha: float = 1.0, beta_sq: float | None = None) -> float:
    """k / N^alpha, or `beta_sq` where it is given (Section 3.2). Raises ValueError unless it is between 0 and 1."""
    if beta_sq is not None:
        if not 0 < beta_sq < 1:
            raise ValueError(f"beta_sq={beta_sq!r}: expected a share above 0 and below 1, as lambda^2 + beta^2 = 1")
        return beta_sq
    if isinstance(k, str) and k not in READINGS:
        raise ValueError(f"k='{k}': expected a number, or one of {', '.join(map(repr, get_args(Reading)))}")
    number = READINGS[k] if isinstance(k, str) else k
    found = number / num_layers**alpha
    if not (0 < number < num_layers and 0 < found < 1):
        shown = f"k={number:g}" + ("" if alpha == 1 else f", alpha={alpha:g}")
        raise ValueError(
            f"{shown}: beta^2 = k / num_layers^alpha must be between 0 and 1, and k below num_layers={num_layers}; "
            f"choose a smaller k, more layers, or beta_sq itself"
        )
    return found


def residual(beta_sq: float) -> Residual:
    """lambda and beta; their squares sum to one."""
    return Residual(skip=math.sqrt(1 - beta_sq), scale=math.sqrt(beta_sq))


def embedding_std(dropout: float, *, num_tables: int) -> float:
    """Of each of the summed tables, so that after dropout they have variance one (Section 3.1)."""
    return math.sqrt((1 - dropout) / num_tables)


def logit_scale(hidden_size: int, *, token_std: float) -> float:
    """What gives the products of normed states with an embedding matrix variance one (Section 3.1, pitfall 3)."""
    return 1 / (token_std * math.sqrt(hidden_size))


def plan(
    num_layers: int,
    *,
    gain: Gain,
    beta_sq: float,
    corr0: float,
    dropout: float,
    attention_dropout: float,
    seq_len: int,
    causal: bool,
    finite: bool,
    memory_corr: float | None = None,
    parallel: bool = False,
) -> Plan:
    """The correlations of one stack, forward (Sections 3.1, 3.6).

    `finite`: value and output matrices make good not the correlation alone, as in the official code, but also what the
    softmax over `seq_len` keys leaves of single values. Causal attention has it always, and goes by causal.py.
    `memory_corr`: of what cross-attention reads, None: there is none. `parallel`: as there.
    """

    def passed(corr: ArrayLike) -> Array:
        return effective_correlation(
            corr, seq_len=seq_len, score_var=SCORE_VAR, attention_dropout=attention_dropout, causal=False
        )

    def alike(corr: ArrayLike) -> Array:
        """Correlation of attention's outputs (Section 1.7)."""
        r = np.asarray(corr)
        return (r + (1 - r) * np.exp(r * (1 - r) * SCORE_VAR) / seq_len) / passed(r)

    memory = None if memory_corr is None else float(passed(memory_corr))
    if causal:
        own, final = causal_gains(
            num_layers,
            gain=gain,
            beta_sq=beta_sq,
            corr0=corr0,
            dropout=dropout,
            attention_dropout=attention_dropout,
            seq_len=seq_len,
            score_var=SCORE_VAR,
            parallel=parallel,
            cross=memory is not None,
        )
        return Plan(beta_sq, own, memory, final)
    list_N1 = dslm_correlations(
        num_layers + 1,
        dropout=dropout,
        beta_sq=beta_sq,
        lambda_sq=1 - beta_sq,
        corr0=corr0,
        kernel=gain.kernel,
        attention=alike if finite else None,
    )
    own = passed(list_N1[:-1]) if finite else list_N1[:-1]
    return Plan(beta_sq, own, memory, float(list_N1[-1]))


def attention(
    hidden_size: int, *, passed: float, dropout: float, joined: Residual, output_size: int | None = None
) -> AttentionInit:
    """Queries and keys 1/sqrt(d); values and output such that d e var_V var_O passed / (1-p) = 1.

    e: `output_size`, the columns of the output matrix; None: d. Raises ValueError for `passed` of 0 or below, as
    where inputs are less alike than chance: there is nothing to make good.
    """
    if passed <= 0:
        raise ValueError(
            f"corr0: attention would pass on {passed:.3g} of the variance, and the method divides by it: expected "
            "inputs that are alike on average; measure r0 on more or longer sequences, or give method.options.corr0"
        )
    width = hidden_size * (hidden_size if output_size is None else output_size)
    last = ((1 - dropout) / (passed * width)) ** 0.25
    scores = hidden_size**-0.5
    return AttentionInit(scores, scores, last, last, joined)


def feed_forward(
    hidden_size: int, intermediate_size: int, *, gain: Gain, dropout: float, joined: Residual
) -> FeedForwardInit:
    """d f var_1 var_2 E[f^2] / (1-p) = 1: in equal parts if the activation is homogeneous, else var_1 = 1/d."""
    d, f, kept = hidden_size, intermediate_size, 1 - dropout
    if gain.homogeneous:
        std = (kept / (d * f * gain.square)) ** 0.25
        return FeedForwardInit(std, std, joined)
    return FeedForwardInit(d**-0.5, math.sqrt(kept / (f * gain.square)), joined)

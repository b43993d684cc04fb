"""Optimizer settings, shared by every program that trains: AdamW, warm-up, decay, clipping."""

from __future__ import annotations

import math
from typing import Literal, Self

from pydantic import Field, model_validator

from retrace.core.config import Frozen

Precision = Literal["fp32", "fp32_master", "pure_bf16"]  # see core/precision.py


class Optim(Frozen):
    """AdamW over `steps` updates of a global batch of `batch_size` sequences."""

    steps: int = Field(ge=1)
    batch_size: int = Field(ge=1)  # sequences in an update, over all processes
    micro_batch_size: int = Field(ge=1)  # sequences in one forward pass of one process
    learning_rate: float = Field(gt=0)
    warmup_steps: int = Field(ge=0)
    hold_steps: int = Field(0, ge=0)  # at the peak after the warm-up, before the decay begins
    decay: Literal["constant", "linear", "cosine"]
    weight_decay: float = Field(ge=0)
    beta1: float = Field(0.9, ge=0, lt=1)
    beta2: float = Field(0.999, ge=0, lt=1)
    epsilon: float = Field(1e-8, gt=0)
    clip_norm: float = Field(gt=0)
    clip: Literal["global", "per_group"]  # the norm that is clipped: of all gradients, or of each parameter group
    precision: Precision  # of weights, gradients and moments; it moves numbers, so it is part of a run's identity

    @model_validator(mode="after")
    def _micro_batches_divide(self) -> Self:
        if self.batch_size % self.micro_batch_size:
            raise ValueError(
                f"micro_batch_size={self.micro_batch_size} does not divide batch_size={self.batch_size}: "
                "choose one that does"
            )
        return self

    def check_processes(self, processes: int, *, key: str) -> None:
        """Raise ValueError, naming `key`, where processes would get different numbers of micro-batches."""
        per_round = self.micro_batch_size * processes
        if self.batch_size % processes:
            raise ValueError(
                f"{key}.batch_size={self.batch_size} does not divide by hardware.processes={processes}: change either"
            )
        if self.batch_size % per_round:
            raise ValueError(
                f"{key}.batch_size={self.batch_size} does not divide into micro-batches of {self.micro_batch_size} on "
                f"{processes} processes: choose {key}.micro_batch_size so that {per_round} becomes a divisor of it"
            )

    def factor(self, step: int) -> float:
        """Learning rate at update `step` (from 0) as a share of its peak."""
        if step < self.warmup_steps:
            return (step + 1) / self.warmup_steps
        begin = self.warmup_steps + self.hold_steps
        span = max(1, self.steps - begin)
        done = min(1.0, max(0.0, (step - begin) / span))
        if self.decay == "linear":
            return 1.0 - done
        if self.decay == "cosine":
            return 0.5 * (1.0 + math.cos(math.pi * done))
        return 1.0

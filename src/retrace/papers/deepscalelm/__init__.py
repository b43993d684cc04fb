"""Transformers Get Stable (DeepScaleLM, arXiv 2403.09635): signal propagation through whole transformers."""

from __future__ import annotations

from retrace.core.paper import Command, Paper, Program
from retrace.papers.deepscalelm import cost
from retrace.papers.deepscalelm.config import (
    DeepScaleLMConfig,
    FinetuneConfig,
    MeasureConfig,
    PrepareConfig,
    SelectConfig,
    TrainConfig,
)
from retrace.papers.deepscalelm.stages import check, stages

_PROGRAMS = "retrace.papers.deepscalelm.programs"

PAPER = Paper(
    slug="deepscalelm",
    title="Transformers Get Stable: An End-to-End Signal Propagation Theory for Language Models",
    arxiv="2403.09635",
    recipe=1,
    config=DeepScaleLMConfig,
    stages=stages,
    programs={
        "measure": Program(MeasureConfig, f"{_PROGRAMS}:measure", cost.measure),
        "prepare": Program(PrepareConfig, f"{_PROGRAMS}:prepare", cost.prepare),
        "train": Program(TrainConfig, f"{_PROGRAMS}:train", cost.train),
        "select": Program(SelectConfig, f"{_PROGRAMS}:select", cost.select, accepts_diverged=True),
        "finetune": Program(FinetuneConfig, f"{_PROGRAMS}:finetune", cost.finetune),
    },
    check=check,
    commands=(
        Command(
            "moments",
            "Show the moments that the theory predicts for every layer of a model, as a table and a figure.",
            "retrace.papers.deepscalelm.moments_command:moments",
        ),
    ),
    panels="retrace.papers.deepscalelm.profile_figures:panels",
)

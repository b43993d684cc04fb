"""Quiet-STaR (arXiv 2403.09629): a language model that thinks before every token."""

from __future__ import annotations

from retrace.core.paper import Command, Paper, Program
from retrace.papers.quietstar import cost
from retrace.papers.quietstar.config import (
    DistillConfig,
    EvaluateConfig,
    PretrainConfig,
    QuietStarConfig,
    TrainConfig,
)
from retrace.papers.quietstar.stages import check, stages

PAPER = Paper(
    slug="quietstar",
    title="Quiet-STaR: Language Models Can Teach Themselves to Think Before Speaking",
    arxiv="2403.09629",
    recipe=1,
    config=QuietStarConfig,
    stages=stages,
    programs={
        "pretrain": Program(PretrainConfig, "retrace.papers.quietstar.programs:pretrain", cost.pretrain),
        "train": Program(TrainConfig, "retrace.papers.quietstar.programs:train", cost.train),
        "distill": Program(DistillConfig, "retrace.papers.quietstar.programs:distill", cost.distill),
        "evaluate": Program(EvaluateConfig, "retrace.papers.quietstar.programs:evaluate", cost.evaluate),
    },
    check=check,
    commands=(
        Command(
            "think",
            "Show what every token of a text gains from thoughts, and the thoughts.",
            "retrace.papers.quietstar.think:think",
        ),
    ),
    panels="retrace.papers.quietstar.joint_figures:panels",
)

"""MM1 (arXiv 2403.09611): what matters in multimodal pre-training."""

from __future__ import annotations

from retrace.core.paper import Paper, Program
from retrace.papers.mm1 import cost
from retrace.papers.mm1.config import MM1Config
from retrace.papers.mm1.program_configs import (
    ChooseConfig,
    DecoderConfig,
    EncoderConfig,
    EvaluateConfig,
    FinetuneConfig,
    LawConfig,
    PretrainConfig,
    TokenizerConfig,
)
from retrace.papers.mm1.stages import check, stages

_PROGRAMS = "retrace.papers.mm1.programs"

PAPER = Paper(
    slug="mm1",
    title="MM1: Methods, Analysis & Insights from Multimodal LLM Pre-training",
    arxiv="2403.09611",
    recipe=3,
    config=MM1Config,
    stages=stages,
    programs={
        "prepare": Program(TokenizerConfig, f"{_PROGRAMS}:prepare", cost.prepare),
        "pretrain_encoder": Program(EncoderConfig, f"{_PROGRAMS}:pretrain_encoder", cost.pretrain_encoder),
        "pretrain_decoder": Program(DecoderConfig, f"{_PROGRAMS}:pretrain_decoder", cost.pretrain_decoder),
        "pretrain": Program(PretrainConfig, f"{_PROGRAMS}:pretrain", cost.pretrain),
        "finetune": Program(FinetuneConfig, f"{_PROGRAMS}:finetune", cost.finetune),
        "evaluate": Program(EvaluateConfig, "retrace.papers.mm1.evaluation:evaluate", cost.evaluate),
        "fit_law": Program(LawConfig, "retrace.papers.mm1.rates:fit_law", cost.fit_law),
        "choose_rate": Program(ChooseConfig, "retrace.papers.mm1.rates:choose_rate", cost.choose_rate),
    },
    check=check,
)

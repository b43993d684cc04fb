"""Quiet-STaR as a model of lm-eval's own command line.

    lm_eval run --model quietstar --model_args pretrained=FOLDER,think=true,dtype=float32 --tasks gsm8k --device cpu

`pretrained` is a folder that `save_pretrained` wrote (`model` of a finished train run), or a model on the hub.
"""

from __future__ import annotations

from typing import Any, Literal

import torch
from pydantic import Field, field_validator

from retrace.core.command_line import language_model
from retrace.core.config import Frozen, validate
from retrace.core.requests import Scorer
from retrace.papers.quietstar.config import TASKS
from retrace.papers.quietstar.pretrained import from_pretrained
from retrace.papers.quietstar.scorer import ThoughtScorer


class ModelArguments(Frozen):
    """What `--model_args`, `--batch_size` and `--device` may say."""

    pretrained: str = Field(min_length=1)
    revision: str = "main"  # of a model on the hub
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"  # auto: as it is stored
    device: str | None = None  # null: a GPU if there is one
    batch_size: int | Literal["auto"] = "auto"  # rows; auto: what a batch of fixed size in tokens holds
    think: bool = True  # false: the same weights without thoughts
    thought_seed: int | Literal["greedy"] = "greedy"  # a number: sampled thoughts
    seed: int = Field(0, ge=0)  # of sampled texts, for tasks that sample

    @field_validator("batch_size", mode="before")
    @classmethod
    def _is_a_number_in_words(cls, given: Any) -> Any:
        return int(given) if isinstance(given, str) and given.isdecimal() else given


def load(**arguments: Any) -> tuple[Scorer, int]:
    """The scorer, and the seed of sampled texts. Raises ValueError for an argument that is unknown or wrong."""
    given = validate(ModelArguments, arguments, source="--model_args")
    model, tokenizer = from_pretrained(
        given.pretrained,
        revision=given.revision,
        dtype=None if given.dtype == "auto" else getattr(torch, given.dtype),
        device=given.device or ("cuda" if torch.cuda.is_available() else "cpu"),
    )
    scorer = ThoughtScorer(
        model,
        tokenizer,
        think=given.think,
        thought_seed=None if given.thought_seed == "greedy" else given.thought_seed,
        batch_size=None if given.batch_size == "auto" else given.batch_size,
    )
    return scorer, given.seed


QuietStar = language_model(load, tasks_dir=TASKS)

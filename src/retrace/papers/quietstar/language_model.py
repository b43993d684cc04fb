"""Quiet-STaR as a model of lm-eval's own command line.

    lm_eval run --model quietstar --model_args pretrained=FOLDER,think=true,dtype=float32 --tasks gsm8k --device cpu

`pretrained` is a folder that `save_pretrained` wrote (`model` of a finished train run), or a model on the hub.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal

import torch
from pydantic import Field, field_validator

from retrace.core.config import Frozen, validate
from retrace.core.evaluate import scorer_model
from retrace.core.requests import OnProgress, Responses
from retrace.core.tasks import read_task
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


def load(**arguments: Any) -> tuple[ThoughtScorer, int]:
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


class QuietStar(scorer_model()):  # type: ignore[misc]  # known once lm-eval is imported
    """The model of `lm_eval --model quietstar`.

    Of this paper's tasks the `allowed` answers hold there too: its `acc` is ours. Its `prob` has no name in lm-eval,
    which prints the perplexity of the answer: exp of the mean of -log(prob) over the items.
    """

    def __init__(self, **arguments: Any) -> None:
        scorer, seed = load(**arguments)
        super().__init__(scorer, seed=seed, answers_of=_answers_of, responses=Responses(), on_progress=_progress_bar())

    def generate_until(self, requests: Sequence[Any]) -> list[str]:
        for task in {request.task_name for request in requests}:
            _answers_of(task)  # refuses a subset
        return super().generate_until(requests)


def _answers_of(task: str) -> Sequence[str] | None:
    if not (TASKS / f"{task}.yaml").is_file():
        return None
    file = read_task(task, tasks_dir=TASKS)
    if file.subset is not None:
        raise ValueError(f"{task}: metadata.subset is for `retrace run`: here, choose items with --samples")
    return file.allowed


def _progress_bar() -> OnProgress:
    """A bar in the terminal for each round of requests."""
    from tqdm import tqdm

    bar: Any = None

    def show(share: float) -> None:
        nonlocal bar
        bar = bar or tqdm(total=1.0, bar_format="answers: {percentage:3.0f}%|{bar}| [{elapsed}<{remaining}]")
        bar.update(share - bar.n)
        if share == 1.0:
            bar.close()
            bar = None

    return show

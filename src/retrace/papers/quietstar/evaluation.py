"""What thoughts bring to questions: answers with and without them, through lm-eval (Section 5, specification 3.1, 3.2).

Everything is measured twice on the same weights: with thoughts (the mixed prediction) and without (metrics that end in
`_base`). Metrics that end in `_before` are the base model's, from before the continued training.
"""

from __future__ import annotations

import shutil
import time
from collections.abc import Mapping
from dataclasses import asdict
from typing import Any

from transformers import PreTrainedTokenizerBase

from retrace.core.config import data_root
from retrace.core.context import Context, Stopped
from retrace.core.evaluate import evaluate_task
from retrace.core.files import read_json, write_json
from retrace.core.requests import OnProgress, Scorer
from retrace.core.tasks import Rows
from retrace.papers.quietstar.config import GENERATED, TASKS, EvaluateConfig
from retrace.papers.quietstar.corpus import questions
from retrace.papers.quietstar.model import ThoughtModel
from retrace.papers.quietstar.scorer import ThoughtScorer
from retrace.papers.quietstar.world import CorpusConfig

STEPS = 100  # of progress, for each task


def score_tasks(
    model: ThoughtModel,
    base: ThoughtModel,
    tokenizer: PreTrainedTokenizerBase,
    *,
    config: EvaluateConfig,
    ctx: Context,
) -> dict[str, float]:
    """Every task through lm-eval. A killed run goes on behind the last batch that it has answered.

    Each finished task is a file `tasks/<name>.json` with all of its items; batches of one that is not finished lie in
    `responses/`. Raises Stopped, between batches, where the context asks to stop.
    """
    scorers = _scorers(model, base, tokenizer, config=config)
    metrics: dict[str, float] = {}
    notes = ctx.notes.setdefault("tasks", {})
    progress = _Progress(len(config.eval.tasks) + 1, ctx)
    for number, name in enumerate(config.eval.tasks):
        path = ctx.run.path / "tasks" / f"{name}.json"
        result = read_json(path)
        if result is None:
            result = _score(name, scorers, config=config, ctx=ctx, on_progress=progress.of(number))
            write_json(path, result)
        metrics |= result["metrics"]
        notes[name] = {key: result[key] for key in ("version", "lm_eval", "task_hash", "num_shortened")}
        notes[name]["items"] = len(result["items"])
    shutil.rmtree(ctx.run.path / "responses", ignore_errors=True)
    for name in config.eval.tasks:
        if f"{name}/prob" in metrics:
            metrics[f"{name}/gain"] = metrics[f"{name}/prob"] - metrics[f"{name}/prob_base"]
    return metrics


def _scorers(
    model: ThoughtModel, base: ThoughtModel, tokenizer: PreTrainedTokenizerBase, *, config: EvaluateConfig
) -> dict[str, Scorer | Mapping[int, Scorer]]:
    seeds = config.eval.thought_seeds
    thinking: Scorer | Mapping[int, Scorer]
    if seeds == "greedy":
        thinking = ThoughtScorer(model, tokenizer, think=True, thought_seed=None)
    else:
        thinking = {seed: ThoughtScorer(model, tokenizer, think=True, thought_seed=seed) for seed in seeds}
    return {
        "": thinking,
        "base": ThoughtScorer(model, tokenizer, think=False, thought_seed=None),
        "before": ThoughtScorer(base, tokenizer, think=False, thought_seed=None),
    }


def _score(
    name: str,
    scorers: Mapping[str, Scorer | Mapping[int, Scorer]],
    *,
    config: EvaluateConfig,
    ctx: Context,
    on_progress: OnProgress,
) -> dict[str, Any]:
    def on_batch(share: float) -> None:
        on_progress(share)
        if ctx.stop.is_set() and share < 1:
            raise Stopped(f"stopped in task {name}; the batches that are answered are kept")

    if ctx.stop.is_set():
        raise Stopped(f"stopped before task {name}")
    return asdict(
        evaluate_task(
            name,
            scorers=scorers,
            seed=config.seed,
            tasks_dir=TASKS,
            data_dir=data_root(),
            generated=_generated(name, config),
            limit=config.eval.limit,
            responses_dir=ctx.run.path / "responses",
            on_progress=on_batch,
        )
    )


def _generated(name: str, config: EvaluateConfig) -> Mapping[str, Rows]:
    """The held-out questions of a procedural task."""
    if name not in GENERATED or not isinstance(config.corpus, CorpusConfig):
        return {}
    return {name: questions(config.corpus, family=GENERATED[name], count=config.eval.num_questions)}


class _Progress:
    """Tells the tracker how far all parts are, and how long the rest takes if all take as long as those so far."""

    def __init__(self, num_parts: int, ctx: Context) -> None:
        self.total, self.ctx = STEPS * num_parts, ctx
        self.first: tuple[int, float] | None = None  # step and time of the first batch in this process

    def of(self, part: int) -> OnProgress:
        def on_progress(share: float) -> None:
            step, now = STEPS * part + int(STEPS * share), time.monotonic()
            self.first = self.first or (step, now)
            since, began = self.first
            left = (now - began) / (step - since) * (self.total - step) if step > since else None
            self.ctx.tracker.progress(step, self.total, seconds_left=left)

        return on_progress

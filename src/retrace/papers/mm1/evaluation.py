"""Program `evaluate`: few-shot tasks and text tasks of a trained model (Section 3.4).

Every task's scores are a file of the run, with each answer: a killed run goes on behind the last one that is there.
"""

from __future__ import annotations

import time
from collections.abc import Collection, Iterator, Sequence
from dataclasses import asdict, dataclass
from itertools import islice
from pathlib import Path
from typing import Any

from torch import Tensor
from transformers import PreTrainedTokenizerBase

from retrace.core.config import data_root
from retrace.core.context import Context, Stopped
from retrace.core.evaluate import evaluate_task
from retrace.core.files import read_json, write_json
from retrace.core.precision import COMPUTED
from retrace.papers.mm1 import cost, fewshot, inference
from retrace.papers.mm1.choices import ImageTask
from retrace.papers.mm1.config import TASKS, Evaluation
from retrace.papers.mm1.corpus_source import CorpusSource
from retrace.papers.mm1.fewshot import Scores, Task, group_means, read_items, sampled, with_demonstrations
from retrace.papers.mm1.model import MultimodalModel
from retrace.papers.mm1.pretrained import load_model
from retrace.papers.mm1.program_configs import EvaluateConfig
from retrace.papers.mm1.rows import Piece
from retrace.papers.mm1.sources import load_tokenizer
from retrace.papers.mm1.subimages import split_images
from retrace.papers.mm1.textcore import TextScorer
from retrace.papers.mm1.world import WorldConfig
from retrace.papers.mm1.worldtasks import world_tasks

MODEL, SCORES = "model", "scores"
SHOWN = 20  # items of each task that are kept with their answers
CHANCE = {"color": 1 / 8, "shape": 1 / 8, "digits": 1 / 10}


@dataclass(frozen=True)
class ModelAnswerer:
    """The model as `fewshot` asks it; with `side`, images are split into an overview and quarters of that size.

    Of `last`, only the last images of a prompt are: mixed resolution (Section 2.4).
    """

    model: MultimodalModel
    side: int | None = None
    last: int | None = None

    def _prompts(self, prompts: Sequence[Sequence[Piece]]) -> list[Sequence[Piece]]:
        return [p if self.side is None else split_images(p, side=self.side, last=self.last) for p in prompts]

    def generate(
        self, prompts: Sequence[Sequence[Piece]], *, max_new_tokens: int, stop: Collection[int]
    ) -> list[list[int]]:
        return inference.generate(self.model, self._prompts(prompts), max_new_tokens=max_new_tokens, stop=stop)

    def log_likelihoods(
        self, prompts: Sequence[Sequence[Piece]], candidates: Sequence[Sequence[Sequence[int]]]
    ) -> list[list[float]]:
        return inference.log_likelihoods(self.model, self._prompts(prompts), candidates)


def evaluate(config: EvaluateConfig, ctx: Context) -> dict[str, float]:
    """Every task at every number of shots; means by group, as the paper's tables have them."""
    if not ctx.is_main:
        return {}
    tokenizer = load_tokenizer(config.data, config.decoder, ctx)
    dtype = COMPUTED[config.eval.precision]
    model = load_model(ctx.parents["model"].path / MODEL, dtype=dtype, device=ctx.hardware.device)
    last = None if isinstance(config.sub_images, bool) else config.sub_images
    answerer = ModelAnswerer(model, side=config.image_size // 2 if config.sub_images else None, last=last)
    _warn_of_positions(config, model, ctx)
    asked = [(task, shots) for task in _tasks(config, tokenizer) for shots in task.shots]
    scores: list[Scores] = []
    total, began = len(asked) + len(config.eval.text_tasks), time.monotonic()
    for number, (task, shots) in enumerate(asked, start=1):
        if ctx.stop.is_set():
            raise Stopped(f"stopped before {task.name} with {shots} shots; the tasks that are done are kept")
        scores.append(_score(task, shots, answerer, tokenizer, config=config, ctx=ctx))
        left = (time.monotonic() - began) / number * (total - number)
        ctx.tracker.progress(number, total, seconds_left=left)
    metrics = {name: value for score in scores for name, value in score.metrics.items()} | group_means(scores)
    metrics |= _text_tasks(answerer, tokenizer, config=config, ctx=ctx)
    if isinstance(config.data, WorldConfig):
        metrics |= _grounded(metrics)
    skipped = sum(score.num_skipped for score in scores)
    without_text = sum(score.num_without_text for score in scores)
    if skipped:
        ctx.notes["episodes_skipped"] = skipped
    if without_text:
        ctx.notes["episodes_without_text"] = without_text
    ctx.cost.update(**_used(config, scores))
    return metrics


def _used(config: EvaluateConfig, scores: Sequence[Scores]) -> dict[str, float]:
    """Tokens and FLOPs: of procedural tasks as planned, of real data, whose size no plan knows, of what was asked."""
    if isinstance(config.data, WorldConfig):
        planned = cost.evaluate(config)
        return {"tokens": planned.tokens, "flops": planned.flops}
    tokens, flops = 0, 0.0
    for score in (score for score in scores if score.num_asked):
        images = score.num_asked * cost.prompt_images(config, score.shots)
        positions = images * config.connector.num_tokens + score.num_text
        counted = {"keys": positions / score.num_asked / 2, "logits": score.num_asked * cost.EPISODE_TEXT}
        tokens += positions
        flops += cost.forward_flops(config, tokens=positions, images=images, **counted)
    return {"tokens": tokens, "flops": flops}


def _warn_of_positions(config: EvaluateConfig, model: MultimodalModel, ctx: Context) -> None:
    """One sentence where prompts are longer than what the decoder was trained for."""
    shots, room = max(config.eval.shots), model.decoder.num_positions
    longest = cost.prompt_length(config, shots)
    if longest > room:
        ctx.warn(
            f"eval.shots: prompts of {shots} shots have some {longest} positions, the decoder was trained on {room}, "
            "and their scores will be low for that alone: ask for fewer shots or image tokens, or split fewer images"
        )


def _tasks(config: EvaluateConfig, tokenizer: PreTrainedTokenizerBase) -> list[Task]:
    asked = config.eval
    if isinstance(config.data, WorldConfig):
        found = world_tasks(
            config.data, image_size=config.image_size, count=asked.num_episodes, seed=asked.seed, shots=asked.shots
        )
        return [task for task in found if config.tuned or task.group != "sft"]
    size = config.image_size
    return [image_task(name, task, asked, tokenizer, image_size=size) for name, task in config.data.tasks.items()]


def image_task(
    name: str, task: ImageTask, asked: Evaluation, tokenizer: PreTrainedTokenizerBase, *, image_size: int
) -> Task:
    """A benchmark: demonstrations from its training split, items as they are read.

    The prompt form is the paper's as others tell it (3.4).
    """
    files = CorpusSource(task.test, tokenizer, seed=asked.seed)
    most = max(asked.shots)

    def episodes(shots: int) -> Iterator[fewshot.Episode]:
        pool = (item for item in read_items(task.train) if item.answers)
        shown = list(islice(pool, task.num_train)) if shots else []
        items = sampled(read_items(task.test), task.limit, key=f"items/{asked.seed}/{name}")
        return with_demonstrations(shown, items, shots=shots, most=most, seed=asked.seed, readable=readable)

    def load(pictures: Sequence[Any]) -> list[Tensor | None]:
        return files.load(pictures, image_size=image_size)

    def readable(item: fewshot.Item) -> bool:
        return load([item.picture])[0] is not None

    captions = task.form == "caption"
    form = fewshot.CAPTION if captions else fewshot.VQA
    score = fewshot.score_captions if captions else fewshot.score_answers
    return Task(name, "mmcore", form, asked.shots, episodes, score, load)


def _score(
    task: Task,
    shots: int,
    answerer: ModelAnswerer,
    tokenizer: PreTrainedTokenizerBase,
    *,
    config: EvaluateConfig,
    ctx: Context,
) -> Scores:
    path: Path = ctx.run.path / SCORES / f"{task.name}_{shots}.json"
    found = read_json(path)
    if found is None:
        made = fewshot.evaluate(task, answerer, shots=shots, tokenizer=tokenizer, batch_size=config.eval.batch_size)
        path.parent.mkdir(parents=True, exist_ok=True)
        found = asdict(made) | {"items": made.items[:SHOWN], "metrics": list(made.metrics.items())}
        write_json(path, found)
    return Scores(**{**found, "metrics": dict(found["metrics"])})  # pairs keep their order: a task's own comes first


def _text_tasks(
    answerer: ModelAnswerer, tokenizer: PreTrainedTokenizerBase, *, config: EvaluateConfig, ctx: Context
) -> dict[str, float]:
    """The paper's text-only tasks through lm-eval, and the mean of their accuracies."""
    if not config.eval.text_tasks:
        return {}
    scorer = TextScorer(answerer, tokenizer, max_length=2048, batch_size=config.eval.batch_size)
    metrics: dict[str, float] = {}
    for name in config.eval.text_tasks:
        if ctx.stop.is_set():
            raise Stopped(f"stopped before task {name}; the tasks that are done are kept")
        result = evaluate_task(
            name,
            scorers={"": scorer},
            seed=config.eval.seed,
            tasks_dir=TASKS,
            data_dir=data_root(),
            generated={},
            responses_dir=ctx.run.path / "responses",
        )
        metrics |= result.metrics
        if result.num_shortened:
            ctx.notes.setdefault("contexts_shortened", {})[name] = result.num_shortened
    main = [
        next(metrics[f"{name}/{metric}"] for metric in ("acc", "exact_match") if f"{name}/{metric}" in metrics)
        for name in config.eval.text_tasks
    ]
    return metrics | {"textcore/mean": sum(main) / len(main)}


def _grounded(metrics: dict[str, float]) -> dict[str, float]:
    """Whether each attribute is read off the image without demonstrations: half way from chance to all, or more.

    Grounding switches on at some step or not at all (Section 5), so the share of seeds that have it says more than a
    mean.
    """
    key = "caption_0/"
    return {
        f"grounded/{name}": float(metrics[key + name] > (1 + chance) / 2)
        for name, chance in CHANCE.items()
        if key + name in metrics
    }

"""Score models on tasks through lm-eval, one task at a time; but for `plugin.py` the only file that imports lm_eval.

Where a task lists `allowed` answers, two metrics take the place of lm-eval's: `prob`, the probability of the whole
answer with the softmax restricted to those tokens at each step, and `acc`, whether the likeliest of them is right at
each step.

No cache of lm-eval is used: its request cache is keyed by the task's name and not by its data, its response cache by
the request and not by the model.
"""

from __future__ import annotations

import importlib.metadata
import logging
import statistics
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import lru_cache
from itertools import islice
from numbers import Real
from pathlib import Path
from typing import Any

from retrace.core.answers import FirstInteger, answer_metrics, encode
from retrace.core.requests import OnProgress, Responses, Scorer, ScorerRequests, start
from retrace.core.tasks import Rows, TaskFile, read_rows, read_task, require_hub

FEWSHOT_SEED = 1234  # lm-eval's own, so that scores compare with those of its command line


@dataclass(frozen=True)
class TaskResult:
    """One task, scored by every scorer on the same items."""

    metrics: dict[str, float]  # "<task>/<metric>": means over the items
    items: list[dict[str, Any]]  # doc_id, the same metrics of each item, and generated texts, in the task's order
    num_shortened: int  # requests whose context lost its beginning, over all scorers
    version: str  # the task's own
    lm_eval: str  # the library's version
    task_hash: str  # of items, prompts and targets, as lm-eval's own results files have it


@dataclass(frozen=True)
class _Scores:
    """What one scorer came to: metrics of the task, and by item the same metrics and the generated texts."""

    metrics: dict[str, float]
    items: dict[int, dict[str, Any]]
    num_shortened: int
    task_hash: str


def evaluate_task(
    name: str,
    *,
    scorers: Mapping[str, Scorer | Mapping[int, Scorer]],
    seed: int,
    tasks_dir: Path,
    data_dir: Path | None,
    generated: Mapping[str, Rows],
    limit: int | None = None,
    responses_dir: Path | None = None,
    on_progress: OnProgress | None = None,
) -> TaskResult:
    """Score one task by every scorer, on its first `limit` items or on all of them.

    A scorer's key ends the names of its metrics: {"": a, "base": b} gives "<task>/prob" and "<task>/prob_base". Several
    scorers by seed under one key are one model with different noise: "<task>/prob" is then their mean, and
    "<task>/prob_seed_std" the standard deviation between them; an item keeps each value, as "prob_seed0".

    `seed` is that of sampled texts, the same for all scorers, so that they are paired. In `responses_dir` every batch
    is kept as it ends, and a second call goes on behind it. `on_progress` is told the share of the task that is done.
    Raises ValueError for whatever `validate_tasks` does, and where the answers do not fit a tokenizer.
    """
    file = read_task(name, tasks_dir=tasks_dir)
    runs = [
        (key, thought_seed, scorer)
        for key, given in scorers.items()
        for thought_seed, scorer in (given.items() if isinstance(given, Mapping) else [(None, given)])
    ]
    found: dict[str, dict[int | None, _Scores]] = {}
    with _quiet():
        task = _load(file, rows=read_rows(file, data_dir=data_dir, generated=generated))
        for done, (key, thought_seed, scorer) in enumerate(runs):
            kept = _join(name, key, "" if thought_seed is None else f"seed{thought_seed}")
            model = scorer_model()(
                scorer,
                seed=seed,
                answers_of=lambda _: file.allowed,
                responses=Responses(responses_dir / f"{kept}.jsonl" if responses_dir else None),
                on_progress=lambda share, done=done: on_progress and on_progress((done + share) / len(runs)),
            )
            found.setdefault(key, {})[thought_seed] = _scores(task, name, model, limit=limit)
    metrics: dict[str, float] = {}
    items: dict[int, dict[str, Any]] = {}
    for key, by_seed in found.items():
        named, valued = _combine(by_seed, key)
        metrics |= {f"{name}/{metric}": value for metric, value in named.items()}
        for doc_id, values in valued.items():
            items.setdefault(doc_id, {"doc_id": doc_id}).update(values)
    every = [scores for by_seed in found.values() for scores in by_seed.values()]
    return TaskResult(
        metrics=metrics,
        items=list(items.values()),
        num_shortened=sum(scores.num_shortened for scores in every),
        version=str(task.VERSION),
        lm_eval=importlib.metadata.version("lm-eval"),
        task_hash=every[-1].task_hash,
    )


def _scores(task: Any, name: str, model: Any, *, limit: int | None) -> _Scores:
    from lm_eval import evaluate  # simple_evaluate also reseeds all global generators and inspects the machine
    from lm_eval.utils import hash_string

    found = evaluate(lm=model, task_dict={"tasks": {name: task}}, limit=limit, bootstrap_iters=0)
    samples = found["samples"][name]
    items: dict[int, dict[str, Any]] = {}
    for sample in samples:
        item = items.setdefault(sample["doc_id"], {})
        item |= {_metric_name(m, sample["filter"]): _number(sample[m]) for m in sample["metrics"]}
        if task.OUTPUT_TYPE == "generate_until":
            (item["texts"],) = sample["resps"]
    digest = hash_string("".join(s["doc_hash"] + s["prompt_hash"] + s["target_hash"] for s in samples))
    return _Scores(dict(_means(found["results"][name])), items, model.num_shortened, digest)


def _means(results: Mapping[str, Any]) -> Iterator[tuple[str, float]]:
    """lm-eval's "metric,filter" entries under our names; the rest are standard errors, which are not asked for."""
    for entry, value in results.items():
        metric, comma, answer_filter = entry.partition(",")
        if comma and isinstance(value, Real):
            yield _metric_name(metric, answer_filter), float(value)


def _metric_name(metric: str, answer_filter: str) -> str:
    return _join(metric, "" if answer_filter == "none" else answer_filter.replace("-", "_"))


def _join(*parts: str) -> str:
    return "_".join(part for part in parts if part)


def _number(value: Any) -> Any:
    return float(value) if isinstance(value, Real) else value


def _combine(by_seed: Mapping[int | None, _Scores], key: str) -> tuple[dict[str, float], dict[int, dict[str, Any]]]:
    """Metrics and items of a model, its key in their names; of several seeds the means, with what they are made of."""
    if None in by_seed:
        alone = by_seed[None]
        items = {i: {_join(m, key): value for m, value in item.items()} for i, item in alone.items.items()}
        return {_join(metric, key): value for metric, value in alone.metrics.items()}, items
    every = list(by_seed.values())
    metrics: dict[str, float] = {}
    for metric in every[0].metrics:
        values = [scores.metrics[metric] for scores in every]
        metrics[_join(metric, key)] = statistics.fmean(values)
        metrics[_join(metric, key, "seed_std")] = statistics.stdev(values)
    items = {}
    for doc_id, first in every[0].items.items():
        item = items.setdefault(doc_id, {})
        for metric in first:
            parts = {f"seed{seed}": scores.items[doc_id][metric] for seed, scores in by_seed.items()}
            if isinstance(first[metric], float):
                item[_join(metric, key)] = statistics.fmean(parts.values())
            item |= {_join(metric, key, seed): value for seed, value in parts.items()}
    return metrics, items


def _load(file: TaskFile, *, rows: Mapping[str, Rows] | None) -> Any:
    """The lm-eval task. Rows that are here are handed over as they are: no path to resolve, no dataset cache."""
    from datasets import Dataset
    from lm_eval.tasks import TaskManager

    scorer_model()  # registers what the task's filters may name
    manager = TaskManager(include_path=str(file.folder), include_defaults=False)  # the defaults take 7 to 24 s to list
    stock = manager.task_index[file.name].cfg or {}
    metadata = (config.get("metadata") or {} for config in (stock, file.settings))
    settings = {**file.settings, "metadata": {key: value for part in metadata for key, value in part.items()}}
    if rows is None:
        require_hub(file.name, file.hint)
    else:
        splits = {split: Dataset.from_list([dict(row) for row in part]) for split, part in rows.items()}
        settings["custom_dataset"] = lambda **_: splits
    if file.subset is not None:
        seed, size = file.subset.shuffle_seed, file.subset.size
        settings["process_docs"] = lambda docs: docs.shuffle(seed=seed).select(range(min(size, len(docs))))
    if file.allowed is not None:
        mean = {"aggregation": "mean", "higher_is_better": True}
        settings["metric_list"] = [{"metric": "prob", **mean}, {"metric": "acc", **mean}]
        settings["process_results"] = answer_metrics
    settings |= {key: _compiled(settings[key]) for key in _templates(file)}
    try:
        # Only within a group are settings merged into those of the task's file; given alone they replace them.
        task = manager.load([{"group": "one", "task": [settings]}])["tasks"][file.name]
    except OSError as error:  # every error of the hub is one
        raise ValueError(f"{file.name}: its data did not come from the hub ({error}); {file.hint}") from error
    if task.get_config("num_fewshot") is None:
        task.set_config(key="num_fewshot", value=0)
    task.set_fewshot_seed(seed=FEWSHOT_SEED)
    return task


def _templates(file: TaskFile) -> list[str]:
    """Settings that are plain templates: lm-eval reads a bare field's name, choices and lists in ways of its own."""
    plain = file.allowed is not None or ("doc_to_choice" not in file.settings and not file.includes)
    texts = {key: file.settings.get(key) for key in ("doc_to_text", "doc_to_target")}
    return [key for key, text in texts.items() if plain and isinstance(text, str) and "{{" in text and text[0] != "["]


def _compiled(template: str) -> Callable[[Mapping[str, Any]], str]:
    """A template as a function: lm-eval compiles a text anew for every item, most of a small task's time."""
    from lm_eval.utils import env

    compiled = env.from_string(template)
    return lambda doc: compiled.render(**doc)


@contextmanager
def _quiet() -> Iterator[None]:
    """lm-eval without its notes on defaults that task files leave out on purpose."""
    logger = logging.getLogger("lm_eval")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        logger.setLevel(level)


@lru_cache(maxsize=1)
def scorer_model() -> Any:
    """`ScorerRequests` as one of lm-eval's models; its base class is only known once lm-eval is imported."""
    from lm_eval.api.model import LM
    from lm_eval.api.registry import register_filter
    from lm_eval.utils import get_rolling_token_windows, make_disjoint_window

    register_filter("first_integer")(FirstInteger)

    class ScorerModel(ScorerRequests, LM):
        def loglikelihood_rolling(self, requests: Sequence[Any]) -> list[float]:
            """Log-probability of each whole text, in windows, each token predicted once."""
            tokenizer, windows = self.scorer.tokenizer, []
            (first,) = start(tokenizer, [])
            for request in requests:
                parts = get_rolling_token_windows(
                    token_list=encode(tokenizer, request.args[0]),
                    prefix_token=first,
                    max_seq_len=self.scorer.max_length,
                    context_len=1,
                )
                windows.append([make_disjoint_window(part) for part in parts])
            scores = iter(self.score([pair for text in windows for pair in text], answers=None))
            return [sum(loglikelihood for loglikelihood, _ in islice(scores, len(text))) for text in windows]

    return ScorerModel

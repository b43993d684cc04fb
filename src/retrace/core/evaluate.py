"""Score models on tasks through lm-eval, one task at a time; the only file that imports lm_eval, and it does so late.

Where a task lists `allowed` answers, two metrics take the place of lm-eval's: `prob`, the probability of the whole
answer with the softmax restricted to those tokens at each step, and `acc`, whether the likeliest of them is right at
each step.

No cache of lm-eval is used: its request cache is keyed by the task's name and not by its data, its response cache by
the request and not by the model.
"""

from __future__ import annotations

import importlib.metadata
import logging
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import islice
from numbers import Real
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from retrace.core.tasks import Rows, TaskFile, read_rows, read_task, require_hub

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

FEWSHOT_SEED = 1234  # lm-eval's own, so that scores compare with those of its command line
MAX_NEW_TOKENS = 256  # lm-eval's own, for tasks that do not say

Request = tuple[list[int], list[int]]  # token ids of a context, never empty, and of its continuation, never empty


class Scorer(Protocol):
    """What a model must answer to be evaluated."""

    tokenizer: PreTrainedTokenizerBase
    max_length: int  # tokens that fit into the model; longer contexts lose their beginning before they get here

    def loglikelihood(self, requests: Sequence[Request], *, allowed: Sequence[int] | None) -> list[tuple[float, bool]]:
        """Of each continuation its summed log-probability (nats), and whether each of its tokens is the likeliest.

        `allowed` restricts the softmax to these token ids, renormalised; a continuation's other tokens are read but not
        scored.
        """
        ...

    def generate(self, contexts: Sequence[list[int]], *, stop: Sequence[str], max_new_tokens: int) -> list[str]:
        """Greedy continuations; each may run on behind a stop string, where the caller cuts it."""
        ...


@dataclass(frozen=True)
class TaskResult:
    """One task, scored by every scorer on the same items."""

    metrics: dict[str, float]  # "<task>/<metric>": means over the items
    items: list[dict[str, Any]]  # doc_id and the same metrics of each item, in the task's order
    num_shortened: int  # requests whose context lost its beginning, over all scorers
    version: str  # the task's own
    lm_eval: str  # the library's version
    task_hash: str  # of items, prompts and targets, as lm-eval's own results files have it


def evaluate_task(
    name: str,
    *,
    scorers: Mapping[str, Scorer],
    tasks_dir: Path,
    data_dir: Path | None,
    generated: Mapping[str, Rows],
    limit: int | None = None,
) -> TaskResult:
    """Score one task by every scorer, on its first `limit` items or on all of them.

    A scorer's key ends the names of its metrics: {"": a, "base": b} gives "<task>/prob" and "<task>/prob_base".
    Raises ValueError for whatever `validate_tasks` does, and where the answers do not fit a tokenizer.
    """
    file = read_task(name, tasks_dir=tasks_dir)
    metrics: dict[str, float] = {}
    items: dict[int, dict[str, Any]] = {}
    num_shortened = 0
    with _quiet():
        from lm_eval import evaluate  # simple_evaluate also reseeds all global generators and inspects the machine
        from lm_eval.utils import hash_string

        task = _load(file, rows=read_rows(file, data_dir=data_dir, generated=generated))
        for key, scorer in scorers.items():
            model = _language_model(scorer, file.allowed)
            found = evaluate(lm=model, task_dict={"tasks": {name: task}}, limit=limit, bootstrap_iters=0)
            metrics |= {f"{name}/{metric}": value for metric, value in _means(found["results"][name], key)}
            samples = found["samples"][name]
            for sample in samples:
                item = items.setdefault(sample["doc_id"], {"doc_id": sample["doc_id"]})
                item |= {_metric_name(m, sample["filter"], key): _number(sample[m]) for m in sample["metrics"]}
            num_shortened += model.num_shortened
    return TaskResult(
        metrics=metrics,
        items=list(items.values()),
        num_shortened=num_shortened,
        version=str(task.VERSION),
        lm_eval=importlib.metadata.version("lm-eval"),
        task_hash=hash_string("".join(s["doc_hash"] + s["prompt_hash"] + s["target_hash"] for s in samples)),
    )


def _means(results: Mapping[str, Any], key: str) -> Iterator[tuple[str, float]]:
    """lm-eval's "metric,filter" entries under our names; the rest are standard errors, which are not asked for."""
    for entry, value in results.items():
        metric, comma, answer_filter = entry.partition(",")
        if comma and isinstance(value, Real):
            yield _metric_name(metric, answer_filter, key), float(value)


def _metric_name(metric: str, answer_filter: str, key: str) -> str:
    parts = (metric, "" if answer_filter == "none" else answer_filter.replace("-", "_"), key)
    return "_".join(part for part in parts if part)


def _number(value: Any) -> Any:
    return float(value) if isinstance(value, Real) else value


def _load(file: TaskFile, *, rows: Mapping[str, Rows] | None) -> Any:
    """The lm-eval task. Rows that are here are handed over as they are: no path to resolve, no dataset cache."""
    from datasets import Dataset
    from lm_eval.tasks import TaskManager

    manager = TaskManager(include_path=str(file.folder), include_defaults=False)  # the defaults take 7 to 24 s to list
    stock = manager.task_index[file.name].cfg or {}
    metadata = (config.get("metadata") or {} for config in (stock, file.settings))
    settings = {**file.settings, "metadata": {key: value for part in metadata for key, value in part.items()}}
    if rows is None:
        require_hub(file.name, file.hint)
    else:
        splits = {split: Dataset.from_list([dict(row) for row in part]) for split, part in rows.items()}
        settings["custom_dataset"] = lambda **_: splits
    if file.allowed is not None:
        mean = {"aggregation": "mean", "higher_is_better": True}
        settings["metric_list"] = [{"metric": "prob", **mean}, {"metric": "acc", **mean}]
        settings["process_results"] = _answer_metrics
        settings |= {key: _compiled(settings[key]) for key in ("doc_to_text", "doc_to_target")}
    try:
        # Only within a group are settings merged into those of the task's file; given alone they replace them.
        task = manager.load([{"group": "one", "task": [settings]}])["tasks"][file.name]
    except OSError as error:  # every error of the hub is one
        raise ValueError(f"{file.name}: its data did not come from the hub ({error}); {file.hint}") from error
    if task.get_config("num_fewshot") is None:
        task.set_config(key="num_fewshot", value=0)
    task.set_fewshot_seed(seed=FEWSHOT_SEED)
    return task


def _compiled(template: str) -> Callable[[Mapping[str, Any]], str]:
    """A template as a function: lm-eval compiles a text anew for every item, most of a small task's time."""
    from lm_eval.utils import env

    compiled = env.from_string(template)
    return lambda doc: compiled.render(**doc)


def _answer_metrics(doc: Mapping[str, Any], results: Sequence[tuple[float, bool]]) -> dict[str, float]:  # noqa: ARG001
    ((loglikelihood, is_greedy),) = results
    return {"prob": math.exp(loglikelihood), "acc": float(is_greedy)}


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


def answer_ids(tokenizer: PreTrainedTokenizerBase, answers: Sequence[str]) -> list[int]:
    """The token id of each answer as it stands in a text. Raises ValueError for one that is not a single token.

    An id is read off behind "A:", where answers stand; where the tokenizer merges the two, off the answer by itself.
    Not the other way round: at the start of a text, many tokenizers put a space before a digit.
    """

    def find(answer: str) -> int:
        for before in ("A:", ""):
            head, whole = _encode(tokenizer, before), _encode(tokenizer, before + answer)
            if len(whole) == len(head) + 1 and whole[:-1] == head and whole[-1] != tokenizer.unk_token_id:
                return whole[-1]
        tokens = tokenizer.convert_ids_to_tokens(_encode(tokenizer, answer))
        raise ValueError(
            f"allowed={answer!r} is {tokens} in this tokenizer: the answer metric needs it to be one token"
        )

    return [find(answer) for answer in answers]


def encode_pair(tokenizer: PreTrainedTokenizerBase, context: str, continuation: str) -> Request:
    """Token ids of both, split as lm-eval does: spaces at the end of the context belong to the continuation.

    The context starts with BOS if the tokenizer has one; an empty context is BOS, or else EOS.
    """
    head = _encode(tokenizer, context.rstrip())
    whole = _encode(tokenizer, context + continuation)
    if len(whole) <= len(head):
        raise ValueError(f"{continuation!r} is no token of its own behind {context[-20:]!r}: it can't be scored")
    return _start(tokenizer, head) + head, whole[len(head) :]


def _encode(tokenizer: PreTrainedTokenizerBase, text: str) -> list[int]:
    return list(tokenizer.encode(text, add_special_tokens=False))


def _start(tokenizer: PreTrainedTokenizerBase, ids: Sequence[int]) -> list[int]:
    if tokenizer.bos_token_id is not None:
        return [tokenizer.bos_token_id]
    return [] if ids else [tokenizer.eos_token_id]


def _language_model(scorer: Scorer, answers: Sequence[str] | None) -> Any:
    """A Scorer as one of lm-eval's models; its base class is only known once lm-eval is imported."""
    from lm_eval.api.model import LM

    class ScorerModel(_ScorerRequests, LM):
        pass

    return ScorerModel(scorer, answers)


class _ScorerRequests:
    """lm-eval's three kinds of request, answered by a Scorer; `answers` restricts loglikelihoods as `allowed` says."""

    def __init__(self, scorer: Scorer, answers: Sequence[str] | None) -> None:
        super().__init__()
        self.scorer = scorer
        self.allowed = (
            None if answers is None else dict(zip(answer_ids(scorer.tokenizer, answers), answers, strict=True))
        )
        self.num_shortened = 0

    def loglikelihood(self, requests: Sequence[Any]) -> list[tuple[float, bool]]:
        pairs = [self._fit(*encode_pair(self.scorer.tokenizer, *request.args)) for request in requests]
        if self.allowed is None:
            return self.scorer.loglikelihood(pairs, allowed=None)
        for _, continuation in pairs:
            self._check_answer(continuation, self.allowed)
        return self.scorer.loglikelihood(pairs, allowed=list(self.allowed))

    def loglikelihood_rolling(self, requests: Sequence[Any]) -> list[float]:
        """Log-probability of each whole text, in windows, each token predicted once."""
        from lm_eval.utils import get_rolling_token_windows, make_disjoint_window

        tokenizer, windows = self.scorer.tokenizer, []
        for request in requests:
            ids = _encode(tokenizer, request.args[0])
            (start,) = _start(tokenizer, [])
            parts = get_rolling_token_windows(
                token_list=ids, prefix_token=start, max_seq_len=self.scorer.max_length, context_len=1
            )
            windows.append([make_disjoint_window(part) for part in parts])
        scores = iter(self.scorer.loglikelihood([pair for text in windows for pair in text], allowed=None))
        return [sum(loglikelihood for loglikelihood, _ in islice(scores, len(text))) for text in windows]

    def generate_until(self, requests: Sequence[Any]) -> list[str]:
        settings = requests[0].args[1]  # the task's, the same for all of its items
        if settings.get("do_sample") or settings.get("temperature"):
            raise ValueError(
                f"generation_kwargs={settings}: generation is greedy; set do_sample: false, temperature: 0"
            )
        room = settings.get("max_gen_toks", MAX_NEW_TOKENS)
        until = settings["until"]
        stop = [until] if isinstance(until, str) else [text for text in until if text]
        contexts = []
        for request in requests:
            ids = _encode(self.scorer.tokenizer, request.args[0])
            contexts.append(self._fit(_start(self.scorer.tokenizer, ids) + ids, [], room=room)[0])
        texts = self.scorer.generate(contexts, stop=stop, max_new_tokens=room)
        return [min((text.partition(end)[0] for end in stop), key=len, default=text) for text in texts]

    def _fit(self, context: list[int], continuation: list[int], *, room: int | None = None) -> Request:
        """Shorten a context from the left; the last token of a continuation is predicted and so takes no room."""
        room = len(continuation) - 1 if room is None else room
        kept = self.scorer.max_length - room
        if kept < 1:
            raise ValueError(f"{room} tokens to be scored or generated leave no room for a context in {kept + room}")
        self.num_shortened += len(context) > kept
        return context[-kept:], continuation

    def _check_answer(self, continuation: list[int], allowed: Mapping[int, str]) -> None:
        """Refuse a token that hides an answer, such as a number of several digits: it would be skipped in silence."""
        for token in set(continuation) - set(allowed):
            text = self.scorer.tokenizer.decode([token])
            if any((answer.strip() or answer) in text for answer in allowed.values()):
                raise ValueError(
                    f"{text!r} is one token in this tokenizer: the answer metric needs {list(allowed.values())} apart"
                )

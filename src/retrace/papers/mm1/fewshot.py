"""Few-shot evaluation (Section 3.4): prompts of demonstrations and a query, greedy answers, scores by task."""

from __future__ import annotations

import random
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cache
from itertools import islice
from statistics import fmean
from typing import Any, Literal, Protocol

from torch import Tensor
from transformers import PreTrainedTokenizerBase

from retrace.papers.mm1.captions import cider, vqa_accuracy
from retrace.papers.mm1.corpora import HubDataset, ImageFolder, LocalShards, require_fields
from retrace.papers.mm1.corpus_source import is_said, plain_ids
from retrace.papers.mm1.lines import EndsEarly
from retrace.papers.mm1.packing import Picture
from retrace.papers.mm1.rows import Piece

Group = Literal["mmcore", "unseen", "textcore", "sft"]


class Answerer(Protocol):
    """A model that is asked. Prompts are sequences of pieces, as documents are."""

    def generate(
        self, prompts: Sequence[Sequence[Piece]], *, max_new_tokens: int, stop: Collection[int]
    ) -> list[list[int]]:
        """The likeliest next tokens of each prompt, up to one of `stop`, which is left out."""
        ...

    def log_likelihoods(
        self, prompts: Sequence[Sequence[Piece]], candidates: Sequence[Sequence[Sequence[int]]]
    ) -> list[list[float]]:
        """Log-probability (nats) of each candidate behind its prompt."""
        ...


@dataclass(frozen=True)
class Item:
    """A picture or none, what is asked, and the answers that people gave; the first is that of a demonstration.

    One without answers can't be asked.
    """

    picture: Picture | None
    answers: tuple[str, ...]
    question: str = ""


@dataclass(frozen=True)
class Episode:
    """One prompt: items with their answers, then one without."""

    demonstrations: tuple[Item, ...]
    query: Item


@dataclass(frozen=True)
class Form:
    """How items become text behind their pictures; an answer ends where one of `stop` begins, or with the document."""

    before: str  # the answer; {question} stands for the item's
    stop: tuple[str, ...]
    max_new_tokens: int
    after: str = "\n"  # each demonstration

    def text(self, item: Item, *, answered: bool) -> str:
        asked = self.before.format(question=item.question)
        parts = [asked, item.answers[0]] if answered else [asked]
        return " ".join(part for part in parts if part) + (self.after if answered else "")


CAPTION = Form("A photo of", stop=("\n",), max_new_tokens=32)
VQA = Form("Question: {question} Short answer:", stop=("\n", ".", ","), max_new_tokens=12)


@dataclass(frozen=True)
class Task:
    """Episodes by number of shots, and their scores: metric -> a value for each episode, the task's own first."""

    name: str
    group: Group
    form: Form
    shots: tuple[int, ...]
    episodes: Callable[[int], Iterable[Episode]]
    score: Callable[[Sequence[str], Sequence[Item]], Mapping[str, Sequence[float]]]
    load: Callable[[Sequence[Picture]], list[Tensor | None]]


@dataclass
class Scores:
    """Of one task at one number of shots: "<task>_<shots>/<metric>", and each episode's answer and scores."""

    task: str
    group: Group
    shots: int
    metrics: dict[str, float]
    items: list[dict[str, Any]] = field(default_factory=list)
    num_skipped: int = 0  # episodes with a picture that can't be read
    num_without_text: int = 0  # and those that say nothing, or ask nothing
    num_asked: int = 0
    num_text: int = 0  # positions of the prompts that are no image

    @property
    def main(self) -> float:
        """The task's own metric."""
        return next(iter(self.metrics.values()))


def evaluate(
    task: Task, answerer: Answerer, *, shots: int, tokenizer: PreTrainedTokenizerBase, batch_size: int
) -> Scores:
    """Ask all episodes of a task. Raises ValueError where none can be asked."""
    answers: list[str] = []
    asked: list[Item] = []
    skipped = without_text = num_text = 0
    episodes = iter(task.episodes(shots))
    while batch := list(islice(episodes, batch_size)):
        said = [episode for episode in batch if episode.query.answers]
        without_text += len(batch) - len(said)
        prompts = list(_prompts(task, said, tokenizer))
        kept = [(prompt, episode.query) for prompt, episode in zip(prompts, said, strict=True) if prompt is not None]
        skipped += len(said) - len(kept)
        num_text += sum(len(piece.token_ids) for prompt, _ in kept for piece in prompt)
        asked += [replace(query, picture=None) for _, query in kept]  # which may be the bytes of a file
        answers += answer(task.form, answerer, [prompt for prompt, _ in kept], tokenizer=tokenizer)
    if not asked:
        raise ValueError(
            f"{task.name}: no episode of {shots} shots can be asked; {skipped} have unreadable pictures, and "
            f"{without_text} no text: mend the data"
        )
    scores = task.score(answers, asked)
    items = [
        {"question": item.question, "wanted": item.answers[0], "answer": given}
        | {metric: values[number] for metric, values in scores.items()}
        for number, (item, given) in enumerate(zip(asked, answers, strict=True))
    ]
    metrics = {f"{task.name}_{shots}/{metric}": fmean(values) for metric, values in scores.items()}
    return Scores(task.name, task.group, shots, metrics, items, skipped, without_text, len(asked), num_text)


def answer(
    form: Form, answerer: Answerer, prompts: Sequence[Sequence[Piece]], *, tokenizer: PreTrainedTokenizerBase
) -> list[str]:
    """Texts up to the form's stops."""
    if not prompts:
        return []
    found = answerer.generate(prompts, max_new_tokens=form.max_new_tokens, stop=stop_tokens(tokenizer, form.stop))
    texts = [tokenizer.decode(ids, skip_special_tokens=True) for ids in found]
    return [min((text.partition(end)[0] for end in form.stop), key=len, default=text).strip() for text in texts]


def stop_tokens(tokenizer: PreTrainedTokenizerBase, stop: Sequence[str]) -> set[int]:
    """Those of the stops that are one token, and the end of the document."""
    encoded = [tokenizer.encode(text, add_special_tokens=False) for text in stop]
    return {ids[0] for ids in encoded if len(ids) == 1} | {tokenizer.eos_token_id}


def _prompts(
    task: Task, episodes: Sequence[Episode], tokenizer: PreTrainedTokenizerBase
) -> Iterator[list[Piece] | None]:
    """The prompt of each episode, None where a picture of it can't be read."""
    turns = [[*((item, True) for item in e.demonstrations), (e.query, False)] for e in episodes]
    pictures = [item.picture for items in turns for item, _ in items if item.picture is not None]
    loaded = iter(task.load(pictures))
    start = tokenizer.bos_token_id
    for items in turns:
        prompt = [] if start is None else [Piece((start,), learned=False)]
        readable = True
        for item, answered in items:
            if item.picture is not None:
                image = next(loaded)
                readable = readable and image is not None
                prompt.append(Piece(image=image))
            ids = plain_ids(task.form.text(item, answered=answered), tokenizer)
            prompt += [Piece(ids, learned=False)] if ids else []
        yield prompt if readable else None


def group_means(scores: Sequence[Scores]) -> dict[str, float]:
    """The plain mean of the tasks' own metrics by group and number of shots, as the paper's tables have them.

    "mmcore_4/mean" of captions (CIDEr points) and answers (percent), un-normalised; text tasks have one mean.
    """
    groups: dict[str, list[float]] = {}
    for score in scores:
        name = "textcore" if score.group == "textcore" else f"{score.group}_{score.shots}"
        groups.setdefault(f"{name}/mean", []).append(score.main)
    return {name: fmean(values) for name, values in groups.items()}


def with_demonstrations(
    train: Sequence[Item],
    test: Iterable[Item],
    *,
    shots: int,
    most: int,
    seed: int,
    readable: Callable[[Item], bool],
) -> Iterator[Episode]:
    """Each test item behind `shots` different items of `train`; more shots, up to `most`, begin with those of fewer.

    Another is drawn for one that is not `readable`, which is asked once of each: it takes no test item with it.
    Raises ValueError where too few are left.
    """
    if shots and len(train) < most:
        raise ValueError(f"{most} shots are asked for, and the training split has {len(train)} items: ask for fewer")
    can_read = cache(lambda index: readable(train[index]))
    for number, query in enumerate(test):
        rng = random.Random(f"demonstrations/{seed}/{number}")
        drawn = _draw(rng, len(train), shots=shots, most=most, can_read=can_read) if shots else []
        yield Episode(tuple(train[index] for index in drawn), query)


def _draw(rng: random.Random, num_items: int, *, shots: int, most: int, can_read: Callable[[int], bool]) -> list[int]:
    """The first `shots` of `most` different numbers of items, another one for each that can't be read."""
    drawn = rng.sample(range(num_items), most)
    taken = set(drawn)
    for place in range(shots):
        while not can_read(drawn[place]):
            if len(taken) == num_items:
                raise ValueError(
                    f"{most} shots are asked for, and fewer of the training split's {num_items} items can be read: "
                    "mend their pictures, or ask for fewer"
                )
            while drawn[place] in taken:
                drawn[place] = rng.randrange(num_items)
            taken.add(drawn[place])
    return drawn[:shots]


def sampled(items: Iterable[Item], limit: int | None, *, key: str) -> Iterator[Item]:
    """All items, or `limit` of them by the luck of the key; no more are held at a time (reservoir sampling)."""
    if limit is None:
        yield from items
        return
    rng = random.Random(key)
    kept: list[Item] = []
    for number, item in enumerate(items):
        if number < limit:
            kept.append(item)
        elif (place := rng.randrange(number + 1)) < limit:
            kept[place] = item
    yield from kept


def read_items(config: ImageFolder | LocalShards | HubDataset) -> Iterator[Item]:
    """Captions ("caption") or questions ("instruction") of a corpus, in its order; a text may be a list of answers.

    Blank answers are left out, and all of them where nothing is asked. Raises ValueError for a row of other fields.
    """
    asks = config.document == "instruction"
    for shard in config.shards():
        try:
            for number, row in enumerate(shard.rows(0)):
                require_fields(config, row, name=f"{shard.name}: row {number}")
                given, question = row[config.text_field], row[config.question_field] if asks else ""
                if asks and not is_said(question):
                    given, question = None, ""
                answers = tuple(text for text in (given if isinstance(given, list) else [given]) if is_said(text))
                yield Item(Picture((row[config.image_field], row.get("__folder__", ""))), answers, question)
        except EndsEarly as error:
            raise ValueError(
                f"{shard.name}: ends early ({error}): an evaluation needs all of it; get it anew"
            ) from error


def score_captions(answers: Sequence[str], asked: Sequence[Item]) -> dict[str, list[float]]:
    """CIDEr in points."""
    return {"cider": cider(answers, [item.answers for item in asked])}


def score_answers(answers: Sequence[str], asked: Sequence[Item]) -> dict[str, list[float]]:
    """VQA accuracy in percent."""
    return {"vqa": [vqa_accuracy(given, item.answers) for given, item in zip(answers, asked, strict=True)]}

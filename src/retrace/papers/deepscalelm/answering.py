"""Questions of several choices: each is read with each of its choices, and a linear score says how well they fit.

B questions, C choices, T tokens, D hidden_size.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from retrace.core.config import data_root
from retrace.core.data import generator, shuffled
from retrace.core.files import json_lines
from retrace.core.store import RunDir
from retrace.core.train import Batch
from retrace.papers.deepscalelm.config import BOS, COMMONSENSE_QA, EOS, FinetuneConfig, ProceduralText
from retrace.papers.deepscalelm.corpora import load_tokenizer
from retrace.papers.deepscalelm.model import Transformer
from retrace.papers.deepscalelm.sentences import TEMPLATE, World

AT_ONCE = 32  # questions
QUESTION_SEEDS = {"train": 1, "test": 2}  # the same for every run: arms answer the same questions


@dataclass(frozen=True)
class QuestionSet:
    """`ids_QCT` are padded on the right, where `mask_QCT` is 0; `answers_Q` says which choice is right."""

    ids_QCT: Tensor
    mask_QCT: Tensor
    answers_Q: Tensor

    def batch(self, rows: range, *, seed: int) -> Batch:
        """These rows of an infinite stream of the questions."""
        chosen = shuffled(rows, num_rows=len(self.answers_Q), seed=seed, purpose="order of questions")
        return self.at(chosen)

    def at(self, chosen: Tensor) -> Batch:
        parts = (self.ids_QCT, self.mask_QCT, self.answers_Q)
        names = ("input_ids", "attention_mask", "answers")
        return {name: part[chosen] for name, part in zip(names, parts, strict=True)}


class Answerer(nn.Module):
    """A trained model with a linear score on the mean of its final hidden states, which starts near zero."""

    def __init__(self, model: Transformer, *, seed: int) -> None:
        super().__init__()
        self.model = model
        for unused in filter(None, (model.head_dense, model.head_norm)):  # of masked words; no gradient comes here
            unused.requires_grad_(False)
        size = model.shape.hidden_size
        weight = torch.randn(1, size, generator=generator(seed, "score")) * 0.02
        self.score = nn.Parameter(weight)

    def forward(self, ids_BCT: Tensor, mask_BCT: Tensor) -> Tensor:
        """Scores (B, C)."""
        ids, mask = ids_BCT.flatten(0, 1), mask_BCT.flatten(0, 1)
        hidden = self.model(ids, attention_mask_BT=mask)
        weights = mask[..., None].to(hidden.dtype)
        mean = (hidden * weights).sum(1) / weights.sum(1)
        return (mean @ self.score.T).view(ids_BCT.shape[:2])


@torch.inference_mode()
def accuracy(answerer: Answerer, questions: QuestionSet, *, device: str) -> float:
    """Share of the questions whose right choice has the highest score, without dropout."""
    answerer.to(device).eval()
    right = 0
    for chosen in torch.arange(len(questions.answers_Q)).split(AT_ONCE):
        batch = {name: part.to(device) for name, part in questions.at(chosen).items()}
        scores_BC = answerer(batch["input_ids"], batch["attention_mask"])
        right += int((scores_BC.argmax(1) == batch["answers"]).sum())
    return right / len(questions.answers_Q)


def load_questions(config: FinetuneConfig, parents: Mapping[str, RunDir]) -> tuple[QuestionSet, QuestionSet]:
    """(for training, for the test): generated, or the first and the last of CommonsenseQA's validation set.

    Raises ValueError where there are fewer, or where they do not fit the model.
    """
    asked, length = config.transfer.questions, config.model.seq_len
    if isinstance(config.corpus, ProceduralText):
        world = World(config.corpus)
        train, test = (
            generated(world, count, length=length, split=split)
            for split, count in (("train", asked.num_train), ("test", asked.num_test))
        )
        return train, test
    rows = _commonsense_rows()
    if asked.num_train + asked.num_test > len(rows):
        raise ValueError(
            f"transfer.questions: {asked.num_train} to train and {asked.num_test} to test are wanted, and "
            f"{COMMONSENSE_QA} has {len(rows)}: ask for fewer"
        )
    tokenizer = load_tokenizer(parents)
    texts = [[f"Q: {row['question']} A: {choice}" for choice in row["choices"]["text"]] for row in rows]
    answers = [row["choices"]["label"].index(row["answerKey"]) for row in rows]
    ids = [[tokenizer(text)["input_ids"][:length] for text in choices] for choices in texts]
    every = padded(ids, answers)
    first, last = torch.arange(asked.num_train), torch.arange(len(rows) - asked.num_test, len(rows))
    return QuestionSet(*every.at(first).values()), QuestionSet(*every.at(last).values())


def _commonsense_rows() -> list[dict[str, Any]]:
    root = data_root()
    assert root is not None
    with open(root / COMMONSENSE_QA, encoding="utf-8") as lines:
        return list(json_lines(lines, path=root / COMMONSENSE_QA))


def padded(ids: list[list[list[int]]], answers: list[int]) -> QuestionSet:
    """Questions of choices of token ids, padded to the longest."""
    length = max(len(choice) for choices in ids for choice in choices)
    ids_QCT = torch.full((len(ids), len(ids[0]), length), EOS)
    mask_QCT = torch.zeros_like(ids_QCT)
    for q, choices in enumerate(ids):
        for c, choice in enumerate(choices):
            ids_QCT[q, c, : len(choice)] = torch.tensor(choice)
            mask_QCT[q, c, : len(choice)] = 1
    return QuestionSet(ids_QCT, mask_QCT, torch.tensor(answers))


def generated(world: World, count: int, *, length: int, split: str) -> QuestionSet:
    """A sentence, and a word that may be of its topic: which of four objects, of four topics, goes with it?

    The right object stands in no sentence of its question, so it has to be known as one of the topic.
    """
    c, rng = world.config, generator(QUESTION_SEEDS[split], "questions")
    space = length - 2  # <bos> in front of the choice, which comes last
    topics_Q4 = torch.stack([torch.randperm(c.num_topics, generator=rng)[:4] for _ in range(count)])
    names_Q = torch.randint(c.num_names, (count,), generator=rng)
    texts_QL = world.sentences(topics_Q4[:, 0], names_Q, length=min(space, len(TEMPLATE)), rng=rng)
    objects_Q4 = torch.stack(
        [
            torch.stack([_absent(world.objects_KO[topic], text, rng) for topic in topics])
            for topics, text in zip(topics_Q4, texts_QL, strict=True)
        ]
    )
    order_Q4 = torch.stack([torch.randperm(4, generator=rng) for _ in range(count)])
    choices_Q4 = objects_Q4.gather(1, order_Q4)
    bos_Q41 = torch.full((count, 4, 1), BOS)
    ids_QCT = torch.cat([texts_QL[:, None].expand(-1, 4, -1), bos_Q41, choices_Q4[..., None]], -1)
    return QuestionSet(ids_QCT, torch.ones_like(ids_QCT), order_Q4.argmin(1))


def _absent(objects_O: Tensor, text_L: Tensor, rng: torch.Generator) -> Tensor:
    """One of the objects that is not in the text; any, should all of them be."""
    free = objects_O[~torch.isin(objects_O, text_L)]
    free = free if len(free) else objects_O
    return free[torch.randint(len(free), (), generator=rng)]

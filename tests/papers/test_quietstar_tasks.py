"""Quiet-STaR's evaluation tasks: the texts of Section 3.1 of the specification, on generated and on real questions."""

from __future__ import annotations

import json
import os
import random
from pathlib import Path
from typing import Any

import pytest
import torch
from scorers import CausalLMScorer
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerBase, PreTrainedTokenizerFast

from retrace.core.answers import FirstInteger
from retrace.core.compose import compose
from retrace.core.config import CONFIGS, validate
from retrace.core.evaluate import _load, evaluate_task
from retrace.core.requests import GenerationSettings
from retrace.core.tasks import list_tasks, read_rows, read_task, validate_tasks
from retrace.papers.quietstar import corpus
from retrace.papers.quietstar.tokenizer import build_tokenizer

TASKS = CONFIGS / "quietstar" / "tasks"
DATA = Path(os.environ["RETRACE_DATA"]) if os.environ.get("RETRACE_DATA") else None
REAL = {
    "gsm8k_direct": 1319,
    "csqa_direct": 1221,
    "gsm8k": 1319,
    "gsm8k_cot": 1319,
    "gsm8k_cot_128": 128,
    "commonsense_qa": 1221,
}
CHAIN = {"question": "Tom has 3 pens. Tom finds 4 more. How many pens now?", "answer": "(3 7)\n#### 7"}
FACT = {
    "question": "Who is Ada's friend's teacher?",
    "choices": {"label": [*"ABCDE"], "text": ["Bo", "Cy", "Di", "Ed", "Flo"]},
    "answerKey": "C",
}
GENERATED = {"chains_cot": [CHAIN], "chains_direct": [CHAIN], "facts_direct": [FACT]}
FACT_TEXT = "Q: Who is Ada's friend's teacher?\n(A) Bo\n(B) Cy\n(C) Di\n(D) Ed\n(E) Flo\nA:"

needs_data = pytest.mark.skipif(DATA is None, reason="RETRACE_DATA is not set: real GSM8K and CommonsenseQA questions")


def load(name: str, **options: Any) -> Any:
    file = read_task(name, tasks_dir=TASKS)
    return _load(file, rows=read_rows(file, **{"data_dir": DATA, "generated": GENERATED} | options))


def scorer(tokenizer: PreTrainedTokenizerBase, *, max_length: int = 512) -> CausalLMScorer:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=1,
        num_attention_heads=2,
        max_position_embeddings=max_length,
        initializer_range=0.2,  # predictions that differ from text to text
    )
    return CausalLMScorer(LlamaForCausalLM(config), tokenizer, batch_tokens=8192)


@pytest.fixture(scope="module")
def byte_pairs() -> PreTrainedTokenizerFast:
    """Byte-level pairs with single digits, learned from the first real questions."""
    assert DATA is not None
    tokenizer = Tokenizer(models.BPE())
    parts = [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(parts)
    tokenizer.decoder = decoders.ByteLevel()
    special, alphabet = ["<bos>", "<eos>"], pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=2000, special_tokens=special, initial_alphabet=alphabet, show_progress=False
    )
    files = ("gsm8k/test.jsonl", "commonsense_qa/validation.jsonl")
    texts = [json.loads(line)["question"] for file in files for line in (DATA / file).open(encoding="utf-8")]
    tokenizer.train_from_iterator([*texts[:200], " A B C D E" * 50], trainer)
    tokenizer.post_processor = processors.TemplateProcessing(single="<bos> $A", special_tokens=[("<bos>", 0)])
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<bos>", eos_token="<eos>")


def test_every_task_file_is_valid():
    assert list_tasks(TASKS) == sorted([*REAL, *GENERATED])
    validate_tasks(list_tasks(TASKS), tasks_dir=TASKS, data_dir=DATA, generated=GENERATED)


@pytest.mark.parametrize(
    ("name", "text", "target"),
    [
        ("chains_direct", f"Q: {CHAIN['question']}\nA:", " 7\n"),
        ("chains_cot", f"Q: {CHAIN['question']}\nA: (", "7"),
        ("facts_direct", FACT_TEXT, " C\n"),
    ],
)
def test_generated_questions_are_the_papers_text(name, text, target):
    task = load(name)
    (doc,) = task.eval_docs
    assert (task.doc_to_text(doc), task.doc_to_target(doc)) == (text, target)


def test_questions_are_asked_as_the_corpus_asks_them():
    """The tasks and the training text are written in two places; a model is judged on what it has read."""
    config = validate(corpus.CorpusConfig, compose("quietstar", ["scale=smoke"])["corpus"], source="smoke")
    names = {"arithmetic": "chains_direct", "facts": "facts_direct"}
    seen = set()
    for index in range(60):
        document = corpus.document(config, split="heldout", seed=0, index=index)
        if document.family in names and len(document.compositions) == 1:
            question = corpus.ask(document.compositions[0], random.Random(0))
            task = load(names[document.family], generated={names[document.family]: [question.document]})
            (doc,) = task.eval_docs
            assert (task.doc_to_text(doc), task.doc_to_target(doc)) == (question.prompt, f" {question.answer}\n")
            assert document.text.endswith("\n")
            seen.add(document.family)
    assert seen == set(names)


@pytest.mark.parametrize("names", [("chains_direct", "gsm8k_direct"), ("facts_direct", "csqa_direct")])
def test_generated_and_real_tasks_ask_alike(names):
    made, real = (dict(read_task(name, tasks_dir=TASKS).settings) for name in names)
    assert [made[key] for key in ("doc_to_text", "doc_to_target", "output_type")] == [
        real[key] for key in ("doc_to_text", "doc_to_target", "output_type")
    ]
    assert made["metadata"]["allowed"] == real["metadata"]["allowed"]


def test_generated_tasks_with_the_papers_own_tokenizer():
    model = scorer(build_tokenizer())
    for name in ("chains_direct", "facts_direct"):
        result = evaluate_task(name, scorers={"": model}, seed=0, tasks_dir=TASKS, data_dir=None, generated=GENERATED)
        assert 0 < result.metrics[f"{name}/prob"] < 1
        assert len(result.items) == 1


@needs_data
def test_the_real_sets_are_whole():
    tasks = {name: load(name) for name in REAL}
    assert {name: len(task.eval_docs) for name, task in tasks.items()} == REAL
    numbers = [row["answer"].split("#### ")[1] for row in tasks["gsm8k_direct"].eval_docs]
    comma = next(i for i, number in enumerate(numbers) if "," in number)
    for i in (0, comma):
        assert tasks["gsm8k_direct"].doc_to_target(tasks["gsm8k_direct"].eval_docs[i]) == f" {numbers[i]}\n"
    first = tasks["csqa_direct"].doc_to_text(tasks["csqa_direct"].eval_docs[0])
    assert first.endswith("measure at a what?\n(A) bank\n(B) library\n(C) department store\n(D) mall\n(E) new york\nA:")


@needs_data
def test_real_questions_by_the_papers_metric(byte_pairs):
    for name, chance in (("gsm8k_direct", 0.01), ("csqa_direct", 0.2)):
        result = evaluate_task(
            name, scorers={"": scorer(byte_pairs)}, seed=0, tasks_dir=TASKS, data_dir=DATA, generated={}, limit=150
        )
        assert len(result.items) == 150
        assert 0 < result.metrics[f"{name}/prob"] < 4 * chance
        assert result.num_shortened == 0


@needs_data
def test_stock_commonsense_qa_equals_lm_evals_own_score(byte_pairs):
    from lm_eval import evaluate
    from lm_eval.models.huggingface import HFLM

    ours = scorer(byte_pairs)
    result = evaluate_task(
        "commonsense_qa", scorers={"": ours}, seed=0, tasks_dir=TASKS, data_dir=DATA, generated={}, limit=200
    )
    theirs = HFLM(pretrained=ours.model, tokenizer=byte_pairs, batch_size=32, add_bos_token=True, device="cpu")
    task = {"tasks": {"commonsense_qa": load("commonsense_qa")}}
    expected = evaluate(lm=theirs, task_dict=task, limit=200, bootstrap_iters=0)
    assert [item["acc"] for item in result.items] == [sample["acc"] for sample in expected["samples"]["commonsense_qa"]]
    assert result.metrics == {"commonsense_qa/acc": expected["results"]["commonsense_qa"]["acc,none"]}


@needs_data
def test_the_published_chain_of_thought_prompt():
    """Two steps; eight samples of each; the 128 items are the first of the test set that the datasets library shuffles
    with seed 42, as the official code's are; every number is an integer that the filter can find."""
    from datasets import Dataset

    task, published = load("gsm8k_cot"), load("gsm8k_cot_128")
    doc = task.eval_docs[0]
    assert task.doc_to_text(doc) == f"Q: {doc['question']}\nA: Let's think step by step."
    settings = GenerationSettings.of(task.get_config("generation_kwargs"))
    assert (settings.stop, settings.max_new_tokens, settings.temperature) == (("Q:",), 384, 0.9)
    assert settings.then == ("\nTherefore, the answer (arabic numerals) is", 12)
    assert task.get_config("repeats") == 8
    shuffled = Dataset.from_list(list(task.eval_docs)).shuffle(seed=42)
    assert published.eval_docs["question"][:128] == shuffled["question"][:128]
    files = [dict(read_task(name, tasks_dir=TASKS).settings) for name in ("gsm8k_cot", "gsm8k_cot_128")]
    assert [file.pop("task") for file in files] == ["gsm8k_cot", "gsm8k_cot_128"]
    assert files[1].pop("metadata").pop("subset") == {"shuffle_seed": 42, "size": 128}
    assert files[0].pop("metadata")
    assert files[0] == files[1]
    found = FirstInteger(after="numerals) is")
    for doc in task.eval_docs:
        number = doc["answer"].split("#### ")[1]
        (extracted,) = found.apply([[f"so 3.\nTherefore, the answer (arabic numerals) is ${number}."]], [doc])
        assert extracted == [task.doc_to_target(doc)]


@needs_data
def test_chain_of_thought_on_real_questions(byte_pairs):
    model = scorer(byte_pairs, max_length=2048)
    result = evaluate_task(
        "gsm8k_cot", scorers={"": model}, seed=0, tasks_dir=TASKS, data_dir=DATA, generated={}, limit=1
    )
    assert set(result.metrics) == {"gsm8k_cot/exact_match_maj@8", "gsm8k_cot/exact_match_single"}
    (item,) = result.items
    assert len(set(item["texts"])) == 8
    for text in item["texts"]:
        assert text.count("\nTherefore, the answer (arabic numerals) is") == 1


@needs_data
def test_stock_gsm8k_generates_answers(byte_pairs):
    model = scorer(byte_pairs, max_length=2048)
    result = evaluate_task("gsm8k", scorers={"": model}, seed=0, tasks_dir=TASKS, data_dir=DATA, generated={}, limit=2)
    assert set(result.metrics) == {"gsm8k/exact_match_strict_match", "gsm8k/exact_match_flexible_extract"}
    assert [set(item) for item in result.items] == [
        {"doc_id", "texts", *(key.partition("/")[2] for key in result.metrics)}
    ] * 2
    assert result.version == "3.0"

"""Scales gpu and paper from end to end: their own YAML, shrunk only where sizes demand it, on files made here."""

from __future__ import annotations

import json
import os
import random
from pathlib import Path

import pytest
import torch
from conftest import Run
from transformers import MistralConfig, MistralForCausalLM

from retrace.core.record import Record
from retrace.core.store import Store
from retrace.papers.quietstar.tokenizer import train_tokenizer

QUICK = ["seed=0", "tracking.wandb=off", "eval.limit=3", "eval.num_windows=4"]
DATA = os.environ.get("RETRACE_DATA")
SHRUNK = [
    "corpus.vocab_size=300",
    "corpus.seq_len=64",
    "model.hidden_size=16",
    "model.num_layers=1",
    "model.num_heads=2",
    "model.num_kv_heads=1",
    "model.intermediate_size=32",
    "base.num_windows=8",
    "base.optim={steps: 3, batch_size: 4, micro_batch_size: 4, warmup_steps: 1}",
    "train.num_windows=4",
    "train.optim={steps: 2, batch_size: 4, micro_batch_size: 2, warmup_steps: 1}",
    "thoughts.num_sampled=2",
]
WORDS = "the sum of two odd numbers is even and product x^2 + y^2 = 25 where (A) apples --- cost 7 dollars".split()


def prose(rng: random.Random, num_words: int) -> str:
    return " ".join(rng.choices(WORDS, k=num_words)) + f" {rng.randrange(1000)}."


def write_rows(path: Path, rows: list[dict[str, object]]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


@pytest.fixture
def data(tmp_path: Path) -> Path:
    """A folder laid out as RETRACE_DATA, with generated text and questions."""
    rng, root = random.Random(0), tmp_path / "data"
    write_rows(root / "stacks" / "train.jsonl", [{"source": str(i), "text": prose(rng, 120)} for i in range(119)])
    sums = [(rng.randrange(50), rng.randrange(50)) for _ in range(40)]
    asked = [{"question": f"What is {a} + {b}?", "answer": f"{a} + {b} = {a + b}\n#### {a + b}"} for a, b in sums]
    write_rows(root / "gsm8k" / "train.jsonl", asked[:30])  # type: ignore[arg-type]
    write_rows(root / "gsm8k" / "test.jsonl", asked[30:])  # type: ignore[arg-type]
    choices = {"label": list("ABCDE"), "text": ["red", "green", "blue", "black", "white"]}
    csqa = [{"question": f"Which color is number {i}?", "choices": choices, "answerKey": "ABCDE"[i % 5]} for i in range(9)]
    write_rows(root / "commonsense_qa" / "validation.jsonl", csqa)
    for name in ("valid", "test"):
        file = root / "wikitext2" / f"{name}.txt"
        file.parent.mkdir(exist_ok=True)
        file.write_text("\n\n".join(prose(rng, 30) for _ in range(900)))
    return root


def finished(home: Path) -> dict[str, Record]:
    return {record.program: record for record in Store(home).records("quietstar") if "thoughts/thoughts/s0" in record.labels}


def check_metrics(metrics: dict[str, float]) -> None:
    """What claims of these scales read: scores with and without thoughts, and from before; deciles."""
    for task in ("gsm8k_direct", "csqa_direct"):
        for metric in ("prob", "prob_base", "prob_before"):
            assert 0 <= metrics[f"{task}/{metric}"] <= 1
    assert {f"text/gain_decile_{i:02d}" for i in range(1, 11)} <= metrics.keys()
    assert metrics["text/nll_before"] > 0


def test_the_gpu_scale_runs_on_generated_files(home: Path, retrace: Run, data: Path) -> None:
    for name in ("base", "continued", "heldout"):
        assert name
    local = [
        "corpus.base=[{kind: local, path: stacks/train.jsonl, stop: 96}, "
        "{kind: local, path: gsm8k/train.jsonl, template: 'Q: {question}\\nA: {answer}'}]",
        "corpus.continued=[{kind: local, path: stacks/train.jsonl, start: 96, stop: 110}]",
        "corpus.heldout=[{kind: local, path: stacks/train.jsonl, start: 110}]",
    ]
    done = retrace("run", "quietstar/thoughts", "scale=gpu", *QUICK, *SHRUNK, *local, RETRACE_DATA=str(data))
    assert done.returncode == 0, done.stdout + done.stderr

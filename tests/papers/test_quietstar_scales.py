"""Scales gpu and paper from end to end: their own YAML, shrunk only where sizes demand it, on files made here."""

from __future__ import annotations

import json
import math
import os
import random
import re
from pathlib import Path

import pytest
import torch
from conftest import Run
from transformers import MistralConfig, MistralForCausalLM

from retrace.core.claims import load_claims
from retrace.core.compose import compose
from retrace.core.config import CONFIGS, validate
from retrace.core.plan import load_ablations
from retrace.core.record import Record
from retrace.core.store import Store
from retrace.core.tasks import read_task
from retrace.papers.quietstar.config import TASKS, QuietStarConfig
from retrace.papers.quietstar.texts import TextCorpusConfig, windows
from retrace.papers.quietstar.tokenizer import train_tokenizer
from retrace.papers.quietstar.trunks import base_tokenizer

QUICK = ["seed=0", "tracking.wandb=off", "eval.limit=3", "eval.num_windows=4"]
SMALL_TRUNK = {"hidden_size": 16, "num_layers": 1, "num_heads": 2, "num_kv_heads": 1, "intermediate_size": 32}
SHRUNK = [  # the gpu scale on a CPU: sizes and steps, nothing else
    *(f"model.{key}={value}" for key, value in SMALL_TRUNK.items()),
    *("corpus.vocab_size=300", "base.num_windows=8", "train.num_windows=4"),
    *("base.optim.steps=3", "base.optim.batch_size=4", "base.optim.micro_batch_size=4"),
    *("train.optim.steps=2", "train.optim.batch_size=4", "train.optim.micro_batch_size=2"),
]
WORDS = ("the", "sum", "of", "two", "odd", "numbers", "x^2", "=", "25", "where", "---", *"ABCDE")  # letters are answers
DATA = os.environ.get("RETRACE_DATA")


def prose(rng: random.Random, num_words: int) -> str:
    return " ".join(rng.choices(WORDS, k=num_words)) + f" {rng.randrange(1000)}."


def write(file: Path, rows: list[dict[str, object]]) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))


@pytest.fixture
def data(tmp_path: Path) -> Path:
    """A folder laid out as RETRACE_DATA: generated text and questions."""
    rng, root = random.Random(0), tmp_path / "data"
    write(root / "text.jsonl", [{"source": str(i), "text": prose(rng, 150)} for i in range(120)])
    numbers = [(rng.randrange(50), rng.randrange(50)) for _ in range(40)]
    sums = [{"question": f"What is {a} + {b}?", "answer": f"{a} + {b} = {a + b}\n#### {a + b}"} for a, b in numbers]
    write(root / "gsm8k" / "train.jsonl", [dict(row) for row in sums[:30]])
    write(root / "gsm8k" / "test.jsonl", [dict(row) for row in sums[30:]])
    choices = {"label": list("ABCDE"), "text": ["red", "green", "blue", "black", "white"]}
    colors = [{"question": f"What color is {i}?", "choices": choices, "answerKey": "ABCDE"[i % 5]} for i in range(9)]
    write(root / "commonsense_qa" / "validation.jsonl", colors)
    return root


def finished(home: Path) -> dict[str, Record]:
    return {record.program: record for record in Store(home).records("quietstar")}


def check_metrics(metrics: dict[str, float], *, scale: str, asked: str = "direct") -> None:
    """Every metric that a claim of the scale reads is there, and what stands beside it.

    `asked`: whether the evaluation is of the ablations that ask directly, or of those by chain of thought ("cot").
    """
    claims = [claim for claim in load_claims(CONFIGS / "quietstar" / "claims.yaml") if scale in claim.testable_at]
    claims = [claim for claim in claims if claim.ablation.startswith("chain_of_thought") == (asked == "cot")]
    assert {metric for claim in claims for _, metric in claim.cells} <= metrics.keys()
    for task in ("gsm8k_direct", "csqa_direct") if asked == "direct" else ():
        assert all(0 <= metrics[f"{task}/{metric}"] <= 1 for metric in ("prob", "prob_base", "prob_before"))
    assert {f"text/gain_decile_{i:02d}" for i in range(1, 11)} <= metrics.keys()
    assert 0 < metrics["text/nll_before"] < 20


def test_the_gpu_scale_runs_on_generated_files(home: Path, retrace: Run, data: Path) -> None:
    local = [
        "corpus.base=[{kind: local, path: text.jsonl, stop: 80}, "
        "{kind: local, path: gsm8k/train.jsonl, template: 'Q: {question}\\nA: {answer}'}]",
        "corpus.continued=[{kind: local, path: text.jsonl, start: 80, stop: 100}]",
        "corpus.heldout=[{kind: local, path: text.jsonl, start: 100}]",
    ]
    command = ["quietstar/main", "scale=gpu", *QUICK, *SHRUNK, *local]
    done = retrace("run", *command, RETRACE_DATA=str(data))
    assert done.returncode == 0, done.stdout + done.stderr
    records = finished(home)
    assert records.keys() == {"pretrain", "train", "evaluate"}
    assert records["pretrain"].metrics["loss/base"] < math.log(300) + 1
    check_metrics(records["evaluate"].metrics, scale="gpu")
    again = retrace("run", *command, RETRACE_DATA=str(data))
    assert "3 of 3 runs finished" in again.stdout
    assert finished(home)["evaluate"].provenance["finished"] == records["evaluate"].provenance["finished"]


@pytest.mark.skipif(DATA is None, reason="RETRACE_DATA is not set: the gpu scale's own text is not here")
def test_the_gpu_scale_runs_on_its_own_text(home: Path, retrace: Run) -> None:
    """The YAML's sources as they stand, but for how much of the base's text is read."""
    few = ["corpus.vocab_size=2048", "corpus.base=[{kind: local, path: stacks/train.jsonl.gz, stop: 3}]"]
    done = retrace("run", "quietstar/thoughts", "scale=gpu", *QUICK, *SHRUNK, *few, timeout=600)
    assert done.returncode == 0, done.stdout + done.stderr
    report = retrace("report", "quietstar", "--scale", "gpu")
    assert report.returncode == 0, report.stderr
    check_metrics(finished(home)["evaluate"].metrics, scale="gpu")


@pytest.mark.slow  # a minute: all of the text is tokenised
@pytest.mark.skipif(DATA is None, reason="RETRACE_DATA is not set: the gpu scale's own text is not here")
def test_the_gpu_scale_asks_for_no_more_windows_than_its_text_gives() -> None:
    experiment = validate(QuietStarConfig, compose("quietstar", ["scale=gpu"]), source="gpu")
    corpus, base = experiment.corpus, experiment.base
    assert isinstance(corpus, TextCorpusConfig)
    assert base is not None
    tokenizer = base_tokenizer(corpus)
    wanted = {
        "base": base.num_windows,
        "continued": experiment.train.num_windows,
        "heldout": experiment.eval.num_windows,
    }
    for split, count in wanted.items():
        assert len(windows(corpus, tokenizer, split=split, seed=0, count=count)) == count  # type: ignore[arg-type]
    for task in experiment.eval.tasks:
        for answer in read_task(task, tasks_dir=TASKS).allowed or ():
            assert len(tokenizer(answer, add_special_tokens=False).input_ids) == 1, answer


@pytest.fixture
def mistral(tmp_path: Path) -> tuple[Path, list[str]]:
    """A tiny random Mistral in a folder with a tiny tokenizer, and the overrides that say so."""
    rng, folder = random.Random(1), tmp_path / "mistral"
    tokenizer = train_tokenizer([prose(rng, 50) for _ in range(50)], vocab_size=297)
    tokenizer.save_pretrained(folder)
    torch.manual_seed(0)
    names = ("hidden_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads", "intermediate_size")
    sizes = dict(zip(names, SMALL_TRUNK.values(), strict=True))
    config = MistralConfig(vocab_size=len(tokenizer), max_position_embeddings=2048, sliding_window=None, **sizes)
    MistralForCausalLM(config).save_pretrained(folder)
    stated = {**SMALL_TRUNK, "vocab_size": len(tokenizer), "name": str(folder)}
    return folder, [f"model.{key}={value}" for key, value in stated.items()]


def test_the_paper_scale_runs_on_a_tiny_mistral_with_local_files(
    home: Path, retrace: Run, data: Path, mistral: tuple[Path, list[str]]
) -> None:
    local = [
        "corpus.continued=[{kind: local, path: text.jsonl, stop: 100}]",
        "corpus.heldout=[{kind: local, path: text.jsonl, start: 100}]",
        *("train.num_windows=8", "train.optim.steps=2", "train.optim.learning_rate=0.01"),  # else bf16 moves nothing
    ]
    done = retrace("run", "quietstar/thoughts", "scale=paper", *QUICK, *mistral[1], *local, RETRACE_DATA=str(data))
    assert done.returncode == 0, done.stdout + done.stderr
    records = list(Store(home).records("quietstar"))
    assert sorted(record.program for record in records) == ["evaluate", "evaluate", "train", "train"]
    with_thoughts, without = (record.metrics for record in records if record.program == "evaluate")
    check_metrics(with_thoughts, scale="paper")
    before = [name for name in with_thoughts if name.endswith("_before")]
    assert [with_thoughts[name] for name in before] == [without[name] for name in before]  # both arms have one base
    assert with_thoughts["gsm8k_direct/prob_before"] != with_thoughts["gsm8k_direct/prob_base"]
    report = retrace("report", "quietstar", "--scale", "paper")
    assert report.returncode == 0, report.stderr
    asked = [c for c in load_claims(CONFIGS / "quietstar" / "claims.yaml") if "paper" in c.testable_at]
    assert f"{len(asked)} without records" in report.stdout  # other sizes are other arms, and judge nothing


def test_chain_of_thought_at_the_paper_scale_runs_on_a_tiny_mistral(
    home: Path, retrace: Run, data: Path, mistral: tuple[Path, list[str]]
) -> None:
    local = [
        "corpus.continued=[{kind: local, path: text.jsonl, stop: 100}]",
        "corpus.heldout=[{kind: local, path: text.jsonl, start: 100}]",
        *("train.num_windows=8", "train.optim.steps=2", "thoughts.num_sampled=2", "eval.limit=1"),
    ]
    chosen = [*QUICK[:2], "eval.num_windows=2", *mistral[1], *local]
    done = retrace("run", "quietstar/chain_of_thought_gsm8k", "scale=paper", *chosen, RETRACE_DATA=str(data))
    assert done.returncode == 0, done.stdout + done.stderr
    records = [record for record in Store(home).records("quietstar") if record.program == "evaluate"]
    for record in records:
        check_metrics(record.metrics, scale="paper", asked="cot")


def test_what_is_out_of_reach_is_said_in_one_sentence_before_anything_is_spent(
    home: Path, retrace: Run, data: Path, mistral: tuple[Path, list[str]]
) -> None:
    nowhere = {"HF_ENDPOINT": "http://127.0.0.1:9", "HF_HUB_OFFLINE": "", "HF_HOME": str(home / "hub")}
    offline = {"HF_HUB_OFFLINE": "1", "HF_HOME": str(home / "hub")}
    text = "open-web-math/open-web-math: {}; where it can be reached, write documents 0 to 999 of split train as JSON"
    local = "corpus.{}=[{{kind: local, path: text.jsonl}}]"
    both = [local.format("continued"), local.format("heldout")]
    cases = [
        ([], nowhere, text.format("the hub at http://127.0.0.1:9 can't be reached")),
        (mistral[1], offline, text.format("Couldn't reach 'open-web-math/open-web-math' on the Hub")[:60]),
        (both, nowhere, "mistralai/Mistral-7B-v0.1: the hub at http://127.0.0.1:9 can't be reached"),
        (both, offline, "mistralai/Mistral-7B-v0.1: not in the hub's cache on this machine"),
    ]
    for overrides, environment, expected in cases:
        done = retrace("run", "quietstar/main", "scale=paper", *overrides, RETRACE_DATA=str(data), **environment)
        assert done.returncode == 2, done.stdout
        assert expected in done.stderr
        assert done.stderr.count("\n") == 1
        assert not (home / "runs").exists()
    done = retrace("run", "quietstar/main", "scale=gpu", RETRACE_DATA="")
    assert (done.returncode, done.stdout) == (2, "")
    assert "stacks/train.jsonl.gz: RETRACE_DATA is not set: set it to the folder" in done.stderr


def test_plans_need_neither_weights_nor_network_nor_data(retrace: Run) -> None:
    for scale in ("gpu", "paper"):
        done = retrace(
            "plan", "quietstar/thoughts", f"scale={scale}", RETRACE_DATA="", HF_ENDPOINT="http://127.0.0.1:9"
        )
        assert done.returncode == 0, done.stderr
        assert "FLOPs" in done.stdout


def test_a_report_names_as_not_run_what_the_scale_asks_and_nothing_else(home: Path, retrace: Run) -> None:
    for scale in ("gpu", "paper", "laptop"):
        done = retrace("report", "quietstar", "--scale", scale)
        assert done.returncode == 0, done.stderr
        report = (home / "results" / "quietstar" / "REPORT.md").read_text().replace("\\", "")
        asked = [name for name, ablation in load_ablations("quietstar").items() if scale in ablation.scales]
        assert sorted(re.findall(r"`retrace run quietstar/(\w+) scale=\w+ seed=0,1,2`", report)) == asked

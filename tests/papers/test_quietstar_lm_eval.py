"""lm-eval's own command line, as a user calls it, on a tiny random model: the numbers are those of `evaluate_task`."""

from __future__ import annotations

import json
import math
import os
import subprocess
import sys
import tomllib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from transformers import LlamaConfig, LlamaForCausalLM

from retrace.core.evaluate import evaluate_task
from retrace.papers.quietstar.config import TASKS, ThoughtConfig
from retrace.papers.quietstar.language_model import load
from retrace.papers.quietstar.pretrained import save_pretrained
from retrace.papers.quietstar.tokenizer import build_tokenizer
from retrace.papers.quietstar.trunks import build_thinker

ROOT = Path(__file__).resolve().parents[2]
LM_EVAL = Path(sys.executable).with_name("lm_eval")
ROWS = [
    {"question": "Tom has 3 pens, first gets 2. How many now?", "answer": "#### 5", "text": "The quiet mill sleeps."},
    {"question": "Sue has 9 eggs, first loses half. How many now?", "answer": "#### 4", "text": "It was a cold night."},
    {"question": "Ben has 6 cards, first gives 2. How many now?", "answer": "#### 4", "text": "\n"},
]
SAMPLED = {"until": ["."], "max_gen_toks": 6, "do_sample": True, "temperature": 0.9}
LOCAL: dict[str, dict[str, Any]] = {
    "local_score": {"output_type": "loglikelihood", "doc_to_text": "Q: {{question}}\nA:", "doc_to_target": " 4 5\n"},
    "local_text": {"output_type": "loglikelihood_rolling", "doc_to_text": "", "doc_to_target": "{{text}} {{question}}"},
    "local_answer": {
        "output_type": "generate_until",
        "doc_to_text": "Q: {{question}}\nA:",
        "doc_to_target": "{{answer}}",
        "generation_kwargs": {**SAMPLED, "then": {"text": " so it is", "max_gen_toks": 3}},
        "repeats": 3,
        "filter_list": [
            {"name": "single", "filter": [{"function": "first_integer", "after": ""}]},
        ],
        "metric_list": [{"metric": "exact_match", "aggregation": "mean", "higher_is_better": True}],
    },
    "gsm8k_direct": yaml.safe_load((TASKS / "gsm8k_direct.yaml").read_text()),  # from a file, and not from the hub
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """model/, the tasks as lm-eval and as Retrace reads them, and the package's entry points."""
    root = tmp_path_factory.mktemp("lm_eval")
    _save_model(root / "model")
    (root / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    for kind in ("theirs", "ours"):
        (root / kind).mkdir()
    for name, settings in LOCAL.items():
        task = {key: value for key, value in settings.items() if key not in ("dataset_name", "metadata")}
        task |= {"task": name, "dataset_path": "json", "test_split": "test", "metadata": {"version": 1.0}}
        theirs = {**task, "dataset_kwargs": {"data_files": {"test": str(root / "rows.jsonl")}}}
        (root / "theirs" / f"{name}.yaml").write_text(yaml.safe_dump(theirs))
        metadata = {**settings.get("metadata", {"version": 1.0}), "local": {"test": "rows.jsonl"}}
        (root / "ours" / f"{name}.yaml").write_text(yaml.safe_dump({**task, "metadata": metadata}))
    declared = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["entry-points"]
    lines = [f"[{group}]\n" + "".join(f"{k} = {v}\n" for k, v in names.items()) for group, names in declared.items()]
    info = root / "site" / "retrace_entry_points-0.dist-info"  # as installed, whatever was installed here and when
    info.mkdir(parents=True)
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: retrace-entry-points\nVersion: 0\n")
    (info / "entry_points.txt").write_text("\n".join(lines))
    return root


@torch.no_grad()
def _save_model(folder: Path) -> None:
    tokenizer = build_tokenizer()
    torch.manual_seed(0)
    trunk = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=len(tokenizer),
            hidden_size=16,
            intermediate_size=24,
            num_hidden_layers=1,
            num_attention_heads=2,
            max_position_embeddings=128,
            initializer_range=0.3,
        )
    )
    config = ThoughtConfig(num_sampled=2, num_true=2, num_thoughts=2, policy_weight=1.0, start_init="(", end_init=")")
    model = build_thinker(trunk, config, tokenizer, seed=0)
    assert model.mixing_head is not None
    for parameter in model.mixing_head.parameters():  # a head at zero would hide the thoughts
        parameter.copy_(torch.randn_like(parameter) * 0.3)
    save_pretrained(model, folder, tokenizer)


def lm_eval(folder: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(folder / "site"), *sys.path]), "COLUMNS": "300"}
    command = [str(LM_EVAL), *arguments, "--model", "quietstar", "--device", "cpu"]
    return subprocess.run(command, env=environment, cwd=folder, capture_output=True, text=True, timeout=300)


def results(folder: Path, name: str) -> tuple[Mapping[str, Any], Mapping[str, list[Any]]]:
    """What lm-eval wrote: its results by task, and each task's samples."""
    (file,) = (folder / name).rglob("results_*.json")
    samples = {
        path.name.removeprefix("samples_").rpartition("_")[0]: [json.loads(line) for line in path.open()]
        for path in file.parent.glob("samples_*.jsonl")
    }
    return json.loads(file.read_text())["results"], samples


@pytest.mark.parametrize(
    ("command", "arguments"),
    [
        ((), {"think": True, "thought_seed": 3, "seed": 5}),
        pytest.param(("run",), {"think": False}, marks=pytest.mark.slow),  # lm-eval takes long to list its own tasks
    ],
    ids=["thoughts", "run-without-thoughts"],
)
def test_the_command_line_gives_our_numbers(folder: Path, command: tuple[str, ...], arguments: dict[str, Any]) -> None:
    out = "-".join(["out", *command])
    shown = ",".join(f"{key}={str(value).lower()}" for key, value in {"pretrained": "model", **arguments}.items())
    tasks = ["--include_path", "theirs", "--tasks", ",".join(LOCAL), "--output_path", out, "--log_samples"]
    done = lm_eval(folder, *command, "--model_args", shown, *tasks, "--batch_size", "2")
    assert done.returncode == 0, done.stderr
    found, samples = results(folder, out)
    scorer, seed = load(pretrained=str(folder / "model"), device="cpu", batch_size=2, **arguments)
    for name in LOCAL:
        ours = evaluate_task(
            name, scorers={"": scorer}, seed=seed, tasks_dir=folder / "ours", data_dir=folder, generated={}
        )
        if name == "gsm8k_direct":
            probs = [item["prob"] for item in ours.items]
            assert 0 < min(probs) < max(probs) < 1
            assert found[name]["acc,none"] == ours.metrics["gsm8k_direct/acc"]
            assert found[name]["perplexity,none"] == pytest.approx(
                math.exp(-sum(map(math.log, probs)) / len(probs)), rel=1e-6
            )
            continue
        theirs = {key: value for key, value in found[name].items() if "," in key and "stderr" not in key}
        named = {f"{name}/" + key.replace(",none", "").replace(",", "_"): value for key, value in theirs.items()}
        assert named == ours.metrics
        if name == "local_answer":
            texts = [sample["resps"][0] for sample in samples[name]]
            assert texts == [item["texts"] for item in ours.items]
            assert len({text for item in texts for text in item}) > len(ROWS)


def test_thoughts_and_their_noise_change_the_numbers(folder: Path) -> None:
    """Else the comparison above would also hold for a model whose arguments are ignored."""
    variants: list[dict[str, Any]] = [{}, {"think": False}, {"thought_seed": 0}, {"thought_seed": 1}]
    values = set()
    for arguments in variants:
        scorer, _ = load(pretrained=str(folder / "model"), **arguments)
        options = {"seed": 0, "tasks_dir": folder / "ours", "data_dir": folder, "generated": {}}
        values.add(evaluate_task("gsm8k_direct", scorers={"": scorer}, **options).metrics["gsm8k_direct/prob"])
    assert len(values) == len(variants)


def test_wrong_arguments_are_one_sentence(folder: Path) -> None:
    for arguments, message in (
        ({"pretrained": "x", "thinks": True}, "--model_args: thinks: no such key; did you mean 'think'?"),
        ({}, "--model_args: no value for pretrained"),
        ({"pretrained": "x", "dtype": "int8"}, "--model_args: dtype='int8': input should be 'auto', 'float32'"),
        ({"pretrained": str(folder / "nowhere")}, "nowhere: no such folder"),
    ):
        with pytest.raises(ValueError) as error:
            load(**arguments)
        assert message in str(error.value)


def test_other_programs_that_import_torch_see_nothing_of_it(folder: Path) -> None:
    """And lm-eval's own models stay where they are, although ours is entered before they are asked for."""
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(folder / "site"), *sys.path])}
    for code in (
        "import sys, torch; assert not {'lm_eval', 'pydantic', 'retrace.core'} & set(sys.modules)",
        "import lm_eval, torch; from lm_eval.api.registry import model_registry; "
        "assert {'hf', 'quietstar'} <= set(model_registry)",
    ):
        subprocess.run([sys.executable, "-c", code], env=environment, check=True, timeout=120)

"""Direct scoring of GSM8K with thoughts before the answer's tokens only, against thoughts at every position.

    python benchmarks/scoring.py [--questions 12]

Both answer the same questions through `evaluate_task`, as `gsm8k_direct` asks them, with greedy thoughts; that every
item gets the same probability is asserted. "answers" reads a question once and thinks where a token is scored, two to
six times. "everywhere" thinks at every token, as the official code's evaluation does; "padded" also at the padding to
256 tokens, which it has. Time is CPU time on one thread, the smallest of the repeats for "answers".

The model: hidden 256, 4 layers, 8/4 heads, MLP 688, random weights, Mistral's vocabulary of 32000. The ratio depends on
the model: where the trunk outweighs the vocabulary it tends to sampled + 3, the passes over a text, since both read the
text once; it is larger where the vocabulary, which every thought token reads, weighs more. The shortest of the paper's
usual thoughts and its longest are measured. Questions are GSM8K's where RETRACE_DATA holds them, else generated ones.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerBase

from retrace.core.config import data_root
from retrace.core.evaluate import TaskResult, evaluate_task
from retrace.core.provenance import processor
from retrace.core.tasks import Rows, read_rows, read_task
from retrace.papers.quietstar.config import TASKS, MixingHead, ThoughtConfig
from retrace.papers.quietstar.model import ThoughtModel
from retrace.papers.quietstar.scorer import ThoughtScorer
from retrace.papers.quietstar.tokenizer import train_tokenizer

HIDDEN, LAYERS, HEADS, KV_HEADS, MLP, VOCAB = 256, 4, 8, 4, 688, 32000
WINDOW = 256  # tokens that the official code pads a question to
SAMPLED = {"12/4": 9, "24/12": 21}  # sampled tokens of a thought, by the paper's name
RESULTS = Path(__file__).parent / "results" / "scoring.json"


class Answers(ThoughtScorer):
    """Thinks where a token is scored; counts its CPU seconds."""

    seconds = 0.0

    def loglikelihood(self, requests: Any, *, allowed: Sequence[int] | None) -> list[tuple[float, bool]]:
        start = time.process_time()
        found = super().loglikelihood(requests, allowed=allowed)
        self.seconds += time.process_time() - start
        return found


class Everywhere(Answers):
    """Thinks at every token that is read."""

    window = 0  # tokens that a row is padded to at least

    def logits(
        self, input_ids_BT: Tensor, attention_mask_BT: Tensor, positions_BN: Tensor, *, seeds: Sequence[int]
    ) -> Tensor:
        missing = max(0, self.window - input_ids_BT.shape[1])
        ids_BT, mask_BT = (torch.nn.functional.pad(x, (0, missing)) for x in (input_ids_BT, attention_mask_BT))
        all_BT = torch.arange(ids_BT.shape[1]).expand_as(ids_BT)
        return super().logits(ids_BT, mask_BT, all_BT, seeds=seeds)[torch.arange(len(ids_BT))[:, None], positions_BN]


class Padded(Everywhere):
    """Thinks at every token of a window, its padding included."""

    window = WINDOW


def build(num_sampled: int, tokenizer: PreTrainedTokenizerBase) -> ThoughtModel:
    torch.manual_seed(0)
    trunk = LlamaConfig(
        vocab_size=VOCAB,
        hidden_size=HIDDEN,
        intermediate_size=MLP,
        num_hidden_layers=LAYERS,
        num_attention_heads=HEADS,
        num_key_value_heads=KV_HEADS,
        max_position_embeddings=2048,
        initializer_range=0.05,  # predictions that differ from question to question
    )
    head = MixingHead(zero_init=False)
    config = ThoughtConfig(num_sampled=num_sampled, num_true=1, num_thoughts=2, policy_weight=1.0, mixing_head=head)
    unused = range(len(tokenizer), VOCAB)
    model = ThoughtModel(
        LlamaForCausalLM(trunk), config, start_init_id=20, end_init_id=21, hidden_token_ids=list(unused)
    )
    return model.eval()


def questions(count: int) -> tuple[str, str, Mapping[str, Rows]]:
    """Where they come from, the task, and its rows if it needs them from us."""
    data = data_root()
    if data is not None and (data / "gsm8k" / "test.jsonl").is_file():
        return "GSM8K test", "gsm8k_direct", {}
    from retrace.core.compose import compose
    from retrace.core.config import validate
    from retrace.papers.quietstar import corpus

    world = validate(corpus.CorpusConfig, compose("quietstar", ["scale=laptop"])["corpus"], source="laptop")
    rows = corpus.questions(world, family="arithmetic", count=count)
    return "generated", "chains_direct", {"chains_direct": rows}


def tokenizer_of(task: str, generated: Mapping[str, Rows]) -> PreTrainedTokenizerBase:
    """Single digits and common pairs, learned from the questions."""
    rows = read_rows(read_task(task, tasks_dir=TASKS), data_dir=data_root(), generated=generated)
    assert rows is not None
    texts = [row["question"] for row in rows["test"]]
    return train_tokenizer([*texts, "Q: A:\n" * 100], vocab_size=2000 if task == "gsm8k_direct" else 300)


def score(scorer: ThoughtScorer, task: str, generated: Mapping[str, Rows], count: int) -> TaskResult:
    return evaluate_task(
        task,
        scorers={"": scorer},
        seed=0,
        tasks_dir=TASKS,
        data_dir=data_root(),
        generated=generated,
        limit=count,
    )


def compare(name: str, count: int) -> dict[str, float]:
    """CPU seconds a question, and how many times faster the answers alone are; asserts equal probabilities."""
    _, task, generated = questions(count)
    tokenizer = tokenizer_of(task, generated)
    model = build(SAMPLED[name], tokenizer)
    row: dict[str, float] = {}
    expected: list[float] = []
    for kind, repeats in ((Answers, 3), (Everywhere, 1), (Padded, 1)):
        times = []
        for _ in range(repeats):
            rows_at_once = None if kind is Answers else 4  # (rows, tokens, vocabulary) floats have to fit
            scorer = kind(model, tokenizer, think=True, thought_seed=None, batch_size=rows_at_once)
            items = score(scorer, task, generated, count).items
            times.append(scorer.seconds / count)
        probs = [item["prob"] for item in items]
        expected = expected or probs
        assert len(set(probs)) == len(probs), "every question should get a probability of its own"
        assert all(abs(a - b) < 1e-4 * a for a, b in zip(expected, probs, strict=True)), (expected, probs)
        row[kind.__name__.lower()] = min(times)
    row["speedup_over_everywhere"] = row["everywhere"] / row["answers"]
    row["speedup_over_padded"] = row["padded"] / row["answers"]
    return row


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--questions", type=int, default=12)
    count = parser.parse_args().questions
    torch.set_num_threads(1)
    source = questions(count)[0]
    rows = {}
    print(f"{count} questions ({source}); CPU seconds a question")
    for name in SAMPLED:
        row = rows[name] = compare(name, count)
        print(
            f"{name:6s} answers {row['answers']:.3f}   everywhere {row['everywhere']:.2f} "
            f"({row['speedup_over_everywhere']:.1f}x)   padded to {WINDOW} {row['padded']:.2f} "
            f"({row['speedup_over_padded']:.1f}x)   same probabilities",
            flush=True,
        )
    machine = {"processor": processor(), "torch": torch.__version__, "threads": 1}
    content = {**machine, "questions": count, "source": source, "thoughts": rows}
    RESULTS.write_text(json.dumps(content, indent=1) + "\n")


if __name__ == "__main__":
    main()

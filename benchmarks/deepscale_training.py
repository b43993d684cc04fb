"""Training speed of DeepScaleLM's transformer: against transformers' GPT-2 and BERT, against vanilla, and its floor.

    python benchmarks/deepscale_training.py [--cases 12x256 192x128] [--repeats 5]

A step is forward, backward and AdamW (fused, for all) in fp32 on one thread, with dropout 0.1 everywhere, on sequences
of 128 tokens: next tokens for decoders, 15 % masked ones for encoders. "gpt2 (gelu)" is GPT-2 with the activation that
ours has, in place of its own, which is several kernels. All variants of a case are in one process, and step in turn;
time is the smallest CPU time of the repeats, which a busy machine disturbs least. The cost of lambda and beta is taken
of one decoder, whose residuals are plain in every other step: the smallest time with over the smallest without.

The floor is the time of the step's matrix products (linear layers, attention, logits; each forward, and twice backward)
as plain products of the sizes that occur.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch
import transformers
from torch import Tensor, nn

from retrace.core.provenance import processor
from retrace.papers.deepscalelm.methods import initialise
from retrace.papers.deepscalelm.model import Transformer
from retrace.papers.deepscalelm.scheme import Residual
from retrace.papers.deepscalelm.shape import ModelShape

SEQ_LEN, VOCAB, DROPOUT, MASKED = 128, 4096, 0.1, 0.15
RESULTS = Path(__file__).parent / "results" / "deepscale_training.json"
Step = Callable[[], float]


@dataclass(frozen=True)
class Case:
    layers: int
    hidden: int
    heads: int
    batch: int


CASES = {"12x256": Case(12, 256, 4, batch=8), "192x128": Case(192, 128, 4, batch=4)}


def labels_of(ids_BT: Tensor, kind: str) -> Tensor:
    """Next tokens, or 15 % of the tokens; -100 where nothing is to be predicted."""
    if kind == "decoder":
        return torch.cat((ids_BT[:, 1:], torch.full_like(ids_BT[:, :1], -100)), 1)
    chosen = torch.rand(ids_BT.shape, generator=torch.Generator().manual_seed(1)) < MASKED
    return torch.where(chosen, ids_BT, -100)


def stepper(model: nn.Module, loss: Callable[[], Tensor]) -> Step:
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, fused=True)
    model.train()

    def step() -> float:
        start = time.process_time()
        loss().backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        return time.process_time() - start

    return step


def make(case: Case, kind: Literal["encoder", "decoder"], method: str) -> Transformer:
    shape = ModelShape(
        kind=kind,
        placement="pre" if kind == "decoder" else "post",
        norm="layernorm",
        activation="gelu",
        positions="learned",
        num_layers=case.layers,
        hidden_size=case.hidden,
        num_heads=case.heads,
        intermediate_size=4 * case.hidden,
        dropout=DROPOUT,
        attention_dropout=DROPOUT,
        vocab_size=VOCAB,
        seq_len=SEQ_LEN,
    )
    return Transformer(shape, initialise(shape, method))


def ours(case: Case, kind: Literal["encoder", "decoder"], method: str, ids_BT: Tensor) -> Step:
    model, labels_BT = make(case, kind, method), labels_of(ids_BT, kind)
    return stepper(model, lambda: model.loss(model(ids_BT), labels_BT))


def overhead(case: Case, rounds: int) -> float:
    """CPU time of a step with lambda and beta over one without."""
    ids_BT = torch.randint(VOCAB, (case.batch, SEQ_LEN))
    model, labels_BT = make(case, "decoder", "dslm"), labels_of(ids_BT, "decoder")
    step = stepper(model, lambda: model.loss(model(ids_BT), labels_BT))
    scaled = [block.fixed for block in model.sub_blocks()]
    times: tuple[list[float], list[float]] = ([], [])
    for round_ in range(2 * rounds + 2):
        for block, residual in zip(model.sub_blocks(), scaled, strict=True):
            block.fixed = residual if round_ % 2 else Residual()
        times[round_ % 2].append(step())
    return min(times[1][1:]) / min(times[0][1:])


def gpt2(case: Case, ids_BT: Tensor, activation: str) -> Step:
    config = transformers.GPT2Config(
        vocab_size=VOCAB,
        n_positions=SEQ_LEN,
        n_embd=case.hidden,
        n_layer=case.layers,
        n_head=case.heads,
        activation_function=activation,
        bos_token_id=0,
        eos_token_id=0,
    )
    model = transformers.GPT2LMHeadModel(config)  # it shifts its labels itself
    return stepper(model, lambda: model(ids_BT, labels=ids_BT, use_cache=False).loss)


def bert(case: Case, ids_BT: Tensor) -> Step:
    config = transformers.BertConfig(
        vocab_size=VOCAB,
        max_position_embeddings=SEQ_LEN,
        hidden_size=case.hidden,
        num_hidden_layers=case.layers,
        num_attention_heads=case.heads,
        intermediate_size=4 * case.hidden,
    )
    model, labels_BT = transformers.BertForMaskedLM(config), labels_of(ids_BT, "encoder")
    return stepper(model, lambda: model(ids_BT, labels=labels_BT).loss)


def floor(case: Case, num_predicted: int) -> Step:
    """One layer's products, forward and twice backward, times the layers; and the logits'."""
    tokens, d, batch_heads = case.batch * SEQ_LEN, case.hidden, case.batch * case.heads

    def product(rows: int, inner: int, columns: int, *, batch: int = 1, times: int = 1) -> float:
        left, right = torch.randn(batch, rows, inner), torch.randn(batch, inner, columns)
        out = torch.randn(batch, rows, columns)
        if batch == 1:
            left, right, out = left[0], right[0], out[0]
        start = time.process_time()
        for _ in range(times):
            _ = left @ right, out @ right.mT, left.mT @ out
        return time.process_time() - start

    def step() -> float:
        n, size = case.layers, d // case.heads
        total = product(tokens, d, 3 * d, times=n) + product(tokens, d, d, times=n)
        total += product(tokens, d, 4 * d, times=n) + product(tokens, 4 * d, d, times=n)
        total += product(SEQ_LEN, size, SEQ_LEN, batch=batch_heads, times=n)
        total += product(SEQ_LEN, SEQ_LEN, size, batch=batch_heads, times=n)
        return total + product(num_predicted, d, VOCAB)

    return step


def measure(case: Case, repeats: int) -> dict[str, object]:
    """Seconds of each variant, and ratios; one round is a step of each in turn."""
    torch.manual_seed(0)
    ids_BT = torch.randint(VOCAB, (case.batch, SEQ_LEN))
    groups: dict[str, dict[str, Step]] = {
        "decoder": {
            "gpt2": gpt2(case, ids_BT, "gelu_new"),
            "gpt2 (gelu)": gpt2(case, ids_BT, "gelu"),
            "ours, vanilla": ours(case, "decoder", "vanilla_xavier", ids_BT),
            "ours, dslm": ours(case, "decoder", "dslm", ids_BT),
            "floor": floor(case, ids_BT.numel()),
        },
        "encoder": {
            "bert": bert(case, ids_BT),
            "ours, vanilla": ours(case, "encoder", "vanilla_xavier", ids_BT),
            "ours, dslm": ours(case, "encoder", "dslm", ids_BT),
            "floor": floor(case, int(MASKED * ids_BT.numel())),
        },
    }
    found: dict[str, object] = {}
    for kind, variants in groups.items():
        times: dict[str, list[float]] = {name: [] for name in variants}
        for round_ in range(repeats + 1):  # the first warms up
            for name, step in sorted(variants.items(), reverse=bool(round_ % 2)):
                times[name].append(step())
        best = {name: min(values[1:]) for name, values in times.items()}
        ratios = {f"{name} / ours": best[name] / best["ours, dslm"] for name in best if not name.startswith("ours")}
        ratios["dslm / vanilla"] = best["ours, dslm"] / best["ours, vanilla"]
        tokens = ids_BT.numel() / best["ours, dslm"]
        found[kind] = {"seconds": best, "tokens/s of ours": tokens, "ratios": ratios}
        print(case, kind, json.dumps(found[kind], indent=1))
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--cases", nargs="+", default=[*CASES, "overhead"], choices=[*CASES, "overhead"])
    parser.add_argument("--repeats", type=int, default=5)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    transformers.logging.set_verbosity_error()
    found: dict[str, object] = json.loads(RESULTS.read_text()) if RESULTS.exists() else {}
    found |= {"processor": processor(), "torch": torch.__version__, "transformers": transformers.__version__}
    for name in arguments.cases:
        if name == "overhead":
            cases = {"12x256": Case(12, 256, 4, batch=4), "24x128": Case(24, 128, 4, batch=4)}
            found[name] = {of: overhead(case, 5 * arguments.repeats) for of, case in cases.items()}
            print(name, found[name])
        else:
            found[name] = measure(CASES[name], arguments.repeats)
        RESULTS.write_text(json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    main()

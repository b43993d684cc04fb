"""Time and peak memory of a Quiet-STaR training step: ThoughtModel against the growing-mask reference, and its floor.

    python benchmarks/thought_step.py [--lengths 128 256] [--repeats 3]

A step is sampling, forward and backward in fp32 on one thread (hidden 256, 4 layers, 8/4 heads, MLP 688, vocabulary
4096, batch 4, P=2, 9 sampled tokens with START and END, 4 true tokens); that both compute the same loss for the same
thoughts is asserted first. Every measurement has a process of its own. Time is the smallest CPU time of the repeats,
which a busy machine disturbs least. Memory is the growth of the largest resident set (ru_maxrss) over the resident set
before the first step, in a process whose malloc maps every tensor of 64 KiB by itself, so that the resident set is the
tensors alive and not the heap's holes. "light" is ours with activation checkpointing in the trunk. The floor is the
time of the step's useful matrix products (linear layers, logits, attention without masked pairs; each forward, and
twice backward) as plain `torch.mm` of the sizes that occur.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import subprocess
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch
from growing_mask import reference_step
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM

from retrace.core.provenance import processor
from retrace.papers.quietstar.config import MixingHead, ThoughtConfig
from retrace.papers.quietstar.model import ThoughtModel

BATCH, HIDDEN, LAYERS, HEADS, KV_HEADS, MLP, VOCAB = 4, 256, 4, 8, 4, 688, 4096
SAMPLED, TRUE, THOUGHTS = 9, 4, 2
REFERENCES = ("eager", "sdpa")  # the growing-mask reference with plain and with fused attention
OURS = ("ours", "light")  # light: with activation checkpointing in the trunk
RESULTS = Path(__file__).parent / "results" / "thought_step.json"


def build() -> ThoughtModel:
    torch.manual_seed(0)
    trunk = LlamaConfig(
        vocab_size=VOCAB,
        hidden_size=HIDDEN,
        intermediate_size=MLP,
        num_hidden_layers=LAYERS,
        num_attention_heads=HEADS,
        num_key_value_heads=KV_HEADS,
    )
    config = ThoughtConfig(
        num_sampled=SAMPLED,
        num_true=TRUE,
        num_thoughts=THOUGHTS,
        policy_weight=1.0,
        mixing_head=MixingHead(zero_init=False),
    )
    return ThoughtModel(LlamaForCausalLM(trunk), config, start_init_id=3, end_init_id=4, hidden_token_ids=[0])


def tokens(num_text: int) -> Tensor:
    return torch.randint(1, VOCAB, (BATCH, num_text), generator=torch.Generator().manual_seed(1))


def assert_same_loss(model: ThoughtModel) -> None:
    ids_BT = tokens(48)
    with torch.no_grad():
        thoughts_BPTM = model.sample(ids_BT, None, generator=torch.Generator().manual_seed(2))
        ours = model.loss(ids_BT, None, thoughts_BPTM).loss
        theirs = reference_step(model, ids_BT, thoughts_BPTM=thoughts_BPTM).loss
    assert abs(ours - theirs) < 1e-5, (ours, theirs)


def measure_step(which: str, num_text: int, repeats: int) -> dict[str, float]:
    """CPU seconds and peak bytes of one step, in this process."""
    model, ids_BT, generator = build(), tokens(num_text), torch.Generator().manual_seed(2)
    assert_same_loss(model)
    if which == "light":
        model.trunk.activation_checkpointing_enable()
    before, seconds, peak = _resident_bytes(), [], 0.0
    for repeat in range(repeats):
        model.zero_grad()
        start = time.process_time()
        if which in REFERENCES:
            loss = reference_step(model, ids_BT, generator=generator, attention=which).loss
        else:
            loss = model(ids_BT, generator=generator).loss
        loss.backward()
        seconds.append(time.process_time() - start)
        del loss
        if repeat == 0:
            peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 - before
    return {"seconds": min(seconds), "bytes": peak}


def _resident_bytes() -> int:
    return int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize()


def measure_floor(num_text: int, repeats: int) -> dict[str, float]:
    """CPU seconds of the useful matrix products of a step."""
    text_rows, thread_rows = BATCH * num_text, BATCH * num_text * THOUGHTS
    passes = [text_rows, text_rows] + [thread_rows] * (SAMPLED - 1) + [thread_rows * (2 + TRUE - 1)]
    head_size = HIDDEN // HEADS
    linears = [(HIDDEN, HIDDEN)] * 2 + [(HIDDEN, KV_HEADS * head_size)] * 2 + [(HIDDEN, MLP)] * 2 + [(MLP, HIDDEN)]
    seconds = flops = 0.0

    def add(rows: int, inner: int, outer: int, count: float, *, backward: bool = True) -> None:
        nonlocal seconds, flops
        x, w, y = torch.randn(rows, inner), torch.randn(outer, inner), torch.randn(rows, outer)
        products: list[Callable[[], Tensor]] = [lambda: torch.mm(x, w.T)]
        if backward:
            products += [lambda: torch.mm(y, w), lambda: torch.mm(y.T, x)]
        seconds += count * sum(_fastest(product, repeats) for product in products)
        flops += count * len(products) * 2.0 * rows * inner * outer

    for rows in sorted(set(passes)):
        for inner, outer in sorted(set(linears)):
            add(rows, inner, outer, LAYERS * passes.count(rows) * linears.count((inner, outer)))
    chunk = 512  # rows of logits at a time
    scored = text_rows + thread_rows * TRUE + SAMPLED * thread_rows / 2  # half of the thoughts have an advantage
    add(chunk, HIDDEN, VOCAB, scored / chunk)
    add(chunk, HIDDEN, VOCAB, (text_rows + (SAMPLED - 1) * thread_rows) / chunk, backward=False)
    # attention: per head, rows of queries against half of the text (causal), twice forward, four times backward
    for rows in sorted(set(passes)):
        per_sequence = rows // BATCH * (HEADS // KV_HEADS)
        add(per_sequence, head_size, num_text // 2, 2 * LAYERS * KV_HEADS * BATCH * passes.count(rows))
    return {"seconds": seconds, "flops": flops}


def _fastest(product: Callable[[], Tensor], repeats: int) -> float:
    times = []
    for _ in range(repeats + 2):
        start = time.process_time()
        product()
        times.append(time.process_time() - start)
    return min(times)


def in_own_process(which: str, num_text: int, repeats: int, **environment: str) -> dict[str, float]:
    command = [sys.executable, __file__, "--child", which, "--lengths", str(num_text), "--repeats", str(repeats)]
    return json.loads(
        subprocess.run(
            command, check=True, capture_output=True, text=True, env={**os.environ, **environment}
        ).stdout.splitlines()[-1]
    )


def compare(num_text: int, repeats: int) -> dict[str, dict[str, float]]:
    """Each variant's seconds and MiB, and what these are of the references' and of the floor's."""
    row = {"floor": in_own_process("floor", num_text, repeats)}
    for which in (*REFERENCES, *OURS):
        seconds = in_own_process(which, num_text, repeats)["seconds"]
        memory = in_own_process(which, num_text, 1, MALLOC_MMAP_THRESHOLD_="65536")["bytes"]
        row[which] = {"seconds": seconds, "mib": memory / 2**20}
    for which in OURS:
        mine = row[which]
        mine["over_floor"] = mine["seconds"] / row["floor"]["seconds"]
        for reference in REFERENCES:
            mine[f"speedup_over_{reference}"] = row[reference]["seconds"] / mine["seconds"]
            mine[f"memory_of_{reference}"] = mine["mib"] / row[reference]["mib"]
    return row


def show(num_text: int, row: dict[str, dict[str, float]]) -> None:
    """A block of lines for one length."""
    print(f"T={num_text:<5d} seconds     MiB   faster than eager / sdpa   memory of eager / sdpa   x floor")
    for which in (*REFERENCES, *OURS):
        mine = row[which]
        line = f"  {which:6s} {mine['seconds']:7.2f} {mine['mib']:7.0f}"
        if which in OURS:
            line += f" {mine['speedup_over_eager']:11.2f}x / {mine['speedup_over_sdpa']:.2f}x"
            line += f" {mine['memory_of_eager']:14.2f} / {mine['memory_of_sdpa']:.2f} {mine['over_floor']:14.2f}"
        print(line)
    print(f"  floor  {row['floor']['seconds']:7.2f}  ({row['floor']['flops']:.3g} FLOP)", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--lengths", type=int, nargs="+", default=[128, 256])
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--child", choices=[*REFERENCES, *OURS, "floor"], help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    if arguments.child is not None:
        measure = measure_floor if arguments.child == "floor" else partial(measure_step, arguments.child)
        print(json.dumps(measure(arguments.lengths[0], arguments.repeats)))
        return
    rows = {}
    for num_text in arguments.lengths:
        rows[num_text] = compare(num_text, arguments.repeats)
        show(num_text, rows[num_text])
    RESULTS.parent.mkdir(exist_ok=True)
    machine = {"processor": processor(), "torch": torch.__version__, "threads": 1}
    RESULTS.write_text(json.dumps({**machine, "lengths": rows}, indent=1) + "\n")


if __name__ == "__main__":
    main()

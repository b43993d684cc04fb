"""Time and peak memory of a Quiet-STaR training step: ThoughtModel against the growing-mask reference, and its floor.

    python benchmarks/thought_step.py [--cases small-128 small-256 small-512 large-128] [--repeats 3]

A step is sampling, forward and backward in fp32 on one thread, with P=2 thoughts of 9 sampled tokens, START and END,
and 4 true tokens; that both compute the same loss for the same thoughts is asserted first. The reference has
transformers' eager attention, which is the plain implementation, or fused SDPA. "light" is ours with activation
checkpointing in the trunk, "compiled" ours with its layers compiled. Every variant has its own process. Time is the
smallest CPU time of the repeats, which a busy machine disturbs least; a step and its floor are measured in turn in one
process. Memory is the growth of the largest resident set (ru_maxrss) over the resident set before the first step, in a
process whose malloc maps every tensor of 64 KiB by itself, so that the resident set is the tensors alive and not the
heap's holes.

The floor is the time of the step's useful matrix products (linear layers; logits; attention to the text, without masked
pairs, and to the thread's own tokens; each forward, and twice backward) as plain products of the sizes that occur.
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
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from growing_mask import reference_step
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM

from retrace.core.provenance import processor
from retrace.papers.quietstar.attention import compile_layers
from retrace.papers.quietstar.config import MixingHead, ThoughtConfig
from retrace.papers.quietstar.model import ThoughtModel

HEADS, KV_HEADS, VOCAB = 8, 4, 4096
SAMPLED, TRUE, THOUGHTS = 9, 4, 2
REFERENCES = ("eager", "sdpa")
OURS = ("ours", "light", "compiled")
RESULTS = Path(__file__).parent / "results" / "thought_step.json"


@dataclass(frozen=True)
class Case:
    """Sizes of the trunk and of the batch."""

    hidden: int
    layers: int
    mlp: int
    batch: int
    num_text: int


CASES = {
    "small-128": Case(256, 4, 688, batch=4, num_text=128),
    "small-256": Case(256, 4, 688, batch=4, num_text=256),
    "small-512": Case(256, 4, 688, batch=1, num_text=512),  # eager attention takes 40 GiB for a batch of 4
    "large-128": Case(512, 8, 1376, batch=2, num_text=128),
}


def build(case: Case = CASES["small-128"]) -> ThoughtModel:
    torch.manual_seed(0)
    trunk = LlamaConfig(
        vocab_size=VOCAB,
        hidden_size=case.hidden,
        intermediate_size=case.mlp,
        num_hidden_layers=case.layers,
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


def tokens(case: Case, num_text: int | None = None) -> Tensor:
    shape = (case.batch, num_text or case.num_text)
    return torch.randint(1, VOCAB, shape, generator=torch.Generator().manual_seed(1))


def assert_same_loss(model: ThoughtModel, case: Case) -> None:
    ids_BT = tokens(case, 48)
    with torch.no_grad():
        thoughts_BPNM = model.sample(ids_BT, None, generator=torch.Generator().manual_seed(2))
        ours = model.loss(ids_BT, None, thoughts_BPNM).loss
        theirs = reference_step(model, ids_BT, thoughts_BPTM=thoughts_BPNM).loss
    assert abs(ours - theirs) < 1e-5, (ours, theirs)


def measure(which: str, case: Case, repeats: int) -> dict[str, float]:
    """CPU seconds and peak bytes of one step, in this process; for ours also the floor, measured in turn with it."""
    model, ids_BT, generator = build(case), tokens(case), torch.Generator().manual_seed(2)
    assert_same_loss(model, case)
    if which == "light":
        model.trunk.activation_checkpointing_enable()
    if which == "compiled":
        compile_layers(model.trunk)
    before, times, floors, peak = _resident_bytes(), [], [], 0.0
    for repeat in range(repeats + (which == "compiled")):
        model.zero_grad()
        start = time.process_time()
        if which in REFERENCES:
            loss = reference_step(model, ids_BT, generator=generator, attention=which).loss
        else:
            loss = model(ids_BT, generator=generator).loss
        loss.backward()
        times.append(time.process_time() - start)
        del loss
        if repeat == 0:
            peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 - before
        if which in OURS and repeats > 1:
            floors.append(floor(case))
    found = {"seconds": min(times), "bytes": peak}
    return {**found, "floor": min(seconds for seconds, _ in floors), "flops": floors[0][1]} if floors else found


def _resident_bytes() -> int:
    return int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize()


def floor(case: Case) -> tuple[float, float]:
    """CPU seconds and FLOPs of the useful matrix products of a step."""
    rows, threads = case.batch * case.num_text, case.batch * case.num_text * THOUGHTS
    passes = [(rows, 1, 0)] + [(rows, 1, 1)] + [(threads, 1, own) for own in range(2, SAMPLED + 1)]
    passes += [(threads, 2 + TRUE - 1, 1 + SAMPLED + 1 + TRUE - 1)]  # rows, tokens of a thread, own keys seen
    seconds = flops = 0.0

    def add(count: float, shape: tuple[int, ...], inner: int, outer: int, *, backward: bool = True) -> None:
        """`count` products (..., rows, inner) @ (inner, outer), and the two that their gradients take."""
        nonlocal seconds, flops
        x, w, y = torch.randn(*shape, inner), torch.randn(*shape[:-1], outer, inner), torch.randn(*shape, outer)
        products: list[Callable[[], Tensor]] = [lambda: x @ w.mT]
        products += [lambda: y @ w, lambda: y.mT @ x] if backward else []
        seconds += count * sum(_fastest(product) for product in products)
        flops += count * len(products) * 2.0 * x.numel() * outer

    head_size, groups = case.hidden // HEADS, HEADS // KV_HEADS
    kv = KV_HEADS * head_size
    linears = [(case.hidden, case.hidden)] * 2 + [(case.hidden, kv)] * 2
    linears += [(case.hidden, case.mlp)] * 2 + [(case.mlp, case.hidden)]
    for num_rows in sorted({num_threads * num_new for num_threads, num_new, _ in passes}):
        times = sum(num_threads * num_new == num_rows for num_threads, num_new, _ in passes)
        for inner, outer in sorted(set(linears)):
            add(case.layers * times * linears.count((inner, outer)), (num_rows,), inner, outer)
    chunk = 512  # rows of logits at a time
    scored = rows + threads * TRUE + SAMPLED * threads / 2  # half of the thoughts have an advantage
    add(scored / chunk, (chunk,), case.hidden, VOCAB)
    add((rows + (SAMPLED - 1) * threads) / chunk, (chunk,), case.hidden, VOCAB, backward=False)
    for num_threads, num_new, num_own in passes:  # two products forward, four backward
        per_head = num_threads // case.batch * num_new * groups
        count = 2 * case.layers * KV_HEADS * case.batch
        add(count, (per_head,), head_size, case.num_text // 2)  # causality leaves half of the text
        if num_own:
            add(2 * case.layers, (num_threads * KV_HEADS, num_new * groups), head_size, num_own)
    return seconds, flops


def _fastest(product: Callable[[], Tensor]) -> float:
    times = []
    for _ in range(4):
        start = time.process_time()
        product()
        times.append(time.process_time() - start)
    return min(times)


def in_own_process(which: str, name: str, repeats: int, **environment: str) -> dict[str, float]:
    command = [sys.executable, __file__, "--child", which, "--cases", name, "--repeats", str(repeats)]
    done = subprocess.run(command, check=True, capture_output=True, text=True, env={**os.environ, **environment})
    found: dict[str, float] = json.loads(done.stdout.splitlines()[-1])
    return found


def compare(name: str, repeats: int) -> dict[str, dict[str, float]]:
    """Each variant's seconds and MiB, and what these are of the references' and of the floor's."""
    row: dict[str, dict[str, float]] = {}
    for which in (*REFERENCES, *OURS):
        row[which] = in_own_process(which, name, repeats if which in OURS else max(1, repeats - 1))
        memory = in_own_process(which, name, 1, MALLOC_MMAP_THRESHOLD_="65536") if which != "compiled" else None
        row[which]["mib"] = memory["bytes"] / 2**20 if memory else float("nan")
        del row[which]["bytes"]
    for which in OURS:
        mine = row[which]
        mine["over_floor"] = mine["seconds"] / mine["floor"]
        for reference in REFERENCES:
            mine[f"speedup_over_{reference}"] = row[reference]["seconds"] / mine["seconds"]
            mine[f"memory_of_{reference}"] = mine["mib"] / row[reference]["mib"]
    return row


def show(name: str, row: dict[str, dict[str, float]]) -> None:
    """A block of lines for one case."""
    print(f"{name:10s} seconds     MiB   faster than eager / sdpa   memory of eager / sdpa   x floor")
    for which in (*REFERENCES, *OURS):
        mine = row[which]
        line = f"  {which:8s} {mine['seconds']:7.2f} {mine['mib']:7.0f}"
        if which in OURS:
            line += f" {mine['speedup_over_eager']:11.2f}x / {mine['speedup_over_sdpa']:.2f}x"
            line += f" {mine['memory_of_eager']:14.2f} / {mine['memory_of_sdpa']:.2f} {mine['over_floor']:14.2f}"
        print(line)
    print(f"  floor    {row['ours']['floor']:7.2f}  ({row['ours']['flops']:.3g} FLOP)", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--cases", nargs="+", choices=CASES, default=list(CASES))
    parser.add_argument("--repeats", type=int, default=4)
    parser.add_argument("--child", choices=[*REFERENCES, *OURS], help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    if arguments.child is not None:
        print(json.dumps(measure(arguments.child, CASES[arguments.cases[0]], arguments.repeats)))
        return
    machine = {"processor": processor(), "torch": torch.__version__, "threads": 1}
    kept = json.loads(RESULTS.read_text()) if RESULTS.exists() else {}
    rows = kept["cases"] if machine.items() <= kept.items() else {}  # of other cases, measured on the same machine
    for name in arguments.cases:
        load = os.getloadavg()[0]
        rows[name] = {"case": asdict(CASES[name]), "load_before": load, **compare(name, arguments.repeats)}
        show(name, rows[name])
        RESULTS.write_text(json.dumps({**machine, "cases": rows}, indent=1) + "\n")


if __name__ == "__main__":
    main()

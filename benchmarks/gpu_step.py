"""A Quiet-STaR training step on a GPU: time, memory, and the share of the GPU's peak that useful FLOPs reach (MFU).

    python benchmarks/gpu_step.py --peak 989e12          # an H100 or H200, bf16 without sparsity
    python benchmarks/gpu_step.py --device cpu --hidden 64 --layers 2 --vocab 512 --batch 2 --num-text 32    # dry run

Weights, gradients and moments are in bf16 (1.1 billion parameters by default: hidden 2048, 16 layers), windows of 256
tokens, 8 at a time, P=2 thoughts of 9 sampled tokens, START and END, 4 true tokens. A step is sampling, forward,
backward and AdamW. Useful FLOPs are those of `retrace plan`: the text once for all thoughts, each thread token forward
and backward, sampling forward, each logit that the loss needs once; nothing that is computed again. Variants: as it is,
with compiled layers, and either with activation checkpointing. One that does not fit says so.
"""

from __future__ import annotations

import argparse
import json
import time
from pathlib import Path

import torch
from transformers import LlamaConfig, LlamaForCausalLM

from retrace.core.cost import DecoderShape
from retrace.papers.quietstar.attention import compile_layers
from retrace.papers.quietstar.config import MixingHead, ThoughtConfig
from retrace.papers.quietstar.cost import step_flops
from retrace.papers.quietstar.model import ThoughtModel

THOUGHTS = ThoughtConfig(
    num_sampled=9, num_true=4, num_thoughts=2, policy_weight=1.0, mixing_head=MixingHead(zero_init=False)
)
VARIANTS = ("plain", "compiled", "light", "light and compiled")  # light: with activation checkpointing
RESULTS = Path(__file__).parent / "results" / "gpu_step.json"


def shape(given: argparse.Namespace) -> DecoderShape:
    heads = max(1, given.hidden // 128)
    mlp = 8 * given.hidden // 3 // 64 * 64
    return DecoderShape(given.hidden, given.layers, heads, heads, mlp, given.vocab)


def build(sizes: DecoderShape, device: str) -> ThoughtModel:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=sizes.vocab_size,
        hidden_size=sizes.hidden_size,
        intermediate_size=sizes.intermediate_size,
        num_hidden_layers=sizes.num_layers,
        num_attention_heads=sizes.num_heads,
        num_key_value_heads=sizes.num_kv_heads,
    )
    trunk = LlamaForCausalLM(config).to(device, torch.bfloat16)
    return ThoughtModel(trunk, THOUGHTS, start_init_id=3, end_init_id=4, hidden_token_ids=[0]).train()


def measure(variant: str, given: argparse.Namespace) -> dict[str, float]:
    """Seconds of a step (the median of a few) and peak bytes."""
    model, device = build(shape(given), given.device), given.device
    if "light" in variant:
        model.trunk.activation_checkpointing_enable()
    if "compiled" in variant:
        compile_layers(model.trunk)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-6, fused=True)
    ids_BT = torch.randint(1, given.vocab, (given.batch, given.num_text), device=device)
    noise, times = torch.Generator(device=device).manual_seed(0), []
    for _ in range(2 + given.repeats):
        wait(device)
        start = time.perf_counter()
        model(ids_BT, generator=noise).loss.backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        wait(device)
        times.append(time.perf_counter() - start)
    peak = torch.cuda.max_memory_allocated() if device == "cuda" else float("nan")
    return {"seconds": sorted(times[2:])[given.repeats // 2], "bytes": peak}


def wait(device: str) -> None:
    if device == "cuda":
        torch.cuda.synchronize()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--device", default="cuda", choices=["cuda", "cpu"])
    parser.add_argument("--peak", type=float, help="FLOP/s of the device in bf16; without it no MFU is stated")
    for name, default in (("hidden", 2048), ("layers", 16), ("vocab", 32000), ("batch", 8), ("num-text", 256)):
        parser.add_argument(f"--{name}", type=int, default=default)
    parser.add_argument("--repeats", type=int, default=5)
    given = parser.parse_args()
    if given.device == "cuda" and not torch.cuda.is_available():
        parser.error("no GPU here: give --device cpu and small sizes for a dry run")
    flops = given.batch * given.num_text * step_flops(shape(given), THOUGHTS, given.num_text)
    rows: dict[str, object] = {"sizes": vars(given), "flops": flops, "torch": torch.__version__}
    rows["device"] = torch.cuda.get_device_name() if given.device == "cuda" else "cpu"
    for variant in VARIANTS:
        try:
            found = measure(variant, given)
        except torch.OutOfMemoryError:
            print(f"{variant:20s} does not fit into the memory of this GPU", flush=True)
            continue
        finally:
            torch.compiler.reset()
            if given.device == "cuda":
                torch.cuda.empty_cache()
                torch.cuda.reset_peak_memory_stats()
        rate = flops / found["seconds"]
        share = f", {rate / given.peak:.1%} of the peak" if given.peak else ""
        speed = f"{found['seconds']:.3f} s, {rate / 1e12:.3g} TFLOP/s{share}"
        print(f"{variant:20s} {speed}, {found['bytes'] / 2**30:.1f} GiB", flush=True)
        rows[variant] = {**found, "mfu": rate / given.peak if given.peak else None}
    if given.device == "cuda":
        RESULTS.write_text(json.dumps(rows, indent=1) + "\n")


if __name__ == "__main__":
    main()

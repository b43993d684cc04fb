"""How many bytes a training step of a run really takes, and how many the plan counts; a JSON line for each run.

    MALLOC_MMAP_THRESHOLD_=65536 python peak_memory.py train train.optim.precision=pure_bf16 -- pretrain ...

Measured is the growth of the largest resident set during `fit`, plus the weights that were there before, after one step
of the same has loaded what libraries load, and made the scratch space that they keep. With the variable, malloc maps
every larger tensor by itself, so that the resident set is the tensors alive and not the heap's holes.
"""

from __future__ import annotations

import gc
import json
import sys
import tempfile
import threading
from pathlib import Path

import torch

from retrace.core.context import Context
from retrace.core.plan import RunSpec, plan
from retrace.core.precision import KEPT, cast_parameters
from retrace.core.store import RunDir
from retrace.core.tracking import Tracker
from retrace.core.train import Group, fit
from retrace.papers.quietstar import cost
from retrace.papers.quietstar.lora import add_adapters
from retrace.papers.quietstar.tokenizer import build_tokenizer
from retrace.papers.quietstar.trunks import build_thinker, build_trunk


def resident(key: str) -> int:
    """Bytes of a line of /proc/self/status: VmRSS now, VmHWM at most."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(key))


def measure(spec: RunSpec) -> float:
    """Peak bytes of the tensors of a few steps."""
    config, tokenizer = spec.config, build_tokenizer()
    model = trunk = build_trunk(config.model, tokenizer, seed=0)
    optim = config.optim if spec.program == "pretrain" else config.train.optim
    if spec.program == "train":
        model = build_thinker(trunk, config.thoughts, tokenizer, seed=0)
        if config.train.lora is not None:
            add_adapters(trunk, config.train.lora, seed=0)

    def loss(wrapped: torch.nn.Module, batch: dict[str, torch.Tensor], noise: torch.Generator) -> tuple:
        if spec.program == "pretrain":
            return wrapped(input_ids=batch["ids"], labels=batch["ids"], use_cache=False).loss, {}
        output = wrapped(batch["ids"], None, generator=noise)
        return output.loss, output.metrics

    def rows(chosen: range) -> dict[str, torch.Tensor]:
        return {"ids": torch.randint(6, 60, (len(chosen), config.corpus.seq_len))}

    cast_parameters(model, KEPT[optim.precision])
    weights = sum(p.numel() * p.element_size() for p in model.parameters())
    groups = [Group("all", [p for p in model.parameters() if p.requires_grad], 1e-3, 0.0)]
    run = RunDir(Path(tempfile.mkdtemp()))
    tracker, stop = Tracker(run, spec), threading.Event()
    ctx = Context(run=run, seed=0, parents={}, hardware=spec.hardware, tracker=tracker, stop=stop)
    gc.collect()
    Path("/proc/self/clear_refs").write_text("5")  # VmHWM begins anew
    before = resident("VmRSS")
    fit(model, ctx=ctx, optim=optim, groups=groups, rows=rows, loss=loss, cost=getattr(cost, spec.program)(config))
    return resident("VmHWM") - before + weights


def find(program: str, overrides: list[str]) -> RunSpec:
    specs = plan(["quietstar/main"], ["scale=smoke", "tracking.wandb=off", "seed=0", *overrides])
    return next(spec for spec in specs if spec.program == program)


def main() -> None:
    torch.set_num_threads(1)
    for words in " ".join(sys.argv[1:]).split(" -- "):
        program, *overrides = words.split(" ")
        measure(find(program, [*overrides, "base.optim.steps=1", "train.optim.steps=1"]))
        spec = find(program, overrides)
        counted = getattr(cost, program)(spec.config)
        found = {"state": counted.state_bytes(spec.hardware), "activations": counted.activation_bytes(spec.hardware)}
        print(json.dumps({"measured": measure(spec), **found}), flush=True)


if __name__ == "__main__":
    main()

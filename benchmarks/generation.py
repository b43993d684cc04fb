"""Tokens a second from a model that thinks before every token: cached keys and values against recomputing the text.

    python benchmarks/generation.py [--lengths 64 256 1024]

The model is that of thought_step.py (hidden 256, 4 layers, thoughts of 9 sampled tokens) on one thread, fp32, greedy.
Without a cache there are three ways to write the token behind a text, from the whole text: as the published code does,
by a growing mask with a thought at every position ("published"); by our threads at every position ("every"); by one
thread at the last position ("last"). That all write the same text is asserted first. Times are the smallest of a few,
for one token behind a text of each length. The floor of the cached way is the time to read its weights once for each of
the passes that a token takes: through so small a trunk, a single token is little work.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch
from growing_mask import reference_next_token
from thought_step import SAMPLED, VOCAB, build
from torch import Tensor

from retrace.core.provenance import processor
from retrace.papers.quietstar.generation import generate
from retrace.papers.quietstar.model import ThoughtModel

PROMPT, NUM_NEW, REPEATS = 16, 16, 3
RESULTS = Path(__file__).parent / "results" / "generation.json"


def prompt(num_text: int, batch: int) -> Tensor:
    return torch.randint(1, VOCAB, (batch, num_text), generator=torch.Generator().manual_seed(1))


def write(model: ThoughtModel, ids_BT: Tensor, num_new: int) -> Tensor:
    return generate(model, ids_BT, max_new_tokens=num_new, eos_token_id=None)


def last(model: ThoughtModel, ids_BT: Tensor) -> Tensor:
    """The likeliest next token (B,), by one thought at the end of the whole text."""
    return write(model, ids_BT, 1)[:, 0]


@torch.no_grad()
def every(model: ThoughtModel, ids_BT: Tensor) -> Tensor:
    """The same, with a thought at every position, none of which but the last is looked at."""
    positions_BT = torch.arange(ids_BT.shape[1]).expand_as(ids_BT)
    found = model.predict(ids_BT, None, positions_BT, generator=None).mixed_BNV[:, -1]
    return found.index_fill(-1, model.blocked, -torch.inf).argmax(-1)


WAYS: dict[str, Callable[[ThoughtModel, Tensor], Tensor]] = {
    "published": reference_next_token,
    "every": every,
    "last": last,
}


def seconds(call: Callable[[], object], repeats: int = REPEATS) -> float:
    """The smallest CPU time of a few calls."""
    times = []
    for _ in range(repeats):
        start = time.process_time()
        call()
        times.append(time.process_time() - start)
    return min(times)


def assert_same_text(model: ThoughtModel) -> None:
    ids_BT = prompt(PROMPT, 1)
    cached = write(model, ids_BT, 4)
    for way in WAYS.values():
        text_BT = ids_BT
        for _ in range(4):
            text_BT = torch.cat([text_BT, way(model, text_BT)[:, None]], 1)
        assert torch.equal(text_BT[:, PROMPT:], cached)


def measure(model: ThoughtModel, batch: int, length: int) -> dict[str, float]:
    """Seconds for one more token of every sequence behind texts of `length` tokens, in each way."""
    ids_BT = prompt(length, batch)
    reading = seconds(partial(write, model, ids_BT, 1))
    found = {"cached": (seconds(partial(write, model, ids_BT, 1 + NUM_NEW)) - reading) / NUM_NEW}
    return found | {name: seconds(partial(way, model, ids_BT)) for name, way in WAYS.items()}


def floor(model: ThoughtModel) -> float:
    """Seconds to read the weights that one token needs: the trunk for each pass, the projection for each prediction."""
    trunk = (
        sum(p.numel() for p in model.trunk.base_model.parameters()) - model.trunk.get_input_embeddings().weight.numel()
    )
    head = model.head.weight_VC.numel()
    buffers = torch.ones(trunk), torch.ones(head)
    of_trunk, of_head = (seconds(buffer.sum) for buffer in buffers)
    return (SAMPLED + 1) * of_trunk + (SAMPLED + 2) * of_head


def scratch_bytes(model: ThoughtModel, batch: int) -> int:
    """Keys and values of one thought of every sequence, whatever the length of the text."""
    config = model.trunk.config
    per_token = 2 * config.num_hidden_layers * config.num_key_value_heads * config.head_dim
    return 4 * batch * model.num_thought_positions * per_token


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--lengths", type=int, nargs="+", default=[64, 256, 1024])
    lengths = parser.parse_args().lengths
    torch.set_num_threads(1)
    model = build().eval()
    assert_same_text(model)
    rows: dict[str, object] = {"processor": processor(), "torch": torch.__version__, "threads": 1}
    for batch in (1, 8):
        for length in lengths:
            found = {**measure(model, batch, length), "floor": floor(model)}
            rate, over = batch / found["cached"], found["cached"] / found["floor"]
            ratios = ", ".join(f"{name} {found[name] / found['cached']:.1f}" for name in WAYS)
            print(f"batch {batch}, {length:4d} tokens: {rate:6.1f} tokens/s, {over:.1f} x floor; faster than {ratios}")
            rows[f"batch {batch}, {length} tokens"] = {**found, "scratch_bytes": scratch_bytes(model, batch)}
        print(f"  scratch keys and values: {scratch_bytes(model, batch) / 2**10:.0f} KiB at any length", flush=True)
    RESULTS.parent.mkdir(exist_ok=True)
    RESULTS.write_text(json.dumps(rows, indent=1) + "\n")


if __name__ == "__main__":
    main()

"""From the official code's checkpoints (`quietstar-8-ahead`) to a folder that `from_pretrained` reads.

    python -m retrace.papers.quietstar.convert PUBLISHED NEW --num-sampled 5

Theirs holds a Mistral and, in the same files, `start_embedding` and `end_embedding` (2, C), of which row 0 is the mean
over 100 (row 1, a log deviation, is never used), and the head as `talk_head.0.{0,2,4}`. Its vocabulary ends in END and
START, in this order, whose rows were never trained. Shards are converted one by one, bit for bit but for that 100.
"""

from __future__ import annotations

import argparse
import json
import shutil
import sys
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from retrace.core.files import write_json
from retrace.papers.quietstar.config import MixingHead, ThoughtConfig
from retrace.papers.quietstar.pretrained import PUBLISHED, write_thoughts

EMBEDDING_SCALE = 100.0  # the effective embedding is this much the stored one
INDEX = "model.safetensors.index.json"
NAMES = {
    "talk_head.0.0.weight": "mixing_head.linears.0.weight",
    "talk_head.0.0.bias": "mixing_head.linears.0.bias",
    "talk_head.0.2.weight": "mixing_head.linears.1.weight",
    "talk_head.0.2.bias": "mixing_head.linears.1.bias",
    "talk_head.0.4.weight": "mixing_head.linears.2.weight",
}
EMBEDDINGS = ("start_embedding", "end_embedding")
ARCHITECTURE = {"model_type": "mistral", "architectures": ["MistralForCausalLM"]}


def convert(source: Path, target: Path, *, num_sampled: int, num_true: int, num_thoughts: int) -> None:
    """Write `target`, a new folder. Raises ValueError where `source` is not laid out as the official code's."""
    if target.exists():
        raise ValueError(f"{target}: exists already: name a new folder")
    if not (source / "config.json").is_file():
        raise ValueError(f"{source}: not a model: expected a folder with config.json and *.safetensors")
    shards = sorted(source.glob("*.safetensors"))
    if not shards:
        raise ValueError(
            f"{source}: no *.safetensors: other formats can hold code and are not read; save it as such first"
        )
    temporary = target.with_name(f".{target.name}.tmp")
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir(parents=True)
    own: dict[str, Tensor] = {}
    places: dict[str, str] = {}
    for shard in shards:
        tensors = load_file(shard)
        own |= {name: tensors.pop(name) for name in [*EMBEDDINGS, *NAMES] if name in tensors}
        places |= dict.fromkeys(tensors, shard.name)
        save_file(tensors, temporary / shard.name, metadata={"format": "pt"})
        print(f"{shard.name}: {len(tensors)} tensors", file=sys.stderr)
    missing = sorted({*EMBEDDINGS, *NAMES} - own.keys())
    if missing:
        raise ValueError(f"{source}: {missing[0]} and {len(missing) - 1} more are missing: expected {PUBLISHED}, ...")
    if len(shards) > 1:
        write_json(temporary / INDEX, {"metadata": {}, "weight_map": places})
    settings = {**json.loads((source / "config.json").read_text()), **ARCHITECTURE}
    settings.pop("auto_map", None)
    write_json(temporary / "config.json", settings)
    for file in source.iterdir():
        if file.name.startswith(("tokenizer", "special_tokens", "added_tokens", "generation_config")):
            shutil.copyfile(file, temporary / file.name)
    thoughts = {name: (own[name][0].float() * EMBEDDING_SCALE).to(own[name].dtype) for name in EMBEDDINGS}
    thoughts |= {new: own[old] for old, new in NAMES.items()}
    config = ThoughtConfig(
        num_sampled=num_sampled,
        num_true=num_true,
        num_thoughts=num_thoughts,
        mixing_head=MixingHead(num_layers=3),
        policy_weight=1e6,
    )
    vocab_size = int(settings["vocab_size"])
    write_thoughts(temporary, config, thoughts, hidden_tokens=[vocab_size - 2, vocab_size - 1])
    temporary.replace(target)


def main() -> int:
    parser = argparse.ArgumentParser(description="Convert a checkpoint of the official Quiet-STaR code.")
    parser.add_argument("source", type=Path, help="folder with config.json and *.safetensors")
    parser.add_argument("target", type=Path, help="new folder")
    parser.add_argument("--num-sampled", type=int, default=5, help="the official n_ahead less 3 (default: %(default)s)")
    parser.add_argument("--num-true", type=int, default=4, help="the official n_ahead_talk (default: %(default)s)")
    parser.add_argument("--num-thoughts", type=int, default=2, help="the official n_passes (default: %(default)s)")
    given = parser.parse_args()
    try:
        with torch.no_grad():
            convert(
                given.source,
                given.target,
                num_sampled=given.num_sampled,
                num_true=given.num_true,
                num_thoughts=given.num_thoughts,
            )
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())

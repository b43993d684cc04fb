"""A thinking model as a folder: transformers' own files for the trunk and tokenizer, and two beside them for thoughts.

    config.json, model.safetensors, tokenizer.json, ...    the trunk, as transformers saves and loads it
    thoughts.json                                          `ThoughtConfig`, the ids that no thought may hold, the prefix
    thoughts.safetensors                                   START, END and the mixing head, bit for bit

Without the last two it is a plain language model, which transformers loads as one.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from huggingface_hub import snapshot_download
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoModelForCausalLM, PreTrainedTokenizerBase

from retrace.core.checkpoint import model_tensors
from retrace.core.config import data_root, validate
from retrace.core.files import read_json, write_json
from retrace.core.weights import load_pretrained
from retrace.papers.quietstar.config import ThoughtConfig
from retrace.papers.quietstar.model import ThoughtModel
from retrace.papers.quietstar.trunks import load_tokenizer

SETTINGS, TENSORS = "thoughts.json", "thoughts.safetensors"
FORMAT = 2
PUBLISHED = "talk_head.0.0.weight"  # a tensor that only the official code's checkpoints have
TRUNK = "trunk."


def save_pretrained(
    model: ThoughtModel,
    folder: Path,
    tokenizer: PreTrainedTokenizerBase,
    *,
    tensors: Mapping[str, Tensor] | None = None,
) -> None:
    """Write the folder; `tensors` are the model's by name where they are not in it, as under FSDP."""
    found = dict(model_tensors(model) if tensors is None else tensors)
    trunk = {name.removeprefix(TRUNK): t for name, t in found.items() if name.startswith(TRUNK)}
    model.trunk.save_pretrained(folder, state_dict=trunk)
    tokenizer.save_pretrained(folder)
    own = {name: t for name, t in found.items() if not name.startswith(TRUNK)}
    write_thoughts(folder, model.config, own, hidden_tokens=model.blocked.tolist(), prefix_tokens=model.prefix.tolist())


def write_thoughts(
    folder: Path,
    config: ThoughtConfig,
    tensors: Mapping[str, Tensor],
    *,
    hidden_tokens: Sequence[int],
    prefix_tokens: Sequence[int] = (),
) -> None:
    """The two files that make a folder with a trunk one that thinks."""
    save_file({name: t.detach().contiguous().cpu() for name, t in tensors.items()}, folder / TENSORS)
    ids = {"hidden_tokens": list(hidden_tokens), "prefix_tokens": list(prefix_tokens)}
    write_json(folder / SETTINGS, {"format": FORMAT, "thoughts": config.model_dump(mode="json"), **ids})


def from_pretrained(
    name: str | Path,
    *,
    revision: str = "main",
    dtype: torch.dtype | None = None,
    device: str | torch.device = "cpu",
) -> tuple[ThoughtModel, PreTrainedTokenizerBase]:
    """The model, in eval mode, and its tokenizer, from a folder (also below RETRACE_DATA) or the hub.

    `dtype` None keeps the stored one. Raises ValueError for a folder that holds no thoughts, or only some of them.
    """
    folder = find_folder(name, revision=revision)
    config, hidden, prefix = _settings(folder)
    trunk = load_pretrained(AutoModelForCausalLM, folder, dtype=dtype or "auto", use_safetensors=True)
    with torch.random.fork_rng(devices=[]):
        ids = {"start_init_id": 0, "end_init_id": 0}  # any: the embeddings are filled below
        model = ThoughtModel(trunk, config, **ids, hidden_token_ids=hidden, prefix_ids=prefix)
    _fill(model, folder / TENSORS)
    return model.to(device).eval(), load_tokenizer(str(folder))


def find_folder(name: str | Path, *, revision: str = "main") -> Path:
    """The folder on this machine, fetched from the hub if need be; raises ValueError where there is none."""
    root = data_root()
    for folder in [Path(name)] + ([root / name] if root else []):
        if folder.is_dir():
            return folder
    if isinstance(name, Path) or name.count("/") != 1 or name.startswith((".", "/")):
        raise ValueError(f"{name}: no such folder; expected one with {SETTINGS}, or the name of a model on the hub")
    return Path(snapshot_download(name, revision=revision, allow_patterns=["*.json", "*.safetensors", "tokenizer*"]))


def _settings(folder: Path) -> tuple[ThoughtConfig, list[int], list[int]]:
    file = folder / SETTINGS
    if not file.is_file():
        raise ValueError(f"{folder}: {_why_not(folder)}")
    found = read_json(file) or {}
    if found.get("format") != FORMAT:
        raise ValueError(
            f"{file}: format={found.get('format')}: expected {FORMAT}; it is from another version of Retrace"
        )
    config = validate(ThoughtConfig, found["thoughts"], source=str(file))
    return config, found["hidden_tokens"], found["prefix_tokens"]


def _why_not(folder: Path) -> str:
    """What is there instead of a model that thinks."""
    index = folder / "model.safetensors.index.json"
    if index.is_file() and PUBLISHED in json.loads(index.read_text()).get("weight_map", {}):
        return "laid out as the official code's: convert it with python -m retrace.papers.quietstar.convert FOLDER NEW"
    if (folder / "config.json").is_file():
        return (
            f"a plain language model without the two thought tokens and a mixing head ({SETTINGS} is missing): "
            "train it with thoughts first (model.kind=pretrained), or take the folder `model` of a finished train run"
        )
    return f"not a model: expected config.json, model.safetensors, {SETTINGS} and {TENSORS}"


@torch.no_grad()
def _fill(model: ThoughtModel, file: Path) -> None:
    wanted = {name: t for name, t in model_tensors(model).items() if not name.startswith(TRUNK)}
    found = load_file(file) if file.is_file() else {}
    missing = sorted(wanted.keys() - found.keys())
    if missing:
        raise ValueError(
            f"{file}: {missing[0]} and {len(missing) - 1} more are missing: without its head and thought tokens a "
            "model would answer as if it had never thought; save it with save_pretrained"
        )
    for name, tensor in wanted.items():
        if tensor.shape != found[name].shape:
            raise ValueError(f"{file}: {name} has shape {tuple(found[name].shape)}: expected {tuple(tensor.shape)}")
        tensor.copy_(found[name])

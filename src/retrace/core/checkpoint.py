"""Checkpoints: safetensors and JSON, whole or not at all, verified before they are believed.

    checkpoints/step_00000120/tensors.safetensors    parameters and optimizer moments
                              state.json             step and whatever else the loop keeps
                              manifest.json          size and SHA-256 of the two

A damaged one is skipped for the one before it, and said so. There is no RNG state in it: noise is a function of
(seed, step), see `core.data`.
"""

from __future__ import annotations

import json
import logging
import os
import shutil
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import nn

from retrace.core.data import fingerprint
from retrace.core.store import sync_folder, write_json

log = logging.getLogger("retrace")
KEEP = 2


def model_tensors(model: nn.Module) -> dict[str, torch.Tensor]:
    """Parameters and persistent buffers by name, shared ones once."""
    kept = set(model.state_dict(keep_vars=True))
    buffers = {name: tensor for name, tensor in model.named_buffers() if name in kept}
    return {**dict(model.named_parameters()), **buffers}


def save_model(model: nn.Module, path: Path) -> None:
    """The model's tensors as one safetensors file."""
    save_file({name: tensor.detach().contiguous() for name, tensor in model_tensors(model).items()}, path)


def load_model(model: nn.Module, path: Path) -> None:
    """Fill the model from `save_model`'s file; raises ValueError if it is of another model."""
    _fill(model_tensors(model), load_file(path), path)


@torch.no_grad()
def _fill(targets: dict[str, torch.Tensor], found: dict[str, torch.Tensor], path: Path) -> None:
    wrong = sorted(set(targets) ^ set(found))
    wrong += [name for name in targets if name in found and targets[name].shape != found[name].shape]
    if wrong:
        raise ValueError(f"{path}: a checkpoint of another model, it differs in {wrong[0]} and {len(wrong) - 1} more")
    for name, target in targets.items():
        target.copy_(found[name])


def save(folder: Path, *, step: int, model: nn.Module, optimizer: torch.optim.Optimizer, state: dict[str, Any]) -> None:
    """Write step_<step> under `folder` and drop all but the last `KEEP`."""
    temporary, final = folder / ".tmp", folder / f"step_{step:08d}"
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir(parents=True)
    tensors = {f"model.{name}": t.detach().contiguous() for name, t in model_tensors(model).items()}
    for index, moments in optimizer.state_dict()["state"].items():
        tensors |= {f"optimizer.{index}.{key}": torch.as_tensor(value) for key, value in moments.items()}
    save_file(tensors, temporary / "tensors.safetensors")
    write_json(temporary / "state.json", {**state, "step": step})
    files = [temporary / "tensors.safetensors", temporary / "state.json"]
    for file in files:
        with open(file, "rb") as opened:
            os.fsync(opened.fileno())
    write_json(temporary / "manifest.json", {f.name: [f.stat().st_size, fingerprint(f)] for f in files})
    shutil.rmtree(final, ignore_errors=True)
    os.replace(temporary, final)
    sync_folder(folder)
    for old in sorted(folder.glob("step_*"))[:-KEEP]:
        shutil.rmtree(old)


def restore(folder: Path, *, model: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, Any] | None:
    """Load the newest sound checkpoint into model and optimizer; its state, or None where there is none."""
    for path in sorted(folder.glob("step_*"), reverse=True):
        damage = _damage(path)
        if damage:
            log.warning("checkpoint %s is damaged (%s): going on from the one before it", path.name, damage)
            shutil.rmtree(path)  # else it would count among those that are kept
            continue
        tensors = load_file(path / "tensors.safetensors")
        parts: dict[str, dict[str, torch.Tensor]] = {"model": {}, "optimizer": {}}
        for name, tensor in tensors.items():
            kind, _, rest = name.partition(".")
            parts[kind][rest] = tensor
        _fill(model_tensors(model), parts["model"], path)
        moments: dict[int, dict[str, torch.Tensor]] = {}
        for name, tensor in parts["optimizer"].items():
            index, _, key = name.partition(".")
            moments.setdefault(int(index), {})[key] = tensor
        optimizer.load_state_dict({"state": moments, "param_groups": optimizer.state_dict()["param_groups"]})
        state: dict[str, Any] = json.loads((path / "state.json").read_text())
        return state
    return None


def _damage(path: Path) -> str | None:
    """What is wrong with a checkpoint, or None."""
    try:
        manifest = json.loads((path / "manifest.json").read_text())
        for name, (size, digest) in manifest.items():
            file = path / name
            if file.stat().st_size != size:
                return f"{name} has {file.stat().st_size} bytes, not {size}"
            if fingerprint(file) != digest:
                return f"{name} does not match its checksum"
    except (OSError, ValueError) as error:
        return f"{type(error).__name__}: {error}"
    return None

"""Checkpoints: safetensors and JSON, whole or not at all, verified before they are believed.

    checkpoints/step_00000120/tensors.safetensors    trained parameters and optimizer moments
                              state.json             run, step and whatever else the loop keeps
                              metrics.jsonl          the run's log so far: what happens to it beside them is mended
                              manifest.json          size and SHA-256 of the others

One that is damaged, another run's, or under another step's name is skipped for the one before it, and said so.

There is no RNG state in it: noise is a function of (seed, step), see `core.data`. Nor is there a trace of how many
processes wrote it: tensors stand in it whole, and each process that reads takes its part. Frozen parameters are not in
it: they are as they were built.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from retrace.core import files

KEEP = 2
TENSORS, STATE, LOG = "tensors.safetensors", "state.json", "metrics.jsonl"
STEPS = "step_" + 8 * "[0-9]"


def model_tensors(model: nn.Module) -> dict[str, Tensor]:
    """Parameters and persistent buffers by name, shared ones once."""
    kept = set(model.state_dict(keep_vars=True))
    buffers = {name: tensor for name, tensor in model.named_buffers() if name in kept}
    return {**dict(model.named_parameters()), **buffers}


@torch.no_grad()
def whole(tensors: Mapping[str, Tensor], *, keep: bool) -> dict[str, Tensor]:
    """Sharded tensors as whole ones on the CPU, one gathered at a time; the others as they are, on the CPU.

    All processes must call it together; those that do not `keep` them get an empty dict.
    """
    found: dict[str, Tensor] = {}
    for name, tensor in tensors.items():
        full = tensor.full_tensor() if isinstance(tensor, DTensor) else tensor
        if keep:
            found[name] = full.detach().cpu().contiguous()
    return found


@torch.no_grad()
def _fill(targets: Mapping[str, Tensor], path: Path) -> None:
    """Copy the file's tensors into those of the same names, or into the part of them that is here."""
    with safe_open(path, "pt") as file:
        names = set(file.keys())
        wrong = sorted(set(targets) ^ names)
        wrong += [n for n in targets if n in names and [*targets[n].shape] != file.get_slice(n).get_shape()]
        if wrong:
            raise ValueError(
                f"{path}: a checkpoint of another model, it differs in {wrong[0]} and {len(wrong) - 1} more"
            )
        for name, target in targets.items():
            if isinstance(target, DTensor):
                _fill_part(target, file.get_slice(name))
            else:
                target.copy_(file.get_tensor(name))


def _fill_part(target: DTensor, rows: Any) -> None:
    """This process's rows of a tensor that is split evenly along its first dimension, rounded up, as FSDP2 does."""
    part = target.to_local()
    share = -(-target.shape[0] // target.device_mesh.size())
    start = target.device_mesh.get_local_rank() * share
    if len(part):
        part.copy_(rows[start : start + len(part)])


def trained_tensors(model: nn.Module) -> dict[str, Tensor]:
    """Those of `model_tensors` that training changes."""
    return {name: t for name, t in model_tensors(model).items() if t.requires_grad or not isinstance(t, nn.Parameter)}


def save(
    folder: Path,
    *,
    step: int,
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    state: dict[str, Any],
    write: bool = True,
) -> None:
    """Write step_<step> under `folder`, which is in that of its run, and drop all but the last `KEEP`.

    All processes must call it together, and one of them `write`s.
    """
    tensors = {f"model.{name}": tensor for name, tensor in trained_tensors(model).items()}
    for index, moments in optimizer.state_dict()["state"].items():
        tensors |= {f"optimizer.{index}.{key}": torch.as_tensor(value) for key, value in moments.items()}
    tensors = whole(tensors, keep=write)
    if not write:
        return
    log = folder.parent / LOG
    with files.whole_folder(folder / f"step_{step:08d}", temporary=folder / ".tmp") as temporary:
        save_file(tensors, temporary / TENSORS)
        files.write_json(temporary / STATE, {**state, "step": step, "run": folder.parent.name})
        if log.exists():
            shutil.copyfile(log, temporary / LOG)
    for old in sorted(folder.glob(STEPS))[:-KEEP]:
        files.remove(old)


def newest(folder: Path) -> tuple[int, str]:
    """The step of the newest sound checkpoint, -1 where there is none; and a sentence on the damaged ones, if any.

    Those are removed, or they would count among the ones that are kept: one process's task. Raises OSError where a
    file is there and can't be opened, which damages nothing.
    """
    step, damaged = -1, []
    for path in sorted(folder.glob(STEPS), reverse=True):
        damage = _damage(path)
        if damage is None:
            step = int(path.name.removeprefix("step_"))
            break
        damaged.append(f"{path.name} is damaged ({damage})")
        files.remove(path)
    if not damaged:
        return step, ""
    instead = "none is left, so this run began anew" if step < 0 else f"this run went on from step {step}"
    return step, f"checkpoint {', '.join(damaged)}: {instead}"


def restore(folder: Path, *, step: int, model: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, Any]:
    """Load the checkpoint of a step into model and optimizer; its state."""
    path = folder / f"step_{step:08d}"
    moments = _moments(optimizer, path / TENSORS)
    targets = {f"model.{name}": tensor for name, tensor in trained_tensors(model).items()}
    for index, tensors in moments.items():
        targets |= {f"optimizer.{index}.{key}": tensor for key, tensor in tensors.items()}
    _fill(targets, path / TENSORS)
    optimizer.load_state_dict({"state": moments, "param_groups": optimizer.state_dict()["param_groups"]})
    state: dict[str, Any] = json.loads((path / STATE).read_text())
    return state


def _moments(optimizer: torch.optim.Optimizer, path: Path) -> dict[int, dict[str, Tensor]]:
    """Room for the moments in the file, sharded like the parameters that they belong to."""
    parameters = [p.detach() for group in optimizer.param_groups for p in group["params"]]
    found: dict[int, dict[str, Tensor]] = {}
    with safe_open(path, "pt") as file:
        for name in file.keys():  # noqa: SIM118  # it is no dict
            if name.startswith("optimizer."):
                _, index, key = name.split(".")
                for parameter in parameters[int(index) :][:1]:  # of another model, it may not be there
                    room = torch.zeros(()) if key == "step" else torch.zeros_like(parameter)
                    found.setdefault(int(index), {})[key] = room
    return found


def _damage(path: Path) -> str | None:
    """What is wrong with a checkpoint, or None."""
    found = files.damage(path, needed=(TENSORS, STATE))
    if found is not None:
        return found
    try:
        state = json.loads((path / STATE).read_bytes())
    except ValueError:
        return f"{STATE} is not JSON"
    if state["run"] != path.parents[1].name:
        return f"it is of {state['run']}"
    if path.name != f"step_{state['step']:08d}":
        return f"it is of step {state['step']}"
    return None

"""Weights on disk: a plain state dict in safetensors, shared tensors once, bit for bit (specification 8, test 7)."""

from __future__ import annotations

from pathlib import Path

from safetensors.torch import load_file, save_file
from torch import nn


def save_weights(module: nn.Module, path: Path) -> None:
    """Write the module's weights to a safetensors file, each shared tensor once."""
    tied = _tied_names(module)
    tensors = {name: tensor.contiguous() for name, tensor in module.state_dict().items() if name not in tied}
    save_file(tensors, path)


def load_weights(module: nn.Module, path: Path, *, prefix: str = "") -> None:
    """Read what `save_weights` wrote, bit for bit; `prefix="trunk."` reads the trunk of a saved ThoughtModel.

    Raises ValueError when the file and the module do not have the same weights.
    """
    tensors = {name.removeprefix(prefix): t for name, t in load_file(path).items() if name.startswith(prefix)}
    expected = set(module.state_dict()) - _tied_names(module)
    if set(tensors) != expected:
        missing, unknown = sorted(expected - set(tensors)), sorted(set(tensors) - expected)
        raise ValueError(
            f"{path} does not fit the model: missing {missing[:3]}, unexpected {unknown[:3]} "
            f"({len(missing)} and {len(unknown)} in all): build the model from the config it was saved with"
        )
    module.load_state_dict(tensors, strict=False)


def _tied_names(module: nn.Module) -> set[str]:
    """Names in the state dict whose tensor stands there already under an earlier name."""
    seen: set[tuple[int, tuple[int, ...]]] = set()
    tied = set()
    for name, tensor in module.state_dict().items():
        key = (tensor.data_ptr(), tuple(tensor.shape))
        if key in seen:
            tied.add(name)
        seen.add(key)
    return tied

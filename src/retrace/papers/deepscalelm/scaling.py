"""lambda and beta in a transformers model, by hooks: its modelling file and the names of its weights stay as they are.

In Pre-LN a layer adds f(norm(x)) to x. What f hands over becomes beta f - (1 - lambda) x, where x is what the norm
read, so the sum is lambda x + beta f. In Post-LN the module that sums is handed lambda x, and the branch's matrix gives
beta f. Hooks and not parametrizations, because those rename weights; and not scaled weights alone, because AdamW's
steps are as large for a small matrix as for a large one, so it would train otherwise, and because no scaling of weights
shrinks the skip. Where training is over they can go: `fold` moves both into the weights, for a norm forgets the scale
of what it reads.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor, nn

from retrace.papers.deepscalelm.layouts import Trunk, is_norm, module, trunk_of

KEY = "deepscalelm"  # in the config of a model, so that save_pretrained writes it and from_pretrained reads it


@dataclass(frozen=True)
class Scales:
    """Of every branch and skip of a model, and of the states in front of its output matrix."""

    skip: float
    scale: float
    logit: float


class _Branch:
    """The hooks of one branch of Pre-LN. A class, so that a copy of the model has its own."""

    def __init__(self, skip: float, scale: float) -> None:
        self.skip, self.scale = skip, scale
        self.stream: Tensor | None = None

    def read(self, _: nn.Module, given: tuple[Any, ...]) -> None:
        self.stream = given[0]

    def write(self, _: nn.Module, __: tuple[Any, ...], made: Any) -> Any:
        branch = made[0] if isinstance(made, tuple) else made
        scaled = branch * self.scale
        if self.skip != 1:
            assert self.stream is not None
            scaled = torch.add(scaled, self.stream, alpha=self.skip - 1)
        self.stream = None
        return (scaled, *made[1:]) if isinstance(made, tuple) else scaled


class _Times:
    """Hooks that multiply what a module is given at a place, or what it makes."""

    def __init__(self, factor: float, *, place: int = 0) -> None:
        self.factor, self.place = factor, place

    def given(self, _: nn.Module, given: tuple[Any, ...]) -> tuple[Any, ...]:
        return (*given[: self.place], given[self.place] * self.factor, *given[self.place + 1 :])

    def made(self, _: nn.Module, __: tuple[Any, ...], made: Tensor) -> Tensor:
        return made * self.factor


def parallel(trunk: Trunk) -> bool:
    """Both branches of a layer read the same point of the stream (GPT-NeoX)."""
    return bool(getattr(trunk.layers[0], "use_parallel_residual", False))


def recognise(model: nn.Module) -> Trunk:
    """The trunk of a model that can be scaled; raises ValueError that says why another can't."""
    name = getattr(getattr(model, "config", None), "model_type", type(model).__name__)
    trunk = trunk_of(model)
    if trunk is None:
        why = "it has no single stack of layers with two branches, each read through a norm or summed in front of one"
        raise ValueError(f"model '{name}': {why}, as in llama, gpt2, gpt_neox or bert; use a model built like those")
    if any(hasattr(trunk.layers[0], attribute) for attribute in ("crossattention", "encoder_attn")):
        raise ValueError(
            f"model '{name}': its layers have cross-attention, a third branch; make it without, or use ours"
        )
    return trunk


def attach(model: nn.Module) -> Scales:
    """Scale the branches of a model as its config says: after from_pretrained of a model that `apply` had made.

    Raises ValueError where the config says nothing, and for a model that can't be scaled.
    """
    given = getattr(getattr(model, "config", None), KEY, None)
    if given is None:
        raise ValueError(f"config.{KEY}: not there; the model wasn't made by apply(), so call that instead")
    scales = Scales(**given)
    hook(model, scales)
    return scales


def hook(model: nn.Module, scales: Scales) -> None:
    """Put the hooks in place of those that `model` has, and write the scales to its config."""
    trunk = recognise(model)
    detach(model)
    layout, handles = trunk.layout, []
    for layer in trunk.layers:
        for which in (0, 1):
            norm, writer = module(layer, layout.norms[which]), module(layer, layout.writers[which])
            if layout.sums is None:
                branch = _Branch(1.0 if which and parallel(trunk) else scales.skip, scales.scale)
                handles.append(norm.register_forward_pre_hook(branch.read))
                handles.append(writer.register_forward_hook(branch.write))
            else:
                skip = _Times(scales.skip, place=1)
                handles.append(module(layer, layout.sums[which]).register_forward_pre_hook(skip.given))
                handles.append(writer.register_forward_hook(_Times(scales.scale).made))
    head = output_matrix(model)
    if head is not None and scales.logit != 1:
        handles.append(head.register_forward_pre_hook(_Times(scales.logit).given))
    model.__dict__["_deepscalelm_hooks"] = handles
    setattr(model.config, KEY, asdict(scales))


def detach(model: nn.Module) -> None:
    """Take the hooks off; the weights stay, and the config no longer speaks of them."""
    for handle in model.__dict__.pop("_deepscalelm_hooks", []):
        handle.remove()
    if hasattr(getattr(model, "config", None), KEY):
        delattr(model.config, KEY)


def output_matrix(model: nn.Module) -> nn.Module | None:
    """The module that makes logits; None in a model without a head."""
    found = model.get_output_embeddings() if hasattr(model, "get_output_embeddings") else None  # type: ignore[operator]
    return found if isinstance(found, nn.Module) else None


@torch.no_grad()
def fold(model: nn.Module) -> None:
    """The same function by weights alone, so that it can be saved and served as a plain model; hooks go.

    With x_n = lambda^n z_n, lambda x + beta f becomes z + (beta / lambda^n) f, and a norm reads the same of z as of x
    (up to its epsilon); behind Post-LN's norms n is always 1. The scale of logits goes to the last norm's gain and
    bias. Raises ValueError for a model without a norm in front of its output matrix.
    """
    scales, trunk, deep = attach(model), recognise(model), 0
    for layer in trunk.layers:
        for which, path in enumerate((trunk.layout.output, trunk.layout.outer)):
            deep = 1 if trunk.layout.sums else deep + (0 if which and parallel(trunk) else 1)
            for parameter in module(layer, path).parameters():
                parameter.mul_(scales.scale / scales.skip**deep)
    if output_matrix(model) is not None and scales.logit != 1:
        inside = {child for layer in trunk.layers for child in layer.modules()}
        norms = [child for child in model.modules() if is_norm(child) and child not in inside]
        last = trunk.final_norm or (norms[-1] if len(norms) > 1 else None)
        if last is None:
            raise ValueError("fold: no norm stands in front of the output matrix, so the scale of logits has no place")
        _scale_norm(last, scales.logit)
    detach(model)


def _scale_norm(norm: nn.Module, factor: float) -> None:
    """Multiply what a norm gives, also where its gain is 1 + weight (Gemma)."""
    weight, bias = norm.weight, getattr(norm, "bias", None)
    assert isinstance(weight, Tensor)
    x = torch.linspace(-1, 1, len(weight), dtype=weight.dtype, device=weight.device)
    expected, old = norm(x) * factor, weight.clone()
    if isinstance(bias, Tensor):
        bias.mul_(factor)
    weight.mul_(factor)
    if not torch.allclose(norm(x), expected, rtol=1e-3, atol=1e-3 * factor):
        weight.copy_((1 + old) * factor - 1)

"""What the numbers of a training are made of: `Optim.precision`, applied to a model.

fp32          weights, gradients and moments in fp32, and so is the computation
fp32_master   the same weights, gradients and moments; forward and backward compute with a bf16 copy of the weights
pure_bf16     all of it in bf16: AdamW's updates below half a unit in a weight's last place are lost
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Literal

import torch
from torch import nn

from retrace.core.optim import Precision

KEPT: dict[Precision, torch.dtype] = {  # of the weights that the optimizer changes and a checkpoint holds
    "fp32": torch.float32,
    "fp32_master": torch.float32,
    "pure_bf16": torch.bfloat16,
}
COMPUTED: dict[Literal["fp32", "bf16"], torch.dtype] = {"fp32": torch.float32, "bf16": torch.bfloat16}


def cast_parameters(model: nn.Module, dtype: torch.dtype) -> None:
    """Parameters in place; buffers stay, since the frequencies of rotary embeddings are not to be rounded."""
    for parameter in model.parameters():
        parameter.data = parameter.data.to(dtype)


@contextlib.contextmanager
def bf16_copy(model: nn.Module) -> Iterator[None]:
    """Within it, each parameter's place holds a bf16 copy, whose gradient goes on to the parameter in fp32.

    It is what FSDP2's mixed-precision policy does with the parameters that it gathers, for those that are whole, so
    that `fp32_master` means one thing however many processes there are. Autocast would mean another: a residual stream
    in fp32 and, since rotary embeddings follow it, queries and keys in fp32 beside values in bf16. It must span the
    backward pass too, where activation checkpointing computes layers again.
    """
    homes = [(module, name, p) for module in model.modules() for name, p in module._parameters.items() if p is not None]
    copies = {p: p.to(torch.bfloat16) for _, _, p in homes}  # tied places share a copy
    try:
        for module, name, parameter in homes:
            module._parameters[name] = copies[parameter]  # type: ignore[assignment]  # not a leaf: it has a gradient
        yield
    finally:
        for module, name, parameter in homes:
            module._parameters[name] = parameter

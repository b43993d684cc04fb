"""Processes that train one model, through Accelerate: each holds the model whole (DDP), or a part of it (FSDP2)."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from typing import TypeVar

import torch
from accelerate import Accelerator, PartialState
from accelerate.utils import (
    DistributedDataParallelKwargs,
    DistributedType,
    FullyShardedDataParallelPlugin,
    broadcast,
    gather_object,
)
from torch import nn
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy

from retrace.core.config import Hardware
from retrace.core.optim import Precision
from retrace.core.precision import bf16_copy

T = TypeVar("T")


def make_accelerator(hardware: Hardware, *, model: nn.Module, precision: Precision) -> Accelerator:
    """Accelerate on the device that the hardware config names; fails if ranks do not find each other."""
    on_cpu = hardware.device == "cpu"
    sharding = _sharding(model, precision) if hardware.shard else None
    if hardware.shard and on_cpu:  # asked for the CPU, Accelerate takes DDP and forgets the plugin, silently
        PartialState(cpu=True).distributed_type = DistributedType.MULTI_GPU
    accelerator = Accelerator(
        cpu=on_cpu,
        fsdp_plugin=sharding,
        kwargs_handlers=[DistributedDataParallelKwargs(gradient_as_bucket_view=True)],  # gradients stand once
    )
    world = int(os.environ.get("WORLD_SIZE", 1))
    if accelerator.num_processes != world:  # Accelerate starts lone processes, silently, when it misses its variables
        raise RuntimeError(f"WORLD_SIZE is {world}, but Accelerate sees {accelerator.num_processes} process(es)")
    if accelerator.device.type != hardware.device:  # it falls back to the CPU, as silently
        raise RuntimeError(f"hardware.device is {hardware.device}, but torch offers {accelerator.device.type}")
    if accelerator.is_fsdp2 != hardware.shard:
        raise RuntimeError(f"hardware.shard is {hardware.shard}, but Accelerate runs {accelerator.distributed_type}")
    return accelerator


def _sharding(model: nn.Module, precision: Precision) -> FullyShardedDataParallelPlugin:
    """FSDP2, layer by layer; what is in no layer (embeddings, output projection, ...) is one more unit, the root's.

    A step may run the trunk a dozen times before its one backward pass. Freed after each forward, as is usual, a layer
    would be gathered again in every one of them; so a layer is gathered once a step and freed before the update.
    """
    named = {name for module in model.modules() for name in getattr(module, "_no_split_modules", None) or ()}
    layers = named & {type(module).__name__ for module in model.modules()}
    if not layers:
        raise ValueError(f"hardware.shard=true: {type(model).__name__} does not name its layers; use shard=false")
    rounded = precision == "fp32_master"
    policy = MixedPrecisionPolicy(
        param_dtype=torch.bfloat16 if rounded else None,
        reduce_dtype=torch.float32 if rounded else None,
        cast_forward_inputs=False,  # they come from parameters, which have the dtype already
    )
    return FullyShardedDataParallelPlugin(
        fsdp_version=2,
        reshard_after_forward=False,
        auto_wrap_policy="transformer_based_wrap",
        transformer_cls_names_to_wrap=sorted(layers),
        mixed_precision_policy=policy,
        cpu_ram_efficient_loading=False,  # every process has built the same model
    )


def prepare(
    accelerator: Accelerator, model: nn.Module, optimizer: torch.optim.Optimizer
) -> tuple[nn.Module, torch.optim.Optimizer]:
    """Both, ready for several processes. Sharding is in place, and puts other parameters into the optimizer."""
    wrapped, optimizer = accelerator.prepare(model, optimizer)
    if isinstance(wrapped, FSDPModule):
        wrapped.set_reshard_after_backward(False)  # `release` does it, once a step; see `_sharding`
    return wrapped, optimizer


@contextlib.contextmanager
def micro_step(accelerator: Accelerator, model: nn.Module, *, precision: Precision, last: bool) -> Iterator[None]:
    """Around forward and backward pass of one micro-batch; gradients travel in the step's `last` one only."""
    with contextlib.ExitStack() as stack:
        if not last:
            stack.enter_context(accelerator.no_sync(model))
        if precision == "fp32_master" and not isinstance(model, FSDPModule):  # which does it itself
            stack.enter_context(bf16_copy(model))
        yield


def release(model: nn.Module) -> None:
    """Free gathered parameters, which the update would leave out of date."""
    for module in model.modules():
        if isinstance(module, FSDPModule):
            module.reshard()


def any_process(accelerator: Accelerator, *wishes: bool) -> list[bool]:
    """For each wish, whether any process has it, so that all act alike."""
    if accelerator.num_processes == 1:
        return list(wishes)
    flags = torch.tensor([float(wish) for wish in wishes], device=accelerator.device)
    return [count > 0 for count in accelerator.reduce(flags, "sum").tolist()]


def from_all(found: T) -> list[T]:
    """Every process's, in order of rank, for all; each must call it, behind `make_accelerator`."""
    gathered: list[T] = gather_object([found])
    return gathered


def from_main(accelerator: Accelerator, number: int) -> int:
    """The main process's number, for all."""
    return int(broadcast(torch.tensor([number], device=accelerator.device)).item())

"""The one training loop: Accelerate underneath, a pure function of (config, seed, step) above.

Rows, learning rate and noise of a step follow from its number, so a run that is killed anywhere ends as if it had not
been: parameters and moments from the last good checkpoint, everything else computed again.
"""

from __future__ import annotations

import math
import os
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
from accelerate import Accelerator
from torch import Tensor, nn

from retrace.core import checkpoint
from retrace.core.context import Context, Diverged, Stopped
from retrace.core.cost import Cost, mfu
from retrace.core.data import derive_seed, generator, micro_batches
from retrace.core.optim import Optim

Batch = Mapping[str, Tensor]
LossFunction = Callable[[nn.Module, Batch, torch.Generator], tuple[Tensor, Mapping[str, Tensor]]]


@dataclass(frozen=True)
class Group:
    """Parameters that share a learning rate."""

    name: str
    parameters: Sequence[nn.Parameter]
    learning_rate: float
    weight_decay: float


def make_accelerator(ctx: Context) -> Accelerator:
    """Accelerate on the device that the hardware config names; fails if ranks do not find each other."""
    accelerator = Accelerator(cpu=ctx.hardware.device == "cpu")
    world = int(os.environ.get("WORLD_SIZE", 1))
    if accelerator.num_processes != world:  # Accelerate starts lone processes, silently, when it misses its variables
        raise RuntimeError(f"WORLD_SIZE is {world}, but Accelerate sees {accelerator.num_processes} process(es)")
    if accelerator.device.type != ctx.hardware.device:  # it falls back to the CPU, as silently
        raise RuntimeError(f"hardware.device is {ctx.hardware.device}, but torch offers {accelerator.device.type}")
    return accelerator


def fit(
    model: nn.Module,
    *,
    ctx: Context,
    optim: Optim,
    groups: Sequence[Group],
    rows: Callable[[range], Batch],
    loss: LossFunction,
    cost: Cost,
) -> dict[str, float]:
    """Train `model` in place for `optim.steps` updates; returns the metrics of the last one.

    `rows(range)` gives the batch of those rows of an infinite stream; `loss(model, batch, generator)` a scalar and
    0-d metrics, with all its randomness from the generator. `cost` is that of the whole run, for progress and MFU.

    Raises `Diverged` when the loss is not finite, `Stopped` (after a checkpoint) when the context asks to stop.
    """
    accelerator = make_accelerator(ctx)
    optimizer = torch.optim.AdamW(
        [{"params": list(g.parameters), "lr": g.learning_rate, "weight_decay": g.weight_decay} for g in groups],
        betas=(optim.beta1, optim.beta2),
        eps=optim.epsilon,
    )
    folder = ctx.run.path / "checkpoints"
    inner = model
    model.to(accelerator.device)
    state = checkpoint.restore(folder, model=inner, optimizer=optimizer) or {"step": 0, "seconds": 0.0, "last": {}}
    model, optimizer = accelerator.prepare(model, optimizer)
    ctx.tracker.resume(state["step"])
    rank, world = accelerator.process_index, accelerator.num_processes
    began, spent, start = time.monotonic(), state["seconds"], state["step"]
    saved, last = began, dict(state["last"])

    def save(step: int) -> None:
        if accelerator.is_main_process:
            seconds = spent + time.monotonic() - began
            checkpoint.save(
                folder, step=step, model=inner, optimizer=optimizer.optimizer, state={"seconds": seconds, "last": last}
            )
        accelerator.wait_for_everyone()

    model.train()
    for step in range(start, optim.steps):
        torch.manual_seed(derive_seed(ctx.seed, "dropout", step, rank))
        for group, setting in zip(optimizer.param_groups, groups, strict=True):
            group["lr"] = setting.learning_rate * optim.factor(step)
        micro = list(
            micro_batches(
                step,
                batch_size=optim.batch_size,
                micro_batch_size=optim.micro_batch_size,
                rank=rank,
                num_processes=world,
            )
        )
        metrics: dict[str, float] = {}
        for index, chosen in micro:
            batch = {name: tensor.to(accelerator.device) for name, tensor in rows(chosen).items()}
            noise = generator(ctx.seed, "noise", step, index, device=accelerator.device)
            value, parts = loss(model, batch, noise)
            accelerator.backward(value / len(micro))
            for name, part in {"loss/total": value.detach(), **parts}.items():
                mean = accelerator.reduce(part.float(), "mean") if world > 1 else part
                metrics[name] = metrics.get(name, 0.0) + float(mean) / len(micro)
        if math.isfinite(metrics["loss/total"]):
            metrics |= _clip(accelerator, groups, optim)
        if not all(map(math.isfinite, metrics.values())):
            raise Diverged(step, last)
        last = metrics
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        now = time.monotonic()
        done = step + 1
        rate = (done - start) / (now - began)  # updates a second, of this process' life
        ctx.tracker.progress(done, optim.steps, seconds_left=(optim.steps - done) / rate)
        if done % ctx.tracker.log_every == 0 or done == optim.steps:
            flops = cost.flops / optim.steps * rate
            speed = {
                "speed/tokens_per_second": cost.tokens / optim.steps * rate,
                "speed/mfu": mfu(flops, 1.0, ctx.hardware.peak_flops, world),
                "optim/lr": optim.learning_rate * optim.factor(step),
            }
            ctx.tracker.log(done, {**metrics, **speed})
        stopping = _agree(accelerator, ctx.stop.is_set())
        if stopping or (done < optim.steps and now - saved >= ctx.hardware.checkpoint_seconds):
            save(done)
            saved = time.monotonic()
        if stopping:
            raise Stopped(f"stopped at step {done} of {optim.steps}")
    seconds = spent + time.monotonic() - began
    ctx.cost.update(
        tokens=cost.tokens,
        flops=cost.flops,
        seconds=seconds,
        mfu=mfu(cost.flops, seconds, ctx.hardware.peak_flops, world),
    )
    return last


def _clip(accelerator: Accelerator, groups: Sequence[Group], optim: Optim) -> dict[str, float]:
    """Clip in place, all gradients together or group by group; the norms before clipping."""
    if optim.clip == "global":
        together = [p for group in groups for p in group.parameters]
        return {"grad_norm/all": float(accelerator.clip_grad_norm_(together, optim.clip_norm))}
    return {
        f"grad_norm/{group.name}": float(accelerator.clip_grad_norm_(group.parameters, optim.clip_norm))
        for group in groups
    }


def _agree(accelerator: Accelerator, wish: bool) -> bool:
    """Whether any process was asked to stop."""
    if accelerator.num_processes == 1:
        return wish
    flag = torch.tensor(float(wish), device=accelerator.device)
    return bool(accelerator.reduce(flag, "sum") > 0)

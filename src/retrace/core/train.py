"""The one training loop: Accelerate underneath, a pure function of (config, seed, step) above.

Rows, learning rate and noise of a step follow from its number, so a run that is killed anywhere ends as if it had not
been: parameters and moments from the last good checkpoint, everything else computed again.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from statistics import fmean
from typing import Any

import torch
from accelerate.utils import gather_object
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from retrace.core import checkpoint, parallel
from retrace.core.context import Context, Diverged, Stopped
from retrace.core.cost import Cost, mfu
from retrace.core.data import derive_seed, generator, micro_batches
from retrace.core.optim import Optim
from retrace.core.precision import KEPT, cast_parameters

Batch = Mapping[str, Tensor]
WEIGHT = "weight"  # of a micro-batch among those of its update, such as its number of labels; see `fit`
LossFunction = Callable[[nn.Module, Batch, torch.Generator], tuple[Tensor, Mapping[str, Tensor]]]


@dataclass(frozen=True)
class Group:
    """Parameters that share a learning rate."""

    name: str
    parameters: Sequence[nn.Parameter]
    learning_rate: float
    weight_decay: float


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

    An update is along the mean gradient of its micro-batches, of all processes; where the loss gives a metric `WEIGHT`,
    along their mean by weight. So a mean over a micro-batch's labels, weighed by their number, becomes that over all
    labels of the update, however they are shared out. A micro-batch of weight 0 counts nothing, even if it is the only
    one.

    Raises `Diverged` when the loss is not finite, or a weight behind the last update, and `Stopped` (after a
    checkpoint) when the context asks to stop.
    """
    if ctx.hardware.activation_checkpointing:
        _checkpoint_activations(model)
    cast_parameters(model, KEPT[optim.precision])
    accelerator = parallel.make_accelerator(ctx.hardware, model=model, precision=optim.precision)
    if not ctx.hardware.shard:
        model.to(accelerator.device)  # sharding moves layer by layer: no GPU need ever hold the whole model
    inner = model
    model, optimizer = parallel.prepare(accelerator, model, _adamw(groups, optim))
    rank, world = accelerator.process_index, accelerator.num_processes
    folder = ctx.run.path / "checkpoints"
    state: dict[str, Any] = {"step": 0, "seconds": 0.0, "last": {}}
    found, damage = checkpoint.newest(folder) if accelerator.is_main_process else (-1, "")
    found = parallel.from_main(accelerator, found)
    if damage:
        ctx.warn(damage)
    if found >= 0:
        state = checkpoint.restore(folder, step=found, model=inner, optimizer=optimizer)
    ctx.tracker.resume(state["step"], saved=folder / f"step_{found:08d}" / checkpoint.LOG)
    began, spent, start = time.monotonic(), state["seconds"], state["step"]
    saved, last = began, dict(state["last"])

    def save(step: int) -> None:
        kept = {"seconds": spent + time.monotonic() - began, "last": last}
        checkpoint.save(
            folder, step=step, model=inner, optimizer=optimizer, state=kept, write=accelerator.is_main_process
        )
        accelerator.wait_for_everyone()

    model.train()
    for step in range(start, optim.steps):
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
        parts: list[dict[str, float]] = []
        for number, (index, chosen) in enumerate(micro, start=1):
            batch = {name: tensor.to(accelerator.device) for name, tensor in rows(chosen).items()}
            noise = generator(ctx.seed, "noise", step, index, device=accelerator.device)
            torch.manual_seed(derive_seed(ctx.seed, "dropout", step, index))
            with parallel.micro_step(accelerator, model, precision=optim.precision, last=number == len(micro)):
                value, seen = loss(model, batch, noise)
                accelerator.backward(_weighed(value, seen, alone=len(micro) * world == 1) / len(micro))
            parts.append(_numbers({"loss/total": value, **seen}))
            del value, seen  # or what they were computed from would stay until the next ones are
        parallel.release(inner)
        parts = parts if world == 1 else gather_object(parts)
        _by_weight(optimizer, parts)
        metrics = _means(parts)
        if math.isfinite(metrics["loss/total"]):
            metrics |= _clip(optimizer, groups, optim)
        lost = [name for name, value in metrics.items() if not math.isfinite(value)]
        if lost:
            ctx.cost["seconds"] = spent + time.monotonic() - began
            raise Diverged(step, last, what=lost[0])
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
        due = done < optim.steps and now - saved >= ctx.hardware.checkpoint_seconds
        stopping, saving = parallel.any_process(accelerator, ctx.stop.is_set(), due)
        if stopping or saving:
            save(done)
            saved = time.monotonic()
        if stopping:
            raise Stopped(f"stopped at step {done} of {optim.steps}")
    seconds = spent + time.monotonic() - began
    exploded = _exploded(inner)  # in the last update, which no loss has seen
    if any(parallel.any_process(accelerator, exploded is not None)):
        ctx.cost["seconds"] = seconds
        raise Diverged(optim.steps, last, what=exploded or "a weight")
    ctx.cost.update(
        tokens=cost.tokens,
        flops=cost.flops,
        seconds=seconds,
        mfu=mfu(cost.flops, seconds, ctx.hardware.peak_flops, world),
    )
    return last


def _exploded(model: nn.Module) -> str | None:
    """The first trained parameter that is not finite, if any, as far as this process has it."""
    trained = ((name, p.to_local() if isinstance(p, DTensor) else p) for name, p in model.named_parameters())
    return next((name for name, p in trained if p.requires_grad and not bool(p.isfinite().all())), None)


def _adamw(groups: Sequence[Group], optim: Optim) -> torch.optim.AdamW:
    return torch.optim.AdamW(
        [{"params": list(g.parameters), "lr": g.learning_rate, "weight_decay": g.weight_decay} for g in groups],
        betas=(optim.beta1, optim.beta2),
        eps=optim.epsilon,
        fused=True,  # rounds once where it stores, which matters in bf16; and the same on every device
    )


def _checkpoint_activations(model: nn.Module) -> None:
    """Keep the inputs of a transformers model's layers for the backward pass, and compute the rest again there."""
    for module in model.modules():
        if hasattr(module, "activation_checkpointing_enable"):
            module.activation_checkpointing_enable()  # type: ignore[operator]
            return
    raise ValueError(
        f"hardware.activation_checkpointing=true: {type(model).__name__} holds no model of transformers, whose layers "
        "can be computed again; use false"
    )


def _numbers(tensors: Mapping[str, Tensor]) -> dict[str, float]:
    """0-d tensors as numbers, with one wait for the device."""
    values = torch.stack([tensor.detach().double() for tensor in tensors.values()])
    return dict(zip(tensors, values.tolist(), strict=True))


def _weighed(value: Tensor, seen: Mapping[str, Tensor], *, alone: bool) -> Tensor:
    """A micro-batch's loss times its weight; the weight of the only one cancels out, unless it is 0."""
    if WEIGHT not in seen:
        return value
    return value * ((seen[WEIGHT] > 0) if alone else seen[WEIGHT])


def _by_weight(optimizer: torch.optim.Optimizer, parts: Sequence[Mapping[str, float]]) -> None:
    """From the mean over all micro-batches of gradient times weight to the mean by weight, in place."""
    weights = [part[WEIGHT] for part in parts if WEIGHT in part]
    if len(parts) > 1 and sum(weights) > 0:
        gradients = [p.grad for group in optimizer.param_groups for p in group["params"] if p.grad is not None]
        torch._foreach_mul_(gradients, len(weights) / sum(weights))


def _means(parts: Sequence[Mapping[str, float]]) -> dict[str, float]:
    """Of each metric over the micro-batches that have it, of all processes: one of padding alone has no rewards.

    By weight where they have one; of those that all weigh 0 only the loss is known, which is 0.
    """
    if any(part.get(WEIGHT) == 0 for part in parts):
        parts = [part for part in parts if part[WEIGHT] > 0]
    if not parts:
        return {"loss/total": 0.0}
    weighed = WEIGHT in parts[0] and len(parts) > 1

    def mean(name: str) -> float:
        found = [part for part in parts if name in part]
        return fmean((part[name] for part in found), [part[WEIGHT] for part in found] if weighed else None)

    return {name: mean(name) for name in dict.fromkeys(n for part in parts for n in part if n != WEIGHT)}


def _clip(optimizer: torch.optim.Optimizer, groups: Sequence[Group], optim: Optim) -> dict[str, float]:
    """Clip in place, all gradients together or group by group; the norms before clipping.

    By torch: Accelerate compares sharded parameters by value where their order is not that of the model, and fails.
    """
    parameters = {g.name: p["params"] for g, p in zip(groups, optimizer.param_groups, strict=True)}
    if optim.clip == "global":
        parameters = {"all": [p for chosen in parameters.values() for p in chosen]}
    norms = {name: nn.utils.clip_grad_norm_(chosen, optim.clip_norm) for name, chosen in parameters.items()}
    return {f"grad_norm/{name}": float(n.full_tensor() if isinstance(n, DTensor) else n) for name, n in norms.items()}

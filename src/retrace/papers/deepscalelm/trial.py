"""A transformers model tried on a few tokens: does its residual stream run as its layout says?"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from retrace.papers.deepscalelm.layouts import Trunk, module
from retrace.papers.deepscalelm.scaling import Scales, parallel

TRIED = (4, 32)  # sequences and tokens


@torch.no_grad()
def run(model: Any, *, watch: list[tuple[nn.Module, str]]) -> list[Tensor]:
    """What passes the modules of `watch`, each at its "input" or "output", in one pass without dropout."""
    seen: dict[int, Tensor] = {}
    handles = []

    def note(index: int) -> tuple[Callable[..., None], Callable[..., None]]:
        def before(_: nn.Module, given: tuple[Any, ...], named: dict[str, Any]) -> None:
            seen[index] = given[0] if given else named["hidden_states"]

        def behind(_: nn.Module, __: tuple[Any, ...], made: Any) -> None:
            seen[index] = made[0] if isinstance(made, tuple) else made

        return before, behind

    for index, (watched, side) in enumerate(watch):
        before, behind = note(index)
        if side == "input":
            handles.append(watched.register_forward_pre_hook(before, with_kwargs=True))
        else:
            handles.append(watched.register_forward_hook(behind))
    words, training = model.get_input_embeddings(), model.training
    longest = getattr(model.config, "max_position_embeddings", TRIED[1])
    ids_BT = torch.randint(words.num_embeddings, TRIED, generator=torch.Generator().manual_seed(0))
    try:
        model.eval().base_model(input_ids=ids_BT[:, :longest].to(words.weight.device))
    finally:
        model.train(training)
        for handle in handles:
            handle.remove()
    return [seen[index] for index in range(len(watch))]


def check(model: Any, trunk: Trunk, scales: Scales) -> None:
    """Raise ValueError unless the first and the last layer give skip * x + scale * f(x), branch by branch.

    `model` has its hooks, so of Pre-LN what a writer gives already holds the skip's share.
    """
    layout = trunk.layout
    for layer in (trunk.layers[0], trunk.layers[-1]):
        watch = [(layer, "input"), (layer, "output")]
        for which in (0, 1):
            norm = module(layer, layout.norms[which])
            watch += [(norm, "input"), (module(layer, layout.writers[which]), "output"), (norm, "output")]
        x, end, read0, write0, out0, read1, write1, out1 = run(model, watch=watch)
        if layout.placement == "post":
            pairs = [(read0, scales.skip * x + write0), (read1, scales.skip * out0 + write1), (end, out1)]
        else:
            middle = x if parallel(trunk) else x + write0
            pairs = [(read0, x), (read1, middle), (end, x + write0 + write1)]
        if not all(_close(there, expected) for there, expected in pairs):
            why = "its layers do more with the stream than to add two branches to it"
            raise ValueError(f"model '{model.config.model_type}': {why}; use llama, gpt2, gpt_neox, bert or their like")


def _close(there: Tensor, expected: Tensor) -> bool:
    tolerance = 1e-4 if there.dtype in (torch.float32, torch.float64) else 0.05
    return bool((there.float() - expected.float()).abs().max() <= tolerance * expected.float().abs().max())

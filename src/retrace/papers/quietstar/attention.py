"""Structured thought attention: every text position carries a private thread of tokens, and no T x kT mask ever exists.

The text goes through the trunk once per unique sequence; threads then follow in one or more passes, each holding the
next K tokens of every thread, position by position: (N, Q, K). A thread token attends to the text up to its position
and to the earlier tokens of its own thread (specification 1.2 "Attention", 6.4). The function is registered with
transformers, so any family that uses the attention interface works unchanged.

Shapes: B sequences, T text tokens, N positions that think, P thoughts per position, Q thoughts in a pass (P, or 1
while they still share their tokens), K tokens of a thread in a pass, G key-value heads, R query heads per key-value
head, H = G * R, D head size, L tokens of the pass, C hidden size.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from transformers import PreTrainedModel
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from retrace.papers.quietstar.memory import LayerMemory, Reach
from retrace.papers.quietstar.threads import KeptText, ThreadAttention

NAME = "retrace_thoughts"


class NotHandedOverError(ValueError):
    """A layer called thought attention without saying in which pass."""


@dataclass
class ThoughtState:
    """One text with its threads, over all passes.

    `num_slots` thread tokens have room. `capacity` is how many text tokens have room, None for those that are there:
    more can only be read without gradients, and only the last one thinks. Without either nothing is kept of the text.
    """

    reach: Reach
    num_thoughts: int
    num_slots: int
    capacity: int | None = None
    num_read: int = 0  # text tokens of earlier passes
    num_done: int = 0  # thread tokens per thought of earlier passes
    calls: int = 0
    memories: dict[int, LayerMemory] = field(default_factory=dict)
    links: dict[int, Tensor] = field(default_factory=dict)

    @property
    def is_tail(self) -> bool:
        """Whether the only thread is the text's own continuation: its keys lie behind the text's until more comes."""
        return self.capacity is not None and self.num_thoughts == 1


class ThoughtPass:
    """One pass: the text after `num_read` tokens (`num_new` 0), or the next `num_new` tokens of every thread.

    No dataclass: FSDP2 looks for tensors in those that a layer is given, and gives the layer copies of them.
    """

    def __init__(self, state: ThoughtState, num_read: int, num_done: int, num_new: int) -> None:
        self.state, self.num_read, self.num_done, self.num_new = state, num_read, num_done, num_new


def run_trunk(
    trunk: PreTrainedModel, embeds_BLC: Tensor, *, position_ids_BL: Tensor, state: ThoughtState, num_new: int
) -> Tensor:
    """One pass of the decoder over the text (`num_new` 0) or `num_new` tokens of every thread.

    Returns final-norm hidden states (B, L, C). Raises ValueError, naming the family, when a layer did not come through
    our attention.
    """
    state.calls = 0
    output = trunk.base_model(
        inputs_embeds=embeds_BLC,
        position_ids=position_ids_BL,
        use_cache=False,
        thought_pass=ThoughtPass(state, state.num_read, state.num_done, num_new),
    )
    num_layers = trunk.config.num_hidden_layers
    if state.calls != num_layers:
        raise ValueError(
            f"'{trunk.config.model_type}' sent {state.calls} of {num_layers} layers through the registered attention "
            "function, so the rest would mix thoughts"
        )
    state.num_done += num_new
    state.num_read = state.reach.num_text
    return output.last_hidden_state


def thought_attention(
    module: nn.Module,
    query_BHLD: Tensor,
    key_BGLD: Tensor,
    value_BGLD: Tensor,
    attention_mask: Tensor | None,
    *,
    scaling: float | None = None,
    dropout: float = 0.0,
    sliding_window: int | None = None,
    softcap: float | None = None,
    thought_pass: ThoughtPass | None = None,
    **options: Any,
) -> tuple[Tensor, None]:
    """The function that transformers calls in every layer; returns (B, L, H, D) and no weights."""
    here = _checked(thought_pass, module, attention_mask=attention_mask, dropout=dropout, options=options)
    state, layer = here.state, int(module.layer_idx)  # type: ignore[arg-type]  # transformers numbers its layers
    state.calls += 1
    scale = query_BHLD.shape[-1] ** -0.5 if scaling is None else scaling
    if here.num_new == 0 or state.is_tail:
        begin = here.num_read if here.num_new == 0 else state.reach.num_text + here.num_done
        if state.num_slots or state.capacity:
            key_BGLD, value_BGLD = _remember(state, layer, begin, key_BGLD, value_BGLD)
        mask = _text_mask(state.reach, begin, key_BGLD.shape[2], sliding_window, query_BHLD.device)
        output_BHLD = _text_attention(query_BHLD, key_BGLD, value_BGLD, mask, scale=scale, softcap=softcap)
        return output_BHLD.transpose(1, 2).contiguous(), None
    num_positions, num_heads = state.reach.num_positions, key_BGLD.shape[1]
    if not state.memories[layer].own_BGNPJD:
        state.memories[layer].make_room(num_positions, state.num_thoughts, state.num_slots)
    query_BHNQKD = query_BHLD.unflatten(2, (num_positions, -1, here.num_new))
    key_BGNQKD, value_BGNQKD = (x.unflatten(2, (num_positions, -1, here.num_new)) for x in (key_BGLD, value_BGLD))
    output_BNQKGRD, state.links[layer] = ThreadAttention.apply(
        query_BHNQKD.unflatten(1, (num_heads, -1)).movedim(2, 5),
        key_BGNQKD,
        value_BGNQKD,
        state.links[layer],
        state.memories[layer],
        here.num_done,
        state.reach,
        sliding_window,
        softcap,
        scale,
    )
    return output_BNQKGRD.flatten(4, 5).flatten(1, 3), None


ALL_ATTENTION_FUNCTIONS.register(NAME, thought_attention)


def compile_layers(trunk: PreTrainedModel) -> None:
    """Compile the trunk's layers around thought attention, all by one graph for passes of any length.

    Worth it where a run lasts long: the first step takes a minute for it.
    """
    ALL_ATTENTION_FUNCTIONS.register(NAME, torch.compiler.disable(thought_attention))
    for module in trunk.modules():
        if type(module).__name__ in (trunk._no_split_modules or ()):
            module.compile(dynamic=True)


def _checked(
    here: ThoughtPass | None,
    module: nn.Module,
    *,
    attention_mask: Tensor | None,
    dropout: float,
    options: dict[str, Any],
) -> ThoughtPass:
    name = type(module).__name__
    if here is None:
        raise NotHandedOverError(
            f"{name} was called outside of ThoughtModel: call the ThoughtModel, or give the trunk its own attention "
            "back with trunk.set_attn_implementation('sdpa')"
        )
    if options.get("s_aux") is not None or dropout > 0 or attention_mask is not None:
        asked = "attention sinks" if options.get("s_aux") is not None else f"dropout={dropout}"
        asked = asked if attention_mask is None else "a ready-made mask"
        raise ValueError(
            f"{name} asks for {asked}, and thought attention serves neither attention dropout (set it to 0 in the "
            "trunk's config) nor sinks nor ready-made masks"
        )
    return here


def _text_attention(
    query_BHLD: Tensor,
    key_BGTD: Tensor,
    value_BGTD: Tensor,
    mask: Tensor | None,
    *,
    scale: float,
    softcap: float | None,
) -> Tensor:
    """Attention of the text to itself; a mask of None is causal, or nothing where there is one query only."""
    if softcap is not None:
        inputs = (query_BHLD, key_BGTD, value_BGTD, mask, scale, softcap)
        return checkpoint(_capped_attention, *inputs, use_reentrant=False)  # weights (H, T, T) are not kept
    causal = mask is None and query_BHLD.shape[2] > 1
    return F.scaled_dot_product_attention(
        query_BHLD, key_BGTD, value_BGTD, mask, is_causal=causal, scale=scale, enable_gqa=True
    )


def _capped_attention(
    query_BHLD: Tensor, key_BGTD: Tensor, value_BGTD: Tensor, mask: Tensor | None, scale: float, softcap: float
) -> Tensor:
    repeats = query_BHLD.shape[1] // key_BGTD.shape[1]
    key_BHTD, value_BHTD = (x.repeat_interleave(repeats, 1) for x in (key_BGTD, value_BGTD))
    scores = softcap * torch.tanh(query_BHLD @ key_BHTD.mT * (scale / softcap))
    if mask is None and query_BHLD.shape[2] > 1:
        mask = torch.ones_like(scores[0, 0], dtype=torch.bool).tril()
    if mask is not None:
        scores = scores.masked_fill(~mask, -torch.inf)
    wide = torch.promote_types(scores.dtype, torch.float32)
    return scores.softmax(-1, dtype=wide).to(scores.dtype) @ value_BHTD


def _text_mask(reach: Reach, begin: int, end: int, window: int | None, device: torch.device) -> Tensor | None:
    """(B or 1, 1, L, T), True where the L tokens [begin, end) attend to; None for plain causal attention."""
    plain = reach.text_allowed_BT is None and (window is None or window >= end)
    if plain and (begin == 0 or begin == end - 1):
        return None
    distance_LT = torch.arange(begin, end, device=device)[:, None] - torch.arange(end, device=device)
    mask = (distance_LT >= 0)[None, None]
    if window is not None:
        mask = mask & (distance_LT < window)
    if reach.text_allowed_BT is not None:
        mask = mask & F.pad(reach.text_allowed_BT, (0, end - reach.num_text), value=True)[:, None, None]
    return mask | (distance_LT == 0)  # a padded row sees itself: a row without any key would be NaN


def _remember(
    state: ThoughtState, layer: int, begin: int, key_BGLD: Tensor, value_BGLD: Tensor
) -> tuple[Tensor, Tensor]:
    """Keep the keys and values of tokens from `begin` on; those of all tokens so far, which they attend to.

    Those of the first pass are linked to what threads will add to their gradients.
    """
    end = begin + key_BGLD.shape[2]
    if begin == 0:
        num_tokens = end if state.capacity is None else state.capacity + state.num_slots * state.is_tail
        key, value = (x.new_empty(*x.shape[:2], num_tokens, x.shape[3]) for x in (key_BGLD, value_BGLD))
        state.memories[layer] = LayerMemory((key, value))
    memory = state.memories[layer]
    for buffer, new in zip(memory.text_BGTD, (key_BGLD, value_BGLD), strict=True):
        buffer[:, :, begin:end] = new.detach()
    if begin == 0:
        state.links[layer] = KeptText.apply(key_BGLD, value_BGLD, memory)
        return key_BGLD, value_BGLD
    key_BGTD, value_BGTD = memory.text_BGTD
    return key_BGTD[:, :, :end], value_BGTD[:, :, :end]

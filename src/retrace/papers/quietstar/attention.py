"""Structured thought attention: every text position carries a private thread of tokens, and no T x kT mask ever exists.

The text goes through the trunk once per unique sequence; threads then follow in one or more passes, each holding the
next K tokens of every thread, position by position: (N, Q, K). A thread token attends to the text up to its position
and to the earlier tokens of its own thread (specification 1.2 "Attention", 6.4). The function is registered with
transformers, so any family that uses the attention interface works unchanged.

Shapes: B sequences, T text tokens, N positions that think, P thoughts per position, Q thoughts in a pass (P, or 1
while they still share their tokens), K tokens of a thread in a pass,
G key-value heads, R query heads per key-value head, H = G * R, D head size, L tokens of the pass, C hidden size.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from retrace.papers.quietstar.threads import KeptText, LayerMemory, Reach, ThreadAttention

NAME = "retrace_thoughts"


@dataclass
class ThoughtState:
    """One text with its threads, over all passes. `num_slots` thread tokens have room; 0 keeps nothing of the text."""

    reach: Reach
    num_thoughts: int
    num_slots: int
    num_done: int = 0  # thread tokens per thought of earlier passes
    calls: int = 0
    memories: dict[int, LayerMemory] = field(default_factory=dict)
    links: dict[int, Tensor] = field(default_factory=dict)


class ThoughtPass:
    """One pass: the text (`num_new` 0), or the next `num_new` tokens of every thread after `num_done` earlier ones.

    No dataclass: FSDP2 looks for tensors in those that a layer is given, and gives the layer copies of them.
    """

    def __init__(self, state: ThoughtState, num_done: int, num_new: int) -> None:
        self.state, self.num_done, self.num_new = state, num_done, num_new


def install(trunk: PreTrainedModel) -> None:
    """Make `trunk` use thought attention. Raises ValueError for a family that cannot be served exactly."""
    family = trunk.config.model_type
    if not trunk._can_set_attn_implementation():
        raise ValueError(
            f"trunk family '{family}' has attention of its own and ignores transformers' attention interface, so its "
            "thoughts would see each other: use a family built on it, such as llama, mistral or qwen2"
        )
    for key in ("logit_scale", "logits_scaling", "final_logit_softcapping", "attn_logit_softcapping"):
        if getattr(trunk.config, key, None) not in (None, 1, 1.0):
            raise ValueError(
                f"trunk family '{family}' sets {key}={getattr(trunk.config, key)}, which mixing in hidden space does "
                "not reproduce: use a family without it, such as llama, mistral or qwen2"
            )
    if getattr(trunk.get_output_embeddings(), "bias", None) is not None:
        raise ValueError(f"trunk family '{family}' has a bias on its output projection: use a family without one")
    trunk.set_attn_implementation(NAME)


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
        thought_pass=ThoughtPass(state, state.num_done, num_new),
    )
    num_layers = trunk.config.num_hidden_layers
    if state.calls != num_layers:
        raise ValueError(
            f"trunk family '{trunk.config.model_type}' sent {state.calls} of {num_layers} layers through the "
            "registered attention function, so the rest would mix thoughts: use a family such as llama, mistral, qwen2"
        )
    state.num_done += num_new
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
    thought_pass: ThoughtPass | None = None,
    **options: Any,
) -> tuple[Tensor, None]:
    """The function that transformers calls in every layer; returns (B, L, H, D) and no weights."""
    here = _checked(thought_pass, module, attention_mask=attention_mask, dropout=dropout, options=options)
    state, layer = here.state, int(module.layer_idx)  # type: ignore[arg-type]  # transformers numbers its layers
    state.calls += 1
    scale = query_BHLD.shape[-1] ** -0.5 if scaling is None else scaling
    if here.num_new == 0:
        mask = _text_mask(state.reach, sliding_window, query_BHLD.device)
        output_BHTD = F.scaled_dot_product_attention(
            query_BHLD, key_BGLD, value_BGLD, mask, is_causal=mask is None, scale=scale, enable_gqa=True
        )
        if state.num_slots:
            _remember(state, layer, key_BGLD, value_BGLD)
        return output_BHTD.transpose(1, 2).contiguous(), None
    num_positions, num_heads = state.reach.num_positions, key_BGLD.shape[1]
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
        scale,
    )
    return output_BNQKGRD.flatten(4, 5).flatten(1, 3), None


ALL_ATTENTION_FUNCTIONS.register(NAME, thought_attention)


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
        raise ValueError(
            f"{name} was called outside of ThoughtModel: call the ThoughtModel, or give the trunk its own attention "
            "back with trunk.set_attn_implementation('sdpa')"
        )
    unserved = [key for key in ("softcap", "s_aux") if options.get(key) is not None]
    if unserved or dropout > 0 or attention_mask is not None:
        raise ValueError(
            f"{name} asks for {unserved or ('dropout', dropout)}: thought attention serves neither attention dropout, "
            "logit soft-capping, sinks nor ready-made masks; set them to 0 or choose another family"
        )
    return here


def _text_mask(reach: Reach, window: int | None, device: torch.device) -> Tensor | None:
    """(B or 1, 1, T, T), True where attended to; None for plain causal attention."""
    if reach.text_allowed_BT is None and (window is None or window >= reach.num_text):
        return None
    index_T = torch.arange(reach.num_text, device=device)
    distance_TT = index_T[:, None] - index_T
    mask = (distance_TT >= 0)[None, None]
    if window is not None:
        mask = mask & (distance_TT < window)
    if reach.text_allowed_BT is not None:
        mask = mask & reach.text_allowed_BT[:, None, None]
    return mask | (distance_TT == 0)  # a padded row sees itself: a row without any key would be NaN


def _remember(state: ThoughtState, layer: int, key_BGTD: Tensor, value_BGTD: Tensor) -> None:
    """Keep the text's keys and values, and make room for those of the threads."""
    text = (key_BGTD.detach().contiguous(), value_BGTD.detach().contiguous())
    batch, num_heads, _, size = key_BGTD.shape
    shape = (batch, num_heads, state.reach.num_positions, state.num_thoughts, state.num_slots, size)
    memory = LayerMemory(text, (text[0].new_empty(shape), text[0].new_empty(shape)))
    state.memories[layer] = memory
    state.links[layer] = KeptText.apply(key_BGTD, value_BGTD, memory)

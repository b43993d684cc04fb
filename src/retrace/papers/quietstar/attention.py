"""Structured thought attention: every text position carries a private thread of tokens, and no T x kT mask ever exists.

A forward pass holds, per unique sequence, the text once and then the threads, position by position:
[text T | thread tokens (N, P, K)]. A thread token attends to the text up to its position and to the earlier tokens of
its own thread (specification 1.2 "Attention", 6.4). The function is registered with transformers, so any family that
uses the attention interface with rotary or learned positions works unchanged.

Scores exist only for one block of positions at a time: all thread tokens of a block are rows of one matrix product
with the text keys, the own keys are a small batched product beside it, and one softmax runs over both. The backward
pass recomputes them, so what is kept for it is linear in the length of a thought.

Shapes: B sequences, T text tokens, N positions that think, P thoughts per position, K tokens of a thread in this pass,
J tokens of a thread so far (K included), G key-value heads, R query heads per key-value head, H = G * R, D head size,
L tokens of the pass, C hidden size, X sequences x key-value heads in a block, W text keys in a block.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

NAME = "retrace_thoughts"
BLOCK_POSITIONS = 32  # on CPU the scores of a block (32 * P * K * R rows) stay in the second-level cache


@dataclass
class LayerCache:
    """Keys and values of one layer that later passes of the same thoughts attend to."""

    text_key_BTGD: Tensor
    text_value_BTGD: Tensor
    own_key_BNPJGD: Tensor
    own_value_BNPJGD: Tensor


@dataclass
class ThoughtState:
    """What the attention function has to know of one forward pass, or of several over the same text.

    `text_allowed_BT` is False at padding that stands before real text, and None where causality already hides it all.
    `positions_BN` are the text positions that think, None for all of them. `num_kept_slots` is the number of thread
    tokens to keep keys and values for; 0 keeps nothing (one pass with text and threads together).
    """

    num_text: int
    num_thoughts: int = 1
    text_allowed_BT: Tensor | None = None
    positions_BN: Tensor | None = None
    num_kept_slots: int = 0
    with_text: bool = True  # does the pass in flight hold the text?
    num_new: int = 0  # thread tokens per thought in the pass in flight
    num_done: int = 0  # thread tokens per thought of earlier passes
    calls: int = 0
    caches: dict[int, LayerCache] = field(default_factory=dict)

    @property
    def num_positions(self) -> int:
        return self.num_text if self.positions_BN is None else self.positions_BN.shape[1]


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
    trunk: PreTrainedModel,
    embeds_BLC: Tensor,
    *,
    position_ids_BL: Tensor,
    state: ThoughtState,
    with_text: bool,
    num_new: int,
) -> Tensor:
    """One pass of the decoder over [text if `with_text` | `num_new` thread tokens per thought]; final-norm hidden states.

    Returns (B, L, C). Raises ValueError, naming the family, when a layer did not come through our attention.
    """
    state.with_text, state.num_new, state.calls = with_text, num_new, 0
    output = trunk.base_model(
        inputs_embeds=embeds_BLC, position_ids=position_ids_BL, use_cache=False, thought_state=state
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
    thought_state: ThoughtState | None = None,
    **options: Any,
) -> tuple[Tensor, None]:
    """The function that transformers calls in every layer; returns (B, L, H, D) and no weights."""
    state = _checked(thought_state, module, attention_mask=attention_mask, dropout=dropout, options=options)
    state.calls += 1
    scale = query_BHLD.shape[-1] ** -0.5 if scaling is None else scaling
    num_text = state.num_text if state.with_text else 0
    query_BLHD, key_BLGD, value_BLGD = (x.transpose(1, 2) for x in (query_BHLD, key_BGLD, value_BGLD))
    text_key, text_value = key_BLGD[:, :num_text], value_BLGD[:, :num_text]
    outputs = []
    if num_text:
        mask = _text_mask(state, sliding_window, query_BHLD.device)
        text = F.scaled_dot_product_attention(
            query_BHLD[:, :, :num_text],
            text_key.transpose(1, 2),
            text_value.transpose(1, 2),
            attn_mask=mask,
            is_causal=mask is None,
            scale=scale,
            enable_gqa=True,
        )
        outputs.append(text.transpose(1, 2))
    own_shape = (query_BLHD.shape[0], state.num_positions, -1, max(state.num_new, 1))
    own_key, own_value = (x[:, num_text:].unflatten(1, own_shape[1:]) for x in (key_BLGD, value_BLGD))
    if state.num_kept_slots:
        text_key, text_value, own_key, own_value = _with_cache(
            state, module.layer_idx, text_key, text_value, own_key, own_value
        )
    if state.num_new:
        query = query_BLHD[:, num_text:].unflatten(1, own_shape[1:])
        threads = ThreadAttention.apply(query, text_key, text_value, own_key, own_value, state, sliding_window, scale)
        outputs.append(threads.flatten(1, 3))
    return (outputs[0] if len(outputs) == 1 else torch.cat(outputs, 1)), None


ALL_ATTENTION_FUNCTIONS.register(NAME, thought_attention)


def _checked(
    state: ThoughtState | None,
    module: nn.Module,
    *,
    attention_mask: Tensor | None,
    dropout: float,
    options: dict[str, Any],
) -> ThoughtState:
    name = type(module).__name__
    if state is None:
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
    return state


def _text_mask(state: ThoughtState, window: int | None, device: torch.device) -> Tensor | None:
    """(B or 1, 1, T, T), True where attended to; None for plain causal attention."""
    if state.text_allowed_BT is None and (window is None or window >= state.num_text):
        return None
    index_T = torch.arange(state.num_text, device=device)
    distance_TT = index_T[:, None] - index_T
    mask = (distance_TT >= 0)[None, None]
    if window is not None:
        mask = mask & (distance_TT < window)
    if state.text_allowed_BT is not None:
        mask = mask & state.text_allowed_BT[:, None, None]
    return mask | (distance_TT == 0)  # a padded row sees itself: a row without any key would be NaN


def _with_cache(
    state: ThoughtState, layer: int, text_key: Tensor, text_value: Tensor, own_key: Tensor, own_value: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Keep this pass's keys and values; return those of the text and of all thread tokens so far."""
    if state.with_text:
        batch, _, heads, size = text_key.shape
        shape = (batch, state.num_positions, state.num_thoughts, state.num_kept_slots, heads, size)
        state.caches[layer] = LayerCache(text_key, text_value, text_key.new_empty(shape), text_key.new_empty(shape))
    cache, done = state.caches[layer], state.num_done + state.num_new
    if state.num_new:  # a pass with one thread for all thoughts (START) is spread over them here
        cache.own_key_BNPJGD[:, :, :, state.num_done : done] = own_key
        cache.own_value_BNPJGD[:, :, :, state.num_done : done] = own_value
    shared = slice(None, own_key.shape[2])
    return (
        cache.text_key_BTGD,
        cache.text_value_BTGD,
        cache.own_key_BNPJGD[:, :, shared, :done],
        cache.own_value_BNPJGD[:, :, shared, :done],
    )


@dataclass(frozen=True)
class Block:
    """Positions [start, stop) of some sequences and heads; text keys [free, end) need a mask, those before do not."""

    batch: slice
    heads: slice
    start: int
    stop: int
    free: int
    end: int


def _blocks(state: ThoughtState, window: int | None, batch: int, heads: int, device: torch.device) -> Iterator[Block]:
    restricted = window is not None or state.text_allowed_BT is not None
    units = [(slice(0, batch), slice(0, heads))]
    if device.type == "cpu":  # one head at a time keeps the scores in cache; a GPU wants everything at once
        units = [(slice(b, b + 1), slice(g, g + 1)) for b in range(batch) for g in range(heads)]
    for sequences, kv_heads in units:
        for start in range(0, state.num_positions, BLOCK_POSITIONS):
            stop = min(start + BLOCK_POSITIONS, state.num_positions)
            if state.positions_BN is None:
                yield Block(sequences, kv_heads, start, stop, 0 if restricted else start, stop)
            else:
                yield Block(sequences, kv_heads, start, stop, 0, state.num_text)


def _probs(
    block: Block, query: Tensor, text_key: Tensor, own_key: Tensor, state: ThoughtState, window: int | None
) -> Tensor:
    """Attention weights (X, rows, W + J) of a block, from scaled queries (X, n, P, K, R, D); rows are (n, P, K, R)."""
    num_x, n, p, k, r, size = query.shape
    num_own = own_key.shape[-2]
    scores = query.new_empty(num_x, n * p * k * r, block.end + num_own)
    text, own = scores[..., : block.end], scores[..., block.end :]
    torch.bmm(query.reshape(num_x, -1, size), text_key.mT, out=text)
    own.copy_((query.reshape(num_x * n * p, k * r, size) @ own_key.mT).view(num_x, -1, num_own))
    slot_K = torch.arange(num_own - k, num_own, device=query.device)
    if block.free < block.end:
        hidden = _hidden_text(block, state, window, slot_K)
        view = text.view(hidden.shape[0], -1, n, p, k, r, block.end)[..., block.free :]
        view.masked_fill_(hidden, -torch.inf)
    distance_KJ = slot_K[:, None] - torch.arange(num_own, device=query.device)
    hidden_KJ = distance_KJ < 0 if window is None else (distance_KJ < 0) | (distance_KJ >= window)
    own.view(num_x * n * p, k, r, num_own).masked_fill_(hidden_KJ[:, None], -torch.inf)
    return torch.softmax(scores, -1)


def _hidden_text(block: Block, state: ThoughtState, window: int | None, slot_K: Tensor) -> Tensor:
    """True where a text key is out of reach: (B or 1, 1, n, 1, K or 1, 1, W - free)."""
    index_W = torch.arange(block.free, block.end, device=slot_K.device)
    if state.positions_BN is None:
        position_Bn = torch.arange(block.start, block.stop, device=slot_K.device)[None]
    else:
        position_Bn = state.positions_BN[block.batch, block.start : block.stop]
    position = position_Bn[:, None, :, None, None, None, None]
    hidden = index_W > position
    if window is not None:  # the distance that a plain run of [text .. position, thread] would have
        hidden = hidden | (position + 1 + slot_K[:, None, None] - index_W >= window)
    if state.text_allowed_BT is not None:
        hidden = hidden | ~state.text_allowed_BT[block.batch, None, None, None, None, None, block.free : block.end]
    return hidden


def _by_head(tensor: Tensor, num_heads: int) -> Tensor:
    """(B, N, P, K, heads, D) -> a view (B, G, N, P, K, heads / G, D)."""
    return tensor.unflatten(4, (num_heads, -1)).movedim(4, 1)


def _per_thread(weights: Tensor, block: Block, query: Tensor) -> Tensor:
    """The weights (or scores) of own keys, (X * n * P, K * R, J), out of those of a block."""
    num_x, n, p, k, r, _ = query.shape
    return weights[..., block.end :].reshape(num_x * n * p, k * r, -1)


def _parts(ctx: Any, inputs: tuple[Tensor, ...]) -> Iterator[tuple[Block, tuple[Tensor, ...]]]:
    """Every block with its scaled queries (X, n, P, K, R, D), text keys, values (X, W, D), own ones (X * n * P, J, D)."""
    query, text_key, text_value, own_key, own_value = inputs
    batch, _, num_heads, size = text_key.shape
    wide = torch.promote_types(query.dtype, torch.float32)  # half precision would round the scores themselves
    query, own_key, own_value = (_by_head(x, num_heads) for x in (query, own_key, own_value))
    text_key, text_value = (x.transpose(1, 2) for x in (text_key, text_value))
    for block in _blocks(ctx.state, ctx.window, batch, num_heads, query.device):
        at = (block.batch, block.heads, slice(block.start, block.stop))
        keys = (block.batch, block.heads, slice(0, block.end))
        scaled = (query[at].to(wide) * ctx.scale).flatten(0, 1)
        text = (x[keys].to(wide).flatten(0, 1) for x in (text_key, text_value))
        own = (x[at].to(wide).reshape(-1, x.shape[4], size) for x in (own_key, own_value))
        yield block, (scaled, *text, *own)


class ThreadAttention(torch.autograd.Function):
    """Attention of thread tokens; saves only its inputs and recomputes the weights of a block in the backward pass."""

    @staticmethod
    def forward(
        ctx: Any,
        query_BNPKHD: Tensor,
        text_key_BTGD: Tensor,
        text_value_BTGD: Tensor,
        own_key_BNPJGD: Tensor,
        own_value_BNPJGD: Tensor,
        state: ThoughtState,
        window: int | None,
        scale: float,
    ) -> Tensor:
        inputs = (query_BNPKHD, text_key_BTGD, text_value_BTGD, own_key_BNPJGD, own_value_BNPJGD)
        ctx.save_for_backward(*inputs)
        # the state moves on with later passes; what the backward pass needs of it stands still in a copy
        ctx.state = ThoughtState(state.num_text, state.num_thoughts, state.text_allowed_BT, state.positions_BN)
        reach = state.num_text + own_key_BNPJGD.shape[3]
        ctx.window = None if window is None or window >= reach else window
        ctx.scale = scale
        output_BNPKHD = torch.empty_like(query_BNPKHD, memory_format=torch.contiguous_format)
        output = _by_head(output_BNPKHD, text_key_BTGD.shape[2])
        for block, parts in _parts(ctx, inputs):
            query, text_key, text_value, own_key, own_value = parts
            probs = _probs(block, query, text_key, own_key, ctx.state, ctx.window)
            text = probs[..., : block.end] @ text_value
            own = _per_thread(probs, block, query) @ own_value
            part = output[block.batch, block.heads, block.start : block.stop]
            part.copy_((text.view(query.shape) + own.view(query.shape)).view(part.shape))
        return output_BNPKHD

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        inputs = ctx.saved_tensors
        num_heads = inputs[1].shape[2]
        wide = torch.promote_types(inputs[0].dtype, torch.float32)
        results = [torch.zeros(x.shape, dtype=wide, device=x.device) for x in inputs]
        d_query, d_own_key, d_own_value = (_by_head(results[i], num_heads) for i in (0, 3, 4))
        d_text_key, d_text_value = (results[i].transpose(1, 2) for i in (1, 2))
        d_output = _by_head(grads[0], num_heads)
        for block, parts in _parts(ctx, inputs):
            query, text_key, text_value, own_key, own_value = parts
            rows, threads = (query.shape[0], -1, query.shape[-1]), (-1, *query.shape[3:])
            at = (block.batch, block.heads, slice(block.start, block.stop))
            keys = (block.batch, block.heads, slice(0, block.end))
            d_out = d_output[at].to(wide).reshape(rows)
            d_own_out, own_query = (x.reshape(threads).flatten(1, 2) for x in (d_out, query))
            probs = _probs(block, query, text_key, own_key, ctx.state, ctx.window)
            own_probs = _per_thread(probs, block, query)
            d_text_value[keys] += (probs[..., : block.end].mT @ d_out).view_as(d_text_value[keys])
            d_own_value[at] = (own_probs.mT @ d_own_out).view(d_own_value[at].shape)
            d_probs = torch.empty_like(probs)
            torch.bmm(d_out, text_value.mT, out=d_probs[..., : block.end])
            d_probs[..., block.end :].copy_((d_own_out @ own_value.mT).view(*probs.shape[:2], -1))
            d_scores = torch._softmax_backward_data(d_probs, probs, -1, probs.dtype)
            own_scores = _per_thread(d_scores, block, query)
            d_rows = (d_scores[..., : block.end] @ text_key).view(query.shape)
            d_rows += (own_scores @ own_key).view(query.shape)
            d_query[at] = (d_rows * ctx.scale).view(d_query[at].shape)
            d_text_key[keys] += (d_scores[..., : block.end].mT @ query.reshape(rows)).view_as(d_text_key[keys])
            d_own_key[at] = (own_scores.mT @ own_query).view(d_own_key[at].shape)
        return *(g.to(x.dtype) for g, x in zip(results, inputs, strict=True)), None, None, None

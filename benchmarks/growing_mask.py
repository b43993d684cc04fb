"""The plain reference for Quiet-STaR's training step: sequential passes under a growing T x kT mask.

Written from the specification (sections 1.2, 6.1-6.3), it computes what `ThoughtModel` computes, in the way of the
published method: rows are repeated for the P thoughts, every inserted token is one pass of the whole sequence through
the trunk with a key-value cache, and each pass attends, by a 4-D mask, to causal text plus one diagonal per earlier
pass. It does not carry the published code's avoidable waste (one-hot embedding products, unused mixed logits, a new
mask in each pass). Attention is transformers' own, eager (plain) or SDPA (fused). Tests take it for the truth,
benchmarks for the baseline.

Shapes: B sequences, A = B * P rows, T text tokens, P thoughts, M sampled tokens, S true tokens, C hidden, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import DynamicCache, PreTrainedModel

from retrace.papers.quietstar.mixing import MixingHead
from retrace.papers.quietstar.model import ThoughtModel


@dataclass
class ReferenceStep:
    """The loss with its parts, the thoughts behind it and the hidden states of every pass (base first), (A, T, C)."""

    loss: Tensor
    base_loss: Tensor
    talk_loss: Tensor
    policy_loss: Tensor
    reward_BPI: Tensor
    thoughts_BPTM: Tensor
    hidden: list[Tensor]


@contextmanager
def own_attention(trunk: PreTrainedModel, attention: str = "sdpa") -> Iterator[PreTrainedModel]:
    """The trunk with an attention of transformers' own, for the time of the block; SDPA knows no soft-capping."""
    before = trunk.config._attn_implementation
    capped = getattr(trunk.config, "attn_logit_softcapping", None) is not None
    trunk.set_attn_implementation("eager" if capped else attention)
    try:
        yield trunk
    finally:
        trunk.set_attn_implementation(before)


@dataclass
class Passes:
    """Sequential passes over all positions; each call feeds one token per position and returns hidden states."""

    trunk: PreTrainedModel
    mask_A1TL: Tensor
    position_ids_AT: Tensor
    cache: DynamicCache = field(default_factory=DynamicCache)
    hidden: list[Tensor] = field(default_factory=list)

    def feed(self, embeds_ATC: Tensor) -> Tensor:
        done = len(self.hidden)
        output = self.trunk.base_model(
            inputs_embeds=embeds_ATC,
            attention_mask=self.mask_A1TL[..., : (done + 1) * embeds_ATC.shape[1]],
            position_ids=self.position_ids_AT + done,
            past_key_values=self.cache,
            use_cache=True,
        )
        self.hidden.append(output.last_hidden_state)
        return output.last_hidden_state


def growing_mask(real_AT: Tensor, num_passes: int, dtype: torch.dtype) -> Tensor:
    """Additive mask (A or 1, 1, T, num_passes * T): causal text in the first block, a diagonal in every other."""
    rows = real_AT[:1] if bool(real_AT.all()) else real_AT
    num_text = rows.shape[1]
    diagonal = torch.eye(num_text, dtype=torch.bool)
    causal = torch.ones(num_text, num_text, dtype=torch.bool).tril() & rows[:, None]
    blocks = [causal | diagonal] + [diagonal.expand_as(causal)] * (num_passes - 1)
    allowed = torch.cat(blocks, -1)[:, None]
    return torch.zeros(allowed.shape, dtype=dtype).masked_fill_(~allowed, torch.finfo(dtype).min)


def reference_step(
    model: ThoughtModel,
    input_ids_BT: Tensor,
    attention_mask_BT: Tensor | None = None,
    *,
    thoughts_BPTM: Tensor | None = None,
    generator: torch.Generator | None = None,
    attention: str = "sdpa",
    chosen_BN: Tensor | None = None,
) -> ReferenceStep:
    """One training step's loss on the model's own weights, for recorded thoughts or, without any, sampled ones.

    `chosen_BN`: positions whose thoughts count, None for all; they are thought everywhere.
    `attention`: transformers' "eager", which is the plain implementation, or the fused "sdpa".
    """
    config, num_thoughts = model.config, model.config.num_thoughts
    ids_AT = input_ids_BT.repeat_interleave(num_thoughts, 0)
    real_AT = torch.ones_like(ids_AT, dtype=torch.bool)
    if attention_mask_BT is not None:
        real_AT = attention_mask_BT.bool().repeat_interleave(num_thoughts, 0)
    thoughts_ATM = None if thoughts_BPTM is None else thoughts_BPTM.flatten(0, 1)
    if thoughts_ATM is not None:  # a thought behind the last token is scored by nothing
        thoughts_ATM = F.pad(thoughts_ATM, (0, 0, 0, input_ids_BT.shape[1] - thoughts_ATM.shape[1]))
    embed, lm_head = model.trunk.get_input_embeddings(), _logits(model.trunk)
    num_passes = 1 + model.num_thought_positions
    with own_attention(model.trunk, attention) as trunk:
        passes = Passes(
            trunk,
            growing_mask(real_AT, num_passes, embed.weight.dtype),
            (real_AT.cumsum(1) - 1).clamp(min=0),
        )
        state = passes.feed(embed(ids_AT))
        if model.start_embedding is not None:
            state = passes.feed(model.start_embedding.expand_as(state))
        for token in model.prefix:
            state = passes.feed(embed(token).expand_as(state))
        log_probs_AT, tokens_AT = [], []
        for step in range(config.num_sampled):
            logits_ATV = lm_head(state).index_fill(-1, model.blocked, -torch.inf)
            if thoughts_ATM is None:
                probs = (logits_ATV.detach() / config.sample_temperature).softmax(-1)
                token_AT = torch.multinomial(probs.flatten(0, 1), 1, generator=generator).view_as(ids_AT)
            else:
                token_AT = thoughts_ATM[..., step]
            log_prob = (logits_ATV / config.policy_temperature).log_softmax(-1)
            log_probs_AT.append(log_prob.gather(-1, token_AT[..., None])[..., 0])
            tokens_AT.append(token_AT)
            state = passes.feed(embed(token_AT))
        if model.end_embedding is not None:
            state = passes.feed(model.end_embedding.expand_as(state))
        talk = [state]
        for offset in range(1, config.num_true):
            talk.append(passes.feed(embed(_shift(ids_AT, offset))))
    counts_AT = torch.ones_like(real_AT)
    if chosen_BN is not None:
        counts_AT = torch.zeros_like(real_AT).scatter_(1, chosen_BN.repeat_interleave(num_thoughts, 0), True)
    log_probs_ATM, tokens_ATM = torch.stack(log_probs_AT, -1), torch.stack(tokens_AT, -1)
    return _losses(model, ids_AT, real_AT, counts_AT, passes.hidden, talk, log_probs_ATM, tokens_ATM)


def _shift(tensor: Tensor, offset: int) -> Tensor:
    """Move the second dimension left by `offset`, zeros at its end."""
    return torch.cat([tensor[:, offset:], torch.zeros_like(tensor[:, :offset])], 1)


def _logits(trunk: PreTrainedModel) -> Callable[[Tensor], Tensor]:
    """From hidden states to logits as Gemma 2, Cohere and all others do it."""
    config, layer = trunk.config, trunk.get_output_embeddings()
    cap = getattr(config, "final_logit_softcapping", None)

    def logits(hidden: Tensor) -> Tensor:
        found = layer(hidden) * getattr(config, "logit_scale", 1.0) / getattr(config, "logits_scaling", 1.0)
        return found if cap is None else torch.tanh(found / cap) * cap

    return logits


def _mixing_weight(head: MixingHead, hidden: Tensor) -> Tensor:
    for index, linear in enumerate(head.linears):
        hidden = linear(hidden if index == 0 else torch.relu(hidden))
    return torch.sigmoid(hidden) if head.bounded == "sigmoid" else hidden


def _losses(
    model: ThoughtModel,
    ids_AT: Tensor,
    real_AT: Tensor,
    counts_AT: Tensor,
    hidden: list[Tensor],
    talk: list[Tensor],
    log_probs_ATM: Tensor,
    tokens_ATM: Tensor,
) -> ReferenceStep:
    config, lm_head, base_ATC = model.config, _logits(model.trunk), hidden[0]
    num_rows, num_text = ids_AT.shape
    num_true, num_columns = config.num_true, num_text - 1 - config.num_true

    def cross_entropy(hidden_ATC: Tensor, offset: int, counts: Tensor) -> tuple[Tensor, Tensor]:
        """NLL of the token `offset` + 1 after each position, zero where there is none to predict; and its mean."""
        keep = num_text - 1 - offset
        valid = real_AT[:, :keep] & real_AT[:, 1 + offset :] & counts[:, :keep]
        logits = lm_head(hidden_ATC[:, :keep])
        nll = F.cross_entropy(logits.transpose(1, 2), ids_AT[:, 1 + offset :], reduction="none") * valid
        return nll, nll.sum() / valid.sum()

    base_nll, base_loss = cross_entropy(base_ATC, 0, torch.ones_like(counts_AT))
    talk_losses, reward = [], base_nll.new_zeros(())
    for offset, thought_ATC in enumerate(talk):
        before_ATC = _shift(base_ATC, offset)
        mixed_ATC = thought_ATC
        if model.mixing_head is not None:
            weight = _mixing_weight(model.mixing_head, torch.cat([before_ATC, thought_ATC], -1))
            mixed_ATC = (1 - weight) * before_ATC + weight * thought_ATC
        nll, mean = cross_entropy(mixed_ATC, offset, counts_AT)
        talk_losses.append(mean)
        if config.reward == "thought":
            with torch.no_grad():
                nll, _ = cross_entropy(thought_ATC, offset, counts_AT)
        gain = _shift(base_nll, offset)[:, :num_columns] - nll[:, :num_columns]
        valid = real_AT[:, :num_columns] & real_AT[:, 1 + offset : 1 + offset + num_columns]
        reward = reward + (gain * valid).detach()
    reward_BPI = reward.view(-1, config.num_thoughts, num_columns)
    advantage = reward_BPI
    if config.baseline == "mean":
        advantage = reward_BPI - reward_BPI.mean(1, keepdim=True)
    elif config.baseline == "loo":
        count = config.num_thoughts
        advantage = (reward_BPI - reward_BPI.mean(1, keepdim=True)) * count / (count - 1)
    if config.positive_only:
        advantage = advantage.clamp(min=0)
    weight = counts_AT[:, :num_columns].to(base_ATC.dtype)
    weight = weight / (weight.sum() * config.num_sampled)
    policy = advantage.reshape(num_rows, num_columns, 1) * log_probs_ATM[:, :num_columns]
    policy_loss = -(policy * weight[..., None]).sum()
    talk_loss = sum(talk_losses, base_nll.new_zeros(())) / num_true
    loss = (
        config.base_loss_weight * base_loss + config.talk_loss_weight * talk_loss + config.policy_weight * policy_loss
    )
    thoughts = tokens_ATM.view(-1, config.num_thoughts, *tokens_ATM.shape[1:])
    return ReferenceStep(loss, base_loss, talk_loss, policy_loss, reward_BPI, thoughts, hidden)


@torch.no_grad()
def reference_next_token(model: ThoughtModel, ids_BT: Tensor, *, attention: str = "sdpa") -> Tensor:
    """The likeliest next token (B,), by a greedy thought at every position of the whole text, as published code writes.

    For models with START, END and a mixing head.
    """
    embed, lm_head = model.trunk.get_input_embeddings(), _logits(model.trunk)
    real_BT = torch.ones_like(ids_BT, dtype=torch.bool)
    position_ids = torch.arange(ids_BT.shape[1]).expand_as(ids_BT)
    with own_attention(model.trunk, attention) as trunk:
        passes = Passes(trunk, growing_mask(real_BT, model.config.num_sampled + 3, embed.weight.dtype), position_ids)
        base_BTC = passes.feed(embed(ids_BT))
        assert model.start_embedding is not None
        assert model.end_embedding is not None
        assert model.mixing_head is not None
        state = passes.feed(model.start_embedding.expand_as(base_BTC))
        for _ in range(model.config.num_sampled):
            token_BT = lm_head(state).index_fill(-1, model.blocked, -torch.inf).argmax(-1)
            state = passes.feed(embed(token_BT))
        state = passes.feed(model.end_embedding.expand_as(state))
        weight = _mixing_weight(model.mixing_head, torch.cat([base_BTC, state], -1))
        mixed_BTV = lm_head((1 - weight) * base_BTC + weight * state)  # of every position, of which one is looked at
    return mixed_BTV[:, -1].index_fill(-1, model.blocked, -torch.inf).argmax(-1)


def naive_hidden(trunk: PreTrainedModel, input_ids_T: Tensor, thread_KC: Tensor, *, position: int) -> Tensor:
    """Hidden states (K, C) of one thread after text 0..`position`: one ordinary causal run, positions 0, 1, 2, ..."""
    text_1IC = trunk.get_input_embeddings()(input_ids_T[None, : position + 1])
    with own_attention(trunk):
        output = trunk.base_model(inputs_embeds=torch.cat([text_1IC, thread_KC[None]], 1), use_cache=False)
    return output.last_hidden_state[0, position + 1 :]

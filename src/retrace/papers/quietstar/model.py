"""A language model that thinks before every token: sampling, the exact loss, prediction, saving (Section 4).

`ThoughtModel` wraps any supported causal LM of transformers. Sampling, scoring and prediction are the same passes: the
text once per sequence, START, each sampled token, and in the last pass END and the true tokens together. In training
they are differentiable as they go, so that nothing is computed twice and the loss is that of specification 1.2 (the
two phases of 6.4 would pay for sampling a second time; where memory is short, switch activation checkpointing on in
the trunk). As in the official code, w multiplies the prediction after the thought.

Shapes: B sequences, T text tokens, N positions that think, P thoughts per position, M sampled tokens of a thought,
Q thoughts in a pass (P, or 1 for START), K thread tokens in a pass, S true tokens scored, C hidden size, V vocabulary.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import PreTrainedModel

from retrace.papers.quietstar.attention import Reach, ThoughtState, install, run_trunk
from retrace.papers.quietstar.config import ThoughtConfig
from retrace.papers.quietstar.losses import sample_tokens, scaled_logits
from retrace.papers.quietstar.mixing import MixingHead
from retrace.papers.quietstar.objective import (
    Targets,
    Thinking,
    ThoughtOutput,
    mix,
    plain_objective,
    thought_objective,
)


@dataclass(frozen=True)
class Prediction:
    """Next-token log-probabilities after chosen positions.

    `mixed_BNV` is the log of the mean, over thoughts, of the mixed probabilities: the prediction of a model that draws
    one of its thoughts at random. `weight_BN` is the mean mixing weight. `thoughts_BPNM` are the thoughts behind it.
    """

    base_BNV: Tensor
    mixed_BNV: Tensor
    weight_BN: Tensor
    thoughts_BPNM: Tensor


class ThoughtModel(nn.Module):
    """`trunk` with START and END embeddings and a mixing head; with `num_sampled` 0 it is the trunk as a plain LM."""

    blocked: Tensor
    start_embedding: nn.Parameter | None
    end_embedding: nn.Parameter | None

    def __init__(
        self,
        trunk: PreTrainedModel,
        config: ThoughtConfig,
        *,
        start_init_id: int,
        end_init_id: int,
        hidden_token_ids: Sequence[int] = (),
    ) -> None:
        """`*_init_id`: token whose embedding START/END begin at. `hidden_token_ids`: never sampled in a thought.

        Weights of the mixing head come from torch's global generator. Raises ValueError for a trunk that cannot be
        served exactly.
        """
        super().__init__()
        install(trunk)
        self.trunk, self.config = trunk, config
        self.register_buffer("blocked", torch.tensor(sorted(hidden_token_ids), dtype=torch.long), persistent=False)
        embedding = trunk.get_input_embeddings().weight.detach()
        thinks = config.num_sampled > 0
        start = nn.Parameter(embedding[start_init_id].clone()) if thinks and config.use_start else None
        end = nn.Parameter(embedding[end_init_id].clone()) if thinks and config.use_end else None
        self.register_parameter("start_embedding", start)
        self.register_parameter("end_embedding", end)
        self.mixing_head: MixingHead | None = None
        if thinks and config.mixing_head is not None:
            head = MixingHead(
                config.mixing_head,
                hidden_size=embedding.shape[1],
                initializer_range=getattr(trunk.config, "initializer_range", 0.02),
            )
            self.mixing_head = head.to(device=embedding.device, dtype=embedding.dtype)

    def forward(
        self, input_ids_BT: Tensor, attention_mask_BT: Tensor | None = None, *, generator: torch.Generator
    ) -> ThoughtOutput:
        """Sample thoughts and score them: one training step's loss. `attention_mask_BT` is 1 at real tokens."""
        return self._loss(self._text(input_ids_BT, attention_mask_BT), None, generator)

    @torch.no_grad()
    def sample(
        self, input_ids_BT: Tensor, attention_mask_BT: Tensor | None, *, generator: torch.Generator | None
    ) -> Tensor:
        """One thought per position and `num_thoughts`, (B, P, T, M); the greedy ones without a generator."""
        batch, num_text = input_ids_BT.shape
        if self.config.num_sampled == 0:
            return input_ids_BT.new_empty(batch, self.config.num_thoughts, num_text, 0)
        thinking = self._think(self._text(input_ids_BT, attention_mask_BT), generator)
        return thinking.thoughts_BNPM.transpose(1, 2)

    def loss(self, input_ids_BT: Tensor, attention_mask_BT: Tensor | None, thoughts_BPTM: Tensor) -> ThoughtOutput:
        """The loss of given thoughts. Raises ValueError for sequences that are too short."""
        return self._loss(self._text(input_ids_BT, attention_mask_BT), thoughts_BPTM.transpose(1, 2), None)

    def _loss(self, text: _Text, thoughts_BTPM: Tensor | None, generator: torch.Generator | None) -> ThoughtOutput:
        config, num_text = self.config, text.input_ids_BT.shape[1]
        num_true = config.num_true if config.num_sampled else 1
        if num_text < num_true + 2:
            raise ValueError(
                f"sequences have {num_text} tokens, but num_true={config.num_true} needs at least "
                f"{num_true + 2}: use longer sequences or a smaller num_true"
            )
        targets = Targets.of(text.input_ids_BT, text.real_BT, num_true)
        if config.num_sampled == 0:
            loss, _ = plain_objective(self._read(text), weight_VC=self._vocabulary, targets=targets, scale=1.0)
            return ThoughtOutput(loss, {"loss/total": loss.detach(), "loss/base": loss.detach()})
        thinking = self._think(text, generator, thoughts_BTPM)
        return thought_objective(
            config,
            thinking=thinking,
            after_BTPSC=self._speak(text, thinking, num_true)[:, :, :, -num_true:],
            targets=targets,
            weight_VC=self._vocabulary,
            mixing_head=self.mixing_head,
            blocked=self.blocked,
        )

    @torch.no_grad()
    def predict(
        self,
        input_ids_BT: Tensor,
        attention_mask_BT: Tensor | None,
        positions_BN: Tensor,
        *,
        generator: torch.Generator | None,
        num_thoughts: int = 1,
    ) -> Prediction:
        """What follows the text up to and including `positions_BN`, thinking only there; greedily without a generator.

        `hidden_token_ids` are kept out of thoughts only: predictions are over the whole vocabulary.
        """
        text = self._text(input_ids_BT, attention_mask_BT, num_thoughts=num_thoughts, positions_BN=positions_BN)
        if self.config.num_sampled == 0:
            base_BNV = self._log_probs(text.at_positions(self._read(text)))
            thoughts = positions_BN.new_empty(len(positions_BN), num_thoughts, positions_BN.shape[1], 0)
            return Prediction(base_BNV, base_BNV, base_BNV.new_zeros(positions_BN.shape), thoughts)
        thinking = self._think(text, generator)
        after_BNPC = self._speak(text, thinking, 1)[:, :, :, -1]
        before_BNPC = text.at_positions(thinking.base_BTC)[:, :, None].expand_as(after_BNPC)
        mixed_BNPC, weight_BNP = mix(self.mixing_head, before_BNPC, after_BNPC)
        return Prediction(
            base_BNV=self._log_probs(before_BNPC[:, :, 0]),
            mixed_BNV=self._log_probs(mixed_BNPC).logsumexp(2) - math.log(num_thoughts),
            weight_BN=weight_BNP.mean(-1),
            thoughts_BPNM=thinking.thoughts_BNPM.transpose(1, 2),
        )

    @torch.no_grad()
    def predict_base(self, input_ids_BT: Tensor, attention_mask_BT: Tensor | None, positions_BN: Tensor) -> Tensor:
        """Next-token log-probabilities after chosen positions without thinking (B, N, V): `Prediction.base_BNV`."""
        text = self._text(input_ids_BT, attention_mask_BT, num_thoughts=1, positions_BN=positions_BN)
        return self._log_probs(text.at_positions(self._read(text)))

    def parameter_groups(self) -> dict[str, list[nn.Parameter]]:
        """Every parameter once, under "trunk", "mixing_head" or "meta" (START and END); empty groups are left out.

        The official code gives the meta embeddings 100 times the trunk's learning rate (specification 1.3).
        """
        head = [] if self.mixing_head is None else list(self.mixing_head.parameters())
        meta = [p for p in (self.start_embedding, self.end_embedding) if p is not None]
        groups = {"trunk": list(self.trunk.parameters()), "mixing_head": head, "meta": meta}
        return {name: parameters for name, parameters in groups.items() if parameters}

    @property
    def num_thought_positions(self) -> int:
        """Positions behind the text that a thought and the true tokens after it take."""
        c = self.config
        return c.use_start + c.num_sampled + c.use_end + c.num_true - 1 if c.num_sampled else 0

    @property
    def _vocabulary(self) -> Tensor:
        """The output projection (V, C)."""
        return self.trunk.get_output_embeddings().weight

    def _embed(self, ids: Tensor) -> Tensor:
        return self.trunk.get_input_embeddings()(ids)

    def _log_probs(self, hidden: Tensor) -> Tensor:
        return torch.log_softmax(scaled_logits(F.linear(hidden, self._vocabulary), 1.0, None), -1)

    def _text(
        self,
        input_ids_BT: Tensor,
        attention_mask_BT: Tensor | None,
        *,
        num_thoughts: int | None = None,
        positions_BN: Tensor | None = None,
    ) -> _Text:
        """The text with its padding: where RoPE counts from, and whether attention has to be told of it."""
        config, real_BT = self.config, torch.ones_like(input_ids_BT, dtype=torch.bool)
        if attention_mask_BT is not None:
            real_BT = attention_mask_BT.bool()
        late = bool((real_BT[:, 1:] > real_BT[:, :-1]).any())  # padding before real text: causality does not hide it
        num_slots = config.use_start + config.num_sampled + config.use_end + config.num_true - 1
        state = ThoughtState(
            Reach(input_ids_BT.shape[1], real_BT if late else None, positions_BN),
            num_thoughts=config.num_thoughts if num_thoughts is None else num_thoughts,
            num_slots=num_slots if config.num_sampled else 0,
        )
        return _Text(input_ids_BT, real_BT, (real_BT.cumsum(1) - 1).clamp(min=0), state)

    def _read(self, text: _Text) -> Tensor:
        """Hidden states (B, T, C) of the text alone."""
        embeds_BTC = self._embed(text.input_ids_BT)
        return run_trunk(self.trunk, embeds_BTC, position_ids_BL=text.position_ids_BT, state=text.state, num_new=0)

    def _continue(self, text: _Text, tokens_BNQKC: Tensor) -> Tensor:
        """Feed every thread its next K tokens; their hidden states (B, N, Q, K, C)."""
        shape = tokens_BNQKC.shape
        steps_K = torch.arange(1, shape[3] + 1, device=tokens_BNQKC.device) + text.state.num_done
        position_ids = text.at_positions(text.position_ids_BT)[:, :, None, None] + steps_K
        hidden_BLC = run_trunk(
            self.trunk,
            tokens_BNQKC.flatten(1, 3),
            position_ids_BL=position_ids.expand(shape[:-1]).flatten(1),
            state=text.state,
            num_new=shape[3],
        )
        return hidden_BLC.view(shape)

    def _think(self, text: _Text, generator: torch.Generator | None, thoughts_BNPM: Tensor | None = None) -> Thinking:
        """Read the text, then sample thoughts token by token, or follow given ones. The last token is not fed yet."""
        base_BTC = self._read(text)
        hidden_BNQC = text.at_positions(base_BTC)[:, :, None]
        if self.start_embedding is not None:  # one START serves all thoughts of a position
            start = self.start_embedding.expand(*hidden_BNQC.shape[:2], 1, 1, -1)
            hidden_BNQC = self._continue(text, start)[:, :, :, 0]
        before: list[Tensor] = [hidden_BNQC]
        tokens: list[Tensor] = []
        for step in range(self.config.num_sampled):
            if step > 0:
                before.append(self._continue(text, self._embed(tokens[-1])[:, :, :, None])[:, :, :, 0])
            if thoughts_BNPM is None:
                tokens.append(self._sample_next(before[-1], text.state.num_thoughts, generator))
            else:
                tokens.append(thoughts_BNPM[..., step])
        return Thinking(base_BTC, before, torch.stack(tokens, -1))

    @torch.no_grad()
    def _sample_next(self, hidden_BNQC: Tensor, num_thoughts: int, generator: torch.Generator | None) -> Tensor:
        return sample_tokens(
            hidden_BNQC,
            weight_VC=self._vocabulary,
            num_thoughts=num_thoughts,
            temperature=self.config.sample_temperature,
            blocked=self.blocked,
            generator=generator,
        )

    def _speak(self, text: _Text, thinking: Thinking, num_true: int) -> Tensor:
        """Feed the last sampled token, END and the true tokens but the last; their hidden states (B, N, P, K, C)."""
        last_BNPC = self._embed(thinking.thoughts_BNPM[..., -1])
        parts = [last_BNPC[:, :, :, None]]
        if self.end_embedding is not None:
            parts.append(self.end_embedding.expand_as(parts[0]))
        if num_true > 1:
            true_BTS = F.pad(text.input_ids_BT, (0, num_true - 1)).unfold(1, num_true, 1)[..., 1:]
            true_BTSC = self._embed(true_BTS)
            parts.append(true_BTSC[:, :, None].expand(-1, -1, last_BNPC.shape[2], -1, -1))
        return self._continue(text, torch.cat(parts, 3))


@dataclass
class _Text:
    input_ids_BT: Tensor
    real_BT: Tensor
    position_ids_BT: Tensor
    state: ThoughtState

    def at_positions(self, values_BT: Tensor) -> Tensor:
        """The values (B, T, ...) at the positions that think, (B, N, ...)."""
        positions_BN = self.state.reach.positions_BN
        if positions_BN is None:
            return values_BT
        return values_BT[torch.arange(len(values_BT), device=values_BT.device)[:, None], positions_BN]

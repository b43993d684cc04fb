"""A language model that thinks before every token: the exact loss, prediction, generation (Section 4).

`ThoughtModel` wraps any supported causal LM of transformers. In training the passes are differentiable as they go, so
that nothing is computed twice and the loss is that of specification 1.2 (the two phases of 6.4 would pay for sampling a
second time; where memory is short, switch activation checkpointing on in the trunk). As in the official code, w
multiplies the prediction after the thought.

Shapes: B sequences, T text tokens, N positions that think, P thoughts per position, M sampled tokens of a thought,
K thread tokens in a pass, S true tokens scored, C hidden size, V vocabulary.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from retrace.papers.quietstar.config import ThoughtConfig
from retrace.papers.quietstar.families import install
from retrace.papers.quietstar.head import OutputHead
from retrace.papers.quietstar.losses import Generators, entropies
from retrace.papers.quietstar.mixing import MixingHead
from retrace.papers.quietstar.objective import Targets, ThoughtOutput, mix, plain_objective, thought_objective
from retrace.papers.quietstar.passes import Passes


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
    prefix: Tensor
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
        prefix_ids: Sequence[int] = (),
    ) -> None:
        """`*_init_id`: token whose embedding START/END begin at. `hidden_token_ids`: never sampled in a thought.

        `prefix_ids`: what every thought begins with, behind START, before its sampled tokens. Weights of the mixing
        head come from torch's global generator. Raises ValueError for a trunk that cannot be served exactly.
        """
        super().__init__()
        install(trunk)
        self.trunk, self.config = trunk, config
        thinks = config.num_sampled > 0
        self.register_buffer("blocked", torch.tensor(sorted(hidden_token_ids), dtype=torch.long), persistent=False)
        prefix = torch.tensor(list(prefix_ids) if thinks else [], dtype=torch.long)
        self.register_buffer("prefix", prefix, persistent=False)
        weight = trunk.get_input_embeddings().weight
        with torch.no_grad():
            start, end = self.embed(torch.tensor([start_init_id, end_init_id], device=weight.device))
        self.register_parameter("start_embedding", nn.Parameter(start) if thinks and config.use_start else None)
        self.register_parameter("end_embedding", nn.Parameter(end) if thinks and config.use_end else None)
        self.mixing_head: MixingHead | None = None
        if thinks and config.mixing_head is not None:
            initializer_range = getattr(trunk.config, "initializer_range", 0.02)
            head = MixingHead(config.mixing_head, hidden_size=len(start), initializer_range=initializer_range)
            self.mixing_head = head.to(device=weight.device, dtype=weight.dtype)

    def forward(
        self, input_ids_BT: Tensor, attention_mask_BT: Tensor | None = None, *, generator: Generators
    ) -> ThoughtOutput:
        """Sample thoughts and score them: one training step's loss. `attention_mask_BT` is 1 at real tokens."""
        return self._loss(input_ids_BT, attention_mask_BT, None, generator)

    def loss(self, input_ids_BT: Tensor, attention_mask_BT: Tensor | None, thoughts_BPNM: Tensor) -> ThoughtOutput:
        """The loss of given thoughts, at the N positions that think. Raises ValueError for sequences too short."""
        return self._loss(input_ids_BT, attention_mask_BT, thoughts_BPNM.transpose(1, 2), None)

    @torch.no_grad()
    def sample(self, input_ids_BT: Tensor, attention_mask_BT: Tensor | None, *, generator: Generators | None) -> Tensor:
        """The thoughts of a training step, (B, P, N, M); the greedy ones without a generator."""
        passes = self._passes(input_ids_BT, attention_mask_BT)
        base_BTC = self._read_and_choose(passes)
        thinking = passes.think(passes.choose(base_BTC), generator)
        return thinking.thoughts_BNPM.transpose(1, 2)

    def _passes(self, input_ids_BT: Tensor, attention_mask_BT: Tensor | None) -> Passes:
        """A training step's: every position with a next token thinks, until others are chosen."""
        positions = range(input_ids_BT.shape[1] - 1)
        num_thoughts = self.config.num_thoughts
        return Passes.over(self, input_ids_BT, attention_mask_BT, positions=positions, num_thoughts=num_thoughts)

    def _loss(
        self,
        input_ids_BT: Tensor,
        attention_mask_BT: Tensor | None,
        thoughts_BNPM: Tensor | None,
        generator: Generators | None,
    ) -> ThoughtOutput:
        config, num_text = self.config, input_ids_BT.shape[1]
        num_true = config.num_true if config.num_sampled else 1
        if num_text < num_true + 2:
            raise ValueError(
                f"sequences have {num_text} tokens, but num_true={config.num_true} needs at least "
                f"{num_true + 2}: use longer sequences or a smaller num_true"
            )
        passes = self._passes(input_ids_BT, attention_mask_BT)
        targets = Targets.of(passes.input_ids_BT, passes.real_BT, num_true)
        base_BTC = self._read_and_choose(passes)
        if config.num_sampled == 0:
            loss, _ = plain_objective(base_BTC[:, :-1], head=self.head, targets=targets, scale=1.0)
            return ThoughtOutput(loss, {"loss/total": loss.detach(), "loss/base": loss.detach()})
        thinking = passes.think(passes.choose(base_BTC), generator, thoughts_BNPM=thoughts_BNPM)
        return thought_objective(
            config,
            base_BTC=base_BTC,
            thinking=thinking,
            after_BNPSC=passes.speak(thinking, num_true)[:, :, :, -num_true:],
            targets=targets,
            positions_BN=passes.choose(torch.arange(num_text, device=input_ids_BT.device).expand_as(input_ids_BT)),
            choose=passes.choose,
            head=self.head,
            mixing_head=self.mixing_head,
            blocked=self.blocked,
        )

    def _read_and_choose(self, passes: Passes) -> Tensor:
        """Read the text and choose where to think as the config says; the text's hidden states (B, T, C)."""
        config, base_BTC = self.config, passes.read()
        batch, num_next = len(base_BTC), base_BTC.shape[1] - 1
        if config.num_sampled == 0 or config.positions == "all":
            return base_BTC
        if config.positions == "every":
            assert config.position_step is not None
            chosen = torch.arange(config.position_step - 1, num_next, config.position_step, device=base_BTC.device)
            passes.think_at(chosen.expand(batch, -1))
            return base_BTC
        assert config.position_share is not None
        entropy_BU = entropies(base_BTC[:, :-1].flatten(0, 1), head=self.head).view(batch, num_next)
        entropy_BU = entropy_BU.masked_fill(~(passes.real_BT[:, :-1] & passes.real_BT[:, 1:]), -1.0)
        hardest_BN = entropy_BU.topk(math.ceil(config.position_share * num_next), dim=1).indices
        passes.think_at(hardest_BN.sort(1).values)
        return base_BTC

    @torch.no_grad()
    def predict(
        self,
        input_ids_BT: Tensor,
        attention_mask_BT: Tensor | None,
        positions_BN: Tensor,
        *,
        generator: Generators | None,
        num_thoughts: int = 1,
    ) -> Prediction:
        """What follows the text up to and including `positions_BN`, thinking only there; greedily without a generator.

        `hidden_token_ids` are kept out of thoughts only: predictions are over the whole vocabulary.
        """
        passes = Passes.over(self, input_ids_BT, attention_mask_BT, positions=positions_BN, num_thoughts=num_thoughts)
        return self.predict_next(passes, passes.choose(passes.read()), generator)

    @torch.no_grad()
    def predict_next(
        self, passes: Passes, base_BNC: Tensor, generator: Generators | None, *, opened_BNC: Tensor | None = None
    ) -> Prediction:
        """What follows the positions of `passes`, where the text has the hidden states `base_BNC`; see `think`."""
        num_thoughts, base_BNV = passes.state.num_thoughts, self.head.log_probs(base_BNC)
        if self.config.num_sampled == 0:
            thoughts = passes.input_ids_BT.new_empty(len(base_BNV), num_thoughts, base_BNV.shape[1], 0)
            return Prediction(base_BNV, base_BNV, base_BNV.new_zeros(base_BNV.shape[:2]), thoughts)
        thinking = passes.think(base_BNC, generator, opened_BNC=opened_BNC)
        after_BNPSC = passes.speak(thinking, 1)[:, :, :, -1:]
        mixed_BNPSC, weight_BNPS = mix(self.mixing_head, base_BNC, after_BNPSC, choose=lambda values: values)
        return Prediction(
            base_BNV=base_BNV,
            mixed_BNV=self.head.log_probs(mixed_BNPSC[:, :, :, 0]).logsumexp(2) - math.log(num_thoughts),
            weight_BN=weight_BNPS[..., 0].mean(-1),
            thoughts_BPNM=thinking.thoughts_BNPM.transpose(1, 2),
        )

    @torch.no_grad()
    def predict_base(self, input_ids_BT: Tensor, attention_mask_BT: Tensor | None, positions_BN: Tensor) -> Tensor:
        """Next-token log-probabilities after chosen positions without thinking (B, N, V): `Prediction.base_BNV`."""
        passes = Passes.over(self, input_ids_BT, attention_mask_BT, positions=positions_BN, num_thoughts=0)
        return self.head.log_probs(passes.choose(passes.read()))

    def parameter_groups(self) -> dict[str, list[nn.Parameter]]:
        """Every parameter once, under "trunk", "mixing_head" or "meta" (START and END); empty groups are left out.

        The official code gives the meta embeddings 100 times the trunk's learning rate (specification 1.3).
        """
        head = [] if self.mixing_head is None else list(self.mixing_head.parameters())
        meta = [p for p in (self.start_embedding, self.end_embedding) if p is not None]
        groups = {"trunk": list(self.trunk.parameters()), "mixing_head": head, "meta": meta}
        return {name: parameters for name, parameters in groups.items() if parameters}

    @property
    def head(self) -> OutputHead:
        """The output projection with its present weights."""
        return OutputHead.of(self.trunk)

    @property
    def num_thought_positions(self) -> int:
        """Positions behind the text that a thought and the true tokens after it take."""
        c = self.config
        return c.use_start + len(self.prefix) + c.num_sampled + c.use_end + c.num_true - 1 if c.num_sampled else 0

    def require_room(self, num_text: int) -> None:
        """Raise ValueError where texts of `num_text` tokens with their thoughts need more positions than there are."""
        most = getattr(self.trunk.config, "max_position_embeddings", None)
        if most is not None and num_text + self.num_thought_positions > most:
            raise ValueError(
                f"texts of {num_text} tokens and thoughts of {self.num_thought_positions} positions do not fit into "
                f"the {most} that this {self.trunk.config.model_type} has: use texts of at most "
                f"{max(0, most - self.num_thought_positions)} tokens, or a smaller num_sampled or num_true"
            )

    def embed(self, ids: Tensor) -> Tensor:
        """Input embeddings (..., C) of token ids, scaled where the family scales them there."""
        embedded: Tensor = self.trunk.get_input_embeddings()(ids)
        return embedded

    def opening(self) -> Tensor | None:
        """START and the forced prefix (K, C), what every thought begins with; None where there is neither."""
        parts = [] if self.start_embedding is None else [self.start_embedding[None]]
        parts += [self.embed(self.prefix)] if len(self.prefix) else []
        return torch.cat(parts) if parts else None

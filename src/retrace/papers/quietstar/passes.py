"""One text and the thoughts after it, pass by pass: read, think, speak (specification 1.2).

Training, prediction and generation are the same passes: the text once per sequence; START and a forced prefix, once for
all thoughts of a position; each sampled token; and in the last pass END and the true tokens together.

Shapes: B sequences, T text tokens, N positions that think, P thoughts per position, M sampled tokens of a thought,
Q thoughts in a pass (P, or 1 while they share their tokens), K thread tokens in a pass, S true tokens, C hidden size.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from retrace.papers.quietstar.attention import ThoughtState, run_trunk
from retrace.papers.quietstar.losses import Generators, sample_tokens, uniform
from retrace.papers.quietstar.memory import Reach
from retrace.papers.quietstar.objective import Thinking, following

if TYPE_CHECKING:
    from retrace.papers.quietstar.model import ThoughtModel


@dataclass
class Passes:
    """A text that is read once, and thoughts at some of its positions."""

    model: ThoughtModel
    input_ids_BT: Tensor
    real_BT: Tensor
    position_ids_BT: Tensor
    state: ThoughtState

    @classmethod
    def over(
        cls,
        model: ThoughtModel,
        input_ids_BT: Tensor,
        attention_mask_BT: Tensor | None,
        *,
        positions: range | Tensor,
        num_thoughts: int,
        capacity: int | None = None,
    ) -> Passes:
        """`num_thoughts` at each of `positions`, a range or (B, N). With a `capacity` more text can follow.

        Raises ValueError where the trunk has no room for them.
        """
        num_text = input_ids_BT.shape[1]
        model.require_room(capacity or num_text)
        real_BT = torch.ones_like(input_ids_BT, dtype=torch.bool)
        if attention_mask_BT is not None:
            real_BT = attention_mask_BT.bool()
        late = bool((real_BT[:, 1:] > real_BT[:, :-1]).any())  # padding before real text: causality does not hide it
        state = ThoughtState(
            Reach(num_text, positions, real_BT if late else None),
            num_thoughts=num_thoughts,
            num_slots=model.num_thought_positions if num_thoughts else 0,
            capacity=capacity,
        )
        return cls(model, input_ids_BT, real_BT, (real_BT.cumsum(1) - 1).clamp(min=0), state)

    def choose(self, values: Tensor) -> Tensor:
        """The values (B, T, ...) at the positions that think, (B, N, ...)."""
        positions = self.state.reach.positions
        if isinstance(positions, range):
            return values[:, positions.start : positions.stop]
        return values[torch.arange(len(values), device=values.device)[:, None], positions]

    def think_at(self, positions_BN: Tensor) -> None:
        """Choose other positions, after the text is read and before the first thought."""
        self.state.reach = replace(self.state.reach, positions=positions_BN)

    def read(self) -> Tensor:
        """Hidden states (B, L, C) of the text that has not been read yet."""
        begin = self.state.num_read
        embeds_BLC = self.model.embed(self.input_ids_BT[:, begin:])
        ids_BL = self.position_ids_BT[:, begin:]
        return run_trunk(self.model.trunk, embeds_BLC, position_ids_BL=ids_BL, state=self.state, num_new=0)

    def read_and_open(self) -> tuple[Tensor, Tensor | None]:
        """In one pass the text that has not been read yet and what opens the thought after it.

        Hidden states (B, 1, C) of the last token of each; None where nothing opens a thought. For a text whose only
        thread is its own continuation (`ThoughtState.is_tail`).
        """
        opening_KC = self.model.opening() if self.state.num_slots else None
        if opening_KC is None:
            return self.read()[:, -1:], None
        begin, num_opening = self.state.num_read, len(opening_KC)
        read_BLC, ids_BL = self.model.embed(self.input_ids_BT[:, begin:]), self.position_ids_BT[:, begin:]
        steps_K = torch.arange(1, num_opening + 1, device=ids_BL.device)
        hidden_BLC = run_trunk(
            self.model.trunk,
            torch.cat([read_BLC, opening_KC.expand(len(read_BLC), -1, -1)], 1),
            position_ids_BL=torch.cat([ids_BL, ids_BL[:, -1:] + steps_K], 1),
            state=self.state,
            num_new=0,
        )
        self.state.num_done = num_opening
        return hidden_BLC[:, -1 - num_opening, None], hidden_BLC[:, -1:]

    def append(self, tokens_B: Tensor) -> None:
        """One more token of text for every sequence; thoughts come after it, and the old ones are forgotten."""
        ids, self.state.num_done = tokens_B[:, None], 0
        self.input_ids_BT = torch.cat([self.input_ids_BT, ids], 1)
        self.real_BT = torch.cat([self.real_BT, torch.ones_like(ids, dtype=torch.bool)], 1)
        self.position_ids_BT = torch.cat([self.position_ids_BT, self.position_ids_BT[:, -1:] + 1], 1)
        num_text, padded = self.input_ids_BT.shape[1], self.state.reach.text_allowed_BT is not None
        self.state.reach = Reach(num_text, range(num_text - 1, num_text), self.real_BT if padded else None)

    def think(
        self,
        base_BNC: Tensor,
        generator: Generators | None,
        *,
        thoughts_BNPM: Tensor | None = None,
        opened_BNC: Tensor | None = None,
    ) -> Thinking:
        """Sample thoughts after the text's hidden states, or follow given ones. The last token is not fed yet.

        Noise comes position by position, so that further positions leave that of the first ones as it is. `opened_BNC`:
        hidden states of what opens a thought, where that has been read already.
        """
        model, hidden_BNQC = self.model, base_BNC[:, :, None]
        shape = (*base_BNC.shape[:2], self.state.num_thoughts, model.config.num_sampled)
        noise_BNPM = None if generator is None else uniform(shape, generator, base_BNC.device)
        if opened_BNC is not None:
            hidden_BNQC = opened_BNC[:, :, None]
        elif (opening_KC := model.opening()) is not None:  # one opening serves all thoughts of a position
            tokens = opening_KC.expand(*hidden_BNQC.shape[:2], 1, -1, -1)
            hidden_BNQC = self._continue(tokens)[:, :, :, -1]
        before: list[Tensor] = [hidden_BNQC]
        tokens_BNP: list[Tensor] = []
        for step in range(model.config.num_sampled):
            if step > 0:
                before.append(self._continue(model.embed(tokens_BNP[-1])[:, :, :, None])[:, :, :, 0])
            if thoughts_BNPM is not None:
                tokens_BNP.append(thoughts_BNPM[..., step])
                continue
            token_BNP = sample_tokens(
                before[-1],
                head=model.head,
                num_thoughts=self.state.num_thoughts,
                temperature=model.config.sample_temperature,
                blocked=model.blocked,
                noise_BNP=None if noise_BNPM is None else noise_BNPM[..., step],
            )
            tokens_BNP.append(token_BNP)
        return Thinking(before, torch.stack(tokens_BNP, -1))

    def speak(self, thinking: Thinking, num_true: int) -> Tensor:
        """Feed the last sampled token, END and the true tokens but the last; their hidden states (B, N, P, K, C)."""
        last_BNPC = self.model.embed(thinking.thoughts_BNPM[..., -1])
        parts = [last_BNPC[:, :, :, None]]
        if self.model.end_embedding is not None:
            parts.append(self.model.end_embedding.expand_as(parts[0]))
        if num_true > 1:
            true_BNS = self.choose(following(self.input_ids_BT, num_true))[..., 1:]
            true_BNPSC = self.model.embed(true_BNS)[:, :, None].expand(-1, -1, last_BNPC.shape[2], -1, -1)
            parts.append(true_BNPSC)
        return self._continue(torch.cat(parts, 3))

    def _continue(self, tokens_BNQKC: Tensor) -> Tensor:
        """Feed every thread its next K tokens; their hidden states (B, N, Q, K, C)."""
        shape = tokens_BNQKC.shape
        steps_K = torch.arange(1, shape[3] + 1, device=tokens_BNQKC.device) + self.state.num_done
        position_ids = self.choose(self.position_ids_BT)[:, :, None, None] + steps_K
        hidden_BLC = run_trunk(
            self.model.trunk,
            tokens_BNQKC.flatten(1, 3),
            position_ids_BL=position_ids.expand(shape[:-1]).flatten(1),
            state=self.state,
            num_new=shape[3],
        )
        return hidden_BLC.view(shape)

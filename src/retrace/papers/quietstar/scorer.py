"""A thinking model as a scorer: a thought before each scored or generated token, or none at all.

Shapes: B rows, T tokens, N positions of a row, L new tokens, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from retrace.core.data import generator
from retrace.core.scoring import PositionScorer
from retrace.papers.quietstar.generation import generate
from retrace.papers.quietstar.model import ThoughtModel

BATCH_TOKENS = 8192


class ThoughtScorer(PositionScorer):
    """Answers with a thought before each token that is scored or generated (`think`), or without any.

    `thought_seed` None: greedy thoughts, as the paper evaluates; else sampled ones, a row's noise from this and the
    row alone. `batch_size` None: as many rows as `BATCH_TOKENS` hold.
    """

    def __init__(
        self,
        model: ThoughtModel,
        tokenizer: PreTrainedTokenizerBase,
        *,
        think: bool,
        thought_seed: int | None,
        batch_size: int | None = None,
    ) -> None:
        super().__init__(
            tokenizer,
            max_length=model.trunk.config.max_position_embeddings - model.num_thought_positions,
            batch_tokens=BATCH_TOKENS,
            batch_size=batch_size,
            device=model.trunk.device,
        )
        self.model, self.think, self.thought_seed = model, think, thought_seed

    def logits(
        self, input_ids_BT: Tensor, attention_mask_BT: Tensor, positions_BN: Tensor, *, seeds: Sequence[int]
    ) -> Tensor:
        """Next-token log-probabilities (B, N, V)."""
        if not self.think:
            return self.model.predict_base(input_ids_BT, attention_mask_BT, positions_BN)
        noise = thought_noise(self.thought_seed, seeds, self.device)
        return self.model.predict(input_ids_BT, attention_mask_BT, positions_BN, generator=noise).mixed_BNV

    @torch.inference_mode()
    def generate(
        self,
        contexts: Sequence[list[int]],
        *,
        stop: Sequence[str],
        max_new_tokens: int,
        temperature: float,
        seeds: Sequence[int],
    ) -> list[str]:
        """See `requests.Scorer`; with cached keys and values."""
        ids_BT, mask_BT = self._pad(contexts, side="left")

        def ended(tokens_BL: Tensor) -> Tensor:
            return torch.tensor([self._has_ended(row, stop) for row in tokens_BL.tolist()], device=tokens_BL.device)

        tokens_BL = generate(
            self.model,
            ids_BT,
            mask_BT,
            max_new_tokens=max_new_tokens,
            eos_token_id=self.tokenizer.eos_token_id,
            temperature=temperature,
            generator=[generator(seed, "tokens", device=self.device) for seed in seeds] if temperature else None,
            think=self.think,
            thought_generator=thought_noise(self.thought_seed, seeds, self.device),
            stop=ended,
        )
        return self.tokenizer.batch_decode(tokens_BL, skip_special_tokens=True)


def thought_noise(
    thought_seed: int | None, seeds: Sequence[int], device: torch.device | str
) -> list[torch.Generator] | None:
    """The noise of each row's thoughts, from its own seed and that of all thoughts; None where they are greedy."""
    if thought_seed is None:
        return None
    return [generator(thought_seed, "thoughts", seed, device=device) for seed in seeds]

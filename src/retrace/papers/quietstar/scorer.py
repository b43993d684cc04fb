"""A thinking model as a scorer: a thought before each scored or generated token, or none at all.

Shapes: B rows, T tokens, N positions of a row, P thoughts a position (1), M tokens of a thought, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from retrace.core.data import generator
from retrace.core.scoring import PositionScorer
from retrace.papers.quietstar.model import Prediction, ThoughtModel

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
        found = predict(
            self.model, input_ids_BT, attention_mask_BT, positions_BN, seeds=seeds, thought_seed=self.thought_seed
        )
        return found.mixed_BNV


def predict(
    model: ThoughtModel,
    input_ids_BT: Tensor,
    attention_mask_BT: Tensor,
    positions_BN: Tensor,
    *,
    seeds: Sequence[int],
    thought_seed: int | None,
) -> Prediction:
    """`ThoughtModel.predict` after one greedy thought, or a sampled one with noise from (thought_seed, row's seed).

    Rows are padded on the right. Rows with noise are read one by one, each without its padding, since
    `ThoughtModel.predict` takes a single stream of noise for all that it is given; what is asked for behind the end of
    a row is the prediction at its end.
    """
    if thought_seed is None:
        return model.predict(input_ids_BT, attention_mask_BT, positions_BN, generator=None)
    parts = []
    for ids_T, mask_T, positions_N, seed in zip(input_ids_BT, attention_mask_BT, positions_BN, seeds, strict=True):
        own_T = ids_T[mask_T.bool()]
        own_N, place_N = positions_N.clamp(max=len(own_T) - 1).unique_consecutive(return_inverse=True)
        noise = generator(thought_seed, "thoughts", seed, device=ids_T.device)
        found = model.predict(own_T[None], None, own_N[None], generator=noise)
        fields = (found.base_BNV, found.mixed_BNV, found.weight_BN, found.thoughts_BPNM.transpose(1, 2))
        parts.append([field[:, place_N] for field in fields])
    base_BNV, mixed_BNV, weight_BN, thoughts_BNPM = (torch.cat(column) for column in zip(*parts, strict=True))
    return Prediction(base_BNV, mixed_BNV, weight_BN, thoughts_BNPM.transpose(1, 2))

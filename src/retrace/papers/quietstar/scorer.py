"""A thinking model as a scorer: a thought before each scored or generated token, or none at all.

Shapes: B rows, T tokens, N scored positions of a row, V vocabulary, A allowed tokens, L new tokens.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from transformers import PreTrainedTokenizerBase

from retrace.core.data import derive_seed, generator
from retrace.core.requests import Request, Sampling
from retrace.papers.quietstar.generation import generate
from retrace.papers.quietstar.model import ThoughtModel

BATCH_TOKENS = 8192  # of a padded batch, a matter of memory alone


class _Row(NamedTuple):
    """What is read, and the positions whose next token is scored."""

    input_ids: tuple[int, ...]
    positions: tuple[int, ...]


def _share_rows(
    requests: Sequence[Request], allowed: Sequence[int] | None
) -> tuple[dict[_Row, list[int]], list[list[int]]]:
    """The rows, each with its requests, and of each request the scored tokens, as indices into `allowed` if given."""
    index = None if allowed is None else {token: i for i, token in enumerate(allowed)}
    rows: dict[_Row, list[int]] = {}
    targets: list[list[int]] = []
    for i, (context, continuation) in enumerate(requests):
        scored = [j for j, token in enumerate(continuation) if index is None or token in index]
        if not scored:
            raise ValueError(f"token ids {continuation} hold none of the allowed answers: there is nothing to score")
        row = _Row((*context, *continuation[:-1]), tuple(len(context) - 1 + j for j in scored))
        rows.setdefault(row, []).append(i)
        targets.append([continuation[j] if index is None else index[continuation[j]] for j in scored])
    return rows, targets


class ThoughtScorer:
    """A `requests.Scorer` with a thought before each token that is scored or generated (`think`), or without any.

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
        self.model, self.tokenizer, self.think, self.thought_seed = model, tokenizer, think, thought_seed
        self.max_length = model.trunk.config.max_position_embeddings - model.num_thought_positions
        self.batch_tokens, self.batch_size = BATCH_TOKENS, batch_size
        self.device = model.trunk.device

    def batches(self, requests: Sequence[Request], *, room: int) -> list[list[int]]:
        """See `requests.Scorer`; the longest rows first, so that a lack of memory shows at once.

        Requests that differ in the last token alone, such as the options of a question, are one row: read once, and
        compared under the same noise.
        """
        rows: dict[tuple[int, ...], list[int]] = {}
        for i, (context, continuation) in enumerate(requests):
            rows.setdefault((*context, *continuation[:-1]), []).append(i)
        units: list[tuple[int, list[int]]] = []  # length, and the requests of a row
        for row, same in rows.items():
            units += [(len(row) + room, [i]) for i in same] if room else [(len(row), same)]
        found: list[list[int]] = []
        longest = num_rows = 0
        for length, unit in sorted(units, key=lambda unit: -unit[0]):
            if not found or num_rows == self.batch_size or longest * (num_rows + 1) > self.batch_tokens:
                found.append([])
                longest, num_rows = length, 0
            found[-1] += unit
            num_rows += 1
        return found

    @torch.inference_mode()
    def loglikelihood(self, requests: Sequence[Request], *, allowed: Sequence[int] | None) -> list[tuple[float, bool]]:
        """See `requests.Scorer`."""
        rows, targets = _share_rows(requests, allowed)
        results: list[tuple[float, bool]] = [(0.0, False)] * len(requests)
        ids_BT, mask_BT = self._pad([row.input_ids for row in rows])
        most = max(len(row.positions) for row in rows)
        positions = [[*row.positions, *[row.positions[-1]] * (most - len(row.positions))] for row in rows]
        seeds = [row_seed(row.input_ids) for row in rows]
        logits_BNV = self.logits(ids_BT, mask_BT, torch.tensor(positions, device=self.device), seeds=seeds).float()
        logits_BNA = logits_BNV if allowed is None else logits_BNV[..., list(allowed)]
        log_probs_BNA, best_BN = logits_BNA.log_softmax(-1).cpu(), logits_BNA.argmax(-1).tolist()
        for asked, log_probs_NA, best in zip(rows.values(), log_probs_BNA, best_BN, strict=True):
            for i in asked:
                right = targets[i]
                results[i] = (log_probs_NA[range(len(right)), right].sum().item(), best[: len(right)] == right)
        return results

    def logits(
        self, input_ids_BT: Tensor, attention_mask_BT: Tensor, positions_BN: Tensor, *, seeds: Sequence[int]
    ) -> Tensor:
        """Next-token log-probabilities after the given positions (B, N, V); rows are padded on the right."""
        if not self.think:
            return self.model.predict_base(input_ids_BT, attention_mask_BT, positions_BN)
        noise = thought_noise(self.thought_seed, seeds, self.device)
        return self.model.predict(input_ids_BT, attention_mask_BT, positions_BN, generator=noise).mixed_BNV

    @torch.inference_mode()
    def generate(self, contexts: Sequence[list[int]], settings: Sampling, *, seeds: Sequence[int]) -> list[str]:
        """See `requests.Scorer`; with cached keys and values."""
        ids_BT, mask_BT = self._pad(contexts, side="left")

        noise = [generator(seed, "tokens", device=self.device) for seed in seeds]

        def ended(tokens_BL: Tensor) -> Tensor:
            ends = [self._has_ended(row, settings.stop) for row in tokens_BL.tolist()]
            return torch.tensor(ends, device=tokens_BL.device)

        tokens_BL = generate(
            self.model,
            ids_BT,
            mask_BT,
            max_new_tokens=settings.max_new_tokens,
            eos_token_id=self.tokenizer.eos_token_id,
            temperature=settings.temperature,
            generator=noise if settings.temperature else None,
            think=self.think,
            thought_generator=thought_noise(self.thought_seed, seeds, self.device),
            stop=ended,
        )
        return self.tokenizer.batch_decode(tokens_BL, skip_special_tokens=True)

    def _has_ended(self, ids: Sequence[int], stop: Sequence[str]) -> bool:
        if ids[-1] == self.tokenizer.eos_token_id:
            return True
        text = self.tokenizer.decode(ids)
        return any(end in text for end in stop)

    def _pad(self, rows: Sequence[Sequence[int]], *, side: str = "right") -> tuple[Tensor, Tensor]:
        """Token ids, padded with zeros, and their mask, both (B, T)."""
        ids = [torch.tensor(row) for row in rows]
        masks = [torch.ones(len(row), dtype=torch.long) for row in rows]
        ids_BT, mask_BT = (pad_sequence(part, batch_first=True, padding_side=side) for part in (ids, masks))
        return ids_BT.to(self.device), mask_BT.to(self.device)


def row_seed(input_ids: Sequence[int]) -> int:
    """A seed that follows from what is read, so that a row's noise is the same in every batch, task and limit."""
    return derive_seed(0, "row", *input_ids)


def thought_noise(
    thought_seed: int | None, seeds: Sequence[int], device: torch.device | str
) -> list[torch.Generator] | None:
    """The noise of each row's thoughts, from its own seed and that of all thoughts; None where they are greedy."""
    if thought_seed is None:
        return None
    return [generator(thought_seed, "thoughts", seed, device=device) for seed in seeds]

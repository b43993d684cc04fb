"""Scorers for evaluate.py: batches of requests, read off the logits at the few positions that are scored.

Shapes: B rows, T tokens, N scored positions of a row, V vocabulary, A allowed tokens, L new tokens.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from transformers.generation import LogitsProcessor, LogitsProcessorList, StoppingCriteria, StoppingCriteriaList

from retrace.core.data import derive_seed, draw, generator

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from retrace.core.requests import Request


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


class PositionScorer(ABC):
    """A Scorer made of `logits`. Its `generate` reads the whole row again for every token: override it where one can.

    `max_length`: tokens that fit into the model. `batch_tokens`: tokens of a padded batch, a matter of memory alone;
    `batch_size`: rows of a batch at most.
    """

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        *,
        max_length: int,
        batch_tokens: int,
        device: torch.device | str,
        batch_size: int | None = None,
    ) -> None:
        self.tokenizer = tokenizer
        self.max_length = max_length
        self.batch_tokens = batch_tokens
        self.batch_size = batch_size
        self.device = device

    @abstractmethod
    def logits(
        self, input_ids_BT: Tensor, attention_mask_BT: Tensor, positions_BN: Tensor, *, seeds: Sequence[int]
    ) -> Tensor:
        """Next-token logits or log-probabilities after the given positions (B, N, V); rows are padded on the right.

        All noise of a row, if there is any, comes from its seed.
        """

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
        """See `requests.Scorer`."""
        new: list[list[int]] = [[] for _ in contexts]
        noise_BL = token_noise(seeds, max_new_tokens)
        live = list(range(len(contexts)))
        for step in range(max_new_tokens):
            ids_BT, mask_BT = self._pad([contexts[i] + new[i] for i in live])
            last_B1 = mask_BT.sum(-1, keepdim=True) - 1
            steps = [derive_seed(seeds[i], "step", step) for i in live]
            logits_BV = self.logits(ids_BT, mask_BT, last_B1, seeds=steps)[:, 0]
            tokens = choose(logits_BV, temperature=temperature, noise_B=noise_BL[live, step]).tolist()
            for i, token in zip(live, tokens, strict=True):
                new[i].append(token)
            live = [i for i in live if not self._has_ended(new[i], stop)]
            if not live:
                break
        return self.tokenizer.batch_decode(new, skip_special_tokens=True)

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


def token_noise(seeds: Sequence[int], num_tokens: int) -> Tensor:
    """Uniform noise (B, L) for the tokens of each row, from its seed alone."""
    return torch.stack([torch.rand(num_tokens, generator=generator(seed, "tokens")) for seed in seeds])


def choose(logits_BV: Tensor, *, temperature: float, noise_B: Tensor) -> Tensor:
    """The token (B) that the noise draws; the likeliest at temperature 0."""
    if temperature == 0:
        return logits_BV.argmax(-1)
    return draw(logits_BV / temperature, noise_B.to(logits_BV.device)[:, None])[:, 0]


class CausalLMScorer(PositionScorer):
    """Any transformers causal LM as it is; switches it to evaluation mode."""

    def __init__(self, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, *, batch_tokens: int) -> None:
        max_length = model.config.max_position_embeddings
        super().__init__(tokenizer, max_length=max_length, batch_tokens=batch_tokens, device=model.device)
        self.model = model.eval()

    def logits(
        self,
        input_ids_BT: Tensor,
        attention_mask_BT: Tensor,
        positions_BN: Tensor,
        *,
        seeds: Sequence[int],  # noqa: ARG002
    ) -> Tensor:
        """Next-token logits after the given positions, the head applied to no others' columns (B, N, V)."""
        columns_C, inverse = positions_BN.unique(return_inverse=True)
        output = self.model(
            input_ids=input_ids_BT, attention_mask=attention_mask_BT, logits_to_keep=columns_C, use_cache=False
        )
        rows_B1 = torch.arange(len(positions_BN), device=positions_BN.device)[:, None]
        return output.logits[rows_B1, inverse]

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
        """See `requests.Scorer`; with the model's key-value cache."""
        ids_BT, mask_BT = self._pad(contexts, side="left")
        start = ids_BT.shape[1]
        drawn = _Drawn(token_noise(seeds, max_new_tokens), temperature=temperature, start=start)
        output_BT = self.model.generate(
            input_ids=ids_BT,
            attention_mask=mask_BT,
            max_new_tokens=max_new_tokens,
            do_sample=False,  # its sampling shares one stream of noise among the rows: ours is in `drawn`
            eos_token_id=self.tokenizer.eos_token_id,
            pad_token_id=self.tokenizer.eos_token_id or 0,
            logits_processor=LogitsProcessorList([drawn] if temperature else []),
            stopping_criteria=StoppingCriteriaList([_Ended(self, stop, start=start)]),
        )
        return self.tokenizer.batch_decode(output_BT[:, start:], skip_special_tokens=True)


class _Drawn(LogitsProcessor):
    """Leaves of each row the one token that its noise draws."""

    def __init__(self, noise_BL: Tensor, *, temperature: float, start: int) -> None:
        self.noise_BL, self.temperature, self.start = noise_BL, temperature, start

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        noise_B = self.noise_BL[:, input_ids.shape[1] - self.start]
        tokens_B = choose(scores, temperature=self.temperature, noise_B=noise_B)
        return torch.full_like(scores, -torch.inf).scatter_(1, tokens_B[:, None], 0.0)


class _Ended(StoppingCriteria):
    """Ends each row at its first stop string; transformers' own criterion assumes that tokens carry their spaces."""

    def __init__(self, scorer: PositionScorer, stop: Sequence[str], *, start: int) -> None:
        self.scorer, self.stop, self.start = scorer, stop, start

    def __call__(self, input_ids: Tensor, scores: Any, **kwargs: Any) -> Tensor:  # noqa: ARG002
        ended = [self.scorer._has_ended(row, self.stop) for row in input_ids[:, self.start :].tolist()]
        return torch.tensor(ended, device=input_ids.device)

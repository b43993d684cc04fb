"""Scorers for evaluate.py: batches of requests, read off the logits at the few positions that are scored.

Shapes: B rows, T tokens, N scored positions of a row, V vocabulary, A allowed tokens.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from transformers.generation import StoppingCriteria, StoppingCriteriaList

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from retrace.core.evaluate import Request


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

    `max_length`: tokens that fit into the model. `batch_tokens`: tokens of a padded batch, a matter of memory alone.
    """

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        *,
        max_length: int,
        batch_tokens: int,
        device: torch.device | str,
    ) -> None:
        self.tokenizer = tokenizer
        self.max_length = max_length
        self.batch_tokens = batch_tokens
        self.device = device

    @abstractmethod
    def logits(self, input_ids_BT: Tensor, attention_mask_BT: Tensor, positions_BN: Tensor) -> Tensor:
        """Next-token logits or log-probabilities after the given positions (B, N, V); rows are padded on the right."""

    @torch.inference_mode()
    def loglikelihood(self, requests: Sequence[Request], *, allowed: Sequence[int] | None) -> list[tuple[float, bool]]:
        """See `evaluate.Scorer`.

        Requests that differ in the last token alone, such as the options of a question, are one row: read once, and
        compared under the same noise where `logits` is noisy.
        """
        rows, targets = _share_rows(requests, allowed)
        order = list(rows)
        results: list[tuple[float, bool]] = [(0.0, False)] * len(requests)
        for batch in self._batches([row.input_ids for row in order]):
            ids_BT, mask_BT = self._pad([order[b].input_ids for b in batch])
            most = max(len(order[b].positions) for b in batch)
            positions = [[*p, *[p[-1]] * (most - len(p))] for p in (order[b].positions for b in batch)]
            logits_BNV = self.logits(ids_BT, mask_BT, torch.tensor(positions, device=self.device)).float()
            logits_BNA = logits_BNV if allowed is None else logits_BNV[..., list(allowed)]
            log_probs_BNA, best_BN = logits_BNA.log_softmax(-1).cpu(), logits_BNA.argmax(-1).tolist()
            for b, log_probs_NA, best in zip(batch, log_probs_BNA, best_BN, strict=True):
                for i in rows[order[b]]:
                    right = targets[i]
                    results[i] = (log_probs_NA[range(len(right)), right].sum().item(), best[: len(right)] == right)
        return results

    @torch.inference_mode()
    def generate(self, contexts: Sequence[list[int]], *, stop: Sequence[str], max_new_tokens: int) -> list[str]:
        """See `evaluate.Scorer`."""
        new: list[list[int]] = [[] for _ in contexts]
        for batch in self._batches(contexts, room=max_new_tokens):
            live = batch
            for _ in range(max_new_tokens):
                ids_BT, mask_BT = self._pad([contexts[i] + new[i] for i in live])
                last_B1 = mask_BT.sum(-1, keepdim=True) - 1
                for i, token in zip(live, self.logits(ids_BT, mask_BT, last_B1)[:, 0].argmax(-1).tolist(), strict=True):
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

    def _batches(self, rows: Sequence[Sequence[int]], *, room: int = 0) -> Iterator[list[int]]:
        """Indices of rows, the longest first, so that rows of a batch are alike and a lack of memory shows at once."""
        batch: list[int] = []
        for i in sorted(range(len(rows)), key=lambda i: -len(rows[i])):
            longest = len(rows[batch[0] if batch else i]) + room
            if batch and longest * (len(batch) + 1) > self.batch_tokens:
                yield batch
                batch = []
            batch.append(i)
        if batch:
            yield batch

    def _pad(self, rows: Sequence[Sequence[int]], *, side: str = "right") -> tuple[Tensor, Tensor]:
        """Token ids, padded with zeros, and their mask, both (B, T)."""
        ids = [torch.tensor(row) for row in rows]
        masks = [torch.ones(len(row), dtype=torch.long) for row in rows]
        ids_BT, mask_BT = (pad_sequence(part, batch_first=True, padding_side=side) for part in (ids, masks))
        return ids_BT.to(self.device), mask_BT.to(self.device)


class CausalLMScorer(PositionScorer):
    """Any transformers causal LM as it is; switches it to evaluation mode."""

    def __init__(self, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, *, batch_tokens: int) -> None:
        max_length = model.config.max_position_embeddings
        super().__init__(tokenizer, max_length=max_length, batch_tokens=batch_tokens, device=model.device)
        self.model = model.eval()

    def logits(self, input_ids_BT: Tensor, attention_mask_BT: Tensor, positions_BN: Tensor) -> Tensor:
        """Next-token logits after the given positions, the head applied to no others' columns (B, N, V)."""
        columns_C, inverse = positions_BN.unique(return_inverse=True)
        output = self.model(
            input_ids=input_ids_BT, attention_mask=attention_mask_BT, logits_to_keep=columns_C, use_cache=False
        )
        rows_B1 = torch.arange(len(positions_BN), device=positions_BN.device)[:, None]
        return output.logits[rows_B1, inverse]

    @torch.inference_mode()
    def generate(self, contexts: Sequence[list[int]], *, stop: Sequence[str], max_new_tokens: int) -> list[str]:
        """See `evaluate.Scorer`; with the model's key-value cache."""
        texts = [""] * len(contexts)
        for batch in self._batches(contexts, room=max_new_tokens):
            ids_BT, mask_BT = self._pad([contexts[i] for i in batch], side="left")
            length = ids_BT.shape[1]
            output_BT = self.model.generate(
                input_ids=ids_BT,
                attention_mask=mask_BT,
                max_new_tokens=max_new_tokens,
                do_sample=False,
                eos_token_id=self.tokenizer.eos_token_id,
                pad_token_id=self.tokenizer.eos_token_id or 0,
                stopping_criteria=StoppingCriteriaList([_Ended(self, stop, start=length)]),
            )
            decoded = self.tokenizer.batch_decode(output_BT[:, length:], skip_special_tokens=True)
            for i, text in zip(batch, decoded, strict=True):
                texts[i] = text
        return texts


class _Ended(StoppingCriteria):
    """Ends each row at its first stop string; transformers' own criterion assumes that tokens carry their spaces."""

    def __init__(self, scorer: PositionScorer, stop: Sequence[str], *, start: int) -> None:
        self.scorer, self.stop, self.start = scorer, stop, start

    def __call__(self, input_ids: Tensor, scores: Any, **kwargs: Any) -> Tensor:  # noqa: ARG002
        ended = [self.scorer._has_ended(row, self.stop) for row in input_ids[:, self.start :].tolist()]
        return torch.tensor(ended, device=input_ids.device)

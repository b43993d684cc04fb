"""What a multimodal model says to a prompt with images: text, greedily, and likelihoods of given answers (Section 3.4).

Prompts are sequences of pieces, as documents are; images may stand anywhere, and all of a call have one size.

Shapes: B prompts, T positions, N tokens of an image, C hidden size.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from transformers import DynamicCache

from retrace.papers.mm1.model import MultimodalModel
from retrace.papers.mm1.rows import Piece

Prompt = Sequence[Piece]
IMAGES_AT_ONCE = 64


@torch.inference_mode()
def generate(
    model: MultimodalModel, prompts: Sequence[Prompt], *, max_new_tokens: int, stop: Collection[int] = ()
) -> list[list[int]]:
    """New tokens of each prompt, greedily, up to `max_new_tokens` or one of `stop`, which is left out.

    No image token is ever written. Raises ValueError for an empty prompt.
    """
    with _evaluating(model):
        embeddings = prompt_embeddings(model, prompts)
        reversed_BTC = pad_sequence([x_TC.flip(0) for x_TC in embeddings], batch_first=True)
        lengths_B = torch.tensor([len(x_TC) for x_TC in embeddings], device=reversed_BTC.device)
        behind_T = torch.arange(reversed_BTC.shape[1], 0, -1, device=lengths_B.device)  # positions from here to the end
        mask_BT = (behind_T <= lengths_B[:, None]).long()
        found_BT = _continue(model, reversed_BTC.flip(1), mask_BT, max_new_tokens=max_new_tokens, stop=stop)
    return [_until(row, stop) for row in found_BT.tolist()]


def _continue(
    model: MultimodalModel, inputs_BTC: Tensor, mask_BT: Tensor, *, max_new_tokens: int, stop: Collection[int]
) -> Tensor:
    """New tokens of prompts that are padded on the left, with cached keys and values; until all have met a stop."""
    stops, cache = torch.tensor(sorted(stop), dtype=torch.long, device=mask_BT.device), DynamicCache()
    unwritten = torch.tensor([model.image_token_id], device=mask_BT.device)
    positions_BT = (mask_BT.cumsum(1) - 1).clamp(min=0)
    found_BT = mask_BT.new_empty(len(mask_BT), 0)
    ended_B = mask_BT.new_zeros(len(mask_BT), dtype=torch.bool)
    while found_BT.shape[1] < max_new_tokens and not bool(ended_B.all()):
        hidden_BTC = model.decoder.trunk.model(
            inputs_embeds=inputs_BTC,
            attention_mask=mask_BT,
            position_ids=positions_BT,
            past_key_values=cache,
            use_cache=True,
        ).last_hidden_state
        token_B = model.decoder.logits(hidden_BTC[:, -1]).index_fill(1, unwritten, -torch.inf).argmax(1)
        found_BT = torch.cat([found_BT, token_B[:, None]], 1)
        ended_B = ended_B | torch.isin(token_B, stops)
        inputs_BTC, positions_BT = model.decoder.embed(token_B[:, None]), positions_BT[:, -1:] + 1
        mask_BT = torch.cat([mask_BT, mask_BT.new_ones(len(mask_BT), 1)], 1)
    return found_BT


@torch.inference_mode()
def log_likelihoods(
    model: MultimodalModel, prompts: Sequence[Prompt], candidates: Sequence[Sequence[Sequence[int]]]
) -> list[list[float]]:
    """Log-probability in nats of each candidate behind its prompt, summed over the candidate's tokens.

    A prompt is read once: its candidates stand behind it in one row, and each sees the prompt and itself. Raises
    ValueError for an empty prompt or candidate.
    """
    for number, choices in enumerate(candidates):
        if not choices or not all(choices):
            raise ValueError(
                f"prompt {number}: candidates={choices!r}: expected at least one, each of at least one token"
            )
    with _evaluating(model):
        rows = [
            _Branches.of(model, prompt_TC, choices)
            for prompt_TC, choices in zip(prompt_embeddings(model, prompts), candidates, strict=True)
        ]
        hidden_BTC = model.decoder.trunk.model(
            inputs_embeds=pad_sequence([row.embeddings_TC for row in rows], batch_first=True),
            position_ids=pad_sequence([row.position_ids_T for row in rows], batch_first=True),
            attention_mask=_visible(pad_sequence([row.branch_T for row in rows], batch_first=True, padding_value=-1)),
            use_cache=False,
        ).last_hidden_state
        return [row.score(model, hidden_TC) for row, hidden_TC in zip(rows, hidden_BTC, strict=True)]


@dataclass(frozen=True)
class _Branches:
    """A prompt (branch 0) and behind it the candidates (branches 1...), each without its last token."""

    embeddings_TC: Tensor
    position_ids_T: Tensor  # of a candidate, as if it stood right behind the prompt
    branch_T: Tensor
    candidates: Sequence[Sequence[int]]

    @classmethod
    def of(cls, model: MultimodalModel, prompt_TC: Tensor, candidates: Sequence[Sequence[int]]) -> _Branches:
        start = len(prompt_TC)
        ids: list[int] = []
        positions, branches = [*range(start)], [0] * start
        for number, choice in enumerate(candidates, start=1):
            ids += choice[:-1]
            positions += range(start, start + len(choice) - 1)
            branches += [number] * (len(choice) - 1)
        ids_T, positions_T, branch_T = (
            torch.tensor(x, dtype=torch.long, device=prompt_TC.device) for x in (ids, positions, branches)
        )
        return cls(torch.cat([prompt_TC, model.decoder.embed(ids_T)]), positions_T, branch_T, candidates)

    def score(self, model: MultimodalModel, hidden_TC: Tensor) -> list[float]:
        """Of each candidate, from the hidden states of this row."""
        last = next_free = int((self.branch_T == 0).sum())
        reading: list[int] = []
        for choice in self.candidates:
            reading += [last - 1, *range(next_free, next_free + len(choice) - 1)]
            next_free += len(choice) - 1
        targets = torch.tensor([token for choice in self.candidates for token in choice], device=hidden_TC.device)
        log_probs = model.decoder.logits(hidden_TC[reading]).log_softmax(-1).gather(1, targets[:, None])[:, 0]
        return [float(part.sum()) for part in log_probs.split([len(choice) for choice in self.candidates])]


def prompt_embeddings(model: MultimodalModel, prompts: Sequence[Prompt]) -> list[Tensor]:
    """The decoder's input for each prompt, (T, C). Raises ValueError for an empty prompt."""
    for number, prompt in enumerate(prompts):
        if not any(piece.token_ids or piece.image is not None for piece in prompt):
            raise ValueError(f"prompt {number} is empty: give it at least one token, such as the beginning of sequence")
    device = next(model.parameters()).device
    images = [piece.image for prompt in prompts for piece in prompt if piece.image is not None]
    chunks = [images[start : start + IMAGES_AT_ONCE] for start in range(0, len(images), IMAGES_AT_ONCE)]
    tokens = iter([found_NC for chunk in chunks for found_NC in model.image_tokens(torch.stack(chunk).to(device))])
    return [
        torch.cat(
            [
                model.decoder.embed(torch.tensor(piece.token_ids, dtype=torch.long, device=device))
                if piece.image is None
                else next(tokens)
                for piece in prompt
            ]
        )
        for prompt in prompts
    ]


def _visible(branch_BT: Tensor) -> Tensor:
    """Which position (columns) each sees, (B, 1, T, T): the prompt's and its own branch's, up to itself."""
    same_BTT = branch_BT[:, :, None] == branch_BT[:, None]
    earlier_TT = torch.ones_like(same_BTT[0]).tril()
    return ((same_BTT | (branch_BT == 0)[:, None]) & earlier_TT)[:, None]


def _until(row: list[int], stop: Collection[int]) -> list[int]:
    return row[: next((place for place, token in enumerate(row) if token in stop), len(row))]


@contextmanager
def _evaluating(model: MultimodalModel) -> Iterator[None]:
    """Without dropout, and as it was behind."""
    training = model.training
    model.eval()
    try:
        yield
    finally:
        model.train(training)

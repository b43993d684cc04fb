"""What every token of a text gains from the thoughts before it, as frozen values.

    model, tokenizer = from_pretrained("runs/quietstar-train-.../model")
    found = inspect(model, tokenizer, "Q: ...", decoding=Decoding(num_samples=3, seed=0))
    found.tokens[7].gain, found.tokens[7].thoughts[0].text

Logits exist for a chunk of positions at a time, so memory does not grow with the text. Shapes: T tokens read, N
positions of a chunk that think, V vocabulary, M tokens of a thought; there is one sequence.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from retrace.core.data import generator
from retrace.papers.quietstar.documents import Document, from_text
from retrace.papers.quietstar.gains import GREEDY, Decoding, Inspection, Thought, TokenGain
from retrace.papers.quietstar.model import ThoughtModel

CHUNK_LOGITS = 2**24  # next-token probabilities alive at a time: 64 MiB in fp32, a few times over
CHUNK_POSITIONS = (16, 1024)  # least and most positions of a chunk, whatever the vocabulary

Progress = Callable[[int, int], None]  # (tokens looked at, tokens in all)


def inspect(
    model: ThoughtModel,
    tokenizer: PreTrainedTokenizerBase,
    text: str,
    *,
    decoding: Decoding = GREEDY,
    window: int | None = None,
    on_progress: Progress | None = None,
) -> Inspection:
    """Let the model think before every token of a text, and compare.

    A text that does not fit into the model's positions is refused, unless `window` says how many tokens to read at
    once; then each token but the first ones is predicted from at least half a window.
    Raises ValueError for a model without thoughts, an empty text, and a text or window that is too long.
    """
    return inspect_document(
        model, tokenizer, from_text(tokenizer, text), decoding=decoding, window=window, on_progress=on_progress
    )


@torch.inference_mode()
def inspect_document(
    model: ThoughtModel,
    tokenizer: PreTrainedTokenizerBase,
    document: Document,
    *,
    decoding: Decoding = GREEDY,
    window: int | None = None,
    on_progress: Progress | None = None,
) -> Inspection:
    """The same for tokens that are at hand already."""
    if model.config.num_sampled == 0:
        raise ValueError("the model never thinks (thoughts.num_sampled=0): expected one that was trained with thoughts")
    if len(document.context) + len(document.ids) < 2:
        raise ValueError("the text has one token and nothing before it, so nothing is predicted: give a longer text")
    model, decoding, noises = _prepared(model, decoding)
    tokens = [] if document.context else [_unpredicted(document)]
    chunk = _chunk_size(model)
    for start, stop in _spans(len(document.ids), room=_room(model, document, window)):
        row_1T = torch.tensor([[*document.context, *document.ids[start:stop]]], device=model.trunk.device)
        shift = len(document.context) - start
        while len(tokens) < stop:
            first, last = len(tokens), min(len(tokens) + chunk, stop)
            columns = _think(model, row_1T[:, : last + shift], num_scored=last - first, noises=noises)
            tokens += _rows(columns, document, first, tokenizer)
            if on_progress is not None:
                on_progress(len(tokens), len(document.ids))
    return Inspection(decoding=decoding, tokens=tuple(tokens))


def _prepared(model: ThoughtModel, decoding: Decoding) -> tuple[ThoughtModel, Decoding, list[torch.Generator | None]]:
    """The model at the temperature asked for, the decoding with that temperature, and noise for each sample."""
    if decoding.num_samples is None:
        return model, decoding, [None]
    if decoding.temperature is None:
        decoding = decoding.model_copy(update={"temperature": model.config.sample_temperature})
    model = copy.copy(model)  # shares every weight
    model.config = model.config.model_copy(update={"sample_temperature": decoding.temperature})
    device = model.trunk.device
    return (
        model,
        decoding,
        [generator(decoding.seed, "think", i, device=device) for i in range(decoding.num_samples or 0)],
    )


def _spans(num_tokens: int, *, room: int) -> Iterator[tuple[int, int]]:
    """(start, stop) of the tokens that are read at once; the first half of each but the first is context alone."""
    start = 0
    while start + room < num_tokens:
        yield start, start + room
        start += room - room // 2
    yield start, num_tokens


def _room(model: ThoughtModel, document: Document, window: int | None) -> int:
    """How many of the document's tokens are read at once; raises ValueError where that can't be."""
    positions = getattr(model.trunk.config, "max_position_embeddings", None)
    beside = model.num_thought_positions + len(document.context)
    fits = max(len(document.ids), window or 0) if positions is None else positions - beside
    if fits < 2:
        raise ValueError(f"the model has {positions} positions, and a thought takes {beside}: nothing can be read")
    if window is None and len(document.ids) > fits:
        raise ValueError(
            f"the text has {len(document.ids)} tokens, and the model has {positions} positions, {beside} of which the "
            f"start of a text and a thought take: shorten the text, or read it in windows with --window {fits}"
        )
    if window is not None and not 2 <= window <= fits:
        raise ValueError(f"window={window}: expected 2 to {fits} tokens, which is what the model's positions allow")
    return fits if window is None else window


def _chunk_size(model: ThoughtModel) -> int:
    least, most = CHUNK_POSITIONS
    return max(least, min(most, CHUNK_LOGITS // model.trunk.config.vocab_size))


@dataclass(frozen=True)
class _Columns:
    """For the N tokens scored and the P samples of a chunk, on the CPU in fp64."""

    base_N: Tensor
    mixed_PN: Tensor
    weight_PN: Tensor
    thoughts_PNM: Tensor


def _think(
    model: ThoughtModel, ids_1T: Tensor, *, num_scored: int, noises: Sequence[torch.Generator | None]
) -> _Columns:
    """Score the last tokens of a text, each after a thought of its own for every generator."""
    length = ids_1T.shape[1]
    positions_1N = torch.arange(length - num_scored - 1, length - 1, device=ids_1T.device)[None]
    target_1N1 = ids_1T[:, -num_scored:, None]
    base, mixed, weights, thoughts = [], [], [], []
    for noise in noises:
        found = model.predict(ids_1T[:, :-1], None, positions_1N, generator=noise)
        base.append(found.base_BNV.gather(-1, target_1N1)[0, :, 0])
        mixed.append(found.mixed_BNV.gather(-1, target_1N1)[0, :, 0])
        weights.append(found.weight_BN[0])
        thoughts.append(found.thoughts_BPNM[0, 0])
    columns = _Columns(
        base[0].double().cpu(),
        torch.stack(mixed).double().cpu(),
        torch.stack(weights).double().cpu(),
        torch.stack(thoughts).cpu(),
    )
    if not bool(columns.base_N.isfinite().all() & columns.mixed_PN.isfinite().all()):
        raise ValueError("the model's log-probabilities are not finite: its weights are damaged, or overflow its dtype")
    return columns


def _rows(columns: _Columns, document: Document, first: int, tokenizer: PreTrainedTokenizerBase) -> Iterator[TokenGain]:
    """A chunk as values, beginning at the document's token `first`."""
    gain_PN = columns.mixed_PN - columns.base_N
    log_prob_N = columns.mixed_PN.logsumexp(0) - math.log(len(gain_PN))
    for column in range(len(log_prob_N)):
        base, log_prob = columns.base_N[column].item(), log_prob_N[column].item()
        thoughts = [
            Thought(
                text=tokenizer.decode(ids, skip_special_tokens=False),
                token_ids=tuple(ids),
                gain=gain_PN[sample, column].item(),
                weight=columns.weight_PN[sample, column].item(),
            )
            for sample, ids in enumerate(columns.thoughts_PNM[:, column].tolist())
        ]
        yield TokenGain(
            text=document.pieces[first + column],
            id=document.ids[first + column],
            log_prob_base=base,
            log_prob=log_prob,
            gain=log_prob - base,
            weight=columns.weight_PN[:, column].mean().item(),
            thoughts=tuple(thoughts),
        )


def _unpredicted(document: Document) -> TokenGain:
    nothing: dict[str, None] = dict.fromkeys(("log_prob_base", "log_prob", "gain", "weight"))
    return TokenGain(text=document.pieces[0], id=document.ids[0], thoughts=(), **nothing)

"""Token ids with the pieces of text that they stand for, so that what is shown is the document as it was written."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from transformers import PreTrainedTokenizerBase

BROKEN = "\ufffd"  # how a decoder shows a character whose bytes are not all there yet


@dataclass(frozen=True)
class Document:
    """`pieces` are one for each of `ids`, and make up the document; `context` is read before every part of it."""

    context: tuple[int, ...]  # what the tokenizer puts before a text, such as a begin-of-sequence token
    ids: tuple[int, ...]
    pieces: tuple[str, ...]


def from_text(tokenizer: PreTrainedTokenizerBase, text: str) -> Document:
    """A text as written: what lies between two tokens, such as spaces, goes with the later one.

    Of a character that several tokens spell, the first has all of it and the others nothing. Raises ValueError for a
    text without tokens, and for a tokenizer that does not say where its tokens stand.
    """
    if not tokenizer.is_fast:
        raise ValueError(f"{type(tokenizer).__name__} does not say where in a text its tokens stand: use a fast one")
    found = tokenizer(text, return_offsets_mapping=True, return_special_tokens_mask=True, verbose=False)
    ids, places = found["input_ids"], found["offset_mapping"]
    inner = [i for i, special in enumerate(found["special_tokens_mask"]) if not special]
    if not text.strip() or not inner:
        raise ValueError("the text is empty: give a sentence, a file with --file, or - and text on standard input")
    pieces, end = [], 0
    for i in inner:
        stop = max(end, places[i][1])
        pieces.append(text[end:stop])
        end = stop
    pieces[-1] += text[end:]
    return Document(tuple(ids[: inner[0]]), tuple(ids[i] for i in inner), tuple(pieces))


def from_ids(tokenizer: PreTrainedTokenizerBase, ids: Sequence[int]) -> Document:
    """Tokens without a text, such as a training window, in the words of the tokenizer's decoder.

    Special tokens within are shown by name; a begin-of-sequence token at the start is context.
    """
    num_context = int(len(ids) > 0 and ids[0] == tokenizer.bos_token_id)
    context, inner = ids[:num_context], ids[num_context:]
    return Document(tuple(context), tuple(inner), tuple(_decoded(tokenizer, inner)))


def _decoded(tokenizer: PreTrainedTokenizerBase, ids: Sequence[int]) -> Iterator[str]:
    """What each token adds to the text before it."""
    before = ""
    for i in range(len(ids)):
        text = tokenizer.decode(ids[: i + 1], skip_special_tokens=False).rstrip(BROKEN)
        yield text[len(before) :] if text.startswith(before) else tokenizer.decode(ids[i : i + 1])
        before = text

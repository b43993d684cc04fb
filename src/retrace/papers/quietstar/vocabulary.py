"""The words that the tokenizer knows, in the order of their ids; planning a run needs only this of the tokenizer."""

from __future__ import annotations

import re
import string
from functools import lru_cache

from retrace.papers.quietstar import words

START, END = "<|startthought|>", "<|endthought|>"
PAD, BOS, EOS, UNKNOWN = "<pad>", "<bos>", "<eos>", "<unk>"
SPECIAL = (PAD, BOS, EOS, UNKNOWN, START, END)
CONTINUED = "##"  # a character inside of a word that is not in the vocabulary

# The label of an option, the 's of a possessive, a word, or any one other character; the spaces between are dropped.
PIECE = r"\([A-E]\)|'s(?![A-Za-z])|[A-Za-z]+|[^A-Za-z \t\r\f\v]"


@lru_cache(maxsize=1)
def vocabulary() -> dict[str, int]:
    """Token -> id."""
    characters = [chr(code) for code in range(128) if chr(code) not in " \t\r\f\v"]
    continued = [CONTINUED + letter for letter in string.ascii_letters]
    return {token: index for index, token in enumerate([*SPECIAL, *characters, *continued, *_corpus_words()])}


def _corpus_words() -> list[str]:
    texts = (
        *words.ENTITIES, *words.RELATIONS, *words.COLORS, *words.NUMBERS, *words.PERSONS, *words.THINGS, *words.NOUNS,
        *words.PLACES, *words.VERBS, *words.ADJECTIVES, *words.TIMES, *words.PROSE, *words.OPERATIONS, *words.ORDER,
        *words.ENDINGS,
        "From the What is it color has How many now Now 's (A) (B) (C) (D) (E)",
    )  # fmt: skip
    pieces = re.findall(PIECE, " ".join(re.sub(r"\{\w+\}", " ", text) for text in texts))
    return sorted({piece for piece in pieces if len(piece) > 1})

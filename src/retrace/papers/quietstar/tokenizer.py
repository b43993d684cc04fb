"""A small word-level tokenizer, built here: the corpus's words, and characters for every other word.

Spaces are not tokens: "42" is the tokens 4, 2, and " A" is the token A, the same one as in "(A)". Decoding puts the
spaces of ordinary English back. Text outside of ASCII is reduced to it, so that no text has an unknown token.
"""

from __future__ import annotations

import re
import string
from functools import lru_cache

from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

from retrace.papers.quietstar import words

START, END = "<|startthought|>", "<|endthought|>"
PAD, BOS, EOS, UNKNOWN = "<pad>", "<bos>", "<eos>", "<unk>"
SPECIAL = (PAD, BOS, EOS, UNKNOWN, START, END)
CONTINUED = "##"  # a character inside of a word that is not in the vocabulary

# The label of an option, the 's of a possessive, a word, or any one other character; what lies between is dropped: spaces.
PIECE = r"\([A-E]\)|'s(?![A-Za-z])|[A-Za-z]+|[^A-Za-z \t\r\f\v]"
# Spaces that stand between two tokens but not in English: before closing and after opening marks, inside of numbers.
NO_SPACE = r" (?=[.,;:?!)%\n]|'s(?![A-Za-z]))|(?<=[($\n]) |(?<=[0-9]) (?=[0-9])"


def _corpus_words() -> list[str]:
    texts = (
        *words.ENTITIES, *words.RELATIONS, *words.NUMBERS, *words.PERSONS, *words.THINGS, *words.NOUNS, *words.PLACES,
        *words.VERBS, *words.ADJECTIVES, *words.TIMES, *words.PROSE, *words.OPERATIONS, *words.ORDER,
        "From the Who is has How many now Now it 's (A) (B) (C) (D) (E)",
    )  # fmt: skip
    pieces = re.findall(PIECE, " ".join(re.sub(r"\{\w+\}", " ", text) for text in texts))
    return sorted({piece for piece in pieces if len(piece) > 1})


@lru_cache(maxsize=1)
def build_tokenizer() -> PreTrainedTokenizerFast:
    """The one tokenizer of the procedural corpus, whatever its config; <bos> opens every encoded text."""
    characters = [chr(code) for code in range(128) if chr(code) not in " \t\r\f\v"]
    continued = [CONTINUED + letter for letter in string.ascii_letters]
    vocabulary = {token: index for index, token in enumerate([*SPECIAL, *characters, *continued, *_corpus_words()])}
    model = models.WordPiece(vocabulary, unk_token=UNKNOWN, continuing_subword_prefix=CONTINUED, max_input_chars_per_word=10**6)
    tokenizer = Tokenizer(model)
    tokenizer.normalizer = normalizers.Sequence(
        [
            normalizers.Replace(Regex("[\u2018\u2019]"), "'"),
            normalizers.NFKD(),
            normalizers.StripAccents(),
            normalizers.Replace(Regex("[^\\x00-\\x7F]"), "?"),
        ]
    )
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex(PIECE), behavior="removed", invert=True)
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{BOS} $A", pair=f"{BOS} $A $B", special_tokens=[(BOS, vocabulary[BOS])]
    )
    spacing = decoders.Replace(Regex(NO_SPACE), "")
    tokenizer.decoder = decoders.Sequence([decoders.WordPiece(prefix=CONTINUED, cleanup=False), decoders.Fuse(), spacing])
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token=PAD,
        bos_token=BOS,
        eos_token=EOS,
        unk_token=UNKNOWN,
        additional_special_tokens=[START, END],
        clean_up_tokenization_spaces=False,
    )

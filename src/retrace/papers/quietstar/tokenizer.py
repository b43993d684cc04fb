"""The two tokenizers made here: word-level for the procedural corpus, byte-level BPE for real text.

The word-level one knows the corpus's words, and characters for every other word.

Spaces are not tokens: "42" is the tokens 4, 2, and " A" is the token A, the same one as in "(A)". Decoding puts the
spaces of ordinary English back. Text outside of ASCII is reduced to it, so that no text has an unknown token.
"""

from __future__ import annotations

from collections.abc import Iterable
from functools import lru_cache

from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

from retrace.core.bpe import train_bpe
from retrace.papers.quietstar.vocabulary import BOS, CONTINUED, END, EOS, PAD, PIECE, START, UNKNOWN, vocabulary

# Spaces that stand between two tokens but not in English: before closing and after opening marks, inside of numbers.
NO_SPACE = r" (?=[.,;:?!)%\n]|'s(?![A-Za-z]))|(?<=[($\n]) |(?<=[0-9]) (?=[0-9])"


@lru_cache(maxsize=1)
def build_tokenizer() -> PreTrainedTokenizerFast:
    """The one tokenizer of the procedural corpus, whatever its config; <bos> opens every encoded text."""
    ids = vocabulary()
    model = models.WordPiece(
        ids, unk_token=UNKNOWN, continuing_subword_prefix=CONTINUED, max_input_chars_per_word=10**6
    )
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
        single=f"{BOS} $A", pair=f"{BOS} $A $B", special_tokens=[(BOS, ids[BOS])]
    )
    spacing = decoders.Replace(Regex(NO_SPACE), "")
    tokenizer.decoder = decoders.Sequence(
        [decoders.WordPiece(prefix=CONTINUED, cleanup=False), decoders.Fuse(), spacing]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token=PAD,
        bos_token=BOS,
        eos_token=EOS,
        unk_token=UNKNOWN,
        additional_special_tokens=[START, END],
        clean_up_tokenization_spaces=False,
    )


def train_tokenizer(texts: Iterable[str], *, vocab_size: int) -> PreTrainedTokenizerFast:
    """Byte-level BPE of `vocab_size` tokens in which every digit is a token; <bos> opens every encoded text."""
    return train_bpe(
        texts,
        vocab_size=vocab_size,
        key="corpus.vocab_size",
        opening=BOS,
        pad_token=PAD,
        bos_token=BOS,
        eos_token=EOS,
        additional_special_tokens=[START, END],
    )

"""A byte-level BPE tokenizer trained on texts that are at hand."""

from __future__ import annotations

from collections.abc import Iterable

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast


def train_bpe(
    texts: Iterable[str],
    *,
    vocab_size: int,
    key: str,
    opening: str | None = None,
    additional_special_tokens: list[str] | None = None,
    **special: str,
) -> PreTrainedTokenizerFast:
    """Byte-level BPE of `vocab_size` tokens in which every digit is a token.

    `special`: pad_token, bos_token, eos_token, ... as transformers names them; they have the first ids, in their order.
    `opening`: one of them that opens every encoded text. `key`: the config key of the size, for the error.
    Raises ValueError where the texts give fewer tokens.
    """
    more = additional_special_tokens or []
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    tokenizer.train_from_iterator(
        texts,
        trainers.BpeTrainer(
            vocab_size=vocab_size,
            special_tokens=[*special.values(), *more],
            initial_alphabet=alphabet,
            show_progress=False,
        ),
    )
    found = tokenizer.get_vocab_size()
    if found != vocab_size:
        raise ValueError(f"{key}={vocab_size}: the base text gives only {found} tokens; ask for fewer")
    if opening is not None:
        tokenizer.post_processor = processors.TemplateProcessing(
            single=f"{opening} $A",
            pair=f"{opening} $A $B",
            special_tokens=[(opening, tokenizer.token_to_id(opening))],
        )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        additional_special_tokens=more,
        clean_up_tokenization_spaces=False,
        **special,
    )

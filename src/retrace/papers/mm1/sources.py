"""From a config to what training reads: tokenizer, sources of documents, rows of a window.

Shapes: B rows, L positions, M images, R pixels a side.
"""

from __future__ import annotations

import itertools
import logging
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from typing import Any, Literal, cast, get_args

from tokenizers import AddedToken
from torch import Tensor
from transformers import AutoTokenizer, PreTrainedTokenizerBase, PreTrainedTokenizerFast

from retrace.core.bpe import train_bpe
from retrace.core.context import Context
from retrace.core.data import derive_seed
from retrace.core.optim import Optim
from retrace.core.weights import load_pretrained
from retrace.papers.mm1.choices import Corpora, PretrainedDecoder, ScratchDecoder, SourceName
from retrace.papers.mm1.config import SUB_IMAGES, Rows
from retrace.papers.mm1.corpora import HubDataset, ImageFolder, LocalShards
from retrace.papers.mm1.corpus_source import CorpusSource, is_said, warn_of_end
from retrace.papers.mm1.documents import Kind, ProceduralSource, build_tokenizer
from retrace.papers.mm1.lines import EndsEarly
from retrace.papers.mm1.mixture import Mixture
from retrace.papers.mm1.packing import Window
from retrace.papers.mm1.parts import PartsSource, WordsSource
from retrace.papers.mm1.stream import Ahead, Source, Stream
from retrace.papers.mm1.subimages import split_images
from retrace.papers.mm1.world import IMAGE, PAD, WorldConfig

TOKENIZER, MARKS, WORDS = "tokenizer", "marks", "_words"
BatchOf = Callable[[range], Mapping[str, Tensor]]
log = logging.getLogger(__name__)


def train_tokenizer(data: Corpora) -> tuple[PreTrainedTokenizerFast, dict[str, int]]:
    """A byte-level BPE of the corpus' text, and counts of what was left out, as the notes of a stream name them.

    Raises ValueError where there is too little of it.
    """
    left_out = {"data/text/without_text": 0, "data/text/short_shards": 0}
    tokenizer = train_bpe(
        itertools.islice(_texts(data.sources["text"], left_out), data.num_bpe_documents),
        vocab_size=data.vocab_size,
        key="photos.vocab_size (without data=${photos}: data.vocab_size)",
        pad_token=PAD,
        bos_token="<bos>",
        eos_token="<eos>",
        additional_special_tokens=[IMAGE],
    )
    return tokenizer, left_out


def _texts(corpus: ImageFolder | LocalShards | HubDataset, left_out: dict[str, int]) -> Iterator[str]:
    """The texts of a corpus, where training finds some too; what is left out is counted."""
    for shard in corpus.shards():
        number = 0
        try:
            for row in shard.rows(0):
                number += 1
                text = row.get(corpus.text_field)
                if is_said(text):
                    yield text
                    continue
                if not left_out["data/text/without_text"]:
                    log.warning("%s: row %d has no text: left out; others are only counted", shard.name, number - 1)
                left_out["data/text/without_text"] += 1
        except EndsEarly as error:
            warn_of_end(shard.name, number, error)
            left_out["data/text/short_shards"] += 1


def load_tokenizer(
    data: WorldConfig | Corpora, decoder: ScratchDecoder | PretrainedDecoder | None, ctx: Context
) -> PreTrainedTokenizerBase:
    """The world's words, the tokenizer of parent `tokenizer`, or the decoder's own with an image token behind it."""
    if isinstance(data, WorldConfig):
        return build_tokenizer()
    if "tokenizer" in ctx.parents:
        found: PreTrainedTokenizerBase = load_pretrained(AutoTokenizer, ctx.parents["tokenizer"].path / TOKENIZER)
        return found
    assert isinstance(decoder, PretrainedDecoder), "a tokenizer comes from somewhere"
    own: PreTrainedTokenizerBase = load_pretrained(AutoTokenizer, decoder.place(), revision=decoder.revision)
    own.add_special_tokens({"additional_special_tokens": [AddedToken(IMAGE, special=True)]})
    if own.pad_token_id is None:
        own.pad_token = own.eos_token
    if len(own) > decoder.vocab_size + 1:  # fewer where the embedding is padded
        raise ValueError(
            f"decoder.vocab_size={decoder.vocab_size}: the tokenizer of {decoder.name} has {len(own) - 1} tokens"
        )
    return own


def image_id(tokenizer: PreTrainedTokenizerBase) -> int:
    """The token that holds an image's places."""
    found = tokenizer.convert_tokens_to_ids(IMAGE)
    assert isinstance(found, int)
    return found


def source(
    data: WorldConfig | Corpora, name: str, tokenizer: PreTrainedTokenizerBase, *, seed: int, purpose: str
) -> Source:
    """The documents of one kind; those of two purposes differ, where they are drawn.

    Procedural ones too: "parts" of captions, and "caption_words", "interleaved_words" without their images.
    """
    if isinstance(data, WorldConfig) and name == "parts":
        return PartsSource(data, "synthetic", derive_seed(seed, purpose))
    if isinstance(data, WorldConfig) and name.endswith(WORDS):
        return WordsSource(data, cast(Kind, name.removesuffix(WORDS)), derive_seed(seed, purpose))
    if isinstance(data, WorldConfig):
        assert name in get_args(Kind), name
        return ProceduralSource(data, cast(Kind, name), derive_seed(seed, purpose))
    corpus = data.instruction if name == "instruction" else data.sources[cast(SourceName, name)]
    assert corpus is not None, "the config was checked"
    return CorpusSource(corpus, tokenizer, seed=derive_seed(seed, purpose))


def window_of(
    rows: Rows,
    tokenizer: PreTrainedTokenizerBase,
    *,
    image_tokens: int,
    sub_images: bool = False,
    too_long: Literal["cut", "trim"] = "cut",
) -> Window:
    """What a row holds. Documents that are too long are cut, or trimmed: what is cut off has lost its image."""
    pad = tokenizer.pad_token_id
    assert isinstance(pad, int)
    return Window(
        rows.seq_len,
        image_tokens,
        rows.max_images,
        pad_id=pad,
        image_id=image_id(tokenizer),
        sub_images=SUB_IMAGES if sub_images else 1,
        too_long=too_long,
    )


def stream(
    data: WorldConfig | Corpora,
    mixture: Mixture,
    tokenizer: PreTrainedTokenizerBase,
    *,
    window: Window,
    image_size: int,
    seed: int,
    purpose: str,
    ctx: Context,
) -> Stream:
    """The rows of a mixture."""
    split: Callable[..., Any] | None = partial(split_images, side=image_size // 2) if window.sub_images > 1 else None
    own: dict[str, Source] = {name: source(data, name, tokenizer, seed=seed, purpose=purpose) for name in mixture.used}
    marks: dict[str, Any] = {"marks": ctx.run.path / MARKS, "write": ctx.is_main}
    return Stream(mixture, own, window=window, image_size=image_size, seed=seed, split=split, **marks)


def ahead(rows: BatchOf, optim: Optim, ctx: Context) -> BatchOf:
    """The rows of a training; made while the model works, where a core is free for that."""
    free = ctx.hardware.device == "cuda" or ctx.hardware.has_spare_core
    if not free:
        return rows
    between = optim.micro_batch_size * ctx.hardware.processes  # rows, from one batch of a process to its next
    return Ahead(rows, between=between, end=optim.steps * optim.batch_size)

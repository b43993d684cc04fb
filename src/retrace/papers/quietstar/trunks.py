"""Where trunks come from: random weights, a run's folder, or a pretrained model; and how one is made to think."""

from __future__ import annotations

from typing import Literal

import torch
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

from retrace.core.context import Context
from retrace.core.data import derive_seed
from retrace.core.weights import load_pretrained, note_commit
from retrace.papers.quietstar.config import Corpus, Model, ThoughtConfig
from retrace.papers.quietstar.model import ThoughtModel
from retrace.papers.quietstar.models import ScratchModel
from retrace.papers.quietstar.texts import TextCorpusConfig
from retrace.papers.quietstar.tokenizer import build_tokenizer, train_tokenizer
from retrace.papers.quietstar.vocabulary import END, START

SIZES = {  # the config's names, and transformers'
    "hidden_size": "hidden_size",
    "num_layers": "num_hidden_layers",
    "num_heads": "num_attention_heads",
    "num_kv_heads": "num_key_value_heads",
    "intermediate_size": "intermediate_size",
    "vocab_size": "vocab_size",
}
MAX_POSITIONS = 4096  # of the trunks trained here; real questions spelled in characters are long


def build_trunk(model: ScratchModel, tokenizer: PreTrainedTokenizerBase, *, seed: int) -> PreTrainedModel:
    """A transformers decoder with random weights that follow from the seed."""
    settings = AutoConfig.for_model(
        model.architecture,
        vocab_size=len(tokenizer),
        hidden_size=model.hidden_size,
        num_hidden_layers=model.num_layers,
        num_attention_heads=model.num_heads,
        num_key_value_heads=model.num_kv_heads,
        intermediate_size=model.intermediate_size,
        max_position_embeddings=MAX_POSITIONS,
        tie_word_embeddings=model.tie_embeddings,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    torch.manual_seed(derive_seed(seed, "trunk"))
    return AutoModelForCausalLM.from_config(settings, dtype=torch.float32)


def base_tokenizer(corpus: Corpus) -> PreTrainedTokenizerBase:
    """The tokenizer that a model from scratch gets: the word-level one, or one trained on the base's text."""
    if isinstance(corpus, TextCorpusConfig):
        assert corpus.vocab_size is not None
        return train_tokenizer(corpus.documents("base"), vocab_size=corpus.vocab_size)
    return build_tokenizer()


def load_base(model: Model, ctx: Context, *, dtype: torch.dtype) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """The model that thoughts are added to, in `dtype`, and its tokenizer.

    Raises ValueError for one of other sizes than the config says.
    """
    if isinstance(model, ScratchModel):
        name, revision = str(ctx.parents["base"].path / "model"), "main"
    else:
        name, revision = str(model.folder() or model.name), model.revision
    trunk, tokenizer = load_trunk(name, revision=revision, dtype=dtype)
    for key, theirs in SIZES.items():
        stated = getattr(model, key, None)  # the vocabulary of a model from scratch is the tokenizer's
        found = getattr(trunk.config, theirs, stated)
        if stated is not None and stated != found:
            raise ValueError(f"model.{key}={stated}: {name} is another model, with {found}; the plan counts with it")
    note_commit(ctx.notes, name, revision=revision)
    return trunk, tokenizer


def load_trunk(
    name: str, *, revision: str = "main", dtype: torch.dtype = torch.float32
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """A causal LM of transformers and its tokenizer, from a folder or the hub; no code of theirs is run."""
    trunk = load_pretrained(AutoModelForCausalLM, name, revision=revision, dtype=dtype, use_safetensors=True)
    return trunk, load_tokenizer(name, revision=revision)


def load_tokenizer(name: str, *, revision: str = "main") -> PreTrainedTokenizerBase:
    """A tokenizer that can pad: one without a padding token pads with the end of sequence, as the paper does."""
    tokenizer: PreTrainedTokenizerBase = load_pretrained(AutoTokenizer, name, revision=revision)
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token
    return tokenizer


def build_thinker(
    trunk: PreTrainedModel, thoughts: ThoughtConfig, tokenizer: PreTrainedTokenizerBase, *, seed: int
) -> ThoughtModel:
    """The trunk with START, END and a fresh mixing head. Raises ValueError for an init text without tokens."""
    torch.manual_seed(derive_seed(seed, "mixing head"))
    return ThoughtModel(
        trunk,
        thoughts,
        start_init_id=_first_token(tokenizer, thoughts.start_init, "thoughts.start_init"),
        end_init_id=_first_token(tokenizer, thoughts.end_init, "thoughts.end_init"),
        hidden_token_ids=hidden_tokens(tokenizer, vocab_size=trunk.config.vocab_size),
        prefix_ids=tokenizer(thoughts.prefix, add_special_tokens=False)["input_ids"] if thoughts.prefix else (),
    )


def next_stage(
    before: ThoughtModel,
    thoughts: ThoughtConfig,
    tokenizer: PreTrainedTokenizerBase,
    *,
    keeps: Literal["everything", "trunk"],
    seed: int,
) -> ThoughtModel:
    """The model that the next stage of a curriculum begins with; without the rest kept, as fresh as the first was."""
    model = build_thinker(before.trunk, thoughts, tokenizer, seed=seed)
    if keeps == "everything":
        model.load_state_dict(before.state_dict())
    return model


def hidden_tokens(tokenizer: PreTrainedTokenizerBase, *, vocab_size: int) -> list[int]:
    """Ids that no thought may hold: START and END, padding, begin of sequence, and rows that stand for no token."""
    known = tokenizer.get_vocab()
    special = [known.get(START), known.get(END), tokenizer.pad_token_id, tokenizer.bos_token_id]
    kept = {i for i in special if i is not None and i != tokenizer.eos_token_id}
    return sorted(kept | set(range(len(tokenizer), vocab_size)))


def _first_token(tokenizer: PreTrainedTokenizerBase, text: str, key: str) -> int:
    ids = tokenizer(text, add_special_tokens=False)["input_ids"]
    if not ids:
        raise ValueError(f"{key}={text!r} has no token: give a text whose first token starts or ends an aside")
    return int(ids[0])

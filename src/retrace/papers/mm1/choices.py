"""What an experiment can choose its parts from: made here or pretrained, data drawn or read. No torch."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Literal, Self

from pydantic import Field, model_validator

from retrace.core.config import Frozen, data_root
from retrace.core.optim import Optim
from retrace.core.weights import load_pretrained
from retrace.papers.mm1.corpora import CorpusConfig, HubDataset, ImageFolder, LocalShards
from retrace.papers.mm1.shape import DecoderShape, ImagePooling, VisionShape, check_heads
from retrace.papers.mm1.world import WorldConfig, vocabulary

SourceName = Literal["caption", "synthetic", "interleaved", "text"]


class TextTower(Frozen):
    """The text side of contrastive pre-training, of the encoder's joint space; it is thrown away behind it."""

    hidden_size: int = Field(ge=1)
    num_layers: int = Field(ge=1)
    num_heads: int = Field(ge=1)
    intermediate_size: int = Field(ge=1)
    max_tokens: int = Field(ge=4)  # of a caption; longer ones are trimmed
    joint_size: int = Field(ge=1)
    image_pooling: ImagePooling

    @model_validator(mode="after")
    def _heads_divide(self) -> Self:
        check_heads(self.hidden_size, self.num_heads)
        return self


PARTS_BLOCK = 64  # like images that follow each other where captions are "parts" (parts.py)


class ScratchEncoder(Frozen):
    """An encoder that is pre-trained here, at the resolution of the experiment (Section 1.2)."""

    kind: Literal["scratch"]
    objective: Literal["contrastive", "reconstructive"]
    patch_size: int = Field(ge=1)
    hidden_size: int = Field(ge=1)
    num_layers: int = Field(ge=1)
    num_heads: int = Field(ge=1)
    intermediate_size: int = Field(ge=1)
    conv_stem: bool
    captions: Literal["caption", "synthetic", "parts"]  # whose images and words; parts: see parts.py
    text_tower: TextTower
    optim: Optim  # a batch is images
    seed: int = Field(ge=0)

    @model_validator(mode="after")
    def _heads_divide(self) -> Self:
        check_heads(self.hidden_size, self.num_heads)
        return self

    @model_validator(mode="after")
    def _batches_lie_in_blocks(self) -> Self:
        if self.captions == "parts" and PARTS_BLOCK % self.optim.batch_size:
            raise ValueError(
                f"captions=parts with optim.batch_size={self.optim.batch_size}: images come in blocks of {PARTS_BLOCK} "
                "that are alike, so choose a batch that divides it"
            )
        return self

    def vision(self, image_size: int) -> VisionShape:
        """Its sizes at a resolution."""
        return VisionShape(
            image_size=image_size,
            patch_size=self.patch_size,
            hidden_size=self.hidden_size,
            num_layers=self.num_layers,
            num_heads=self.num_heads,
            intermediate_size=self.intermediate_size,
            conv_stem=self.conv_stem,
        )


class _Weights(Frozen):
    """Weights that exist: a folder, also below RETRACE_DATA, or a model of the hub."""

    name: str = Field(min_length=1)
    revision: str = Field(min_length=1)  # on the hub; a commit fixes the weights, a branch does not

    def place(self) -> str:
        """The folder on this machine, or the name on the hub."""
        root = data_root()
        folders = [Path(self.name), *([root / self.name] if root else [])]
        return next((str(path) for path in folders if (path / "config.json").is_file()), self.name)

    def check(self) -> None:
        """Raise ValueError where the weights have other sizes than are told, by their config.json alone."""
        from transformers import AutoConfig  # it takes seconds

        self.check_sizes(load_pretrained(AutoConfig, self.place(), revision=self.revision))

    def check_sizes(self, real: Any) -> None:
        """Raise ValueError where `real`, the config of transformers that the weights have, has other sizes."""
        raise NotImplementedError

    def _same(self, key: str, told: Frozen, real: Mapping[str, int | None]) -> None:
        """Raise ValueError for a size that the weights do not have: costs would be wrong."""
        for size, found in real.items():
            given = getattr(told, size)
            if found is None:
                raise ValueError(f"{key}.{size}={given}: {self.name} has no such size: name a model of another kind")
            if given != found:
                raise ValueError(f"{key}.{size}={given}: {self.name} has {found}: correct the sizes beside its name")


def _sizes(real: Any, **names: str) -> dict[str, int | None]:
    """Sizes that a config of transformers has under these names; None for one that it has not."""
    return {size: getattr(real, name, None) for size, name in names.items()}


class PretrainedEncoder(_Weights):
    """CLIP's, SigLIP's or AIMv2's image tower; its sizes are for counting FLOPs and bytes.

    The three matrices of an AIMv2's MLP count as two that are half again as wide.
    """

    kind: Literal["pretrained"]
    patch_size: int = Field(ge=1)
    hidden_size: int = Field(ge=1)
    num_layers: int = Field(ge=1)
    num_heads: int = Field(ge=1)
    intermediate_size: int = Field(ge=1)

    def vision(self, image_size: int) -> VisionShape:
        """Its sizes at a resolution."""
        sizes = self.model_dump(exclude={"kind", "name", "revision"})
        return VisionShape(image_size=image_size, **sizes)

    def check_sizes(self, real: Any) -> None:
        """Raise ValueError where `real`, the config of transformers that the weights have, has other sizes."""
        real = getattr(real, "vision_config", real)  # of a model that has a text tower too
        sizes = _sizes(real, patch_size="patch_size", hidden_size="hidden_size", num_layers="num_hidden_layers")
        wide = getattr(real, "intermediate_size", None)
        gated = real.model_type.startswith("aimv2")
        self._same("encoder", self, {**sizes, "intermediate_size": wide * 3 // 2 if wide and gated else wide})


class ScratchDecoder(Frozen):
    """A decoder that is pre-trained here on the experiment's text."""

    kind: Literal["scratch"]
    shape: DecoderShape  # dense; experts are copies of its MLPs, made behind the pre-training
    optim: Optim  # a batch is rows
    seq_len: int = Field(ge=8)
    caption_words: float = Field(ge=0, lt=1)  # share of rows with the words of captions and of interleaved documents
    seed: int = Field(ge=0)


class PretrainedDecoder(_Weights):
    """A text-pretrained decoder; its sizes are for counting FLOPs and bytes."""

    kind: Literal["pretrained"]
    shape: DecoderShape
    vocab_size: int = Field(ge=1)

    def check_sizes(self, real: Any) -> None:
        """Raise ValueError where `real`, the config of transformers that the weights have, has other sizes."""
        sizes = _sizes(
            real,
            hidden_size="hidden_size",
            num_layers="num_hidden_layers",
            num_heads="num_attention_heads",
            num_kv_heads="num_key_value_heads",
            intermediate_size="intermediate_size",
        )
        self._same("decoder.shape", self.shape, sizes)
        self._same("decoder", self, _sizes(real, vocab_size="vocab_size"))
        width = (getattr(real, "head_dim", None) or 0) * real.num_attention_heads
        if width not in (0, real.hidden_size):
            raise ValueError(
                f"{self.name}: {real.num_attention_heads} heads of {real.head_dim} in a hidden size of "
                f"{real.hidden_size}: costs are counted for heads that share it: choose another decoder"
            )


Encoder = Annotated[ScratchEncoder | PretrainedEncoder, Field(discriminator="kind")]
Decoder = Annotated[ScratchDecoder | PretrainedDecoder, Field(discriminator="kind")]


class ImageTask(Frozen):
    """A benchmark of real images: demonstrations from one split, items from another (Section 3.4)."""

    form: Literal["caption", "vqa"]
    train: CorpusConfig
    test: CorpusConfig
    num_train: int = Field(1000, ge=1)  # items, the first ones, that demonstrations are drawn from
    limit: int | None = Field(ge=2)  # items of the test split that are asked; null: all
    num_items: int = Field(5000, ge=2)  # all of them, for a plan that has not seen them

    @model_validator(mode="after")
    def _documents_fit(self) -> Self:
        wanted = "caption" if self.form == "caption" else "instruction"
        for split, corpus in (("train", self.train), ("test", self.test)):
            if corpus.document != wanted:
                raise ValueError(f"{split}.document={corpus.document} with form={self.form}: expected {wanted}")
        return self


class Corpora(Frozen):
    """Real data; each of `sources` says where its documents lie."""

    kind: Literal["corpora"]
    vocab_size: int = Field(ge=260)  # of the tokenizer that is trained on the text, where the decoder brings none
    num_bpe_documents: int = Field(ge=1)
    sources: dict[SourceName, CorpusConfig]
    instruction: CorpusConfig | None
    tasks: dict[str, ImageTask]

    @model_validator(mode="after")
    def _documents_are_what_they_are_called(self) -> Self:
        named = [*self.sources.items(), *([("instruction", self.instruction)] if self.instruction else [])]
        for name, corpus in named:
            if corpus.document != name:
                raise ValueError(f"source {name} has document={corpus.document}: expected document: {name}")
        return self

    def every(self) -> dict[str, ImageFolder | LocalShards | HubDataset]:
        """All corpora by what they are for."""
        found: dict[str, ImageFolder | LocalShards | HubDataset] = dict(self.sources)  # type: ignore[arg-type]
        if self.instruction is not None:
            found["instruction"] = self.instruction
        for name, task in self.tasks.items():
            found |= {f"{name}/train": task.train, f"{name}/test": task.test}
        return found


Data = Annotated[WorldConfig | Corpora, Field(discriminator="kind")]


def vocab_size(data: WorldConfig | Corpora, decoder: ScratchDecoder | PretrainedDecoder) -> int:
    """Rows of the decoder's embedding, the image token among them."""
    if isinstance(decoder, PretrainedDecoder):
        return decoder.vocab_size + 1
    return len(vocabulary()) if isinstance(data, WorldConfig) else data.vocab_size

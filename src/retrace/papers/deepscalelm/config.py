"""What can be asked of a DeepScaleLM experiment. Section numbers are those of the specification.

An experiment asks one of three things: moments of a model as it is made (`moments`), how well it trains (`training`),
or what the trained one learns from few questions (`transfer`).
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from typing import Annotated, Literal, Self

from pydantic import Field, model_validator

from retrace.core.config import Experiment, Frozen
from retrace.core.optim import Optim
from retrace.core.texts import HubText, LocalText, Source
from retrace.papers.deepscalelm.shape import ModelShape
from retrace.papers.deepscalelm.variants import Variant, make

Split = Literal["train", "valid", "test"]
SPLITS: tuple[Split, ...] = ("train", "valid", "test")
NUM_SPECIAL = 3  # <mask>, <bos>, <eos>: the first ids of every vocabulary here
MASK, BOS, EOS = range(NUM_SPECIAL)
COMMONSENSE_QA = "commonsense_qa/validation.jsonl"  # below RETRACE_DATA


class ProceduralText(Frozen):
    """Sentences whose words follow from each other: see sentences.py."""

    kind: Literal["procedural"]
    world_seed: int = Field(ge=0)  # which id stands for which word
    num_topics: int = Field(ge=2)
    num_names: int = Field(ge=2)
    num_verbs: int = Field(ge=2)  # forms of a topic's verb, with which it agrees with the name
    num_objects: int = Field(ge=2)  # of a topic
    num_common: int = Field(ge=2)

    @property
    def vocab_size(self) -> int:
        return NUM_SPECIAL + self.num_names + self.num_topics * (self.num_verbs + self.num_objects) + self.num_common


class RealText(Frozen):
    """Text for the three splits; the tokenizer is a byte-level BPE."""

    kind: Literal["text"]
    num_bpe_documents: int = Field(ge=1)  # of `train`, that the tokenizer is trained on
    train: tuple[Source, ...] = Field(min_length=1)
    valid: tuple[Source, ...] = Field(min_length=1)
    test: tuple[Source, ...] = Field(min_length=1)

    def sources(self, split: Split) -> tuple[LocalText | HubText, ...]:
        found: tuple[LocalText | HubText, ...] = getattr(self, split)
        return found

    def documents(self, split: Split) -> Iterator[str]:
        """All texts of a split, source after source."""
        return itertools.chain.from_iterable(source.documents() for source in self.sources(split))

    def every_source(self) -> list[LocalText | HubText]:
        return [*self.train, *self.valid, *self.test]


Corpus = Annotated[ProceduralText | RealText, Field(discriminator="kind")]


class CorrelatedInput(Frozen):
    """Gaussian input of variance 1 and correlation `corr` along the sequence, in place of embeddings (Section 2.4)."""

    kind: Literal["correlated"]
    corr: float = Field(ge=0, lt=1)


class ZipfInput(Frozen):
    """Token ids of a Zipf distribution over the model's vocabulary (Section 1.4)."""

    kind: Literal["zipf"]
    exponent: float = Field(gt=0)


class ImageInput(Frozen):
    """Patches of procedural images through a linear layer (Section 3.6, tag S)."""

    kind: Literal["images"]
    patch_size: int = Field(ge=1)  # pixels on a side; an image has as many patches as the model has positions


class SpectrogramInput(Frozen):
    """Frames of procedural spectrograms through a linear layer (Section 3.6, tag S)."""

    kind: Literal["spectrograms"]
    num_bands: int = Field(ge=1)
    frames_per_step: int = Field(ge=1)  # frames stacked into one position of the model


Input = Annotated[CorrelatedInput | ZipfInput | ImageInput | SpectrogramInput, Field(discriminator="kind")]


class Moments(Frozen):
    """What is put through a fresh model, forward and backward."""

    input: Input
    num_sequences: int = Field(ge=1)


class Objective(Frozen):
    """What is predicted: masked tokens by an encoder; each next token by the others."""

    mask_share: float = Field(gt=0, lt=1)  # of an encoder's tokens; of them 80 % <mask>, 10 % random, 10 % unchanged


class Training(Frozen):
    """One training for each learning rate; the best on validation text is taken."""

    objective: Objective
    learning_rates: tuple[float, ...] = Field(min_length=1)  # from low to high
    num_windows: int = Field(
        ge=1
    )  # different windows of `seq_len` tokens; they are repeated, in another order each time
    num_heldout: int = Field(ge=1)  # windows of validation text, and as many of test text
    optim: Optim  # its learning_rate is replaced by each of `learning_rates`

    @model_validator(mode="after")
    def _rates_rise(self) -> Self:
        if any(rate <= 0 for rate in self.learning_rates) or sorted(set(self.learning_rates)) != [*self.learning_rates]:
            raise ValueError(f"learning_rates={list(self.learning_rates)}: expected rising positive numbers")
        return self


class Questions(Frozen):
    """Multiple choice: generated of a procedural corpus, or CommonsenseQA's validation set below RETRACE_DATA."""

    kind: Literal["procedural", "commonsense_qa"]
    num_train: int = Field(ge=1)
    num_test: int = Field(ge=1)

    @property
    def num_choices(self) -> int:
        return 4 if self.kind == "procedural" else 5


class Transfer(Frozen):
    """A short fine-tune of the trained model, with a linear score on top of its mean hidden state."""

    questions: Questions
    optim: Optim


class Sizes(Frozen):
    """Sizes of the models of one kind of question at a scale; configs refer to them by interpolation."""

    num_layers: int
    hidden_size: int
    num_heads: int
    intermediate_size: int
    vocab_size: int
    seq_len: int


class DeepScaleLMConfig(Experiment):
    """The composed experiment: configs/deepscalelm/{main,moments,transfer}.yaml."""

    asks: Literal["moments", "training", "transfer"]
    sizes: dict[Literal["moments", "training"], Sizes]
    model: ModelShape
    method: Variant
    moments: Moments
    corpus: Corpus
    training: Training
    transfer: Transfer

    @model_validator(mode="after")
    def _method_fits(self) -> Self:
        make(self.model, self.method)
        return self

    @model_validator(mode="after")
    def _input_fits(self) -> Self:
        if self.asks != "moments":
            return self
        kind, length = self.moments.input.kind, self.model.seq_len
        if kind == "images" and round(length**0.5) ** 2 != length:
            raise ValueError(f"model.seq_len={length}: images have a square number of patches, such as 64")
        if kind != "zipf" and self.model.kind == "encoder_decoder":
            raise ValueError(f"moments.input.kind={kind}: an encoder-decoder reads tokens; use kind zipf")
        if self.method.corr0 == "measured" and kind == "zipf":
            raise ValueError("method.corr0=measured: of tokens by Zipf's law the method knows it; use assumed")
        return self

    @model_validator(mode="after")
    def _text_fits(self) -> Self:
        if self.asks == "moments":
            return self
        if isinstance(self.corpus, ProceduralText) and self.model.vocab_size != self.corpus.vocab_size:
            raise ValueError(
                f"model.vocab_size={self.model.vocab_size}: the procedural corpus has {self.corpus.vocab_size} words"
            )
        procedural = self.transfer.questions.kind == "procedural"
        if self.asks == "transfer" and procedural != isinstance(self.corpus, ProceduralText):
            raise ValueError(
                f"transfer.questions.kind={self.transfer.questions.kind}, corpus.kind={self.corpus.kind}: questions "
                "are in the words of the corpus; procedural goes with procedural, commonsense_qa with text"
            )
        if self.asks == "transfer" and self.model.kind == "encoder_decoder":
            raise ValueError("model.kind=encoder_decoder with asks=transfer: choose encoder or decoder")
        if self.method.corr0 == "measured":
            raise ValueError("method.corr0=measured: there is nothing to measure in text; use assumed")
        return self


class MeasureConfig(Frozen):
    """Program `measure`: moments of a fresh model, beside those that the theory predicts."""

    model: ModelShape
    method: Variant
    moments: Moments
    seed: int


class PrepareConfig(Frozen):
    """Program `prepare`: real text as windows of tokens, once for all trainings."""

    corpus: RealText
    vocab_size: int
    seq_len: int
    num_windows: int
    num_heldout: int
    files: dict[str, str]  # local files that are read -> fingerprint


class TrainConfig(Frozen):
    """Program `train`: one learning rate. Parent, for real text: `text`, as for the programs below."""

    model: ModelShape
    method: Variant
    corpus: Corpus
    objective: Objective
    num_windows: int
    num_heldout: int
    optim: Optim
    seed: int


class SelectConfig(Frozen):
    """Program `select`: the best of several trainings on validation text, and its loss on test text.

    Parent `rate_<i>` is the training at `learning_rates[i]`.
    """

    model: ModelShape
    method: Variant
    corpus: Corpus
    objective: Objective
    num_windows: int
    num_heldout: int
    learning_rates: tuple[float, ...]
    seed: int


class FinetuneConfig(Frozen):
    """Program `finetune`: the selected model learns to answer questions. Parent: `model`."""

    model: ModelShape
    method: Variant
    corpus: Corpus
    transfer: Transfer
    files: dict[str, str]
    seed: int

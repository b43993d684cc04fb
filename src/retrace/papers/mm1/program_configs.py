"""What each program of MM1 depends on, and nothing else: these are hashed into the ids of runs."""

from __future__ import annotations

from typing import Annotated

from pydantic import Field

from retrace.core.config import Frozen
from retrace.papers.mm1.choices import Corpora, Data, Decoder, Encoder, ScratchDecoder, ScratchEncoder
from retrace.papers.mm1.config import Evaluation, Finetune, Pretrain, Rates
from retrace.papers.mm1.shape import ConnectorShape, ExpertsShape, VisionShape


class TokenizerConfig(Frozen):
    """Program `prepare`: a tokenizer trained on the text of real data, once for all runs."""

    data: Corpora
    files: dict[str, str]


class EncoderConfig(Frozen):
    """Program `pretrain_encoder`. Parent, for real data: `tokenizer`, as for those below."""

    vision: VisionShape
    encoder: ScratchEncoder
    data: Data
    files: dict[str, str]  # local files that are read -> fingerprint
    seed: int


class DecoderConfig(Frozen):
    """Program `pretrain_decoder`: a language model."""

    decoder: ScratchDecoder
    data: Data
    files: dict[str, str]
    seed: int


class PretrainConfig(Frozen):
    """Program `pretrain`. Parents: `encoder` and `decoder`, where they are made here."""

    image_size: int
    encoder: Encoder
    connector: ConnectorShape
    decoder: Decoder
    experts: ExpertsShape | None
    data: Data
    pretrain: Pretrain
    files: dict[str, str]
    seed: int

    @property
    def vision(self) -> VisionShape:
        return self.encoder.vision(self.image_size)


class FinetuneConfig(Frozen):
    """Program `finetune`. Parent: `model`."""

    encoder: Encoder
    connector: ConnectorShape
    decoder: Decoder
    experts: ExpertsShape | None
    data: Data
    finetune: Finetune
    files: dict[str, str]
    seed: int

    @property
    def vision(self) -> VisionShape:
        return self.encoder.vision(self.finetune.encoder_size)


class EvaluateConfig(Frozen):
    """Program `evaluate`. Parent: `model`."""

    image_size: int  # of the images that are asked about
    sub_images: bool | Annotated[int, Field(ge=1)]  # in which images are asked about; a number: the last of a prompt
    tuned: bool  # questions of the instruction data are asked too
    encoder: Encoder
    connector: ConnectorShape
    decoder: Decoder
    experts: ExpertsShape | None
    data: Data
    eval: Evaluation
    tasks: dict[str, str]  # lm-eval task -> fingerprint
    files: dict[str, str]
    seed: int

    @property
    def vision(self) -> VisionShape:
        return self.encoder.vision(self.image_size // 2 if self.sub_images else self.image_size)


class ChooseConfig(Frozen):
    """Program `choose_rate`. Parent `rate_<i>` is the evaluation behind a pre-training at `rates.learning_rates[i]`."""

    rates: Rates
    metric: str  # of the evaluation, the higher the better
    num_parameters: int  # of the decoder without embeddings
    seed: int


class LawConfig(Frozen):
    """Program `fit_law`. Parents by size: the choice of the rate of each."""

    num_parameters: dict[str, int]
    seed: int

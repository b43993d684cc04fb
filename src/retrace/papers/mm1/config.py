"""What can be asked of an MM1 experiment. Section numbers are those of the specification."""

from __future__ import annotations

from typing import Literal, Self, get_args

from pydantic import Field, model_validator

from retrace.core.config import CONFIGS, Experiment, Frozen
from retrace.core.optim import Optim
from retrace.papers.mm1.choices import (
    Corpora,
    Data,
    Decoder,
    Encoder,
    PretrainedDecoder,
    ScratchDecoder,
    ScratchEncoder,
)
from retrace.papers.mm1.mixture import Mixture
from retrace.papers.mm1.shape import ConnectorShape, DecoderShape, ExpertsShape, VisionShape
from retrace.papers.mm1.world import NATIVE, WorldConfig

TASKS = CONFIGS / "mm1" / "tasks"
SUB_IMAGES = 5  # an overview and four quarters (Section 2.4)
Part = Literal["encoder", "connector", "decoder"]
PARTS: tuple[Part, ...] = get_args(Part)


class Rows(Frozen):
    """The rows that documents are packed into (Section 2.3)."""

    seq_len: int = Field(ge=8)
    max_images: int = Field(ge=1)
    mask: Literal["documents", "rows"]  # what a token sees: its own document, or all that stands before it in the row


class Pretrain(Frozen):
    """Joint multimodal pre-training."""

    mixture: Mixture  # probability of each source, for a row
    rows: Rows
    trained: tuple[Part, ...] = Field(min_length=1)  # the others are frozen
    encoder_rate: float = Field(gt=0, le=1)  # the encoder's learning rate, as a share of the others'
    optim: Optim


class Finetune(Frozen):
    """Supervised fine-tuning on instruction data, at the resolution of the encoder or above (Section 3.5, 2.4)."""

    image_size: int = Field(ge=1)  # of the images; with sub-images the encoder gets half of it
    sub_images: bool
    rows: Rows
    trained: tuple[Part, ...] = Field(min_length=1)  # the others are frozen
    optim: Optim

    @property
    def encoder_size(self) -> int:
        """Pixels a side of what the encoder gets."""
        return self.image_size // 2 if self.sub_images else self.image_size

    @model_validator(mode="after")
    def _halves(self) -> Self:
        if self.sub_images and self.image_size % 2:
            raise ValueError(f"image_size={self.image_size} with sub_images=true: expected an even number of pixels")
        return self


class Evaluation(Frozen):
    """What is asked of the trained model (Section 3.4)."""

    shots: tuple[int, ...] = Field(min_length=1)
    num_episodes: int = Field(ge=2)  # of each procedural task
    batch_size: int = Field(ge=1)
    text_tasks: tuple[str, ...]  # of configs/mm1/tasks, through lm-eval
    seed: int = Field(ge=0)  # the same for all arms and seeds: they are asked the same
    precision: Literal["fp32", "bf16"]

    @model_validator(mode="after")
    def _shots_rise(self) -> Self:
        if any(shot < 0 for shot in self.shots) or sorted(set(self.shots)) != [*self.shots]:
            raise ValueError(f"shots={list(self.shots)}: expected rising numbers from 0, as in [0, 4, 8]")
        return self


class Resolutions(Frozen):
    """Pixels a side."""

    low: int
    medium: int
    high: int


class Counts(Frozen):
    """Tokens: of an image, or of a row that has images of so many."""

    few: int
    medium: int
    many: int


class Length(Frozen):
    """Updates of a joint pre-training, and those at the peak rate."""

    steps: int
    hold_steps: int


class Decoders(Frozen):
    """Decoders of the learning rate's law."""

    small: DecoderShape
    medium: DecoderShape
    large: DecoderShape


class Sizes(Frozen):
    """What the arms of the ablations are at a scale; configs refer to it by interpolation."""

    resolution: Resolutions
    low_patch_size: int  # of encoders at the low resolution, whose grid must have a patch for each image token
    tokens: Counts
    seq_len: Counts
    connectors: Length  # each connector's training where connectors are compared
    larger: int  # width of the larger encoder, and of its MLP
    larger_mlp: int
    experts: int
    decoders: Decoders


class Rates(Frozen):
    """The learning rates of joint pre-training that an experiment chooses from (Section 3.2)."""

    learning_rates: tuple[float, ...] = Field(min_length=2)
    near: float = Field(ge=0, lt=1)  # share of the best score that another rate may lack and count as one of the best
    law: bool = False  # for all of sizes.decoders, and a law fit through them

    @model_validator(mode="after")
    def _rates_rise(self) -> Self:
        if self.learning_rates[0] <= 0 or sorted(set(self.learning_rates)) != [*self.learning_rates]:
            raise ValueError(f"learning_rates={list(self.learning_rates)}: expected rising numbers above 0")
        return self


class Tunings(Frozen):
    """The arms of ablation fine_tuning."""

    same: Finetune
    interpolated: Finetune
    sub_images: Finetune


class MM1Config(Experiment):
    """The composed experiment: configs/mm1/main.yaml."""

    sizes: Sizes
    tuning: Tunings
    image_size: int = Field(ge=1)  # pixels a side, of the encoder's own pre-training too where that is done here
    encoder: Encoder
    connector: ConnectorShape
    decoder: Decoder
    experts: ExpertsShape | None
    photos: Corpora  # your own: `data=${photos}` takes them
    data: Data
    pretrain: Pretrain
    synthetic_share: float = Field(ge=0, lt=1)  # of the captions, in joint pre-training (Section 3.3)
    finetune: Finetune | None
    split_last: int | None = Field(ge=1)  # behind sub-images: of a prompt's images these alone are split; null: all
    rates: Rates | None  # null: the one rate of pretrain.optim
    eval: Evaluation

    @property
    def pretraining(self) -> Pretrain:
        """`pretrain` with `synthetic_share` of the captions' weight given to synthetic ones."""
        weights = self.pretrain.mixture.weights
        if not self.synthetic_share or not weights.get("caption"):
            return self.pretrain
        moved = self.synthetic_share * weights["caption"]
        captions = {"caption": weights["caption"] - moved, "synthetic": weights.get("synthetic", 0.0) + moved}
        return self.pretrain.model_copy(update={"mixture": Mixture(weights={**weights, **captions})})

    @property
    def used_sources(self) -> list[str]:
        """Of the trainings before any fine-tuning."""
        used = [*self.pretraining.mixture.used]
        used += [self.encoder.captions] if isinstance(self.encoder, ScratchEncoder) else []
        return [*used, *(["text"] if isinstance(self.decoder, ScratchDecoder) else [])]

    @property
    def vision(self) -> VisionShape:
        return self.encoder.vision(self.image_size)

    @model_validator(mode="after")
    def _tokens_fit_the_grid(self) -> Self:
        patch, tokens = self.vision.patch_size, self.connector.num_tokens
        sides = [(f"image_size={self.image_size}", self.image_size)]
        if (tuned := self.finetune) is not None:
            halved = " halved by sub_images" if tuned.sub_images else ""
            sides.append((f"finetune.image_size={tuned.image_size}{halved}", tuned.encoder_size))
        for said, side in sides:
            if side % patch:
                raise ValueError(f"{said} is no multiple of encoder.patch_size={patch}: choose one that is")
            grid = side // patch
            if self.connector.kind != "attention_pool" and tokens > grid * grid:
                raise ValueError(
                    f"connector.num_tokens={tokens}: {said} in patches of {patch} gives {grid}x{grid} of them: use at "
                    f"most {grid * grid} tokens, or kind attention_pool"
                )
        return self

    @model_validator(mode="after")
    def _patches_predict_others(self) -> Self:
        encoder = self.encoder
        if isinstance(encoder, ScratchEncoder) and encoder.objective == "reconstructive" and self.vision.grid == 1:
            raise ValueError(
                f"encoder.objective=reconstructive with image_size={self.image_size}: an image is one patch, and none "
                f"is left to predict: use {2 * encoder.patch_size} pixels or more, or smaller patches"
            )
        return self

    @model_validator(mode="after")
    def _enough_to_demonstrate(self) -> Self:
        most = max(self.eval.shots)
        for name, task in self.data.tasks.items() if isinstance(self.data, Corpora) else ():
            if task.num_train < most:
                raise ValueError(
                    f"eval.shots={[*self.eval.shots]}: data.tasks.{name}.num_train={task.num_train} items are all that "
                    "demonstrations are drawn from: ask for fewer shots, or take more items"
                )
        return self

    @model_validator(mode="after")
    def _experts_fit(self) -> Self:
        if self.decoder.shape.experts is not None:
            raise ValueError("decoder.shape.experts: the decoder is pre-trained dense; set `experts` instead")
        shapes = {"decoder.shape": self.decoder.shape}
        if self.rates is not None and self.rates.law:
            shapes = {f"sizes.decoders.{name}": shape for name, shape in self.sizes.decoders}
        for key, shape in shapes.items():
            if self.experts is not None and self.experts.every > shape.num_layers:
                raise ValueError(
                    f"experts.every={self.experts.every} with {key}.num_layers={shape.num_layers}: no layer would have "
                    "experts"
                )
        return self

    @model_validator(mode="after")
    def _something_is_split(self) -> Self:
        if self.split_last is not None and (self.finetune is None or not self.finetune.sub_images):
            raise ValueError(f"split_last={self.split_last}: only a fine-tuning with sub_images=true splits; use null")
        return self

    @model_validator(mode="after")
    def _rows_hold_an_image(self) -> Self:
        places = [("pretrain.rows", self.pretrain.rows, self.connector.num_tokens)]
        if self.finetune is not None:
            count = SUB_IMAGES if self.finetune.sub_images else 1
            places.append(("finetune.rows", self.finetune.rows, count * self.connector.num_tokens))
        for key, rows, tokens in places:
            if tokens >= rows.seq_len:
                raise ValueError(
                    f"{key}.seq_len={rows.seq_len}: an image takes {tokens} positions: choose longer rows or fewer "
                    "image tokens"
                )
        return self

    @model_validator(mode="after")
    def _sources_are_there(self) -> Self:
        if isinstance(self.data, WorldConfig):
            sides = {"image_size": self.image_size, "finetune.image_size": self.finetune and self.finetune.image_size}
            for key, side in sides.items():
                if side and side > NATIVE:
                    raise ValueError(f"{key}={side}: procedural images have {NATIVE} pixels a side: use at most that")
            if self.eval.text_tasks:
                raise ValueError("eval.text_tasks: procedural data brings its own text tasks; use []")
            if isinstance(self.decoder, PretrainedDecoder):
                raise ValueError("decoder.kind=pretrained: procedural data has a vocabulary of its own; use scratch")
            return self
        if isinstance(self.encoder, ScratchEncoder) and self.encoder.captions == "parts":
            raise ValueError("encoder.captions=parts: only procedural captions come in parts; use caption or synthetic")
        if isinstance(self.decoder, ScratchDecoder) and self.decoder.caption_words:
            raise ValueError(f"decoder.caption_words={self.decoder.caption_words:g}: of procedural data only; use 0.0")
        for name in self.used_sources:
            if name not in self.data.sources:
                raise ValueError(
                    f"data.sources has no {name}, which is trained on; it has {', '.join(self.data.sources)}"
                )
        if self.finetune is not None and self.data.instruction is None:
            raise ValueError("finetune: data.instruction is null: name a corpus of questions and answers")
        return self

    @model_validator(mode="after")
    def _known_sources(self) -> Self:
        unknown = sorted(set(self.pretrain.mixture.weights) - {"caption", "synthetic", "interleaved", "text"})
        if unknown:
            raise ValueError(
                f"pretrain.mixture.weights.{unknown[0]}: expected some of caption, synthetic, interleaved, text"
            )
        return self

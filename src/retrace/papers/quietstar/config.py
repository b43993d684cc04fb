"""What can be asked of a Quiet-STaR experiment. Names follow the paper; section numbers are the paper's.

`num_sampled` counts the thought tokens that are sampled, without START and END: the official code's `n_ahead` is
`num_sampled + 3`, and the legend of the paper's Figure 2 counts in the official way, almost certainly.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal, Self

from pydantic import Field, field_validator, model_validator

from retrace.core.config import CONFIGS, Experiment, Frozen
from retrace.core.optim import Optim
from retrace.papers.quietstar.models import PretrainedModel, ScratchModel
from retrace.papers.quietstar.texts import TextCorpusConfig
from retrace.papers.quietstar.world import CorpusConfig

TASKS = CONFIGS / "quietstar" / "tasks"
MIN_SEEDS = 3  # of sampled thoughts: fewer say nothing of the spread
GENERATED: dict[str, Literal["arithmetic", "facts"]] = {
    "chains_cot": "arithmetic",
    "chains_direct": "arithmetic",
    "facts_direct": "facts",
}


class MixingHead(Frozen):
    """The interpolation between the predictions without and with a thought (Section 4.3)."""

    num_layers: int = Field(3, ge=1, le=8)  # linear layers, ReLU between them, hidden size = trunk's
    bounded: Literal["none", "sigmoid"] = "none"  # "none": w is any real number, as in the official code
    zero_init: bool = True  # last layer at zero, so that the mixed prediction starts as the base prediction


class ThoughtConfig(Frozen):
    """One thought at every token and how it is learned (Sections 4.1-4.4)."""

    num_sampled: int = Field(ge=0, le=256)  # sampled tokens in a thought; 0: no thoughts at all, a plain LM
    num_true: int = Field(ge=1, le=64)  # true tokens scored after each thought (the paper's n_true)
    num_thoughts: int = Field(ge=1, le=64)  # thoughts sampled per position
    positions: Literal["all", "every", "hardest"] = "all"  # that think in training: those of highest entropy, hardest
    position_step: int | None = Field(None, ge=1)  # of "every": each how many-th token
    position_share: float | None = Field(None, gt=0, le=1)  # of "hardest": share of a window's tokens
    use_start: bool = True
    use_end: bool = True
    start_init: str = Field("---", min_length=1)  # text whose first token's embedding initialises START
    end_init: str = Field("---", min_length=1)
    prefix: str = ""  # text that every thought begins with, in front of its sampled tokens
    mixing_head: MixingHead | None = MixingHead()  # None: the prediction after the thought is used as it is
    base_loss_weight: float = Field(0.5, ge=0)
    talk_loss_weight: float = Field(0.5, ge=0)
    policy_weight: float = Field(ge=0)
    policy_temperature: float = Field(3.0, gt=0)  # of the log-probabilities in the REINFORCE term
    sample_temperature: float = Field(1.0, gt=0)
    reward: Literal["mixed", "thought"] = "mixed"  # whose log-likelihood of the true tokens is the reward
    baseline: Literal["mean", "loo", "base_loss"] = "mean"  # over the thoughts of a position, or the base prediction
    positive_only: bool = True  # reinforce only thoughts better than the baseline

    @model_validator(mode="after")
    def _positions_are_said(self) -> Self:
        wanted = {"every": "position_step", "hardest": "position_share"}.get(self.positions)
        for key in ("position_step", "position_share"):
            value = getattr(self, key)
            if (value is not None) != (key == wanted):
                expected = "a value" if key == wanted else "null"
                raise ValueError(f"{key}={value} with positions={self.positions}: expected {expected}")
        return self

    @model_validator(mode="after")
    def _baseline_needs_thoughts(self) -> Self:
        if self.num_sampled > 0 and self.num_thoughts == 1 and self.baseline != "base_loss":
            raise ValueError(
                f"baseline '{self.baseline}' compares the thoughts of a position, but num_thoughts is 1: "
                "use baseline 'base_loss', or num_thoughts of 2 or more"
            )
        return self


Corpus = Annotated[CorpusConfig | TextCorpusConfig, Field(discriminator="kind")]
Model = Annotated[ScratchModel | PretrainedModel, Field(discriminator="kind")]


class BaseConfig(Frozen):
    """How the base model is trained. Its seed is the arm's unless set, so that paired arms share their base."""

    seed: int = Field(ge=0)
    num_windows: int = Field(ge=1)  # different training windows; they are repeated, in another order each time
    optim: Optim


class Lora(Frozen):
    """Low-rank adapters beside the trunk's linear layers, which themselves stay as they are (arXiv 2106.09685)."""

    rank: int = Field(ge=1)
    alpha: int = Field(ge=1)  # the adapters' product counts alpha / rank times
    target_modules: tuple[str, ...] = Field(min_length=1)  # last parts of the layers' names, such as q_proj


class ContinuedConfig(Frozen):
    """Continued training with thoughts: one learning rate for each kind of parameter."""

    num_windows: int = Field(ge=1)
    lora: Lora | None  # null: every weight of the trunk is trained, as in the paper
    optim: Optim  # its learning_rate is the trunk's, or the adapters'
    mixing_head_learning_rate: float = Field(gt=0)
    meta_learning_rate: float = Field(gt=0)  # of the START and END embeddings

    @model_validator(mode="after")
    def _adapters_are_not_rounded_away(self) -> Self:
        if self.lora is not None and self.optim.precision == "pure_bf16":
            raise ValueError(
                "lora with optim.precision=pure_bf16: merged into bf16 weights, most of what adapters add is rounded "
                "away; use fp32_master"
            )
        return self


class CurriculumStage(Frozen):
    """Continued training before the last one, with thoughts of another length; all else is as in the last."""

    num_sampled: int = Field(ge=1, le=256)
    num_true: int = Field(ge=1, le=64)
    learning_rate: float = Field(gt=0)  # of the trunk


class Curriculum(Frozen):
    """Thoughts that shrink from stage to stage (Fast Quiet-STaR, arXiv 2505.17746)."""

    stages: tuple[CurriculumStage, ...]  # before `thoughts`, in their order; none: the training is in one stage
    keeps: Literal["everything", "trunk"]  # by a stage of the one before; the published code's loses all but the trunk


class Student(Frozen):
    """A model that never thinks, trained on what the thinking one predicts (Fast Quiet-STaR's "NTP")."""

    objective: Literal["reinforce", "cross_entropy"]  # as published; or ours, of the teacher's mixed predictions
    start: Literal["base", "teacher"]  # whose trunk: the published script says base, the paper teacher
    steps: int = Field(ge=1)
    learning_rate: float = Field(gt=0)


class EvalConfig(Frozen):
    """Zero-shot questions through lm-eval, and the gain by difficulty of a token (Section 5)."""

    tasks: tuple[str, ...]  # names of configs/quietstar/tasks/*.yaml
    num_questions: int = Field(ge=1, le=2000)  # generated for each procedural task
    limit: int | None = Field(None, ge=1)  # items of each task; null: all
    num_windows: int = Field(ge=1)  # held-out text for the deciles of difficulty
    batch_size: int = Field(ge=1)
    precision: Literal["fp32", "bf16"]  # of the weights and of the computation; softmax and sampling are in fp32
    thought_seeds: Literal["greedy"] | tuple[int, ...]  # greedy thoughts; or sampled ones, and the metrics are means
    page_windows: int = Field(ge=0, le=16)  # of that text, shown token by token on the page of thoughts; 0: no page

    @field_validator("thought_seeds", mode="before")
    @classmethod
    def _several_seeds(cls, given: Any) -> Any:
        different = isinstance(given, (list, tuple)) and len(set(map(str, given))) == len(given) >= MIN_SEEDS
        if given != "greedy" and not (different and all(type(seed) is int and seed >= 0 for seed in given)):
            raise ValueError(
                f"expected greedy, or {MIN_SEEDS} or more different seeds of sampled thoughts, as in [0,1,2]"
            )
        return tuple(given) if different else given


class QuietStarConfig(Experiment):
    """The composed experiment, configs/quietstar/main.yaml."""

    corpus: Corpus
    model: Model
    base: BaseConfig | None  # null: the model is pretrained
    thoughts: ThoughtConfig
    train: ContinuedConfig
    curriculum: Curriculum
    student: Student | None  # null: the trained model itself is evaluated
    eval: EvalConfig

    @model_validator(mode="after")
    def _fits_the_window(self) -> Self:
        if self.thoughts.num_true >= self.corpus.seq_len:
            raise ValueError(
                f"thoughts.num_true={self.thoughts.num_true} leaves no position to think at in windows of "
                f"corpus.seq_len={self.corpus.seq_len}: choose fewer true tokens or longer windows"
            )
        return self

    @model_validator(mode="after")
    def _follow_ups_have_thoughts(self) -> Self:
        if self.thoughts.num_sampled == 0 and (self.curriculum.stages or self.student):
            raise ValueError(
                "thoughts.num_sampled=0 with curriculum.stages or a student: both need a last stage that thinks; "
                "set num_sampled to 1 or more"
            )
        return self

    @model_validator(mode="after")
    def _base_is_trained_once(self) -> Self:
        scratch, text = isinstance(self.model, ScratchModel), isinstance(self.corpus, TextCorpusConfig)
        if scratch != (self.base is not None):
            raise ValueError(
                f"model.kind={self.model.kind} with base={'settings' if self.base else 'null'}: a model from scratch "
                "needs settings in base, and a pretrained one base=null"
            )
        if not scratch and not text:
            raise ValueError("corpus.kind=procedural has its own tokenizer: a pretrained model needs corpus.kind=text")
        if isinstance(self.corpus, TextCorpusConfig):
            if scratch != (self.corpus.vocab_size is not None):
                raise ValueError(
                    f"corpus.vocab_size={self.corpus.vocab_size}: expected a size for a model from scratch, and null "
                    "for a pretrained one, which brings its tokenizer"
                )
            if scratch and not self.corpus.base:
                raise ValueError("corpus.base names no text: a model from scratch needs some to be trained on")
        return self


class PretrainConfig(Frozen):
    """Program `pretrain`: a base model on the corpus with worked asides."""

    corpus: Corpus
    model: ScratchModel
    num_windows: int
    optim: Optim
    files: dict[str, str]  # local files that are read -> fingerprint
    seed: int


class TrainConfig(Frozen):
    """Program `train`: continued training of the base with thoughts, on the corpus without asides."""

    corpus: Corpus
    model: Model
    thoughts: ThoughtConfig
    train: ContinuedConfig
    keeps: Literal["everything", "trunk", None]  # of the stage before; null: this is the first, from the base
    files: dict[str, str]
    seed: int


class DistillConfig(Frozen):
    """Program `distill`: a student that never thinks."""

    corpus: Corpus
    model: Model
    teacher: ThoughtConfig
    student: Student
    optim: Optim  # of the continued training, with the student's steps and learning rate
    num_windows: int
    files: dict[str, str]
    seed: int


class EvaluateConfig(Frozen):
    """Program `evaluate`: what the trained model does with and without its thoughts."""

    corpus: Corpus
    model: Model
    thoughts: ThoughtConfig
    eval: EvalConfig
    tasks: dict[str, str]  # name -> fingerprint of what the task asks
    files: dict[str, str]
    seed: int

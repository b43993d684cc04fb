"""What each program costs, from its config: the counting of Section 6 of the specification, without torch.

FLOPs are those that the method needs: base pass shared by the thoughts of a position, each thread token once forward
and backward, sampling forward only, each logit that a loss needs once; what activation checkpointing computes again is
not counted. Memory is parameters with gradients and moments, and the activations of one micro-batch; in an evaluation,
two models and what they remember of the text.
"""

from __future__ import annotations

from dataclasses import replace
from functools import cache

from retrace.core.cost import BF16, COMPUTED, FP32, KEPT, Cost, DecoderShape, Memory
from retrace.core.optim import Optim
from retrace.core.tasks import read_task
from retrace.papers.quietstar.config import (
    TASKS,
    Corpus,
    DistillConfig,
    EvalConfig,
    EvaluateConfig,
    Lora,
    Model,
    PretrainConfig,
    ThoughtConfig,
    TrainConfig,
)
from retrace.papers.quietstar.models import PretrainedModel
from retrace.papers.quietstar.texts import TextCorpusConfig
from retrace.papers.quietstar.vocabulary import vocabulary

TRAIN, ADAPT = 3.0, 2.0  # forward and backward in forward passes; frozen weights need no gradients of their own
TYPICAL_ITEM_TOKENS = 64  # of a generated question; real ones are longer, and their number is not in the config
LOG_PROBS = 4  # rows of the vocabulary's size held a position while predictions are compared
KEPT_HIDDEN = {FP32: 8, BF16: 11}  # hidden-sized tensors kept a token and layer; in bf16, norms keep copies in fp32
UNNEEDED_HIDDEN, UNNEEDED_MLP = 3, 1  # of them, inputs of matrices that are frozen
AGAIN_HIDDEN = {FP32: 2, BF16: 3}  # with activation checkpointing: the input, and what computing again leaves behind
KEPT_MLP, PASSING_MLP = 4, 2  # tensors of the MLP's size kept a token and layer, and those of its backward pass
MIXED_HIDDEN = 9  # hidden-sized tensors kept a token that is scored after a thought: the mixing head's, and the loss's
LOGITS = 2**21  # alive at a time, and as many log-probabilities and gradients


def shape(model: Model, corpus: Corpus) -> DecoderShape:
    """Sizes of the trunk with its vocabulary."""
    if isinstance(model, PretrainedModel):
        return model.shape(model.vocab_size)
    return model.shape(corpus.vocab_size or 0 if isinstance(corpus, TextCorpusConfig) else len(vocabulary()))


def pretrain(config: PretrainConfig) -> Cost:
    """Plain next-token training."""
    trunk, length = shape(config.model, config.corpus), config.corpus.seq_len
    tokens = config.optim.steps * config.optim.batch_size * length
    flops = TRAIN * trunk.forward_flops(tokens=tokens, keys=(length + 1) / 2, logits=tokens)
    parameters = trunk.parameters
    return Cost(tokens, flops, _training(trunk, config.optim, length, parameters, parameters, thoughts=None))


def train(config: TrainConfig) -> Cost:
    """Continued training with thoughts; with none it is plain training."""
    trunk, length, optim = shape(config.model, config.corpus), config.corpus.seq_len, config.train.optim
    thoughts, lora = config.thoughts, config.train.lora
    tokens = optim.steps * optim.batch_size * length
    flops = tokens * step_flops(trunk, thoughts, length, train=ADAPT if lora else TRAIN)
    own = own_parameters(trunk, thoughts)
    trained = own + (adapter_parameters(trunk, lora) if lora else trunk.parameters)
    parameters = trunk.parameters + (trained if lora else own)
    return Cost(tokens, flops, _training(trunk, optim, length, parameters, trained, thoughts=thoughts))


def distill(config: DistillConfig) -> Cost:
    """Plain training of the student, and the teacher's greedy thoughts at every position, forward only."""
    trunk, length, optim = shape(config.model, config.corpus), config.corpus.seq_len, config.optim
    tokens, keys = optim.steps * optim.batch_size * length, (length + 1) / 2
    slots = thread_tokens(config.teacher) / config.teacher.num_thoughts
    logits = config.teacher.num_sampled + 1
    taught = trunk.forward_flops(tokens=1 + slots, keys=keys + slots / 2, logits=logits)
    flops = tokens * (TRAIN * trunk.forward_flops(tokens=1, keys=keys, logits=1) + taught)
    student = _training(trunk, optim, length, trunk.parameters, trunk.parameters, thoughts=None)
    teacher = KEPT[optim.precision] * (trunk.parameters + own_parameters(trunk, config.teacher))
    predictions = optim.micro_batch_size * length * FP32 * LOG_PROBS * trunk.vocab_size
    return Cost(tokens, flops, replace(student, beside=teacher + predictions))


def evaluate(config: EvaluateConfig) -> Cost:
    """Held-out text with thoughts everywhere, and the questions with thoughts at their answers."""
    trunk, length, thoughts = shape(config.model, config.corpus), config.corpus.seq_len, config.thoughts
    text = (config.eval.num_windows + (config.eval.page_windows if thoughts.num_sampled else 0)) * length
    items = len(config.eval.tasks) * min(config.eval.num_questions, config.eval.limit or config.eval.num_questions)
    asked = items * TYPICAL_ITEM_TOKENS
    slots = thread_tokens(thoughts) / thoughts.num_thoughts if thoughts.num_sampled else 0
    flops = trunk.forward_flops(tokens=text * (1 + slots) + 2 * asked, keys=length / 2, logits=2 * text)
    written = sum(_written_tokens(name, config.eval) for name in config.eval.tasks)
    once = trunk.forward_flops(tokens=written, keys=length / 2, logits=written)
    flops += (3 + slots) * once  # with thoughts, without them, and by the base model
    kept = _inference(trunk, thoughts, num_text=config.eval.batch_size * length, bf16=config.eval.precision == "bf16")
    return Cost(text + asked, flops, kept, shared=False)


def _written_tokens(task: str, settings: EvalConfig) -> int:
    """Tokens that a model writes for a task, at most: a text may end earlier."""
    each, most = _written_an_item(task)
    items = min(settings.num_questions, settings.limit or settings.num_questions)
    return each * (items if most is None else min(items, most))


@cache
def _written_an_item(task: str) -> tuple[int, int | None]:
    """(tokens written for an item at most, items at most); read once, as a plan asks for every arm and seed."""
    file = read_task(task, tasks_dir=TASKS)
    if file.settings.get("output_type") != "generate_until":
        return 0, None
    kwargs = file.settings.get("generation_kwargs", {})
    once = kwargs.get("max_gen_toks", 0) + (kwargs.get("then") or {}).get("max_gen_toks", 0)
    return int(file.settings.get("repeats", 1)) * int(once), file.subset.size if file.subset else None


def thread_tokens(thoughts: ThoughtConfig) -> int:
    """Tokens beside each text token in the differentiable pass: P x (START, sampled, END, S - 1 true ones)."""
    if thoughts.num_sampled == 0:
        return 0
    return thoughts.num_thoughts * (
        thoughts.use_start + thoughts.num_sampled + thoughts.use_end + thoughts.num_true - 1
    )


def own_parameters(trunk: DecoderShape, thoughts: ThoughtConfig) -> int:
    """Parameters beside the trunk's: START, END and the mixing head."""
    if thoughts.num_sampled == 0:
        return 0
    head, size = thoughts.mixing_head, trunk.hidden_size
    between = 0 if head is None else 2 * size * size + (head.num_layers - 2) * size * size
    return between + (thoughts.use_start + thoughts.use_end) * size


def adapter_parameters(trunk: DecoderShape, lora: Lora) -> int:
    """Parameters of the adapters; layers of unknown names count as square ones."""
    size, mlp, kv = (
        trunk.hidden_size,
        trunk.intermediate_size,
        trunk.hidden_size * trunk.num_kv_heads // trunk.num_heads,
    )
    both = {
        "k_proj": size + kv,
        "v_proj": size + kv,
        **dict.fromkeys(("gate_proj", "up_proj", "down_proj"), size + mlp),
    }
    return trunk.num_layers * lora.rank * sum(both.get(name, 2 * size) for name in lora.target_modules)


def step_flops(trunk: DecoderShape, thoughts: ThoughtConfig, length: int, *, train: float = TRAIN) -> float:
    """FLOPs of a training step for each of its text tokens."""
    keys = (length + 1) / 2
    base = trunk.forward_flops(tokens=1, keys=keys, logits=1)
    if thoughts.num_sampled == 0:
        return train * base
    threads = thread_tokens(thoughts)
    slots = threads / thoughts.num_thoughts
    scored = thoughts.num_thoughts * (thoughts.num_sampled + thoughts.num_true)
    differentiable = base + trunk.forward_flops(tokens=threads, keys=keys + slots / 2, logits=scored)
    drawn = thoughts.num_thoughts * thoughts.num_sampled
    sampling = base + trunk.forward_flops(tokens=drawn, keys=keys + slots / 2, logits=drawn)
    return train * differentiable + sampling


def _training(
    trunk: DecoderShape, optim: Optim, length: int, parameters: int, trained: int, *, thoughts: ThoughtConfig | None
) -> Memory:
    """What a micro-batch keeps for its backward pass: in each layer, and for the tokens that are scored."""
    size, text = COMPUTED[optim.precision], optim.micro_batch_size * length
    hidden, mlp = trunk.hidden_size, trunk.intermediate_size
    thread = thread_tokens(thoughts) if thoughts else 0
    frozen = trained < trunk.parameters
    keys = 2 * hidden * trunk.num_kv_heads // trunk.num_heads * (size + FP32)  # and their gradients, which are in fp32
    kept = keys + size * (KEPT_HIDDEN[size] - UNNEEDED_HIDDEN * frozen) * hidden
    kept += size * (KEPT_MLP - UNNEEDED_MLP * frozen) * mlp
    again = keys + size * AGAIN_HIDDEN[size] * hidden
    last_pass = thoughts.num_thoughts * (thoughts.use_end + thoughts.num_true) if thoughts and thread else 1
    one_layer = text * last_pass * (kept + size * PASSING_MLP * mlp)
    scored = _scored_bytes(trunk, thoughts, text, size)
    return Memory(
        parameters=parameters,
        trained=trained,
        precision=optim.precision,
        activations=trunk.num_layers * text * (1 + thread) * kept + scored,
        checkpointed=trunk.num_layers * text * (1 + thread) * again + one_layer + scored,
        micro_batches=optim.batch_size // optim.micro_batch_size,
        several_passes=thread > 0,
    )


def _scored_bytes(trunk: DecoderShape, thoughts: ThoughtConfig | None, text: int, size: int) -> float:
    """Behind the last layer: whole logits in plain training; else the mixing head, and gradients of the projection."""
    if thoughts is None:
        return text * trunk.vocab_size * (size + 3 * FP32)
    spoken = text * (thoughts.num_thoughts * thoughts.num_true if thoughts.num_sampled else 1)
    projection = trunk.vocab_size * trunk.hidden_size
    chunk = min(LOGITS, spoken * trunk.vocab_size)
    return size * (MIXED_HIDDEN * trunk.hidden_size * spoken + 3 * projection) + FP32 * (projection + 3 * chunk)


def _inference(trunk: DecoderShape, thoughts: ThoughtConfig, *, num_text: int, bf16: bool) -> Memory:
    """The trained model and its base; keys and values of text and thoughts, one layer, and log-probabilities."""
    slots = thoughts.use_start + thoughts.num_sampled + thoughts.use_end if thoughts.num_sampled else 0
    keys = 2 * trunk.num_layers * trunk.hidden_size * trunk.num_kv_heads // trunk.num_heads
    layer = 12 * trunk.hidden_size + 4 * trunk.intermediate_size
    size = BF16 if bf16 else FP32
    kept = num_text * (size * (keys * (1 + slots) + layer) + FP32 * LOG_PROBS * trunk.vocab_size)
    return Memory(
        parameters=2 * trunk.parameters + own_parameters(trunk, thoughts),
        trained=0,
        precision="pure_bf16" if bf16 else "fp32",
        activations=kept,
        checkpointed=kept,
    )

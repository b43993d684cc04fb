"""What each program costs, from its config: the counting of Section 6 of the specification, without torch.

FLOPs are those that the method needs: base pass shared by the thoughts of a position, each thread token once forward
and backward, sampling forward only, each logit that a loss needs once. Memory is parameters with gradients and moments,
and the activations of one micro-batch, all in fp32; in an evaluation, two models and what they remember of the text.
"""

from __future__ import annotations

from retrace.core.cost import Cost, DecoderShape
from retrace.papers.quietstar.config import (
    Corpus,
    DistillConfig,
    EvaluateConfig,
    Model,
    PretrainConfig,
    ThoughtConfig,
    TrainConfig,
)
from retrace.papers.quietstar.models import PretrainedModel
from retrace.papers.quietstar.texts import TextCorpusConfig
from retrace.papers.quietstar.vocabulary import vocabulary

TRAIN = 3.0  # a backward pass costs two forward passes
FP32 = 4
TYPICAL_ITEM_TOKENS = 64  # of a generated question; real ones are longer, and their number is not in the config
LOG_PROBS = 4  # rows of the vocabulary's size held a position while predictions are compared
ACTIVATIONS = 12  # hidden-sized tensors kept a token and layer, beside four of the MLP's size


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
    return Cost(tokens, flops, _memory(trunk, config.optim.micro_batch_size * length))


def train(config: TrainConfig) -> Cost:
    """Continued training with thoughts; with none it is plain training."""
    trunk, length, optim = shape(config.model, config.corpus), config.corpus.seq_len, config.train.optim
    tokens = optim.steps * optim.batch_size * length
    flops = tokens * _step_flops(trunk, config.thoughts, length)
    in_flight = optim.micro_batch_size * length * (1 + thread_tokens(config.thoughts))
    return Cost(tokens, flops, _memory(trunk, in_flight))


def distill(config: DistillConfig) -> Cost:
    """Plain training of the student, and the teacher's greedy thoughts at every position, forward only."""
    trunk, length, optim = shape(config.model, config.corpus), config.corpus.seq_len, config.optim
    tokens, keys = optim.steps * optim.batch_size * length, (length + 1) / 2
    slots = thread_tokens(config.teacher) / config.teacher.num_thoughts
    logits = config.teacher.num_sampled + 1
    taught = trunk.forward_flops(tokens=1 + slots, keys=keys + slots / 2, logits=logits)
    flops = tokens * (TRAIN * trunk.forward_flops(tokens=1, keys=keys, logits=1) + taught)
    return Cost(tokens, flops, _memory(trunk, optim.micro_batch_size * length * 2) + FP32 * trunk.parameters)


def evaluate(config: EvaluateConfig) -> Cost:
    """Held-out text with thoughts everywhere, and the questions with thoughts at their answers."""
    trunk, length, thoughts = shape(config.model, config.corpus), config.corpus.seq_len, config.thoughts
    text = (config.eval.num_windows + (config.eval.page_windows if thoughts.num_sampled else 0)) * length
    items = len(config.eval.tasks) * min(config.eval.num_questions, config.eval.limit or config.eval.num_questions)
    asked = items * TYPICAL_ITEM_TOKENS
    threads = text * thread_tokens(thoughts) / thoughts.num_thoughts if thoughts.num_sampled else 0
    flops = trunk.forward_flops(tokens=text + threads + 2 * asked, keys=length / 2, logits=2 * text)
    return Cost(text + asked, flops, _inference_memory(trunk, thoughts, num_text=config.eval.batch_size * length))


def thread_tokens(thoughts: ThoughtConfig) -> int:
    """Tokens beside each text token in the differentiable pass: P x (START, sampled, END, S - 1 true ones)."""
    if thoughts.num_sampled == 0:
        return 0
    return thoughts.num_thoughts * (
        thoughts.use_start + thoughts.num_sampled + thoughts.use_end + thoughts.num_true - 1
    )


def _step_flops(trunk: DecoderShape, thoughts: ThoughtConfig, length: int) -> float:
    """FLOPs of a training step for each of its text tokens."""
    keys = (length + 1) / 2
    base = trunk.forward_flops(tokens=1, keys=keys, logits=1)
    if thoughts.num_sampled == 0:
        return TRAIN * base
    threads = thread_tokens(thoughts)
    slots = threads / thoughts.num_thoughts
    scored = thoughts.num_thoughts * (thoughts.num_sampled + thoughts.num_true)
    differentiable = base + trunk.forward_flops(tokens=threads, keys=keys + slots / 2, logits=scored)
    drawn = thoughts.num_thoughts * thoughts.num_sampled
    sampling = base + trunk.forward_flops(tokens=drawn, keys=keys + slots / 2, logits=drawn)
    return TRAIN * differentiable + sampling


def _memory(trunk: DecoderShape, tokens: float) -> float:
    """Bytes: weights, gradients and two moments, and the activations of the tokens in flight."""
    weights = 4 * FP32 * trunk.parameters
    layer = ACTIVATIONS * trunk.hidden_size + 4 * trunk.intermediate_size
    return weights + FP32 * tokens * (trunk.num_layers * layer + trunk.vocab_size)


def _inference_memory(trunk: DecoderShape, thoughts: ThoughtConfig, *, num_text: int) -> float:
    """Bytes: the trained model and its base, keys and values of text and thoughts, one layer, and log-probabilities."""
    slots = thoughts.use_start + thoughts.num_sampled + thoughts.use_end if thoughts.num_sampled else 0
    keys = 2 * trunk.num_layers * trunk.hidden_size * trunk.num_kv_heads // trunk.num_heads
    layer = ACTIVATIONS * trunk.hidden_size + 4 * trunk.intermediate_size
    rows = LOG_PROBS * trunk.vocab_size
    return FP32 * (2 * trunk.parameters + num_text * (keys * (1 + slots) + layer + rows))

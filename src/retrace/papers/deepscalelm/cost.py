"""What each program costs, from its config: FLOPs of the matrix products, forward and backward; no torch.

The backward pass is twice the forward. Logits are made where something is predicted: at the masked tokens of an
encoder, at every token of the others.
"""

from __future__ import annotations

from retrace.core.cost import COMPUTED, FP32, Cost, Memory
from retrace.core.optim import Optim, Precision
from retrace.papers.deepscalelm.config import FinetuneConfig, MeasureConfig, PrepareConfig, SelectConfig, TrainConfig
from retrace.papers.deepscalelm.shape import ModelShape

TRAIN = 3.0  # forward and backward, in forward passes
KEPT = 9  # hidden-sized tensors that a layer keeps a token for its backward pass, beside the two below
LOGIT_COPIES = 3  # logits, log-probabilities, gradient


def layer_parameters(shape: ModelShape, *, cross: bool = False) -> int:
    """Elements of a layer's matrices."""
    square, halves = shape.hidden_size**2, 3 if shape.activation == "swiglu" else 2
    return (8 if cross else 4) * square + halves * shape.hidden_size * shape.intermediate_size


def trunk_parameters(shape: ModelShape) -> int:
    """Of all layers: the part that a depth and width of equal N d^2 share."""
    both = shape.kind == "encoder_decoder"
    return shape.num_layers * (layer_parameters(shape) + (layer_parameters(shape, cross=True) if both else 0))


def parameters(shape: ModelShape) -> int:
    """All matrices and tables; biases and norms are not counted."""
    tables = shape.vocab_size + (shape.seq_len if shape.positions == "learned" else 0)
    head = shape.hidden_size**2 if shape.kind == "encoder" else 0
    return trunk_parameters(shape) + tables * shape.hidden_size + head


def forward_flops(shape: ModelShape, *, tokens: float, logits: float, length: int | None = None) -> float:
    """Two FLOPs a multiply-add. `tokens` through the layers, in sequences of `length`; `logits` predictions.

    The two halves of an encoder-decoder share a window: each of its tokens goes through one of them.
    """
    keys = (length or shape.seq_len) * (0.5 if shape.kind == "decoder" else 1.0)
    attention = 4 * shape.num_layers * shape.hidden_size * keys * tokens
    through = trunk_parameters(shape) * (0.5 if shape.kind == "encoder_decoder" else 1.0)
    head = shape.vocab_size * shape.hidden_size + (shape.hidden_size**2 if shape.kind == "encoder" else 0)
    return 2 * through * tokens + attention + 2 * head * logits


def predicted_share(shape: ModelShape, mask_share: float) -> float:
    """Share of a window's tokens that are predicted."""
    return {"encoder": mask_share, "decoder": 1.0, "encoder_decoder": 0.5}[shape.kind]


def measure(config: MeasureConfig) -> Cost:
    """One forward and backward pass of all sequences."""
    shape = config.model
    tokens = config.moments.num_sequences * shape.seq_len
    flops = TRAIN * forward_flops(shape, tokens=tokens, logits=0)
    return Cost(tokens, flops, _memory(shape, tokens=tokens, logits=0, precision="fp32"), shared=False)


def prepare(config: PrepareConfig) -> Cost:
    """Tokenising has no matrix products; an operation a token stands for it, so that its time can be told."""
    tokens = (config.num_windows + 2 * config.num_heldout) * config.seq_len
    return Cost(tokens, float(tokens), Memory(0, 0, "fp32", activations=FP32 * tokens, checkpointed=0.0), shared=False)


def train(config: TrainConfig) -> Cost:
    """The training itself; its look at validation text is not counted."""
    shape, optim = config.model, config.optim
    share = predicted_share(shape, config.objective.mask_share)
    tokens = optim.steps * optim.batch_size * shape.seq_len
    return Cost(
        tokens, TRAIN * forward_flops(shape, tokens=tokens, logits=share * tokens), _training(shape, optim, share=share)
    )


def select(config: SelectConfig) -> Cost:
    """Test text through the chosen model."""
    shape = config.model
    tokens = config.num_heldout * shape.seq_len
    share = predicted_share(shape, config.objective.mask_share)
    memory = _memory(shape, tokens=shape.seq_len, logits=shape.seq_len, precision="fp32", trained=False)
    return Cost(tokens, forward_flops(shape, tokens=tokens, logits=share * tokens), memory, shared=False)


def finetune(config: FinetuneConfig) -> Cost:
    """Each question is read once with each of its choices."""
    shape, optim = config.model, config.transfer.optim
    choices = config.transfer.questions.num_choices
    tokens = optim.steps * optim.batch_size * choices * shape.seq_len
    flops = TRAIN * forward_flops(shape, tokens=tokens, logits=0)
    flops += forward_flops(shape, tokens=config.transfer.questions.num_test * choices * shape.seq_len, logits=0)
    return Cost(tokens, flops, _training(shape, optim, share=0.0, sequences=choices))


def _training(shape: ModelShape, optim: Optim, *, share: float, sequences: int = 1) -> Memory:
    tokens = optim.micro_batch_size * sequences * shape.seq_len
    return _memory(
        shape,
        tokens=tokens,
        logits=share * tokens,
        precision=optim.precision,
        micro_batches=optim.batch_size // optim.micro_batch_size,
    )


def _memory(
    shape: ModelShape,
    *,
    tokens: float,
    logits: float,
    precision: Precision,
    trained: bool = True,
    micro_batches: int = 1,
) -> Memory:
    """Weights with gradients and moments; what the layers keep of each token, attention weights among it."""
    size, count = COMPUTED[precision], parameters(shape)
    layers = shape.num_layers * (2 if shape.kind == "encoder_decoder" else 1)
    wide = (3 if shape.activation == "swiglu" else 2) * shape.intermediate_size
    layer = KEPT * shape.hidden_size + wide + 2 * shape.num_heads * shape.seq_len
    scored = logits * shape.vocab_size * FP32 * LOGIT_COPIES
    return Memory(
        parameters=count,
        trained=count if trained else 0,
        precision=precision,
        activations=(layers if trained else 1) * layer * size * tokens + scored,
        checkpointed=(layers * shape.hidden_size + layer) * size * tokens + scored,
        micro_batches=micro_batches,
    )

"""What each program costs, from its config: FLOPs of the matrix products, forward and backward; no torch.

The backward pass is twice the forward. Rows are taken as full, and a row with images as holding as many as it may: an
upper bound, since how many documents fit is known behind the packing alone.
"""

from __future__ import annotations

from retrace.core.cost import COMPUTED, FP32, Cost, Memory
from retrace.core.cost import DecoderShape as Counted
from retrace.core.optim import Optim, Precision
from retrace.papers.mm1.choices import Corpora, TextTower, vocab_size
from retrace.papers.mm1.config import SUB_IMAGES, Rows
from retrace.papers.mm1.program_configs import (
    ChooseConfig,
    DecoderConfig,
    EncoderConfig,
    EvaluateConfig,
    FinetuneConfig,
    LawConfig,
    PretrainConfig,
    TokenizerConfig,
)
from retrace.papers.mm1.shape import ConnectorShape, DecoderShape, ExpertsShape, VisionShape
from retrace.papers.mm1.world import ATTRIBUTES, WorldConfig

TRAIN = 3.0  # forward and backward, in forward passes
KEPT_VISION, KEPT_DECODER = 14, 16  # hidden-sized tensors that a layer keeps of a patch or token for its backward pass
LOGIT_COPIES = 3
BPE_TOKENS = 500  # of a document that a tokenizer is trained on
EPISODE_TEXT = 32  # positions of an episode that are no image
TEXT_TASKS, QUESTION_TASKS = 3, 4  # of the procedural world; questions are asked of tuned models

Model = PretrainConfig | FinetuneConfig | EvaluateConfig


def patch_layers(shape: VisionShape) -> list[tuple[int, int]]:
    """Of the layers that make patches of pixels: matrix elements, and places of an image that go through them."""
    size, patch, side, channels = shape.hidden_size, shape.patch_size, shape.image_size, 3
    layers: list[tuple[int, int]] = []
    while shape.conv_stem and patch % 2 == 0:
        patch, side = patch // 2, side // 2
        layers.append((9 * channels * size, side**2))
        channels = size
    return [*layers, (patch**2 * channels * size, shape.grid**2)]


def layer_parameters(shape: VisionShape | TextTower) -> int:
    """Matrix elements of one layer of an encoder."""
    return 4 * shape.hidden_size**2 + 2 * shape.hidden_size * shape.intermediate_size


def vision_parameters(shape: VisionShape) -> int:
    """Matrix elements, those of a convolutional stem too."""
    return shape.num_layers * layer_parameters(shape) + sum(count for count, _ in patch_layers(shape))


def vision_flops(shape: VisionShape) -> float:
    """One image, forward."""
    patches = shape.grid**2
    attention = 4 * shape.num_layers * shape.hidden_size * patches**2
    stem = sum(2.0 * count * places for count, places in patch_layers(shape))
    return stem + 2.0 * shape.num_layers * layer_parameters(shape) * patches + attention


def connector_parameters(shape: ConnectorShape, *, in_size: int, out_size: int) -> tuple[int, int]:
    """Matrix elements that each patch goes through, and each image token."""
    if shape.kind == "average_pool":
        return 0, in_size * out_size
    if shape.kind == "attention_pool":
        return 2 * in_size**2, 2 * in_size**2 + in_size * out_size
    if shape.depth == 0:
        return 0, in_size * out_size + out_size**2
    inner = shape.hidden_size
    block = 2 * inner**2 + 9 * inner
    first = block + (2 * in_size * inner - inner**2 if in_size != inner else 0)
    return first + (shape.depth - 1) * block, shape.depth * block + inner * out_size + out_size**2


def connector_flops(shape: ConnectorShape, vision: VisionShape, *, out_size: int) -> float:
    """One image, forward."""
    patch, token = connector_parameters(shape, in_size=vision.hidden_size, out_size=out_size)
    patches = vision.grid**2
    mixing = 4.0 * vision.hidden_size * patches * shape.num_tokens if shape.kind == "attention_pool" else 0.0
    return 2.0 * (patch * patches + token * shape.num_tokens) + mixing


def counted(shape: DecoderShape, vocab: int) -> Counted:
    """The decoder as the core counts it, without experts."""
    return Counted(
        hidden_size=shape.hidden_size,
        num_layers=shape.num_layers,
        num_heads=shape.num_heads,
        num_kv_heads=shape.num_kv_heads,
        intermediate_size=shape.intermediate_size,
        vocab_size=vocab,
    )


def expert_parameters(shape: DecoderShape, experts: ExpertsShape | None, *, active: bool) -> int:
    """What experts add to the dense decoder's elements: all of them, or those that a token goes through."""
    if experts is None:
        return 0
    mlp, layers = 3 * shape.hidden_size * shape.intermediate_size, shape.num_layers // experts.every
    count = experts.top_k if active else experts.num_experts
    return layers * ((count - 1) * mlp + experts.num_experts * shape.hidden_size)


def parameters(config: Model) -> dict[str, int]:
    """Elements by part."""
    shape, vision = config.decoder.shape, config.vision
    vocab = vocab_size(config.data, config.decoder)
    decoder = counted(shape, vocab).parameters + expert_parameters(shape, config.experts, active=False)
    connector = sum(connector_parameters(config.connector, in_size=vision.hidden_size, out_size=shape.hidden_size))
    return {"encoder": vision_parameters(vision), "connector": connector, "decoder": decoder}


def forward_flops(config: Model, *, tokens: float, keys: float, logits: float, images: float) -> float:
    """The whole model, forward; `images` as the encoder gets them."""
    shape = config.decoder.shape
    text = counted(shape, vocab_size(config.data, config.decoder)).forward_flops(
        tokens=tokens, keys=keys, logits=logits
    )
    text += 2.0 * expert_parameters(shape, config.experts, active=True) * tokens
    seen = vision_flops(config.vision) + connector_flops(config.connector, config.vision, out_size=shape.hidden_size)
    return text + images * seen


def prepare(config: TokenizerConfig) -> Cost:
    """A tokenizer's training has no matrix products; an operation a token stands for it, so that time can be told."""
    tokens = config.data.num_bpe_documents * BPE_TOKENS
    return Cost(tokens, float(tokens), Memory(0, 0, "fp32", activations=0.0, checkpointed=0.0), shared=False)


def pretrain_encoder(config: EncoderConfig) -> Cost:
    """Tokens are those of the captions, or none: then patches."""
    vision, optim = config.vision, config.encoder.optim
    images = optim.steps * optim.batch_size
    flops, count = vision_flops(vision), vision_parameters(vision)
    if config.encoder.objective == "contrastive":
        tower = config.encoder.text_tower
        own = tower.num_layers * layer_parameters(tower)
        seen_by_patch = vision.grid**2 if tower.image_pooling == "mean_and_patches" else 0
        joint = tower.joint_size * (tower.hidden_size + vision.hidden_size * (1 + seen_by_patch))  # once an image
        flops += 2.0 * (own * tower.max_tokens + joint)
        count += own + joint
        tokens = images * tower.max_tokens
    else:
        head = 4 * vision.hidden_size**2 + 12 * vision.hidden_size * vision.patch_size**2
        flops += 2.0 * head * vision.grid**2
        count += head
        tokens = images * vision.grid**2
    seen = optim.micro_batch_size * vision.grid**2
    return Cost(tokens, TRAIN * images * flops, _memory(count, count, optim, vision=vision, patches=seen))


def pretrain_decoder(config: DecoderConfig) -> Cost:
    """All rows are text."""
    optim, length = config.decoder.optim, config.decoder.seq_len
    shape = counted(config.decoder.shape, vocab_size(config.data, config.decoder))
    tokens = optim.steps * optim.batch_size * length
    flops = TRAIN * shape.forward_flops(tokens=tokens, keys=(length + 1) / 2, logits=tokens)
    memory = _memory(shape.parameters, shape.parameters, optim, decoder=shape, tokens=optim.micro_batch_size * length)
    return Cost(tokens, flops, memory)


def pretrain(config: PretrainConfig) -> Cost:
    """Tokens are positions of text and images."""
    weights = config.pretrain.mixture.weights
    share = 1.0 - weights.get("text", 0.0)
    images = row_images(config.pretrain.rows, config.connector.num_tokens)
    return _joint(config, config.pretrain.optim, config.pretrain.rows, images, share, trained=config.pretrain.trained)


def finetune(config: FinetuneConfig) -> Cost:
    """As the pre-training, on rows with images alone."""
    tuned = config.finetune
    images = row_images(tuned.rows, config.connector.num_tokens, sub_images=tuned.sub_images)
    return _joint(config, tuned.optim, tuned.rows, images, 1.0, trained=tuned.trained)


def row_images(rows: Rows, num_tokens: int, *, sub_images: bool = False) -> int:
    """The most images of a row, as the encoder gets them; one that was cut from a long document may have no text."""
    each = SUB_IMAGES if sub_images else 1
    return each * min(rows.max_images, rows.seq_len // (each * num_tokens))


def _joint(
    config: PretrainConfig | FinetuneConfig,
    optim: Optim,
    rows: Rows,
    per_row: int,
    share: float,
    *,
    trained: tuple[str, ...],
) -> Cost:
    sizes, seqs = parameters(config), optim.steps * optim.batch_size
    text = rows.seq_len - share * per_row * config.connector.num_tokens
    flops = forward_flops(config, tokens=rows.seq_len, keys=(rows.seq_len + 1) / 2, logits=text, images=share * per_row)
    shape = counted(config.decoder.shape, vocab_size(config.data, config.decoder))
    memory = _memory(
        sum(sizes.values()),
        sum(size for part, size in sizes.items() if part in trained),
        optim,
        vision=config.vision,
        patches=optim.micro_batch_size * per_row * config.vision.grid**2,
        decoder=shape,
        tokens=optim.micro_batch_size * rows.seq_len,
        experts=config.experts,
    )
    return Cost(seqs * rows.seq_len, TRAIN * seqs * flops, memory)


def prompt_images(config: EvaluateConfig, shots: int) -> int:
    """Of a few-shot prompt, as the encoder gets them."""
    split = 0 if config.sub_images is False else shots + 1 if config.sub_images is True else config.sub_images
    return shots + 1 + (SUB_IMAGES - 1) * min(split, shots + 1)


def prompt_length(config: EvaluateConfig, shots: int) -> int:
    """Positions of a few-shot prompt, its text taken as `EPISODE_TEXT` a turn."""
    return prompt_images(config, shots) * config.connector.num_tokens + (shots + 1) * EPISODE_TEXT


def evaluate(config: EvaluateConfig) -> Cost:
    """Every episode's prompt is read once; text tasks of lm-eval are not counted."""
    asked, data = config.eval, config.data
    if isinstance(data, Corpora):
        episodes = {shot: sum(task.limit or task.num_items for task in data.tasks.values()) for shot in asked.shots}
    else:
        more = {shot: len(ATTRIBUTES) if shot else 1 for shot in asked.shots}  # without shots, unseen captions
        episodes = {shot: asked.num_episodes * (1 + count) for shot, count in more.items()}
    tokens = flops = 0.0
    if isinstance(data, WorldConfig):
        texts, length = asked.num_episodes * TEXT_TASKS, EPISODE_TEXT
        tokens += texts * length
        flops += texts * forward_flops(config, tokens=length, keys=length / 2, logits=length, images=0)
        episodes[0] = episodes.get(0, 0) + asked.num_episodes * QUESTION_TASKS * config.tuned
    for shot, count in episodes.items():
        images, length = prompt_images(config, shot), prompt_length(config, shot)
        tokens += count * length
        flops += count * forward_flops(config, tokens=length, keys=length / 2, logits=EPISODE_TEXT, images=images)
    longest = prompt_length(config, max(asked.shots)) * asked.batch_size
    precision: Precision = "fp32" if asked.precision == "fp32" else "pure_bf16"
    shape, size = config.decoder.shape, COMPUTED[precision]
    kept = size * longest * (2 * shape.num_layers + 12) * shape.hidden_size
    memory = Memory(sum(parameters(config).values()), 0, precision, activations=kept, checkpointed=kept)
    return Cost(int(tokens), flops, memory, shared=False)


def choose_rate(config: ChooseConfig) -> Cost:
    """A look at some records."""
    looks = len(config.rates.learning_rates)
    return Cost(0, float(looks), Memory(0, 0, "fp32", activations=0.0, checkpointed=0.0), shared=False)


def fit_law(config: LawConfig) -> Cost:
    """A look at a record a size."""
    return Cost(0, float(len(config.num_parameters)), Memory(0, 0, "fp32", 0.0, 0.0), shared=False)


def _memory(
    count: int,
    trained: int,
    optim: Optim,
    *,
    vision: VisionShape | None = None,
    patches: float = 0,
    decoder: Counted | None = None,
    tokens: float = 0,
    experts: ExpertsShape | None = None,
) -> Memory:
    """Weights with gradients and moments; what layers keep of each patch and token, and logits."""
    size = COMPUTED[optim.precision]
    kept = again = 0.0
    if vision is not None:
        layer = size * patches * (KEPT_VISION * vision.hidden_size + 2 * vision.intermediate_size)
        places = sum(places for _, places in patch_layers(vision)[:-1]) / vision.grid**2  # of a stem, for each patch
        stem = 2 * size * patches * places * vision.hidden_size  # before and behind each GELU
        kept += vision.num_layers * layer + stem
        again += vision.num_layers * size * patches * vision.hidden_size + layer + stem
    if decoder is not None:
        layer = size * tokens * (KEPT_DECODER * decoder.hidden_size + 3 * decoder.intermediate_size)
        logits = FP32 * LOGIT_COPIES * min(tokens * decoder.vocab_size, 2**27)
        kept += decoder.num_layers * layer + logits
        again += decoder.num_layers * size * tokens * decoder.hidden_size + layer + logits
        if experts is not None:  # each token's MLPs but the first, and what goes into them and comes out
            each = (experts.top_k - 1) * 4 * decoder.intermediate_size + 3 * experts.top_k * decoder.hidden_size
            kept += decoder.num_layers // experts.every * size * tokens * each
            again += size * tokens * each
    return Memory(
        parameters=count,
        trained=trained,
        precision=optim.precision,
        activations=kept,
        checkpointed=again,
        micro_batches=optim.batch_size // optim.micro_batch_size,
    )

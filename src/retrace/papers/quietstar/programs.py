"""The three runs of an experiment: pretrain -> train -> evaluate. Each is called as (config, ctx) -> metrics."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel, PreTrainedTokenizerBase

from retrace.core.checkpoint import load_model, save_model
from retrace.core.context import Context
from retrace.core.data import derive_seed, shuffled
from retrace.core.train import Batch, Group, fit
from retrace.papers.quietstar import cost
from retrace.papers.quietstar.config import EvaluateConfig, ModelConfig, PretrainConfig, ThoughtConfig, TrainConfig
from retrace.papers.quietstar.corpus import CorpusConfig, Split, windows
from retrace.papers.quietstar.evaluation import gain_by_difficulty, score_tasks
from retrace.papers.quietstar.model import ThoughtModel
from retrace.papers.quietstar.tokenizer import build_tokenizer
from retrace.papers.quietstar.vocabulary import END, START

WEIGHTS = "model.safetensors"  # in the folder `model` of a run
MAX_POSITIONS = 4096  # of the trunks trained here; real questions spelled in characters are long


def pretrain(config: PretrainConfig, ctx: Context) -> dict[str, float]:
    """Train a base model from scratch on the corpus with asides."""
    tokenizer = build_tokenizer()
    trunk = build_trunk(config.model, tokenizer, seed=config.seed)

    def loss(model: nn.Module, batch: Batch, _: torch.Generator) -> tuple[Tensor, Mapping[str, Tensor]]:
        labels = batch["input_ids"].masked_fill(batch["attention_mask"] == 0, -100)
        value = model(
            input_ids=batch["input_ids"], labels=labels, use_cache=False
        ).loss  # right padding: no mask needed
        return value, {"loss/base": value.detach()}

    group = Group("trunk", list(trunk.parameters()), config.optim.learning_rate, config.optim.weight_decay)
    metrics = fit(
        trunk,
        ctx=ctx,
        optim=config.optim,
        groups=[group],
        rows=Windows(config.corpus, tokenizer, split="base", seed=config.seed, count=config.num_windows),
        loss=loss,
        cost=cost.pretrain(config),
    )
    save(trunk, ctx)
    return metrics


def train(config: TrainConfig, ctx: Context) -> dict[str, float]:
    """Continue training the base with thoughts, on the corpus without asides."""
    tokenizer = build_tokenizer()
    trunk = build_trunk(config.model, tokenizer, seed=config.seed)
    load_model(trunk, ctx.parents["base"].path / "model" / WEIGHTS)
    model = build_thinker(trunk, config.thoughts, tokenizer, seed=config.seed)
    settings = config.train
    rates = {
        "trunk": settings.optim.learning_rate,
        "mixing_head": settings.mixing_head_learning_rate,
        "meta": settings.meta_learning_rate,
    }
    decays = {"trunk": settings.optim.weight_decay}
    groups = [Group(name, p, rates[name], decays.get(name, 0.0)) for name, p in model.parameter_groups().items()]

    def loss(wrapped: nn.Module, batch: Batch, noise: torch.Generator) -> tuple[Tensor, Mapping[str, Tensor]]:
        output = wrapped(batch["input_ids"], batch["attention_mask"], generator=noise)
        return output.loss, output.metrics

    metrics = fit(
        model,
        ctx=ctx,
        optim=settings.optim,
        groups=groups,
        rows=Windows(config.corpus, tokenizer, split="continued", seed=config.seed, count=settings.num_windows),
        loss=loss,
        cost=cost.train(config),
    )
    save(model, ctx)
    return metrics


def evaluate(config: EvaluateConfig, ctx: Context) -> dict[str, float]:
    """Score the trained model with and without thoughts: tasks through lm-eval, and held-out text token by token."""
    if not ctx.is_main:
        return {}  # one process is enough; the others would only repeat it
    tokenizer, device = build_tokenizer(), ctx.hardware.device
    base = build_trunk(config.model, tokenizer, seed=config.seed)
    load_model(base, ctx.parents["base"].path / "model" / WEIGHTS)
    trunk = build_trunk(config.model, tokenizer, seed=config.seed)
    thinker = build_thinker(trunk, config.thoughts, tokenizer, seed=config.seed)
    load_model(thinker, ctx.parents["model"].path / "model" / WEIGHTS)
    thinker.to(device).eval()
    base.to(device).eval()
    used = cost.evaluate(config)
    metrics = score_tasks(thinker, tokenizer, config=config, ctx=ctx)
    texts = Windows(
        config.corpus, tokenizer, split="heldout", seed=config.corpus.world_seed, count=config.eval.num_windows
    )
    metrics |= gain_by_difficulty(thinker, base, texts.every(), config=config, ctx=ctx)
    ctx.cost.update(tokens=used.tokens, flops=used.flops)
    return metrics


def build_trunk(model: ModelConfig, tokenizer: PreTrainedTokenizerBase, *, seed: int) -> PreTrainedModel:
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


def build_thinker(
    trunk: PreTrainedModel, thoughts: ThoughtConfig, tokenizer: PreTrainedTokenizerBase, *, seed: int
) -> ThoughtModel:
    """The trunk with START, END and a fresh mixing head. Raises ValueError for an init text without tokens."""
    hidden = [*tokenizer.convert_tokens_to_ids([START, END]), tokenizer.pad_token_id, tokenizer.bos_token_id]
    torch.manual_seed(derive_seed(seed, "mixing head"))
    return ThoughtModel(
        trunk,
        thoughts,
        start_init_id=_first_token(tokenizer, thoughts.start_init, "thoughts.start_init"),
        end_init_id=_first_token(tokenizer, thoughts.end_init, "thoughts.end_init"),
        hidden_token_ids=hidden,
    )


def _first_token(tokenizer: PreTrainedTokenizerBase, text: str, key: str) -> int:
    ids = tokenizer(text, add_special_tokens=False)["input_ids"]
    if not ids:
        raise ValueError(f"{key}={text!r} has no token: give a text whose first token starts or ends an aside")
    return int(ids[0])


def save(model: nn.Module, ctx: Context) -> None:
    """Leave the final weights in the run's folder `model`."""
    if ctx.is_main:
        with ctx.run.folder("model") as folder:
            save_model(model, folder / WEIGHTS)


class Windows:
    """Rows of a split: its windows over and over, in another order each time; a pure function of the row's number."""

    def __init__(
        self, corpus: CorpusConfig, tokenizer: PreTrainedTokenizerBase, *, split: Split, seed: int, count: int
    ) -> None:
        self._ids = torch.tensor(windows(corpus, tokenizer, split=split, seed=seed, count=count))
        self._mask = (self._ids != tokenizer.pad_token_id).long()
        self._order = (seed, f"order of {split}")

    def __call__(self, rows: range) -> Batch:
        """`input_ids` and `attention_mask` (B, T) of these rows of the infinite stream."""
        chosen = shuffled(rows, num_rows=len(self._ids), seed=self._order[0], purpose=self._order[1])
        return {"input_ids": self._ids[chosen], "attention_mask": self._mask[chosen]}

    def every(self) -> Batch:
        """All windows once, in their own order."""
        return {"input_ids": self._ids, "attention_mask": self._mask}

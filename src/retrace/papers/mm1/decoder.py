"""The decoder: a Llama-like model of transformers, dense or with experts, on packed rows (Sections 2.1, 2.3, 2.6).

    decoder = load_decoder("meta-llama/Llama-3.2-1B")                      the hub or a folder
    decoder = build_decoder(shape, vocab_size=256, seed=0)                 random weights
    loss, metrics = decoder(batch)                                         text alone: how its own pre-training runs

Shapes: B rows of L positions, T tokens that are no padding, J of them with a label, C hidden size, V vocabulary.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from transformers import AutoConfig, AutoModelForCausalLM, LlamaConfig, PreTrainedModel

from retrace.core.data import derive_seed
from retrace.core.weights import load_pretrained
from retrace.papers.mm1.attention import NAME, Tokens
from retrace.papers.mm1.experts import add_experts, routings
from retrace.papers.mm1.rows import IGNORED, PackedBatch
from retrace.papers.mm1.shape import DecoderShape, ExpertsShape

FAMILIES = ("llama", "mistral", "qwen2", "qwen3", "olmo2")  # logits = hidden @ weight, no scale, no soft-cap
LOGITS = {"cpu": 2**21}  # alive at a time
LOGITS_ELSEWHERE = 2**27


class Output(NamedTuple):
    """The scalar to minimise, and detached 0-d tensors by name."""

    loss: Tensor
    metrics: dict[str, Tensor]


class Decoder(nn.Module):
    """A causal language model over packed documents."""

    def __init__(self, trunk: PreTrainedModel, *, experts: ExpertsShape | None = None) -> None:
        """`trunk` has its experts already."""
        super().__init__()
        trunk.set_attn_implementation(NAME)
        self.trunk, self.experts = trunk, experts

    @property
    def hidden_size(self) -> int:
        return int(self.trunk.config.hidden_size)

    @property
    def vocab_size(self) -> int:
        return int(self.trunk.config.vocab_size)

    @property
    def num_positions(self) -> int:
        """Of a document, at the most, that it was trained for."""
        return int(self.trunk.config.max_position_embeddings)

    def embed(self, input_ids: Tensor) -> Tensor:
        """(..., C)."""
        found: Tensor = self.trunk.get_input_embeddings()(input_ids)
        return found

    def hidden(self, tokens: Tokens, embeddings_TC: Tensor) -> Tensor:
        """Final hidden states (T, C), each of what its own document has up to there."""
        found: Tensor = self.trunk.model(
            inputs_embeds=embeddings_TC[None],
            position_ids=tokens.position_ids_T[None],
            attention_mask=embeddings_TC.new_zeros(1, 1, 1, 1),  # or transformers would make one, T x T
            documents=tokens.documents,
            use_cache=False,
        ).last_hidden_state
        return found[0]

    def logits(self, hidden: Tensor) -> Tensor:
        """(..., V) in fp32 or wider."""
        scores: Tensor = self.trunk.get_output_embeddings()(hidden)
        return scores.to(torch.promote_types(scores.dtype, torch.float32))

    def forward(self, batch: PackedBatch | Tokens, *, embeddings_TC: Tensor | None = None) -> Output:
        """Mean loss in nats over tokens with a label, and the routers' losses; `embeddings_TC` instead of the ids'."""
        tokens = batch if isinstance(batch, Tokens) else Tokens.of(batch)
        hidden_TC = self.hidden(tokens, self.embed(tokens.input_ids_T) if embeddings_TC is None else embeddings_TC)
        learned_J = (tokens.labels_T != IGNORED).nonzero()[:, 0]
        text = self._text_loss(hidden_TC[learned_J], tokens.labels_T[learned_J])
        extra, seen = self._router_loss()
        return Output(text + extra, {"loss/text": text.detach(), **seen})

    def _text_loss(self, hidden_JC: Tensor, labels_J: Tensor) -> Tensor:
        """Cross entropy whose logits are never all alive: all but a single chunk's are computed again behind."""
        if not len(labels_J):
            return hidden_JC.sum() + self.logits(hidden_JC).sum()  # 0, with gradients of 0 for all who wait, a head too
        rows = max(1, LOGITS.get(hidden_JC.device.type, LOGITS_ELSEWHERE) // self.vocab_size)
        if len(labels_J) <= rows:
            return self._nll(hidden_JC, labels_J) / len(labels_J)
        chunks = zip(hidden_JC.split(rows), labels_J.split(rows), strict=True)
        parts = [checkpoint(self._nll, h, y, use_reentrant=False) for h, y in chunks]
        return torch.stack(parts).sum() / len(labels_J)

    def _nll(self, hidden_JC: Tensor, labels_J: Tensor) -> Tensor:
        return F.cross_entropy(self.logits(hidden_JC), labels_J, reduction="sum")

    def _router_loss(self) -> tuple[Tensor | float, dict[str, Tensor]]:
        """Weighted sum over the layers with experts; the mean of each part over them."""
        if self.experts is None:
            return 0.0, {}
        balance, z, busiest = (torch.stack(values) for values in zip(*routings(self.trunk), strict=True))
        loss = self.experts.load_balance_weight * balance.sum() + self.experts.router_z_weight * z.sum()
        means = {"router/load_balance": balance.mean(), "router/z": z.mean(), "router/busiest": busiest.mean()}
        return loss, {name: value.detach() for name, value in means.items()}

    def settings(self) -> dict[str, Any]:
        """What `decoder_of` needs beside the tensors."""
        config = self.trunk.config
        experts = None if self.experts is None else self.experts.model_dump(mode="json")
        return {"model_type": config.model_type, "config": config.to_dict(), "experts": experts}


def decoder_of(settings: dict[str, Any]) -> Decoder:
    """The decoder that `settings` describe, with random weights."""
    options = {key: value for key, value in settings["config"].items() if key != "model_type"}
    config = AutoConfig.for_model(settings["model_type"], **options)
    trunk = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    experts = None if settings["experts"] is None else ExpertsShape(**settings["experts"])
    if experts is not None:
        add_experts(trunk, experts, copied=False)
    return Decoder(trunk, experts=experts)


def build_decoder(shape: DecoderShape, *, vocab_size: int, seed: int) -> Decoder:
    """A Llama with random weights that follow from the seed."""
    config = LlamaConfig(
        vocab_size=vocab_size,
        hidden_size=shape.hidden_size,
        num_hidden_layers=shape.num_layers,
        num_attention_heads=shape.num_heads,
        num_key_value_heads=shape.num_kv_heads,
        intermediate_size=shape.intermediate_size,
        max_position_embeddings=4096,
        tie_word_embeddings=True,
    )
    torch.manual_seed(derive_seed(seed, "decoder"))
    experts = None if shape.experts is None else shape.experts.model_dump(mode="json")
    return decoder_of({"model_type": config.model_type, "config": config.to_dict(), "experts": experts})


def load_decoder(
    name: str,
    *,
    experts: ExpertsShape | None = None,
    vocab_size: int | None = None,
    revision: str = "main",
    dtype: torch.dtype = torch.float32,
    seed: int = 0,
) -> Decoder:
    """A dense decoder from the hub or a folder; with `experts`, copies of its MLPs.

    A `vocab_size` above its own makes room for new tokens, such as the image token; what is new, routers too, follows
    from the seed, so that all processes begin alike. Raises ValueError for other models and for one below it.
    """
    found = load_pretrained(AutoConfig, name, revision=revision).model_type
    if found not in FAMILIES:
        raise ValueError(f"{name}: a model of type {found}: expected one of {', '.join(FAMILIES)}")
    torch.manual_seed(derive_seed(seed, "experts"))
    trunk = load_pretrained(AutoModelForCausalLM, name, revision=revision, dtype=dtype, use_safetensors=True)
    if vocab_size is not None and vocab_size < trunk.config.vocab_size:
        raise ValueError(f"vocab_size={vocab_size}: {name} has {trunk.config.vocab_size} tokens already")
    if vocab_size is not None and vocab_size > trunk.config.vocab_size:
        trunk.resize_token_embeddings(vocab_size, mean_resizing=False)
    if experts is not None:
        add_experts(trunk, experts, copied=True)
    return Decoder(trunk, experts=experts)

"""Tiny random models that think, and the plain implementations that tests hold them against."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path
from types import ModuleType

import torch
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

from retrace.papers.quietstar.config import MixingHead, ThoughtConfig
from retrace.papers.quietstar.model import ThoughtModel
from retrace.papers.quietstar.passes import Passes

SIZES = {
    "vocab_size": 37,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
    "initializer_range": 0.3,  # large, so that attention is far from uniform
}
HIDDEN_IDS = (0, 1)
GEMMA2 = {  # soft-caps low enough to bend every score
    "head_dim": 8,
    "query_pre_attn_scalar": 8,
    "attn_logit_softcapping": 2.0,
    "final_logit_softcapping": 3.0,
}
FAMILIES: dict[str, tuple[str, dict[str, object]]] = {  # name -> transformers' family, what it needs beside SIZES
    "llama": ("llama", {}),
    "llama_tied": ("llama", {"tie_word_embeddings": True}),
    "mistral": ("mistral", {"sliding_window": 64}),
    "mistral_small_window": ("mistral", {"sliding_window": 5}),
    "mixtral": ("mixtral", {}),
    "qwen2": ("qwen2", {}),
    "qwen3": ("qwen3", {"head_dim": 8}),
    "gemma": ("gemma", {"head_dim": 8}),
    "gemma2": ("gemma2", {**GEMMA2, "sliding_window": 64}),
    "gemma2_small_window": ("gemma2", {**GEMMA2, "sliding_window": 5}),  # in every second layer
    "gemma3_text": ("gemma3_text", {"head_dim": 8, "query_pre_attn_scalar": 8}),
    "gpt2": ("gpt2", {"n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 128}),
    "gpt_neox": ("gpt_neox", {}),  # Pythia
    "opt": ("opt", {"ffn_dim": 48, "word_embed_proj_dim": 32}),
    "phi": ("phi", {}),
    "phi3": ("phi3", {"pad_token_id": 0}),
    "olmo2": ("olmo2", {}),
    "starcoder2": ("starcoder2", {}),
    "cohere": ("cohere", {"logit_scale": 0.25}),
    "granite": ("granite", {"logits_scaling": 4.0, "embedding_multiplier": 3.0}),
}
PADDINGS = ["none", "left", "right"]


def _reference() -> ModuleType:
    path = Path(__file__).parents[2] / "benchmarks" / "growing_mask.py"
    spec = importlib.util.spec_from_file_location("growing_mask", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules["growing_mask"] = module
    spec.loader.exec_module(module)
    return module


reference = _reference()


def _double_norms(trunk: PreTrainedModel) -> None:
    """transformers' RMSNorm rounds to fp32 inside, which would hide what fp64 tests look for."""
    for module in list(trunk.modules()):
        for name, child in list(module.named_children()):
            if type(child).__name__.endswith("RMSNorm"):
                setattr(module, name, torch.nn.RMSNorm(child.weight.shape, eps=1e-6, dtype=torch.float64))


def tiny(name: str) -> PreTrainedModel:
    """A tiny random model of a family."""
    family, options = FAMILIES[name]
    return AutoModelForCausalLM.from_config(AutoConfig.for_model(family, **{**SIZES, **options})).eval()


def build(
    family: str = "llama", *, dtype: torch.dtype = torch.float64, zero_init: bool = False, **changes: object
) -> ThoughtModel:
    """A thinking model on random weights; `changes` are settings of its ThoughtConfig."""
    torch.manual_seed(0)
    values = {"num_sampled": 3, "num_true": 2, "num_thoughts": 2, "policy_weight": 10.0, **changes}
    values.setdefault("mixing_head", MixingHead(zero_init=zero_init))
    trunk = tiny(family).to(dtype)
    if dtype == torch.float64:
        _double_norms(trunk)
    config, prefix_ids = ThoughtConfig(**values), range(8, 10) if "prefix" in changes else ()
    ids = {"start_init_id": 5, "end_init_id": 6, "hidden_token_ids": HIDDEN_IDS, "prefix_ids": tuple(prefix_ids)}
    return ThoughtModel(trunk, config, **ids).to(dtype)


def batch(padding: str = "none", *, num_text: int = 11) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(1)
    ids_BT = torch.randint(2, SIZES["vocab_size"], (2, num_text), generator=generator)
    mask_BT = torch.ones_like(ids_BT)
    if padding == "left":
        mask_BT[0, :3] = 0
    if padding == "right":
        mask_BT[1, -4:] = 0
    return ids_BT * mask_BT, mask_BT


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def gradients(model: ThoughtModel, loss: Tensor) -> dict[str, Tensor]:
    model.zero_grad()
    loss.backward()
    return {n: torch.zeros_like(p) if p.grad is None else p.grad.clone() for n, p in model.named_parameters()}


def assert_gradients_equal(ours: dict[str, Tensor], theirs: dict[str, Tensor], *, atol: float = 1e-10) -> None:
    """Parameter by parameter, naming the first that differs."""
    for name, gradient in theirs.items():
        torch.testing.assert_close(
            ours[name], gradient, atol=atol, rtol=1e-8, msg=lambda text, name=name: f"{name}: {text}"
        )


def thread_embeddings(model: ThoughtModel, ids_BT: Tensor, thoughts_BPNM: Tensor) -> Tensor:
    """[START, prefix, sampled, END, the true tokens after the position] of every thread, (B, N, P, K, C)."""
    num_true, num_positions = model.config.num_true, thoughts_BPNM.shape[2]
    sampled = model.embed(thoughts_BPNM.transpose(1, 2))
    padded = torch.cat([ids_BT, ids_BT.new_zeros(len(ids_BT), num_true)], 1)
    true = torch.stack([padded[:, s : s + num_positions] for s in range(1, num_true)], 2) if num_true > 1 else None
    parts = [sampled]
    if true is not None:
        parts.append(model.embed(true)[:, :, None].expand(-1, -1, sampled.shape[2], -1, -1))
    if model.end_embedding is not None:
        parts.insert(1, model.end_embedding.expand_as(sampled[:, :, :, :1]))
    if (opening := model.opening()) is not None:
        parts.insert(0, opening.expand(*sampled.shape[:3], -1, -1))
    return torch.cat(parts, 3)


def thread_hidden(
    model: ThoughtModel, ids_BT: Tensor, mask_BT: Tensor, thoughts_BPNM: Tensor, *, at_once: bool = False
) -> Tensor:
    """Final hidden states (B, N, P, K, C) of all thread tokens behind START, in the passes of a step or all in one."""
    positions, num_thoughts = range(thoughts_BPNM.shape[2]), thoughts_BPNM.shape[1]
    passes = Passes.over(model, ids_BT, mask_BT, positions=positions, num_thoughts=num_thoughts)
    base_BTC = passes.read()
    if at_once:
        return passes._continue(thread_embeddings(model, ids_BT, thoughts_BPNM))
    thinking = passes.think(passes.choose(base_BTC), None, thoughts_BNPM=thoughts_BPNM.transpose(1, 2))
    end = passes.speak(thinking, model.config.num_true)
    before = thinking.before if model.opening() is not None else thinking.before[1:]
    return torch.cat([*(h.expand_as(end[:, :, :, 0])[:, :, :, None] for h in before), end], 3)

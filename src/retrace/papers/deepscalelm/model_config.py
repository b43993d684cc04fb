"""The shape of somebody's model, from the config.json that transformers writes. No torch, no transformers."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from retrace.core.config import validate
from retrace.papers.deepscalelm.shape import ModelShape

KEYS: Mapping[str, tuple[str, ...]] = {  # of ModelShape: the names that transformers' configs have for it
    "num_layers": ("num_hidden_layers", "n_layer", "n_layers", "num_layers"),
    "hidden_size": ("hidden_size", "n_embd", "d_model", "dim"),
    "num_heads": ("num_attention_heads", "n_head", "n_heads", "num_heads"),
    "intermediate_size": ("intermediate_size", "n_inner", "d_ff", "ffn_dim", "hidden_dim"),
    "dropout": ("hidden_dropout_prob", "resid_pdrop", "hidden_dropout", "dropout_rate", "dropout"),
    "attention_dropout": ("attention_probs_dropout_prob", "attn_pdrop", "attention_dropout", "dropout_rate"),
    "vocab_size": ("vocab_size",),
    "seq_len": ("max_position_embeddings", "n_positions", "n_ctx"),
}
ACTIVATIONS = {"relu": "relu", "gelu": "gelu", "gelu_new": "gelu", "gelu_fast": "gelu", "gelu_pytorch_tanh": "gelu"}
_FAMILIES = (
    ("llama mistral qwen2", "decoder pre rmsnorm rope swiglu"),
    ("gpt2 gpt_neo opt", "decoder pre layernorm learned"),
    ("gpt_neox gptj", "decoder pre layernorm rope"),
    ("bert roberta electra distilbert camembert", "encoder post layernorm learned"),
)
FAMILIES: Mapping[str, Mapping[str, str]] = {  # by model_type: what its config.json does not say
    name: dict(zip(("kind", "placement", "norm", "positions", "activation"), traits.split(), strict=False))
    for names, traits in _FAMILIES
    for name in names.split()
}
DEFAULTS: Mapping[str, Any] = {
    "kind": "encoder", "placement": "post", "norm": "layernorm", "activation": "relu", "positions": "learned",
    "num_layers": 12, "hidden_size": 768, "num_heads": 12, "dropout": 0.1, "attention_dropout": 0.1,
    "vocab_size": 30522, "seq_len": 512,
}  # fmt: skip


def model_shape(config: Path | None, options: Mapping[str, Any]) -> ModelShape:
    """A config.json's shape, with `options` (those that are None do not count) on top; without one, BERT's with ReLU.

    intermediate_size is four times hidden_size where nobody says. Raises ValueError for a file that is no config, and
    for what a shape needs and neither the file nor the options say.
    """
    given = {key: value for key, value in options.items() if value is not None}
    values = {**(DEFAULTS if config is None else read_config(config)), **given}
    if config is None and "num_heads" not in given:
        width = values["hidden_size"]
        values["num_heads"] = next(n for n in range(max(1, width // 64), 0, -1) if width % n == 0)
    if values.get("hidden_size") and not values.get("intermediate_size"):
        values["intermediate_size"] = 4 * values["hidden_size"]
    missing = [key for key in ModelShape.model_fields if key not in values]
    if missing:
        raise ValueError(f"{config}: does not say {', '.join(missing)}: add {', '.join(map(option_name, missing))}")
    return validate(ModelShape, values, source="shape" if config is None else str(config))


def option_name(key: str) -> str:
    """The command's option for a key of ModelShape."""
    return f"--{key.removeprefix('num_').replace('_', '-')}"


def read_config(path: Path) -> dict[str, Any]:
    """The keys of ModelShape that a config.json says something of. Raises ValueError for a file that is none."""
    file = path / "config.json" if path.is_dir() else path
    try:
        config = json.loads(file.read_text())
    except OSError as error:
        raise ValueError(f"{file}: {error.strerror}; expected a transformers config.json, or its folder") from None
    except ValueError:
        raise ValueError(f"{file}: not JSON; expected a transformers config.json") from None
    if not isinstance(config, dict):
        raise ValueError(f"{file}: expected keys and values, found {type(config).__name__}")
    found: dict[str, Any] = dict(FAMILIES.get(str(config.get("model_type")), {}))
    for key, names in KEYS.items():
        value = next((config[name] for name in names if config.get(name) is not None), None)
        if value is not None:
            found[key] = value
    function = config.get("hidden_act") or config.get("activation_function") or config.get("activation")
    if "activation" not in found and function in ACTIVATIONS:
        found["activation"] = ACTIVATIONS[function]
    found.setdefault("dropout", 0.0)  # families whose configs have no key for it have none
    found.setdefault("attention_dropout", 0.0)
    return found

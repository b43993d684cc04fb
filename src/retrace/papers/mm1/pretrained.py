"""A model of this paper as a folder: the whole, its decoder or its vision encoder.

    retrace_mm1.json      what it is: format, part, the configs of its parts
    model.safetensors     parameters and buffers by name, bit for bit

Parts that transformers knows come from its own folders and the hub (`load_encoder`, `load_decoder`); these here have
what it does not know: connectors, experts, a convolutional stem.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, get_args

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from retrace.core.checkpoint import model_tensors
from retrace.core.config import validate
from retrace.core.files import write_json
from retrace.papers.mm1.decoder import Decoder, decoder_of
from retrace.papers.mm1.encoder import VisionEncoder, encoder_of
from retrace.papers.mm1.model import MultimodalModel
from retrace.papers.mm1.shape import ConnectorShape

SETTINGS, TENSORS = "retrace_mm1.json", "model.safetensors"
FORMAT = 1
Saved = MultimodalModel | Decoder | VisionEncoder


def save_pretrained(model: Saved, folder: Path, *, tensors: Mapping[str, Tensor] | None = None) -> None:
    """Write the folder; `tensors` are the model's by name where they are not in it, as under FSDP."""
    found = dict(model_tensors(model) if tensors is None else tensors)
    folder.mkdir(parents=True, exist_ok=True)
    save_file({name: tensor.detach().contiguous().cpu() for name, tensor in found.items()}, folder / TENSORS)
    part = next(kind.__name__ for kind in get_args(Saved) if isinstance(model, kind))  # sharding renames the class
    write_json(folder / SETTINGS, {"format": FORMAT, "part": part, **_settings(model)})


def from_pretrained(folder: Path, *, dtype: torch.dtype | None = None, device: str | torch.device = "cpu") -> Saved:
    """What was saved there, in eval mode; `dtype` None keeps the stored one.

    Raises ValueError for a folder that holds something else, or tensors that do not fit.
    """
    file = folder / SETTINGS
    if not file.is_file():
        raise ValueError(
            f"{folder}: no model of MM1, {SETTINGS} is missing: expected a folder that save_pretrained wrote"
        )
    settings = json.loads(file.read_text())
    if settings.get("format") != FORMAT:
        raise ValueError(
            f"{file}: format={settings.get('format')}: expected {FORMAT}; it is of another version of Retrace"
        )
    with torch.random.fork_rng(devices=[]):
        model = _build(settings, source=str(file))
    _fill(model, folder / TENSORS, dtype=dtype)
    return model.to(device).eval()


def load_model(
    folder: Path, *, dtype: torch.dtype | None = None, device: str | torch.device = "cpu"
) -> MultimodalModel:
    """The whole model. Raises ValueError for a part of one, or as `from_pretrained` does."""
    model = from_pretrained(folder, dtype=dtype, device=device)
    if not isinstance(model, MultimodalModel):
        raise ValueError(f"{folder}: holds a {type(model).__name__} alone: expected a whole MultimodalModel")
    return model


def _settings(model: Saved) -> dict[str, Any]:
    if not isinstance(model, MultimodalModel):
        return {"settings": model.settings()}
    return {
        "encoder": model.encoder.settings(),
        "connector": model.connector_shape.model_dump(mode="json"),
        "decoder": model.decoder.settings(),
        "image_token_id": model.image_token_id,
    }


def _build(settings: dict[str, Any], *, source: str) -> Saved:
    if settings["part"] == "VisionEncoder":
        return encoder_of(settings["settings"])
    if settings["part"] == "Decoder":
        return decoder_of(settings["settings"])
    return MultimodalModel(
        encoder_of(settings["encoder"]),
        validate(ConnectorShape, settings["connector"], source=source),
        decoder_of(settings["decoder"]),
        image_token_id=settings["image_token_id"],
    )


@torch.no_grad()
def _fill(model: Saved, file: Path, *, dtype: torch.dtype | None) -> None:
    """Parameters take the stored dtype or `dtype`; buffers keep theirs."""
    wanted = model_tensors(model)
    with safe_open(file, "pt") as found:
        wrong = sorted(wanted.keys() ^ set(found.keys()))
        wrong += [n for n in wanted if n not in wrong and [*wanted[n].shape] != found.get_slice(n).get_shape()]
        if wrong:
            raise ValueError(f"{file}: does not fit its {SETTINGS}: {wrong[0]} and {len(wrong) - 1} more differ")
        for name, target in wanted.items():
            tensor = found.get_tensor(name)
            target.data = tensor.to(dtype or tensor.dtype) if isinstance(target, torch.nn.Parameter) else tensor

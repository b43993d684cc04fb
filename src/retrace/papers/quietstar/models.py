"""The trunks that an experiment can ask for: sizes that are known before the weights are."""

from __future__ import annotations

import hashlib
import os
from pathlib import Path
from typing import Literal, Self

from pydantic import Field, model_validator

from retrace.core.config import Frozen, data_root
from retrace.core.cost import DecoderShape
from retrace.core.tasks import require_hub
from retrace.core.weights import require_weights


class ModelShape(Frozen):
    """Sizes of a decoder; they are known before its weights are, for counting FLOPs and bytes."""

    hidden_size: int = Field(ge=8)
    num_layers: int = Field(ge=1)
    num_heads: int = Field(ge=1)
    num_kv_heads: int = Field(ge=1)
    intermediate_size: int = Field(ge=8)

    @model_validator(mode="after")
    def _heads_divide(self) -> Self:
        if self.hidden_size % (2 * self.num_heads):
            raise ValueError(f"hidden_size={self.hidden_size} does not give {self.num_heads} heads of even size")
        if self.num_heads % self.num_kv_heads:
            raise ValueError(f"num_kv_heads={self.num_kv_heads} does not divide num_heads={self.num_heads}")
        return self

    def shape(self, vocab_size: int) -> DecoderShape:
        """For counting FLOPs and bytes."""
        return DecoderShape(
            hidden_size=self.hidden_size,
            num_layers=self.num_layers,
            num_heads=self.num_heads,
            num_kv_heads=self.num_kv_heads,
            intermediate_size=self.intermediate_size,
            vocab_size=vocab_size,
        )


class ScratchModel(ModelShape):
    """A trunk trained here from random weights, by program `pretrain`."""

    kind: Literal["scratch"]
    architecture: Literal["llama", "mistral", "qwen2"]
    tie_embeddings: bool  # one matrix for input embedding and output projection


class PretrainedModel(ModelShape):
    """A trunk that exists: a folder as transformers saves it, or a model of the hub; loading checks the sizes."""

    kind: Literal["pretrained"]
    name: str = Field(min_length=1)  # a folder, also below RETRACE_DATA, or a name on the hub
    revision: str = Field(min_length=1)  # on the hub; a commit fixes the weights, a branch does not
    vocab_size: int = Field(ge=1)

    def folder(self) -> Path | None:
        """Where the weights lie on this machine, None for a model of the hub."""
        root = data_root()
        candidates = [Path(self.name)] + ([root / self.name] if root else [])
        return next((path for path in candidates if (path / "config.json").is_file()), None)

    def check(self) -> None:
        """Raise ValueError where no safetensors are here, in the hub's cache, or to be fetched."""
        from huggingface_hub import try_to_load_from_cache

        folder = self.folder()
        if folder is not None:
            require_weights(folder)
        elif not try_to_load_from_cache(self.name, "config.json", revision=self.revision):
            hint = (
                "on a machine that reaches it, download it with `hf download`, copy the folder here, and say "
                "model.name=FOLDER"
            )
            if os.environ.get("HF_HUB_OFFLINE"):
                raise ValueError(
                    f"{self.name}: not in the hub's cache on this machine, and HF_HUB_OFFLINE is set; {hint}"
                )
            require_hub(self.name, hint)

    def fingerprints(self) -> dict[str, str]:
        """Twelve hex digits over a folder's file names, sizes and first mebibytes; nothing for the hub."""
        folder = self.folder()
        if folder is None:
            return {}
        digest = hashlib.sha256()
        for path in sorted(path for path in folder.iterdir() if path.is_file()):
            with open(path, "rb") as file:
                digest.update(f"{path.name}/{path.stat().st_size}/".encode() + file.read(2**20))
        return {self.name: digest.hexdigest()[:12]}

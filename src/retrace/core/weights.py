"""Models and tokenizers of other people, from a folder or the hub: safetensors only, and none of their code is run."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from safetensors import SafetensorError

from retrace.core.files import read_json


def load_pretrained(kind: Any, name: str | Path, *, revision: str = "main", **options: Any) -> Any:
    """`kind.from_pretrained` of a class of transformers, for a model with `use_safetensors=True` among `options`.

    Left to itself the library asks on standard input whether to run code that comes with a model; here it never does.
    Raises ValueError, in one sentence, for a model that is there in other formats only, or needs code of its own.
    """
    try:
        return kind.from_pretrained(str(name), revision=revision, trust_remote_code=False, **options)
    except (OSError, ValueError, SafetensorError) as error:
        if options.get("use_safetensors"):
            require_weights(Path(name))
        asked = _asks_for_code(Path(name)) or "trust_remote_code" in str(error)
        first = next((line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__)
        reason = "it needs code of its own, which is never run: use a type that transformers knows" if asked else first
        raise ValueError(f"{name}: {reason}") from error


def note_commit(notes: dict[str, Any], name: str, *, revision: str) -> None:
    """Put into a run's notes which commit of the hub was loaded, since a branch moves; nothing for a folder."""
    from huggingface_hub import try_to_load_from_cache  # 0.15 s, and every command imports this file

    found = None if Path(name).is_dir() else try_to_load_from_cache(name, "config.json", revision=revision)
    if isinstance(found, str):
        notes.setdefault("hub_commits", {})[name] = Path(found).parent.name


def require_weights(folder: Path) -> None:
    """Raise ValueError for a folder with weights in other formats only; before a run, and without reading them."""
    if folder.is_dir() and not any(folder.glob("model*.safetensors")):
        raise ValueError(
            f"{folder}: no model*.safetensors: other formats can hold code and are not read; save it as such first"
        )


def _asks_for_code(folder: Path) -> bool:
    return any("auto_map" in (read_json(folder / name) or {}) for name in ("config.json", "tokenizer_config.json"))

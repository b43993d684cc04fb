"""The identity of a run: a hash of everything that can change one of its numbers, and of nothing else.

The hash covers paper, recipe, program, scale, the program's scientific config and the ids of the runs it builds on.
So a base model that many arms share is one run, and a change in it renames all that follow. Placement is never covered.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Mapping
from typing import Any

from retrace.core.config import Frozen, Placement


def canonical(value: Any) -> str:
    """JSON with sorted keys and no whitespace; raises TypeError or ValueError for what has no canonical form."""
    _check(value, "config")
    return json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=True, allow_nan=False)


def _check(value: Any, where: str) -> None:
    if value is None or isinstance(value, bool | int | str):
        return
    if isinstance(value, float):
        if not math.isfinite(value):
            raise ValueError(f"{where}={value}: a run's identity needs finite numbers")
    elif isinstance(value, Mapping):
        for key, item in value.items():
            if not isinstance(key, str):
                raise TypeError(f"{where} has the key {key!r}: keys in a config are text")
            _check(item, f"{where}.{key}")
    elif isinstance(value, list | tuple):
        for index, item in enumerate(value):
            _check(item, f"{where}[{index}]")
    else:
        raise TypeError(f"{where} is a {type(value).__name__}, which has no canonical form; use numbers, text, lists")


def science(config: Frozen) -> dict[str, Any]:
    """The config as a plain tree without its `Placement` parts, at any depth."""
    tree: dict[str, Any] = {}
    for name in type(config).model_fields:
        value = getattr(config, name)
        if not isinstance(value, Placement):
            tree[name] = _plain(value)
    return tree


def _plain(value: Any) -> Any:
    if value is None or isinstance(value, bool | int | float | str):  # most are; the other questions take longer
        return value
    if isinstance(value, Frozen):
        return science(value)
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    if isinstance(value, Mapping):
        return {key: _plain(item) for key, item in value.items()}
    return value


def run_id(*, paper: str, program: str, recipe: int, scale: str, config: Frozen, parents: Mapping[str, str]) -> str:
    """`<paper>-<program>-<12 hex digits>`, safe as a folder name and as a W&B run id."""
    content = {
        "paper": paper,
        "program": program,
        "recipe": recipe,
        "scale": scale,
        "config": science(config),
        "parents": dict(parents),
    }
    digest = hashlib.sha256(canonical(content).encode()).hexdigest()
    return f"{paper}-{program}-{digest[:12]}"

"""The identity of a run: a hash of everything that can change one of its numbers, and of nothing else.

The hash covers paper, recipe, program, scale, the program's scientific config and the ids of the runs it builds on.
So a base model that many arms share is one run, and a change in it renames all that follow. Placement is never covered.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Mapping
from functools import cache
from typing import Any

from retrace.core.config import Frozen, Placement

_ATOMS = frozenset({bool, int, str, type(None)})  # most values are one of these, and a plan has millions


def canonical(value: Any) -> str:
    """JSON with sorted keys and no whitespace; raises TypeError or ValueError for what has no canonical form."""
    _check(value, ("config",))
    return json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=True, allow_nan=False)


def _check(value: Any, where: tuple[object, ...]) -> None:
    if isinstance(value, Mapping):
        for key, item in value.items():
            if not isinstance(key, str):
                raise TypeError(f"{_told(where)} has the key {key!r}: keys in a config are text")
            if type(item) not in _ATOMS:
                _check(item, (*where, key))
    elif isinstance(value, list | tuple):
        for index, item in enumerate(value):
            if type(item) not in _ATOMS:
                _check(item, (*where, index))
    elif isinstance(value, float):
        if not math.isfinite(value):
            raise ValueError(f"{_told(where)}={value}: a run's identity needs finite numbers")
    elif value is not None and not isinstance(value, bool | int | str):
        kind = type(value).__name__
        raise TypeError(f"{_told(where)} is a {kind}, which has no canonical form; use numbers, text, lists")


def _told(where: tuple[object, ...]) -> str:
    """A place in a config, as config.data.weights[2]."""
    return "".join(f"[{part}]" if isinstance(part, int) else f".{part}" for part in where).removeprefix(".")


def science(config: Frozen) -> dict[str, Any]:
    """The config as a plain tree without its `Placement` parts, at any depth."""
    values = ((name, getattr(config, name)) for name in _fields(type(config)))
    return {
        name: value if type(value) in _ATOMS else _plain(value)
        for name, value in values
        if not isinstance(value, Placement)
    }


@cache
def _fields(kind: type[Frozen]) -> tuple[str, ...]:
    return tuple(kind.model_fields)


def _plain(value: Any) -> Any:
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

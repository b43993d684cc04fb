"""From YAML and overrides to a plain tree; the only file that knows Hydra, which runs here and never in a worker.

Hydra composes the config groups, which takes 50 ms; a plan of a hundred runs then only sets other values on what was
composed, with Hydra's own grammar, as Hydra does it.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Mapping, Sequence
from functools import lru_cache
from typing import Any

from hydra import compose as hydra_compose
from hydra import initialize_config_dir
from hydra.core.global_hydra import GlobalHydra
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Override
from hydra.errors import HydraException
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from retrace.core.config import CONFIGS, papers, suggest


def parse(text: str) -> Override:
    """One override in Hydra's grammar; raises ValueError for what does not parse, and for adding or removing keys."""
    if text.startswith(("+", "~")):
        raise ValueError(f"{text}: keys can't be added or removed, only set; write {text.lstrip('+~')}")
    try:
        return OverridesParser.create().parse_override(text)
    except HydraException as error:
        reason = str(error).splitlines()[0]
        raise ValueError(f"{text!r} is not an override: {reason}; write key=value, as in seed=0,1,2") from None


def expand_sweep(overrides: Sequence[str]) -> list[tuple[str, ...]]:
    """Hydra's sweep syntax (`a=1,2`, `a=range(3)`, `a=choice(x,y)`) as the product of plain override lists."""
    choices: list[list[str]] = []
    for text in overrides:
        override = parse(text)
        choices.append(_values(override) if override.is_sweep_override() else [text])
    return list(itertools.product(*choices))


def _values(override: Override) -> list[str]:
    try:
        values = [f"{override.get_key_element()}={value}" for value in override.sweep_string_iterator()]
    except HydraException as error:
        raise ValueError(f"{override.input_line}: {_one_line(error)}; sweep with a=1,2 or range(3)") from None
    if not values:
        raise ValueError(f"{override.input_line}: a sweep over nothing; give at least one value")
    return values


def override_key(override: str) -> str:
    """The dotted key that an override sets: `thoughts.num_sampled` of `thoughts.num_sampled=3`."""
    return override.partition("=")[0]


def compose(paper: str, overrides: Sequence[str], *, name: str = "main") -> dict[str, Any]:
    """The resolved plain tree of configs/<paper>/<name>.yaml under overrides.

    Raises ValueError, in one line, for an unknown paper, key, group choice or a value that does not parse.
    """
    if not (CONFIGS / paper / f"{name}.yaml").is_file():
        raise ValueError(f"{paper}/{name}: no such config; the papers are: {', '.join(papers()) or 'none'}")
    groups = tuple(text for text in overrides if _is_group(paper, override_key(text)))
    tree = _compose_groups(paper, name, groups).copy()
    for text in overrides:
        if text not in groups:
            _set(tree, text)
    try:
        plain = OmegaConf.to_container(tree, resolve=True)
    except OmegaConfBaseException as error:
        raise ValueError(f"{paper}/{name} does not resolve: {_one_line(error)}") from None
    assert isinstance(plain, dict)
    return {str(key): value for key, value in plain.items()}


def _is_group(paper: str, key: str) -> bool:
    """Whether a key chooses a file: a folder of the paper's configs, or of all papers'."""
    return "." not in key and ((CONFIGS / paper / key).is_dir() or (CONFIGS / key).is_dir())


@lru_cache(maxsize=64)
def _compose_groups(paper: str, name: str, groups: tuple[str, ...]) -> DictConfig:
    for text in groups:
        group, choice = parse(text).get_key_element(), text.partition("=")[2]
        known = {path.stem for folder in (CONFIGS / paper, CONFIGS) for path in (folder / group).glob("*.yaml")}
        if choice not in known:
            raise ValueError(f"{text}: no such {group} for {paper}; there are: {', '.join(sorted(known))}")
    GlobalHydra.instance().clear()
    try:
        with initialize_config_dir(config_dir=str(CONFIGS / paper), version_base="1.3"):
            search = f"hydra.searchpath=[file://{CONFIGS}]"  # configs/hardware and configs/tracking, for every paper
            return hydra_compose(name, [search, *groups])
    except (HydraException, OmegaConfBaseException) as error:
        raise ValueError(f"{paper}/{name} does not compose with {' '.join(groups)}: {_one_line(error)}") from None


def _set(tree: DictConfig, text: str) -> None:
    override = parse(text)
    key, value = override.get_key_element(), override.value()
    try:
        before = OmegaConf.select(tree, key)
        kinds = [part.get("kind") if isinstance(part, Mapping) else None for part in (before, value)]
        another = None not in kinds and kinds[0] != kinds[1]  # with keys of its own: it takes the place of the first
        OmegaConf.update(tree, key, value, merge=not another)
    except OmegaConfBaseException as error:
        known = list(_leaves(OmegaConf.to_container(tree)))
        if key not in known:
            raise ValueError(f"{text}: no such key{suggest(key, known)}") from None
        raise ValueError(f"{text}: {_one_line(error)}") from None


def _one_line(error: Exception) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return " ".join(lines[:6])


def _leaves(tree: Any, prefix: str = "") -> Iterator[str]:
    for key, value in tree.items():
        yield prefix + key
        if isinstance(value, Mapping):
            yield from _leaves(value, f"{prefix}{key}.")

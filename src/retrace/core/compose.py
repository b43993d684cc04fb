"""From YAML and overrides to a plain tree; the only file that knows Hydra, which runs here and never in a worker.

Hydra composes the config groups, which takes 50 ms, and its import 150 ms, so it is imported where it is needed. A plan
of a hundred runs only sets other values on what was composed, with Hydra's own grammar, as Hydra does it; runs that
differ in their seed alone share all but the last step.
"""

from __future__ import annotations

import hashlib
import itertools
import json
import re
from collections.abc import Iterator, Mapping, Sequence
from functools import lru_cache
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

from retrace.core.config import CONFIGS, suggest
from retrace.core.discovery import configs_of
from retrace.core.memo import remember
from retrace.core.safety import refuse_secrets

if TYPE_CHECKING:
    from hydra.core.override_parser.types import Override
    from omegaconf import DictConfig


@lru_cache(maxsize=1024)
def parse(text: str) -> Override:
    """One override in Hydra's grammar; raises ValueError for what does not parse, and for adding or removing keys."""
    from hydra.core.override_parser.overrides_parser import OverridesParser
    from hydra.errors import HydraException

    if text.startswith(("+", "~")):
        raise ValueError(f"{text}: keys can't be added or removed, only set; write {text.lstrip('+~')}")
    if text.startswith("="):
        raise ValueError(f"{text}: no key before =; write key=value, without spaces around =, as in seed=0,1,2")
    try:
        return OverridesParser.create().parse_override(text)
    except HydraException as error:
        reason = str(error).splitlines()[0].partition(" expecting ")[0].replace("'<EOF>'", "end")
        raise ValueError(f"{text!r} is not an override: {reason}; write key=value, as in seed=0,1,2") from None


def expand_sweep(overrides: Sequence[str]) -> list[tuple[str, ...]]:
    """Hydra's sweep syntax (`a=1,2`, `a=range(3)`, `a=choice(x,y)`) as the product of plain override lists."""
    choices: list[list[str]] = []
    for text in overrides:
        if re.fullmatch(r"[\w.]+=[\w./-]+", text):  # one value; known without Hydra, which takes 0.3 s to import
            choices.append([text])
            continue
        override = parse(text)
        choices.append(_values(override) if override.is_sweep_override() else [text])
    return list(itertools.product(*choices))


def _values(override: Override) -> list[str]:
    from hydra.errors import HydraException

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
    if not (path := configs_of(paper) / f"{name}.yaml").is_file():
        raise ValueError(f"{paper}/{name}: no such config: there is no {path}")
    seeds = [text.removeprefix("seed=") for text in overrides if override_key(text) == "seed"]
    seed = seeds[0] if len(seeds) == 1 and re.fullmatch("0|[1-9][0-9]*", seeds[0]) else None
    given = tuple(f"seed={_SEED}" if seed and text == f"seed={seed}" else text for text in overrides)
    text = _composed(paper, name, given)
    if text is None:
        return _resolve(_tree(paper, name, overrides), f"{paper}/{name}")
    plain: dict[str, Any] = json.loads(text if seed is None else text.replace(_SEED, seed))
    return plain


_SEED = "917263548091"  # stands for any seed; in no config


@lru_cache(maxsize=1024)
def _composed(paper: str, name: str, overrides: tuple[str, ...]) -> str | None:
    """The tree as JSON, or None where a seed may do more than stand in some places, so that each has to be composed.

    It can do no more where values only name other values: without resolvers, without a name put together from others,
    and where no text has it within. Such a tree depends on nothing but files and overrides, so it is kept on disk:
    Hydra takes seconds for a paper, and hashing all configs takes a few milliseconds.
    """

    def make() -> str | None:
        tree = _tree(paper, name, overrides)
        if not _is_plain(tree):
            return None
        plain = _resolve(tree, f"{paper}/{name}")
        values = list(_scalars(plain))
        refuse_secrets("\n".join(map(str, values)), where=f"{paper}/{name}")
        within = any(_SEED in str(value) and value != int(_SEED) for value in values)
        return None if within else json.dumps(plain)

    return remember(_sources(paper), json.dumps([paper, name, overrides]), make)


def _is_plain(tree: DictConfig) -> bool:
    from omegaconf import OmegaConf

    written = map(str, _scalars(OmegaConf.to_container(tree)))
    return not any(re.search(r"\$\{[^}]*(:|\$\{)", text) for text in written)


@lru_cache(maxsize=16)
def _sources(paper: str) -> str:
    """A hash of all that a paper's composed trees come from: its configs, those of all papers, this file, libraries."""
    found = hashlib.sha256(repr([version(name) for name in ("hydra-core", "omegaconf")]).encode())
    shared = (path for path in CONFIGS.glob("*/*.yaml") if not (path.parent / "main.yaml").is_file())
    for path in (Path(__file__), *sorted(shared), *sorted(configs_of(paper).rglob("*.yaml"))):
        content = path.read_bytes()
        found.update(f"{path} {len(content)}\n".encode() + content)
    return found.hexdigest()


def _resolve(tree: DictConfig, source: str) -> dict[str, Any]:
    """The plain tree, with the values that refer to others looked up."""
    from omegaconf import OmegaConf
    from omegaconf.errors import OmegaConfBaseException

    try:
        plain = OmegaConf.to_container(tree, resolve=True)
    except OmegaConfBaseException as error:
        raise ValueError(f"{source} does not resolve: {_one_line(error)}") from None
    assert isinstance(plain, dict)
    return {str(key): value for key, value in plain.items()}


def _tree(paper: str, name: str, overrides: Sequence[str]) -> DictConfig:
    """The tree before values that refer to others are looked up."""
    groups = tuple(text for text in overrides if _is_group(paper, override_key(text)))
    tree = _compose_groups(paper, name, groups).copy()
    for text in overrides:
        if text not in groups:
            _set(tree, text)
    return tree


def _is_group(paper: str, key: str) -> bool:
    """Whether a key chooses a file: a folder of the paper's configs, or of all papers'."""
    return "." not in key and ((configs_of(paper) / key).is_dir() or (CONFIGS / key).is_dir())


@lru_cache(maxsize=64)
def _compose_groups(paper: str, name: str, groups: tuple[str, ...]) -> DictConfig:
    from hydra import compose as hydra_compose
    from hydra import initialize_config_dir
    from hydra.core.global_hydra import GlobalHydra
    from hydra.errors import HydraException
    from omegaconf.errors import OmegaConfBaseException

    for text in groups:
        group, choice = parse(text).get_key_element(), text.partition("=")[2]
        known = {path.stem for folder in (configs_of(paper), CONFIGS) for path in (folder / group).glob("*.yaml")}
        if choice not in known:
            raise ValueError(f"{text}: no such {group} for {paper}; there are: {', '.join(sorted(known))}")
    GlobalHydra.instance().clear()
    try:
        with initialize_config_dir(config_dir=str(configs_of(paper)), version_base="1.3"):
            search = f"hydra.searchpath=[file://{CONFIGS}]"  # configs/hardware and configs/tracking, for every paper
            return hydra_compose(name, [search, *groups])
    except (HydraException, OmegaConfBaseException) as error:
        raise ValueError(f"{paper}/{name} does not compose with {' '.join(groups)}: {_one_line(error)}") from None


def _set(tree: DictConfig, text: str) -> None:
    from omegaconf import OmegaConf
    from omegaconf.errors import OmegaConfBaseException

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
            raise ValueError(f"{text}: no such key{_nearest(key, known)}") from None
        raise ValueError(f"{text}: {_one_line(error)}") from None


def _nearest(key: str, known: Sequence[str]) -> str:
    """The key that was meant, perhaps, or else those beside it: all keys of a paper would fill the screen."""
    parent = key.rpartition(".")[0]
    while parent and parent not in known:
        parent = parent.rpartition(".")[0]
    beside = [name for name in known if name.rpartition(".")[0] == parent]
    hint = suggest(key, known)
    return hint if "did you mean" in hint else suggest(key, beside)


def _one_line(error: Exception) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return " ".join(lines[:6])


def _scalars(tree: Any) -> Iterator[Any]:
    """Every value that is not a branch or a list."""
    if isinstance(tree, Mapping | list):
        for value in tree.values() if isinstance(tree, Mapping) else tree:
            yield from _scalars(value)
    else:
        yield tree


def _leaves(tree: Any, prefix: str = "") -> Iterator[str]:
    for key, value in tree.items():
        yield prefix + key
        if isinstance(value, Mapping):
            yield from _leaves(value, f"{prefix}{key}.")

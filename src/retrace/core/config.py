"""Frozen, strict configs: what a run is made of; and `compose()`, the only place that knows Hydra.

A config is composed once, validated once and never changed. Every default stands in a YAML or in a schema, so the JSON
of a config is the whole experiment. Parts that only say *where* a run happens derive from `Placement`.
"""

from __future__ import annotations

import difflib
import itertools
import json
import os
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, TypeVar

from pydantic import BaseModel, ConfigDict, Field, ValidationError

Scale = Literal["smoke", "laptop", "gpu", "paper"]
SCALES: tuple[Scale, ...] = ("smoke", "laptop", "gpu", "paper")

HOME = Path(os.environ.get("RETRACE_HOME") or Path(__file__).resolve().parents[3])  # holds runs/ and results/
CONFIGS = Path(os.environ.get("RETRACE_CONFIGS") or Path(__file__).resolve().parents[3] / "configs")


class Frozen(BaseModel):
    """A value: no unknown keys, no coercion of types, no assignment after creation."""

    model_config = ConfigDict(extra="forbid", strict=True, frozen=True, allow_inf_nan=False, validate_default=True)


class Placement(Frozen):
    """Base of config parts that say where and how a run is carried out, which can change no number."""


class Hardware(Placement):
    """One machine or one kind of node: a YAML in configs/hardware."""

    name: str
    device: Literal["cpu", "cuda"]
    processes: int = Field(ge=1)  # Accelerate processes in one run
    threads: int = Field(ge=1)  # CPU threads of one process
    parallel_runs: int | None = Field(ge=1)  # runs side by side on one machine; null: one for each `threads` cores
    peak_flops: float | None = Field(gt=0)  # of one process, in the dtype used; null: unknown, so MFU is unknown
    checkpoint_seconds: float = Field(ge=0)  # least time between two checkpoints of a run

    @property
    def slots(self) -> int:
        """How many runs this machine carries out side by side."""
        cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
        return self.parallel_runs or max(1, cores // (self.threads * self.processes))


class Tracking(Placement):
    """Who hears of a run beside its own metrics.jsonl."""

    wandb: Literal["auto", "online", "offline", "off"]  # auto: online with an API key, else offline
    project: str
    entity: str | None
    log_every: int = Field(ge=1)  # steps between two lines of metrics


class Experiment(Frozen):
    """The part of a composed config that every paper shares; a paper's own config class derives from it."""

    scale: Scale
    seed: int = Field(ge=0)
    hardware: Hardware
    tracking: Tracking


C = TypeVar("C", bound=Frozen)


def validate(schema: type[C], values: Mapping[str, Any], *, source: str) -> C:
    """`values` as a `schema`, or one ValueError of one line for each thing that is wrong: key, value, expectation.

    Validation goes through JSON so that strictness is that of the file that a worker will read back.
    """
    try:
        return schema.model_validate_json(json.dumps(values))
    except ValidationError as error:
        lines = [_explain(e, schema) for e in error.errors()]
        raise ValueError(f"{source}: " + "; ".join(lines)) from None


def _explain(error: Any, schema: type[BaseModel]) -> str:
    key = ".".join(str(part) for part in error["loc"])
    if error["type"] == "extra_forbidden":
        return f"{key}: no such key{_suggest(key, list(_keys(schema)))}"
    message = error["msg"].removeprefix("Value error, ")
    shown = "" if isinstance(error["input"], dict) else f"={error['input']!r}"
    return f"{key}{shown}: {message[:1].lower()}{message[1:]}" if key else message


def _keys(schema: type[BaseModel], prefix: str = "") -> Iterator[str]:
    for name, field in schema.model_fields.items():
        yield prefix + name
        if isinstance(field.annotation, type) and issubclass(field.annotation, BaseModel):
            yield from _keys(field.annotation, f"{prefix}{name}.")


def _suggest(word: str, known: Sequence[str]) -> str:
    near = difflib.get_close_matches(word, known, n=1, cutoff=0.5)
    return f"; did you mean '{near[0]}'?" if near else f"; the keys are: {', '.join(known)}"


def data_root() -> Path | None:
    """The folder of local datasets, from RETRACE_DATA; None where it is not set. Raises ValueError if it is no folder."""
    value = os.environ.get("RETRACE_DATA")
    if not value:
        return None
    root = Path(value)
    if not root.is_dir():
        raise ValueError(f"RETRACE_DATA={value}: no such folder; set it to a folder with gsm8k/, commonsense_qa/, ...")
    return root


def papers() -> list[str]:
    """Slugs of the papers: the folders of configs/ that hold a main.yaml."""
    return sorted(path.parent.name for path in CONFIGS.glob("*/main.yaml"))


def expand_sweep(overrides: Sequence[str]) -> list[tuple[str, ...]]:
    """Hydra's sweep syntax (`a=1,2`, `a=range(3)`, `a=choice(x,y)`) as the product of plain override lists.

    Raises ValueError where an override does not parse.
    """
    from hydra.core.override_parser.overrides_parser import OverridesParser
    from hydra.errors import HydraException

    parser = OverridesParser.create()
    choices: list[list[str]] = []
    for text in overrides:
        try:
            override = parser.parse_override(text)
        except HydraException as error:
            reason = str(error).splitlines()[0]
            raise ValueError(f"{text!r} is not an override: {reason}; write key=value, as in seed=0,1,2") from None
        if override.is_sweep_override():
            key = override.get_key_element()
            choices.append([f"{key}={value}" for value in override.sweep_string_iterator()])
        else:
            choices.append([text])
    return list(itertools.product(*choices))


def override_key(override: str) -> str:
    """The dotted key that an override sets: `thoughts.num_sampled` of `++thoughts.num_sampled=3`."""
    return override.partition("=")[0].lstrip("+~")


def compose(paper: str, overrides: Sequence[str], *, name: str = "main") -> dict[str, Any]:
    """The resolved plain tree of configs/<paper>/<name>.yaml under Hydra overrides.

    Raises ValueError, in one line, for an unknown paper, key, group choice or a value that does not parse.
    """
    from hydra import compose as hydra_compose
    from hydra import initialize_config_dir
    from hydra.core.global_hydra import GlobalHydra
    from hydra.errors import HydraException
    from omegaconf import OmegaConf
    from omegaconf.errors import OmegaConfBaseException

    folder = CONFIGS / paper
    if not (folder / f"{name}.yaml").is_file():
        raise ValueError(f"{paper}/{name}: no such config; the papers are: {', '.join(papers()) or 'none'}")
    for override in overrides:
        if override.startswith(("+", "~")):
            raise ValueError(f"{override}: keys can't be added or removed, only set; write {override.lstrip('+~')}")
    GlobalHydra.instance().clear()
    try:
        with initialize_config_dir(config_dir=str(folder), version_base="1.3"):
            search = f"hydra.searchpath=[file://{CONFIGS}]"  # configs/hardware and configs/tracking, for every paper
            tree = OmegaConf.to_container(hydra_compose(name, [search, *overrides]), resolve=True)
    except (HydraException, OmegaConfBaseException) as error:
        raise ValueError(_one_line(error, paper, name, overrides)) from None
    assert isinstance(tree, dict)
    return {str(key): value for key, value in tree.items()}


def _one_line(error: Exception, paper: str, name: str, overrides: Sequence[str]) -> str:
    """Hydra's several lines as one sentence, with the nearest known key where a key is unknown."""
    text = str(error)
    for override in overrides:
        key = override_key(override)
        if f"'{key}'" in text and ("Could not override" in text or "is not in struct" in text):
            known = list(_leaves(compose(paper, [], name=name)))
            return f"{override}: no such key{_suggest(key, known)}"
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    return f"{paper}/{name} does not compose: " + " ".join(lines[:6])


def _leaves(tree: Mapping[str, Any], prefix: str = "") -> Iterator[str]:
    for key, value in tree.items():
        yield prefix + key
        if isinstance(value, Mapping):
            yield from _leaves(value, f"{prefix}{key}.")

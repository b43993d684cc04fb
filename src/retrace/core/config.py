"""Frozen, strict configs: what a run is made of.

A config is composed once, validated once and never changed. Every default stands in a YAML or in a schema, so the JSON
of a config is the whole experiment. Parts that only say *where* a run happens derive from `Placement`.
"""

from __future__ import annotations

import difflib
import json
import os
import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, Self, TypeVar, get_args

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from retrace.core.safety import assigned_secret

Scale = Literal["smoke", "laptop", "gpu", "paper"]
SCALES: tuple[Scale, ...] = get_args(Scale)

HOME = Path(os.environ.get("RETRACE_HOME") or Path(__file__).resolve().parents[3])  # holds runs/ and results/
CONFIGS = Path(os.environ.get("RETRACE_CONFIGS") or Path(__file__).resolve().parents[3] / "configs")


class Frozen(BaseModel):
    """A value: no unknown keys, no coercion of types, no assignment after creation."""

    model_config = ConfigDict(extra="forbid", strict=True, frozen=True, allow_inf_nan=False, validate_default=True)


class Placement(Frozen):
    """Base of config parts that say where and how a run is carried out, which can change no number."""


class SlurmJobs(Placement):
    """How jobs are asked for. Tasks, CPUs and GPUs follow from the processes of a run and their threads."""

    partition: str | None  # null, here and below: the cluster's own default
    account: str | None
    qos: str | None
    minutes: int = Field(ge=1)  # the time limit of a job; a run that needs longer is requeued and goes on
    nodes: int = Field(ge=1)  # of one run; its processes are spread evenly over them
    memory_gb: float | None = Field(gt=0)  # of a node, main memory
    array_parallelism: int = Field(ge=1)  # jobs at the same time
    runs_per_job: int = Field(ge=1)  # small runs, one after another in a job
    signal_seconds: int = Field(ge=1)  # before the time limit: when a run is told to save and stop
    max_requeues: int = Field(ge=0)  # after that many time limits a job gives up; preemptions are not counted
    setup: tuple[str, ...]  # shell lines at the start of a job, such as "module load cuda"
    extra: tuple[str, ...]  # other options of sbatch, such as "--constraint=h100"

    @model_validator(mode="after")
    def _extra_are_options(self) -> Self:
        for text in self.extra:
            if not re.fullmatch(r"--[a-z][a-z0-9-]*(=\S.*)?", text):
                raise ValueError(f"extra={text!r}: expected an option of sbatch in full, such as --constraint=h100")
        return self

    @model_validator(mode="after")
    def _secrets_are_not_written_down(self) -> Self:
        for name in filter(None, map(assigned_secret, (*self.setup, *self.extra))):
            raise ValueError(
                f"setup and extra: {name} is set to a value, and configs are recorded: set it in the shell that "
                f"submits, which hands it on, or read it from a file of yours: export {name}=$(cat FILE)"
            )
        return self

    @model_validator(mode="after")
    def _signal_within_the_limit(self) -> Self:
        if self.signal_seconds >= 60 * self.minutes:
            raise ValueError(
                f"signal_seconds={self.signal_seconds} with minutes={self.minutes}: the signal would come before the "
                "job; lower signal_seconds or raise minutes"
            )
        return self


class Hardware(Placement):
    """One machine or one kind of node: a YAML in configs/hardware."""

    name: str
    device: Literal["cpu", "cuda"]
    processes: int = Field(ge=1)  # Accelerate processes in one run
    threads: int = Field(ge=1)  # CPU threads of one process
    parallel_runs: int | None = Field(ge=1)  # runs side by side on one machine; null: one for each `threads` cores
    shard: bool  # weights, gradients and moments are split over the processes (FSDP2), or whole in each (DDP)
    activation_checkpointing: bool  # keep a layer's input only, and compute the layer again in the backward pass
    compile: bool  # a model's layers by torch.compile, where a program offers it; a minute, worth it in long runs
    peak_flops: float | None = Field(gt=0)  # of one process, in the dtype used; null: unknown, so MFU is unknown
    memory_gb: float | None = Field(None, gt=0)  # of one GPU; null: unknown, so no plan says whether a run fits
    price_per_hour: float | None = Field(None, gt=0)  # of one GPU or CPU process, in any currency; null: no price told
    planned_mfu: float | None = Field(gt=0, le=1)  # share of the peak to plan with where nothing was measured yet
    checkpoint_seconds: float = Field(ge=0)  # least time between two checkpoints of a run
    slurm: SlurmJobs | None = None  # null: on this machine

    @model_validator(mode="after")
    def _something_to_share(self) -> Self:
        if self.shard and self.processes == 1:
            raise ValueError("shard=true with processes=1: nothing is shared; set processes to the number of GPUs")
        if self.slurm and self.processes % self.slurm.nodes:
            raise ValueError(
                f"processes={self.processes} with slurm.nodes={self.slurm.nodes}: expected a multiple of it"
            )
        if self.slurm and self.slurm.runs_per_job > 1 and self.processes > 1:
            raise ValueError(
                f"slurm.runs_per_job={self.slurm.runs_per_job} with processes={self.processes}: only runs of one "
                "process share a job; set slurm.runs_per_job to 1"
            )
        if self.shard and self.compile:
            raise ValueError("shard=true with compile=true: not tried together; set one of them to false")
        return self

    @property
    def unit(self) -> str:
        """What its hours are of: 'GPU' or 'core'."""
        return "GPU" if self.device == "cuda" else "core"

    @property
    def slots(self) -> int:
        """How many runs go on side by side, here or in the cluster."""
        if self.slurm:
            return self.slurm.array_parallelism
        return self.parallel_runs or max(1, num_cores() // (self.threads * self.processes))

    @property
    def has_spare_core(self) -> bool:
        """Whether this machine, or a job's share of it, has a core beside those that its runs compute on."""
        return num_cores() > (1 if self.slurm else self.slots) * self.processes * self.threads


def num_cores() -> int:
    """The CPU cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


class Tracking(Placement):
    """Who hears of a run beside its own metrics.jsonl."""

    wandb: Literal["auto", "online", "offline", "off"]  # auto: online with an API key, else offline
    project: str
    entity: str | None
    trackio: bool = False  # as well: in a database beside the runs, for `retrace dashboard`
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
    text = json.dumps(values, default=str)  # YAML reads 2024-03-15 as a date, which is text to whoever wrote it
    if "\\u0000" in text:
        raise ValueError(f"{source}: a text in it has a NUL character, which no file name and no command line can hold")
    try:
        return schema.model_validate_json(text)
    except ValidationError as error:
        found = error.errors()
        absent = [".".join(_path(e["loc"], values)) for e in found if e["type"] == "missing"]
        inside = {e["loc"][:-1] for e in found}  # a list with a wrong item is also said to be too short
        lines = [f"no value for {', '.join(absent)}"] if absent else []
        for e in found:
            if e["type"] != "missing" and not (e["type"] == "too_short" and e["loc"] in inside):
                lines.append(_explain(e, schema, values))
        raise ValueError(f"{source}: " + "; ".join(lines)) from None


_EXPECTED = {  # in the words of YAML, where pydantic's are those of JSON
    **dict.fromkeys(("list_type", "tuple_type"), "expected a list, as in [a,b] or [a]"),
    **dict.fromkeys(("model_type", "model_attributes_type", "dict_type"), "expected keys with values; set one of them"),
    "string_type": "expected text",
    "too_short": "expected one or more",
}


def _explain(error: Any, schema: type[BaseModel], values: Mapping[str, Any]) -> str:
    key = ".".join(_path(error["loc"], values))
    if error["type"] == "extra_forbidden":
        return f"{key}: no such key{suggest(key, list(_keys(schema)))}"
    message = _EXPECTED.get(error["type"]) or error["msg"].removeprefix("Value error, ")
    if error["type"] == "string_pattern_mismatch":
        message = f"expected the form {error['ctx']['pattern']} (a regular expression)"
    if error["type"] == "literal_error" and isinstance(error["input"], bool):
        message += "; in a file, put on, off, yes and no in quotes"
    shown = "" if isinstance(error["input"], dict) else f"={error['input']!r}"
    return f"{key}{shown}: {message[:1].lower()}{message[1:]}" if key else message


def _path(loc: Sequence[str | int], values: Any) -> Iterator[str]:
    """Where an error is, in the keys of the file: without pydantic's names of the members of a union."""
    for part in loc:
        if isinstance(values, Mapping) and part not in values and part == values.get("kind"):
            continue
        yield str(part)
        inside = (isinstance(values, Mapping) and part in values) or (
            isinstance(values, list) and isinstance(part, int) and part < len(values)
        )
        values = values[part] if inside else None


def _keys(schema: type[BaseModel], prefix: str = "") -> Iterator[str]:
    for name, field in schema.model_fields.items():
        yield prefix + name
        for member in get_args(field.annotation) or (field.annotation,):
            if isinstance(member, type) and issubclass(member, BaseModel):
                yield from _keys(member, f"{prefix}{name}.")


def suggest(word: str, known: Sequence[str], *, what: str = "keys") -> str:
    """The end of a sentence about an unknown word: the nearest known one, or all of them."""
    near = difflib.get_close_matches(word, known, n=1, cutoff=0.5)
    return f"; did you mean '{near[0]}'?" if near else f"; the {what} are: {', '.join(known) or 'none'}"


def data_root() -> Path | None:
    """The folder of local datasets that RETRACE_DATA names, or None; raises ValueError where it is no folder."""
    value = os.environ.get("RETRACE_DATA")
    if not value:
        return None
    root = Path(value)
    if not root.is_dir():
        raise ValueError(f"RETRACE_DATA={value}: no such folder; set it to a folder with gsm8k/, commonsense_qa/, ...")
    return root


def parse_yaml(path: Path) -> Any:
    """What a YAML file holds, or a ValueError that names the file, the line and what is wrong there."""
    loader = getattr(yaml, "CSafeLoader", yaml.SafeLoader)  # libyaml's is ten times as fast, and not everywhere
    try:
        return loader(path.read_text()).get_single_data()
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        line = f", line {mark.line + 1}" if mark else ""
        problem = str(error.problem)  # in words of libyaml, or of the slower parser where it is not there
        hint = (
            "; indent with spaces, not with a tab" if "cannot start any token" in problem
            else '; put a text that holds ": " in quotes' if "mapping values are not allowed" in problem
            else ""
        )  # fmt: skip
        raise ValueError(f"{path}{line}: not readable as YAML: {problem}{hint}") from None
    except yaml.YAMLError as error:
        raise ValueError(f"{path}: not readable as YAML: {' '.join(str(error).split())}") from None


def read_yaml(path: Path) -> dict[str, Any]:
    """A YAML file as a dict, or a ValueError that names the file and the place."""
    tree = parse_yaml(path)
    if not isinstance(tree, dict):
        raise ValueError(f"{path}: expected keys and values, found {'nothing' if tree is None else repr(tree)[:60]}")
    return tree

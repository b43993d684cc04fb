"""Evaluation tasks as files: what there is, whether it can be run here, and where its rows come from.

A task is a YAML in configs/<paper>/tasks, named like the task. It is lm-eval's, with a few additions.
`include: lm_eval/...` is a file of the installed lm-eval, so that a stock task can be run as it is. In `metadata`,
`local: {split: file}` says where a split lies below RETRACE_DATA, `allowed: [...]` lists answer strings and asks for
the probability of the answer among them (see evaluate.py), and `subset: {shuffle_seed: 42, size: 128}` takes the first
items of the set as the datasets library shuffles it. `generation_kwargs` may go on with a second text (`then`, see
requests.py), and a filter may be `first_integer` (see answers.py). A task with neither a `dataset_path` nor an
`include` asks its caller for the rows.

Checking imports neither torch nor lm-eval, so that a wrong task is refused before anything is spent.
"""

from __future__ import annotations

import hashlib
import importlib.util
import os
import re
import threading
import urllib.error
import urllib.request
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

from retrace.core.config import read_yaml
from retrace.core.files import json_lines

Rows = Sequence[Mapping[str, Any]]
HUB_SECONDS = 5.0  # how long a hub may take to answer before it counts as unreachable
STREAM_RETRIES = 2  # of a read that broke off, each of which tries five times within half a minute


@dataclass(frozen=True)
class Subset:
    """The first `size` items in the order that `datasets.Dataset.shuffle` gives for this seed."""

    shuffle_seed: int
    size: int


@dataclass(frozen=True)
class TaskFile:
    """One task's own YAML, read and checked; what it includes is left to lm-eval."""

    name: str
    folder: Path  # where lm-eval finds the task: the YAML's, or the included file's
    settings: Mapping[str, Any]  # the YAML without `include`
    includes: bool  # a file of the installed lm-eval
    is_generated: bool  # the rows come from the caller
    local: Mapping[str, str]  # split -> file below the data folder; may be empty
    allowed: Sequence[str] | None  # answer strings
    subset: Subset | None  # None: every item

    @property
    def hint(self) -> str:
        """What to do where the hub can't be reached."""
        cached = "set HF_HUB_OFFLINE=1 if its data is in the hub's cache on this machine"
        files = " and ".join(self.local.values())
        return f"set RETRACE_DATA to a folder with {files}, or {cached}" if files else cached


def list_tasks(tasks_dir: Path) -> list[str]:
    """Names of the tasks: the YAML files of a folder."""
    return sorted(path.stem for path in tasks_dir.glob("*.yaml"))


def read_task(name: str, *, tasks_dir: Path) -> TaskFile:
    """Read one task file; raises ValueError where there is none or where it is wrong."""
    path = tasks_dir / f"{name}.yaml"
    if not re.fullmatch(r"[A-Za-z0-9_-]{1,100}", name) or not path.is_file():  # answers go into a file of that name
        raise ValueError(f"{name}: no such task; the tasks are: {', '.join(list_tasks(tasks_dir)) or 'none'}")
    settings = read_yaml(path)
    if settings.get("task") != name:
        raise ValueError(f"{path}: task={settings.get('task')!r}: expected {name!r}, as the file is called")
    include = settings.pop("include", None)
    stock = _installed(include) if include else None
    if stock is not None and not stock.is_file():
        raise ValueError(f"{path}: include={include!r}: no such file; expected lm_eval/... of the installed lm-eval")
    is_generated = stock is None and "dataset_path" not in settings
    _check(path, settings, is_generated=is_generated)
    metadata = settings.get("metadata") or {}
    return TaskFile(
        name=name,
        folder=stock.parent if stock else tasks_dir,
        settings=settings,
        includes=stock is not None,
        is_generated=is_generated,
        local=metadata.get("local") or {},
        allowed=metadata.get("allowed"),
        subset=_subset(path, metadata.get("subset")),
    )


def _subset(path: Path, given: Any) -> Subset | None:
    if given is None:
        return None
    numbers = isinstance(given, dict) and all(type(value) is int and value >= 0 for value in given.values())
    if not numbers or given.keys() != {"shuffle_seed", "size"}:
        raise ValueError(f"{path}: metadata.subset={given!r}: expected numbers, as in {{shuffle_seed: 42, size: 128}}")
    return Subset(**given)


def _check(path: Path, settings: Mapping[str, Any], *, is_generated: bool) -> None:
    allowed = (settings.get("metadata") or {}).get("allowed")
    if allowed is not None and not (isinstance(allowed, list) and allowed and all(isinstance(a, str) for a in allowed)):
        raise ValueError(f'{path}: metadata.allowed={allowed!r}: expected a list of quoted answers, as in ["0", "1"]')
    if allowed is not None and settings.get("output_type") != "loglikelihood":
        found = settings.get("output_type")
        raise ValueError(f"{path}: output_type={found!r}: expected loglikelihood, as there is metadata.allowed")
    if allowed is not None and not {"doc_to_text", "doc_to_target"} <= settings.keys():
        raise ValueError(f"{path}: doc_to_text and doc_to_target are expected, as there is metadata.allowed")
    if "data_files" in (settings.get("dataset_kwargs") or {}):
        raise ValueError(f"{path}: dataset_kwargs.data_files depends on the current folder: use metadata.local")
    if is_generated and "test_split" not in settings:
        raise ValueError(f"{path}: test_split is missing: name the split that the generated rows are, as in test")


def _installed(path: str) -> Path:
    """Where a path that starts with lm_eval/ lies on this machine; found without importing lm_eval."""
    spec = importlib.util.find_spec("lm_eval")
    assert spec is not None
    assert spec.submodule_search_locations is not None
    root = Path(spec.submodule_search_locations[0])
    file = (root.parent / path).resolve()
    outside = not file.is_relative_to(root.resolve())  # where its functions would be anybody's code
    return root / "outside" if outside else file


def validate_tasks(
    names: Sequence[str],
    *,
    tasks_dir: Path,
    data_dir: Path | None,
    generated: Collection[str],
    probe_hub: bool = False,
) -> None:
    """Raise ValueError for a task that could not be evaluated here.

    `generated` names the tasks whose rows the caller makes. `probe_hub` also asks the hub for an answer if it is
    needed, which takes up to `HUB_SECONDS`: for a run about to start, not for a plan.
    """
    for name in names:
        task = read_task(name, tasks_dir=tasks_dir)
        if needs_hub(task, data_dir=data_dir, generated=generated) and probe_hub:
            require_hub(task.name, task.hint)


@lru_cache(maxsize=256)
def task_fingerprint(name: str, *, tasks_dir: Path, data_dir: Path | None) -> str:
    """Twelve hex digits over all that a task asks: its YAML, the stock file it includes, and its local data.

    Part of an evaluation's identity, so that an edited task is another run. Raises ValueError for an unknown task.
    """
    task = read_task(name, tasks_dir=tasks_dir)
    files = [tasks_dir / f"{name}.yaml"]
    files += [task.folder / f"{name}.yaml"] if task.folder != tasks_dir else []
    if data_dir is not None:
        files += [data_dir / file for file in task.local.values()]
    digest = hashlib.sha256()
    for file in files:
        digest.update(hashlib.sha256(file.read_bytes() if file.is_file() else b"").digest())
    return digest.hexdigest()[:12]


def needs_hub(task: TaskFile, *, data_dir: Path | None, generated: Collection[str]) -> bool:
    """Whether the rows come from the hub and not from here. Raises ValueError where they should be here and are not."""
    if task.is_generated:
        if task.name not in generated:
            known = ", ".join(sorted(generated)) or "none"
            raise ValueError(f"{task.name}: no dataset_path, and its rows are not generated; those that are: {known}")
        return False
    if data_dir is None or not task.local:
        return True
    for file in task.local.values():
        if not (data_dir / file).is_file():
            raise ValueError(
                f"{task.name}: {data_dir / file} is missing: put it there, or unset RETRACE_DATA for the hub"
            )
    return False


def read_rows(task: TaskFile, *, data_dir: Path | None, generated: Mapping[str, Rows]) -> dict[str, Rows] | None:
    """The rows of each split that is here, or None where they come from the hub; raises as `needs_hub` does."""
    if needs_hub(task, data_dir=data_dir, generated=generated):
        return None
    if task.is_generated:
        return {task.settings["test_split"]: generated[task.name]}
    assert data_dir is not None
    return {split: _local_rows(data_dir / file) for split, file in task.local.items()}


def _local_rows(path: Path) -> Rows:
    with path.open(encoding="utf-8") as lines:
        rows = list(json_lines(lines, path=path))
    if not rows:
        raise ValueError(f"{path}: no rows in it")
    return rows


def require_hub(name: str, hint: str) -> None:
    """Raise ValueError, within seconds, where the hub does not answer: the libraries try again for most of a minute.

    `name` is what needs it, `hint` what to do without it.
    """
    if os.environ.get("HF_HUB_OFFLINE", "").upper() in {"1", "ON", "YES", "TRUE"}:
        return  # whoever sets it relies on the hub's cache on this machine, which answers at once
    endpoint = os.environ.get("HF_ENDPOINT") or "https://huggingface.co"
    try:
        _reach(endpoint)
    except ConnectionError:
        raise ValueError(f"{name}: the hub at {endpoint} can't be reached; {hint}") from None


def open_stream(dataset: str, subset: str | None, *, split: str, revision: str) -> Any:
    """A dataset of the hub, read as it is needed. Where it breaks off it is asked again for a minute and a half.

    Left to itself the library does so for ten, in which a run that waits can't be stopped; and no run is lost by
    ending, since the same command goes on from its checkpoint. Raises OSError or an error of `datasets`.
    """
    import datasets

    datasets.config.STREAMING_READ_MAX_RETRIES = STREAM_RETRIES
    return datasets.load_dataset(dataset, subset, split=split, revision=revision, streaming=True)


@lru_cache  # of answers, for a plan of many runs; a failure is an exception, and not kept
def _reach(endpoint: str) -> None:
    answered = threading.Event()

    def ask() -> None:
        try:
            urllib.request.urlopen(urllib.request.Request(endpoint, method="HEAD"), timeout=HUB_SECONDS).close()
        except urllib.error.HTTPError:
            pass  # an answer, if not a kind one
        except OSError:
            return
        answered.set()

    thread = threading.Thread(target=ask, daemon=True)  # looking up a name takes as long as it takes, timeout or not
    thread.start()
    thread.join(HUB_SECONDS)
    if not answered.is_set():
        raise ConnectionError(endpoint)

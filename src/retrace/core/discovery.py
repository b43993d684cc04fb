"""Which papers there are and where their YAML lies: those of this repository, and those that other packages bring."""

from __future__ import annotations

import re
from functools import lru_cache
from importlib.metadata import EntryPoint, entry_points
from importlib.util import find_spec
from pathlib import Path

from retrace.core import config

PAPERS = "retrace.papers"  # where papers of this repository are, and the entry points of those of other packages


def papers() -> list[str]:
    """Slugs of the papers: the folders of configs/ that hold a main.yaml, and what other packages bring."""
    if not config.CONFIGS.is_dir():
        raise ValueError(f"{config.CONFIGS}: no such folder, and configs are read from it: see RETRACE_CONFIGS")
    own = [path.parent.name for path in config.CONFIGS.glob("*/main.yaml")]
    for slug in set(own) & paper_packages().keys():
        raise ValueError(
            f"{slug}: a paper of Retrace and one of the package {paper_packages()[slug].module} have this slug: rename "
            "the latter in its pyproject.toml and in its PAPER"
        )
    return sorted([*own, *paper_packages()])


@lru_cache(maxsize=1)
def paper_packages() -> dict[str, EntryPoint]:
    """Papers that other packages bring, by slug: the entry points of group `retrace.papers`, as "module:PAPER".

    Raises ValueError for a slug that is none, or that two packages have.
    """
    found: dict[str, EntryPoint] = {}
    for entry in entry_points(group=PAPERS):
        if not re.fullmatch(r"[a-z][a-z0-9_]*=[a-z][a-z0-9_]*:[A-Z]+", f"{entry.name}={entry.value}"):
            raise ValueError(
                f"entry point {entry.name} = {entry.value!r} of group {PAPERS}: expected slug = 'package:PAPER', in "
                "small letters, digits and _, the package at the top level; change its pyproject.toml, install it again"
            )
        if found.setdefault(entry.name, entry).value != entry.value:
            modules = f"{found[entry.name].module} and {entry.module}"
            raise ValueError(f"{entry.name}: the packages {modules} both bring it: rename one, or uninstall it")
    return found


def package_folder(slug: str) -> Path | None:
    """The folder of the package that brings a paper, or None where it is one of this repository.

    Raises ValueError where the package is announced and not there.
    """
    entry = paper_packages().get(slug)
    if entry is None:
        return None
    try:
        spec = find_spec(entry.module)
    except ModuleNotFoundError:
        spec = None
    if spec is None or spec.origin is None or spec.submodule_search_locations is None:
        raise ValueError(f"{slug}: no package {entry.module} (a folder with an __init__.py) is there: install it again")
    return Path(spec.origin).parent


def configs_of(slug: str) -> Path:
    """The folder of a paper's YAML: configs/<slug> here, or `configs` in the package that brings it."""
    folder = package_folder(slug)
    return config.CONFIGS / slug if folder is None else folder / "configs"

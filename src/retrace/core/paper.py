"""The contract between the core and a paper: what a paper package must hand over to be planned, run and judged.

A paper's `__init__.py` defines `PAPER`. It imports no torch: programs are named as "module:function" and are imported
where they run, so that planning a cluster sweep on a login node stays instant.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from importlib.metadata import EntryPoint
from pathlib import Path
from typing import TYPE_CHECKING, Any

from retrace.core import config
from retrace.core.config import Experiment, Frozen, suggest
from retrace.core.discovery import PAPERS, paper_packages, papers

if TYPE_CHECKING:
    from retrace.core.cost import Cost
    from retrace.core.samples import Samples
    from retrace.core.svg import Figure


@dataclass(frozen=True)
class Stage:
    """One run that an experiment needs: a program, its own config, and the stages whose results it builds on."""

    program: str
    config: Frozen
    seed: int
    parents: Mapping[str, Stage] = field(default_factory=dict)


@dataclass(frozen=True)
class Program:
    """What a stage can execute. `entry` is "package.module:function", called as (config, ctx) -> metrics.

    One that `accepts_diverged` parents runs also where they diverged, such as a choice among learning rates. It raises
    Diverged itself where none of them is of use.
    """

    config: type[Frozen]
    entry: str
    cost: Callable[[Any], Cost]
    accepts_diverged: bool = False

    def load(self) -> Callable[[Any, Any], Mapping[str, float]]:
        """Import the program's module and return the function."""
        return _imported(self.entry)


@dataclass(frozen=True)
class Command:
    """A command that a paper adds to the command line, `retrace <name>`.

    `entry` is "package.module:function", a function with typer's annotations whose docstring is its `--help`. Its
    module imports torch inside of functions only, so that `--help` and wrong options are answered at once.
    """

    name: str
    help: str  # one line, for `retrace --help`
    entry: str

    def load(self) -> Callable[..., None]:
        """Import the command's module and return the function."""
        return _imported(self.entry)


@dataclass(frozen=True)
class Panel:
    """Figures of one ablation that a paper draws for the report, `says` what they show; `folded` ones open at a click.

    `note`: what else is to be known, such as where figures that are left out stand.
    """

    says: str
    figures: tuple[Figure, ...]
    folded: bool = False
    note: str = ""


def _imported(entry: str) -> Callable[..., Any]:
    module, _, name = entry.partition(":")
    function: Callable[..., Any] = getattr(importlib.import_module(module), name)
    return function


@dataclass(frozen=True)
class Paper:
    """A paper as the core sees it. `recipe` is bumped when the meaning of its code changes; it is part of every id.

    `stages` maps a composed config to the last stage of its chain (a pure function). `check`, if given, raises
    ValueError for what a schema can't see, such as a missing dataset folder; it runs before anything is spent.
    `panels`, if given, is "package.module:function" of the figures that only this paper has, called as
    (ablation -> its arms, samples) -> ablation -> panels; what it draws from, runs have left in `ctx.notes`.
    """

    slug: str
    title: str
    arxiv: str
    recipe: int
    config: type[Experiment]
    stages: Callable[[Any], Stage]
    programs: Mapping[str, Program]
    check: Callable[[Any], None] | None = None
    commands: tuple[Command, ...] = ()
    panels: str = ""

    def draw(self, arms: Mapping[str, Sequence[str]], samples: Samples) -> Mapping[str, Sequence[Panel]]:
        """The panels of each ablation, of those in `arms`."""
        found: Mapping[str, Sequence[Panel]] = _imported(self.panels)(arms, samples) if self.panels else {}
        return found


def load_paper(slug: str) -> Paper:
    """`PAPER` of `retrace.papers.<slug>`, or of the package that brings it; raises ValueError where there is none."""
    return _load(slug, paper_packages().get(slug), config.CONFIGS)


@lru_cache(maxsize=64)
def _load(slug: str, entry: EntryPoint | None, configs: Path) -> Paper:  # noqa: ARG001 (`papers` looks there)
    """It is asked for every run of a plan; what raises is not kept."""
    if slug not in papers():
        raise ValueError(f"{slug}: no such paper{suggest(slug, papers(), what='papers')}")
    entry = entry or EntryPoint(slug, f"{PAPERS}.{slug}:PAPER", PAPERS)
    try:
        module = importlib.import_module(entry.module)
    except ModuleNotFoundError as error:
        hint = "write or install it (docs/add-a-paper.md)" if error.name == entry.module else "install what is missing"
        raise ValueError(f"{slug}: {entry.module} can't be imported: {error}; {hint}") from error
    paper = getattr(module, entry.attr, None)
    if not isinstance(paper, Paper) or paper.slug != slug:
        raise ValueError(f"{slug}: {entry.value} is {paper!r:.60}; expected a Paper with slug='{slug}'")
    return paper


def paper_commands() -> dict[str, tuple[str, Command]]:
    """Every command that a paper brings, by name, with the paper's slug; raises ValueError for a name used twice."""
    found: dict[str, tuple[str, Command]] = {}
    for slug in papers():
        for command in load_paper(slug).commands:
            if command.name in found:
                raise ValueError(
                    f"`retrace {command.name}` is brought by {found[command.name][0]} and by {slug}: rename one"
                )
            found[command.name] = (slug, command)
    return found

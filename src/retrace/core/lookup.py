"""Runs by the names that people have for them: an id, the start of one, or a label as `retrace status` shows it."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass

from retrace.core.files import try_json
from retrace.core.record import Record
from retrace.core.store import Store


@dataclass(frozen=True)
class KnownRun:
    """What config.json says of a run on disk; the id alone where it can't be read."""

    id: str
    paper: str = ""
    program: str = ""
    scale: str = ""
    seed: int = 0
    labels: tuple[str, ...] = ()
    parents: Mapping[str, str] = dataclasses.field(default_factory=dict)

    @property
    def label(self) -> str:
        """The first label, or nothing."""
        return next(iter(self.labels), "")


def known_runs(store: Store) -> list[KnownRun]:
    """Every run on disk, by id; a broken config hides no other run."""
    found = []
    for path in sorted(store.runs.glob("*/config.json")):
        frozen = try_json(path)
        tree = {name: frozen[name] for name in KnownRun.__annotations__.keys() & frozen}
        labels = tuple(tree.get("labels", ()))
        found.append(KnownRun(**tree | {"id": path.parent.name, "labels": labels}))
    return found


def names(word: str, run: KnownRun | Record) -> bool:
    """Whether `word` is the run's id, a start of it with a dash, `<ablation>/<arm>/s<seed>` or that behind the paper.

    The dash is asked for since a paper's name begins the ids of all its runs.
    """
    return ("-" in word and run.id.startswith(word)) or word.removeprefix(f"{run.paper}/") in run.labels


def find_run(word: str, *, paper: str, program: str, store: Store) -> KnownRun | None:
    """The finished run of a program that `word` names (see `names`), or None where nothing on disk has such a name.

    Of a whole id and longer ones the whole one is meant; of runs that build on each other, the last.
    Raises ValueError where it names runs of other programs only, several runs, or one that is not finished.
    """
    runs = [_with_recorded_labels(run, store=store) for run in known_runs(store) if run.paper == paper]
    named = [run for run in runs if names(word, run)]
    named = [run for run in named if run.id == word] or named
    own = [run for run in named if run.program == program]
    if named and not own:
        hint = f"; it builds on {', '.join(named[0].parents.values())}" if named[0].parents else ""
        raise ValueError(f"{word}: a run of program '{named[0].program}': expected one of '{program}'{hint}")
    states = {run.id: store.run(run.id).state().status for run in own}
    finished = [run for run in own if states[run.id] == "DONE"]
    if own and not finished:
        raise ValueError(
            f"{word}: run {own[0].id} is {states[own[0].id]}: expected one that is DONE; see `retrace status`"
        )
    earlier = {parent for run in finished for parent in run.parents.values()}
    finished = [run for run in finished if run.id not in earlier]
    if len(finished) > 1:
        ids = ", ".join(f"{run.id} (scale {run.scale}, seed {run.seed})" for run in finished[:4])
        more = f" and {len(finished) - 4} more" if len(finished) > 4 else ""
        raise ValueError(f"{word}: names {len(finished)} finished runs: give the id of one: {ids}{more}")
    return finished[0] if finished else None


def _with_recorded_labels(run: KnownRun, *, store: Store) -> KnownRun:
    """Those of a plan that came after the run was finished are in its record only."""
    record = try_json(store.record_path(run.paper, run.id))
    return dataclasses.replace(run, labels=(*run.labels, *record.get("labels", ())))

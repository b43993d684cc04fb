"""Runs by the names that people have for them: an id, the start of one, or a label as `retrace status` shows it."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from retrace.core.files import read_json, try_json
from retrace.core.store import RunDir, Store


@dataclass(frozen=True)
class FoundRun:
    """A finished run on disk, with what its config.json says of it."""

    run: RunDir
    paper: str
    program: str
    scale: str
    seed: int
    labels: tuple[str, ...]
    parents: dict[str, str]


def find_run(word: str, *, paper: str, program: str, store: Store) -> FoundRun | None:
    """The finished run of a program that `word` names, or None where nothing on disk has such a name.

    `word` is an id, the start of one id alone, `<ablation>/<arm>/s<seed>` or `<paper>/<ablation>/<arm>/s<seed>`; of
    runs that build on each other, the last is meant.
    Raises ValueError where it names runs of other programs only, several runs, or one that is not finished.
    """
    named = [found for found in _runs(store) if found.paper == paper and _is_named(found, word)]
    named = [found for found in named if found.run.id == word] or named
    own = [found for found in named if found.program == program]
    if named and not own:
        raise ValueError(f"{word}: a run of program '{named[0].program}': expected one of '{program}'{_hint(named[0])}")
    finished = [found for found in own if found.run.state().status == "DONE"]
    if own and not finished:
        state = own[0].run.state()
        raise ValueError(
            f"{word}: run {own[0].run.id} is {state.status}: expected one that is DONE; see `retrace status`"
        )
    earlier = {parent for found in finished for parent in found.parents.values()}
    finished = [found for found in finished if found.run.id not in earlier]
    if len(finished) > 1:
        ids = ", ".join(f"{found.run.id} (scale {found.scale}, seed {found.seed})" for found in finished[:4])
        more = f" and {len(finished) - 4} more" if len(finished) > 4 else ""
        raise ValueError(f"{word}: names {len(finished)} finished runs: give the id of one: {ids}{more}")
    return finished[0] if finished else None


def _runs(store: Store) -> Iterator[FoundRun]:
    for path in sorted(store.runs.glob("*/config.json")):
        tree = try_json(path)
        if tree is None:
            continue  # a broken one hides no other run
        record = read_json(store.record_path(tree["paper"], path.parent.name)) or {}
        yield FoundRun(
            run=RunDir(path.parent),
            paper=tree["paper"],
            program=tree["program"],
            scale=tree["scale"],
            seed=tree["seed"],
            labels=(*tree["labels"], *record.get("labels", ())),  # a later plan's are in the record only
            parents=tree["parents"],
        )


def _is_named(found: FoundRun, word: str) -> bool:
    return bool(word) and (found.run.id.startswith(word) or word.removeprefix(f"{found.paper}/") in found.labels)


def _hint(found: FoundRun) -> str:
    return f"; it builds on {', '.join(found.parents.values())}" if found.parents else ""

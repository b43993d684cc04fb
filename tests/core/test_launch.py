"""What becomes of runs whose parents came to no result."""

from __future__ import annotations

from test_pages import HARDWARE, TRACKING

from retrace.core.config import Frozen
from retrace.core.launch import Summary, _skip_children
from retrace.core.plan import RunSpec


def run(name: str, *parents: str, accepts_diverged: bool = False) -> RunSpec:
    roles = {f"role{i}": parent for i, parent in enumerate(parents)}
    return RunSpec(
        name, "demo", "train", 1, "smoke", 0, Frozen(), roles, (), HARDWARE, TRACKING, accepts_diverged=accepts_diverged
    )


def waiting() -> dict[str, RunSpec]:
    specs = [run("choice", "train", accepts_diverged=True), run("after", "choice"), run("plain", "train")]
    return {spec.id: spec for spec in specs}


def test_a_diverged_parent_holds_up_only_those_that_do_not_accept_it() -> None:
    left, summary = waiting(), Summary()
    _skip_children("train", left, summary, diverged=True)
    assert left.keys() == {"choice", "after"}
    assert summary.skipped == {"plain": "train"}


def test_a_failed_parent_holds_up_everything_that_builds_on_it() -> None:
    left, summary = waiting(), Summary()
    _skip_children("train", left, summary)
    assert not left
    assert summary.skipped == {"choice": "train", "after": "choice", "plain": "train"}

"""What is handed out when, and what becomes of runs whose parents came to no result."""

from __future__ import annotations

import queue
import threading
from pathlib import Path

import pytest
from test_pages import HARDWARE, TRACKING

from retrace.core import launch
from retrace.core.config import Frozen
from retrace.core.launch import Local, Summary, _skip_children
from retrace.core.plan import RunSpec
from retrace.core.store import Store


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


def test_a_run_is_handed_out_once_its_parents_are_done_and_again_while_somebody_else_holds_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(launch, "BUSY_SECONDS", 0.05)
    specs = [run("a"), run("b"), run("c", "a", "b"), run("d", "c"), run("bad"), run("e", "bad"), run("f", "gone")]
    answers = {"b": ["BUSY", "BUSY", "DONE"], "bad": ["FAILED"]}
    ready: queue.Queue[RunSpec | None] = queue.Queue()
    ended: queue.Queue[tuple[RunSpec, str, str]] = queue.Queue()
    order: list[str] = []

    def slot() -> None:
        while (spec := ready.get()) is not None:
            order.append(spec.id)
            ended.put((spec, answers.get(spec.id, ["DONE"]).pop(0), "why"))

    threading.Thread(target=slot, daemon=True).start()
    summary = Summary()
    local = Local(Store(tmp_path), command="test", on_change=lambda *_: None)
    local._schedule({spec.id: spec for spec in specs}, ready, ended, summary)
    ready.put(None)
    assert order == ["a", "b", "bad", "f", "b", "b", "c", "d"]
    assert summary.done == ["a", "f", "b", "c", "d"]
    assert (summary.failed, summary.skipped) == ({"bad": "why"}, {"e": "bad"})

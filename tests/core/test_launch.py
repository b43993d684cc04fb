"""What becomes of runs whose parents came to no result, that others hold, or whose launcher ends."""

from __future__ import annotations

import os
import sys
import threading
from dataclasses import replace
from pathlib import Path

import pytest
from test_pages import HARDWARE, TRACKING

from retrace.core import launch, slurmjob
from retrace.core.config import Frozen
from retrace.core.launch import Local, Summary, _skip_children
from retrace.core.plan import RunSpec, plan
from retrace.core.store import Store
from retrace.core.workers import Worker


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


def test_the_last_words_of_a_process_are_read_to_the_end_before_they_are_told() -> None:
    lines = "import sys; [print(f'line {i}', file=sys.stderr) for i in range(2_000)]"
    for _ in range(3):
        worker = Worker()
        process = worker._open([sys.executable, "-c", f"{lines}; sys.exit('the reason')"], os.environ)
        assert worker._died(process, run("one")) == ("FAILED", "its worker died (exit code 1): the reason")


def test_what_ends_the_launcher_stops_its_workers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As a reader of the output that goes away does, such as `head`: the command would hang until its runs end."""
    started, stopped = threading.Event(), threading.Event()

    def carry_out(_: Worker, spec: RunSpec, __: Path) -> tuple[str, str]:
        if spec.id == "quick":
            return "FAILED" if started.wait(timeout=60) else "", "why"
        started.set()
        return "STOPPED" if stopped.wait(timeout=60) else "DONE", ""

    def on_change(run_id: str, status: str, _: str) -> None:
        if (run_id, status) == ("quick", "FAILED"):
            raise SystemExit(141)

    monkeypatch.setattr(Worker, "run", carry_out)
    monkeypatch.setattr(Worker, "stop", lambda _: stopped.set())
    specs = [
        replace(run(name), hardware=HARDWARE.model_copy(update={"parallel_runs": 2})) for name in ("slow", "quick")
    ]
    with pytest.raises(SystemExit):
        Local(Store(tmp_path), command="test", on_change=on_change).run(specs)
    assert stopped.is_set()


def test_a_run_that_somebody_else_holds_is_left_as_it_was_frozen_and_looked_at_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It may be that of a job, whose hardware is not that of this machine."""
    store, seen = Store(tmp_path), list[str]()
    held, spec = store.run("one"), run("one")
    held.freeze(replace(spec, hardware=HARDWARE.model_copy(update={"name": "gpu1"})), command="of a job")
    before = (held.path / "config.json").read_text()

    def on_change(_: str, status: str, __: str) -> None:
        seen.append(status)
        if status == "BUSY" and seen.count("BUSY") == 2:
            held.finish("DONE")

    monkeypatch.setattr(launch, "BUSY_SECONDS", 0.05)
    with held.lease():
        summary = Local(store, command="test", on_change=on_change).run([spec])
    assert (summary.done, seen) == (["one"], ["BUSY", "BUSY", "DONE"])
    assert (held.path / "config.json").read_text() == before


def test_what_builds_on_most_goes_first_so_that_results_come_early(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    carried_out: list[str] = []
    monkeypatch.setattr(Worker, "run", lambda _, spec, __: (carried_out.append(spec.id), ("DONE", ""))[1])
    specs = [*(run(f"first {i}") for i in range(8)), *(run(f"next {i}", f"first {i}") for i in range(8))]
    Local(Store(tmp_path), command="test", on_change=lambda *_: None).run(specs)
    order = [run_id.split(" ")[0] for run_id in carried_out]
    assert sorted(order) == ["first"] * 8 + ["next"] * 8
    assert order.index("next") <= 4, "not behind all that they could wait for"


def test_of_equals_the_one_with_the_longest_critical_path_goes_first(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    carried_out: list[str] = []
    monkeypatch.setattr(Worker, "run", lambda _, spec, __: (carried_out.append(spec.id), ("DONE", ""))[1])
    specs = [run("unknown"), run("quick"), run("long"), run("leads far"), run("far", "leads far", "quick")]
    specs = [replace(spec, hardware=HARDWARE.model_copy(update={"parallel_runs": 1})) for spec in specs]
    seconds = {"unknown": None, "quick": 1.0, "long": 50.0, "leads far": 20.0, "far": 40.0}
    launcher = Local(Store(tmp_path), command="test", on_change=lambda *_: None, expected=seconds)
    launcher.run(specs)
    assert launch.critical_paths({spec.id: spec for spec in specs}, seconds) == {
        "unknown": 0.0, "quick": 41.0, "long": 50.0, "leads far": 60.0, "far": 40.0
    }  # fmt: skip
    assert [name for name in carried_out if name != "far"] == ["leads far", "long", "quick", "unknown"]


def test_runs_that_will_never_start_are_told_of_each(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Worker, "run", lambda *_: ("FAILED", "why"))
    seen: list[tuple[str, str]] = []
    specs = [run("train"), run("choice", "train", accepts_diverged=True), run("after", "choice"), run("plain", "train")]
    Local(Store(tmp_path), command="test", on_change=lambda i, status, _: seen.append((i, status))).run(specs)
    assert seen[:2] == [("train", "RUNNING"), ("train", "FAILED")]
    assert sorted(seen[2:]) == [(name, "SKIPPED") for name in ("after", "choice", "plain")]


def test_a_job_runs_on_the_hardware_that_it_asked_for_whatever_was_frozen_since(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    store, spec = Store(tmp_path), plan(["quietstar/main"], ["scale=smoke", "hardware.threads=3"])[0]
    asked = spec.hardware.model_copy(update={"threads": 1})
    run_dir = store.run(spec.id)
    run_dir.freeze(spec, command="of this machine, and killed")
    monkeypatch.setattr(slurmjob, "_task", lambda: None)  # submitit would look for Slurm's variables
    monkeypatch.setattr(Worker, "run", lambda _, given, path: ("DONE", f"{given.hardware.threads} {path.name}"))
    assert slurmjob.Job(str(tmp_path), [spec.id], hardware=asked, patience=1.0)() == {spec.id: "DONE"}
    assert run_dir.load()[0].hardware == asked


def test_a_job_leaves_what_somebody_alive_has_frozen_until_he_has_ended(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    store, spec = Store(tmp_path), plan(["quietstar/main"], ["scale=smoke", "hardware.threads=3"])[0]
    held = store.run(spec.id)
    held.freeze(spec, command="of this machine, and alive")
    before = (held.path / "config.json").read_text()
    asked = spec.hardware.model_copy(update={"threads": 1})
    monkeypatch.setattr(slurmjob, "_task", lambda: None)
    monkeypatch.setattr(slurmjob, "BUSY_SECONDS", 0.05)
    monkeypatch.setattr(Worker, "run", lambda *_: ("DONE", ""))
    job, statuses = slurmjob.Job(str(tmp_path), [spec.id], hardware=asked, patience=1.0), dict[str, str]()
    thread = threading.Thread(target=lambda: statuses.update(job()))
    with held.lease():
        thread.start()
        thread.join(timeout=1.0)
        assert thread.is_alive()
        assert (held.path / "config.json").read_text() == before
    thread.join(timeout=60)
    assert statuses == {spec.id: "DONE"}
    assert held.load()[0].hardware == asked

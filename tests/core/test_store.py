"""The run directory: labels that gather, files that can't be read, and a lease that is lost."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import pytest
from test_pages import record, spec

from retrace.core import store as store_module
from retrace.core.launch import Summary, unfinished
from retrace.core.store import Busy, RunDir, Store

RUN = "demo-evaluate-1"


@pytest.fixture
def run(tmp_path: Path) -> RunDir:
    found = Store(tmp_path).run(RUN)
    found.freeze(spec(RUN), command="test")
    return found


def labels(run: RunDir) -> list[str]:
    return list(json.loads((run.path / "config.json").read_text())["labels"])


def test_a_run_that_is_asked_for_again_gains_labels_and_loses_none(run: RunDir) -> None:
    run.freeze(dataclasses.replace(spec(RUN), labels=("other/one/s0",)), command="test")
    run.freeze(spec(RUN), command="test")
    assert labels(run) == ["size/big/s0", "other/one/s0"]


def test_a_config_that_cannot_be_read_hides_no_other_run_and_is_written_anew(run: RunDir, tmp_path: Path) -> None:
    store = Store(tmp_path)
    store.run("demo-evaluate-2").freeze(spec("demo-evaluate-2"), command="test")
    (run.path / "config.json").write_text("{")
    assert store.labels() == {RUN: (), "demo-evaluate-2": ("size/big/s0",)}
    run.freeze(spec(RUN), command="test")
    assert labels(run) == ["size/big/s0"]


def test_a_result_that_cannot_be_read_is_a_failure_of_that_run_which_is_tried_again(run: RunDir) -> None:
    (run.path / "result.json").write_text("")
    assert run.state().status == "FAILED"
    assert "result.json: not readable as JSON" in run.state().reason
    assert not run.state().finished


def test_a_finished_run_without_a_record_is_told_and_the_others_go_on(run: RunDir, tmp_path: Path) -> None:
    store, summary = Store(tmp_path), Summary()
    run.finish("DONE")
    specs = [spec(RUN), spec("demo-evaluate-2"), spec("demo-evaluate-3")]
    store.run("demo-evaluate-3").finish("DONE")
    store.write_record(record("demo-evaluate-3"))
    assert unfinished(specs, store=store, summary=summary).keys() == {"demo-evaluate-2"}
    assert summary.failed.keys() == {RUN}
    assert "finished and its record is gone (" in summary.failed[RUN]


def test_who_loses_its_lease_to_another_host_stops_and_leaves_what_that_one_writes(
    run: RunDir, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(store_module, "HEARTBEAT_SECONDS", 0.01)
    lease = run.path / "lease.json"
    with run.lease():
        run.progress(step=1, total=2, seconds_left=None, seconds=1.0)
        assert not run.lost.is_set()
        lease.write_text(json.dumps({"host": "elsewhere", "pid": 1}))
        assert run.lost.wait(timeout=10)
        with pytest.raises(Busy, match=f"{RUN} was taken over by elsewhere:1"):
            run.progress(step=2, total=2, seconds_left=None, seconds=1.0)
    assert run.state().step == 1
    assert json.loads(lease.read_text())["host"] == "elsewhere"

"""The run directory: labels that gather, files that can't be read, and a lease that is lost."""

from __future__ import annotations

import dataclasses
import errno
import fcntl
import json
import os
import shutil
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from test_pages import record, spec

from retrace.core import lease as lease_module
from retrace.core.files import write_json
from retrace.core.launch import Summary, unfinished
from retrace.core.lease import Busy
from retrace.core.lookup import known_runs
from retrace.core.plan import plan
from retrace.core.store import RunDir, Store

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


@pytest.mark.parametrize("content", ["{", "[1]"])
def test_a_config_that_cannot_be_read_hides_no_other_run_and_is_written_anew(
    run: RunDir, tmp_path: Path, content: str
) -> None:
    store = Store(tmp_path)
    store.run("demo-evaluate-2").freeze(spec("demo-evaluate-2"), command="test")
    (run.path / "config.json").write_text(content)
    assert {found.id: found.labels for found in known_runs(store)} == {RUN: (), "demo-evaluate-2": ("size/big/s0",)}
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
    monkeypatch.setattr(lease_module, "HEARTBEAT_SECONDS", 0.01)
    lease = run.path / "lease.json"
    with run.lease():
        run.progress(step=1, total=2, seconds_left=None, seconds=1.0)
        assert not run.lost.is_set()
        write_json(lease, {"host": "elsewhere", "pid": 1})  # whole, as other hosts do: a torn one is written anew
        assert run.lost.wait(timeout=10)
        with pytest.raises(Busy, match=f"{RUN} was taken over by elsewhere:1"):
            run.progress(step=2, total=2, seconds_left=None, seconds=1.0)
    assert run.state().step == 1
    assert json.loads(lease.read_text())["host"] == "elsewhere"


def test_a_heart_goes_on_beating_behind_a_disk_that_did_not_answer_and_a_lease_that_was_deleted(
    run: RunDir, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(lease_module, "HEARTBEAT_SECONDS", 0.01)
    lease = run.path / "lease.json"
    with run.lease():
        content = lease.read_text()
        lease.unlink()
        lease.mkdir()  # to read it is an error of the system
        time.sleep(0.2)
        lease.rmdir()
        until(lambda: lease.is_file() and lease.read_text() == content)
        os.utime(lease, (0, 0))
        until(lambda: lease.stat().st_mtime > 0)
        assert not run.lost.is_set()


def test_on_a_disk_without_locks_the_heartbeat_says_who_lives(run: RunDir, monkeypatch: pytest.MonkeyPatch) -> None:
    def no_locks(*_: object) -> None:
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(fcntl, "flock", no_locks)
    with run.lease():
        assert run.state().status == "RUNNING"
        with pytest.raises(Busy), run.lease():
            pass
        os.utime(run.path / "lease.json", (0, 0))
        assert run.state().status == "PLANNED"
    with run.lease():
        pass


@pytest.mark.parametrize("content", ["", "[1]", "5", '"x"', "null", "{}"])
def test_small_files_that_are_broken_stop_neither_status_nor_a_start(content: str, run: RunDir) -> None:
    for name in ("lease.json", "progress.json", "result.json"):
        (run.path / name).write_text(content)
    assert run.state().status in ("FAILED", "PLANNED")
    assert run.spent() == 0
    with run.lease():
        assert run.state().status == "RUNNING"


def test_a_folder_that_was_damaged_is_told_and_one_that_cannot_be_written_leaves_nothing_behind(run: RunDir) -> None:
    with run.folder("model") as folder:
        (folder / "weights").write_bytes(b"0" * 100)
    run.check_folders()
    file = run.path / "model" / "weights"
    file.write_bytes(b"0" * 99 + b"1")
    with pytest.raises(
        ValueError, match=rf"runs/{RUN}/model: is damaged \(weights does not match .*: delete runs/{RUN}"
    ):
        run.check_folders()
    file.unlink()
    with pytest.raises(ValueError, match="weights: No such file"):
        run.check_folders()
    with pytest.raises(IsADirectoryError), run.folder("other") as folder:
        (folder / "weights").mkdir()  # can't be made durable
    assert not list(run.path.glob("*other*"))


@pytest.mark.parametrize(
    ("part", "key", "value"),
    [("config", "seed", 99), ("config", "optim", None), ("", "seed", 99), ("", "scale", "gpu")],
)
def test_a_config_that_was_edited_is_not_carried_out_under_the_id_of_another(
    part: str, key: str, value: object, tmp_path: Path
) -> None:
    found = plan(["quietstar/main"], ["scale=smoke"])[0]
    run = Store(tmp_path).run(found.id)
    run.freeze(found, command="test")
    assert run.load()[0].id == found.id
    tree = json.loads((run.path / "config.json").read_text())
    place = tree[part] if part else tree
    place[key] = {**place[key], "learning_rate": 1.0} if value is None else value
    (run.path / "config.json").write_text(json.dumps(tree))
    with pytest.raises(ValueError, match=f"was changed, and is not what {found.id} stands for: `retrace run`"):
        run.load()


def until(condition: Callable[[], bool]) -> None:
    end = time.monotonic() + 30
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.01)


def test_a_run_whose_folder_was_made_anew_by_another_process_stops(run: RunDir, tmp_path: Path) -> None:
    with run.lease():
        run.check_lease()
        shutil.rmtree(run.path)
        again = Store(tmp_path).run(RUN)
        again.freeze(spec(RUN), command="test")
        with again.lease():
            with pytest.raises(Busy, match="was taken over"):
                run.progress(step=1, total=2, seconds_left=None, seconds=1.0)
            again.progress(step=1, total=2, seconds_left=None, seconds=1.0)


@pytest.mark.parametrize("result", ['{"status": 5, "reason": 7}', '{"status": "DONE", "reason": ["x"]}', "[1]"])
def test_a_result_of_wrong_types_hides_no_other_run(run: RunDir, result: str) -> None:
    (run.path / "result.json").write_text(result)
    assert run.state().status == "FAILED"
    assert "not a result" in run.state().reason


def test_progress_of_wrong_types_counts_as_none(run: RunDir) -> None:
    (run.path / "progress.json").write_text('{"step": "x", "total": null, "seconds": "z"}')
    assert (run.spent(), run.state().step, run.state().total) == (0.0, 0, 0)


def test_a_record_that_is_made_again_keeps_the_labels_of_the_one_that_stood_there(tmp_path: Path) -> None:
    store = Store(tmp_path)
    store.write_record(record(RUN).relabelled(("size/big/s0", "other/one/s0")))
    store.write_record(record(RUN).relabelled(("main/main/s0", "size/big/s0")))
    assert store.records("demo")[0].labels == ("size/big/s0", "other/one/s0", "main/main/s0")

"""metrics.jsonl is the truth; W&B is a mirror under the run's id, whose files are read back here."""

from __future__ import annotations

import json
import struct
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from conftest import TINY, Run

from retrace.core.config import Tracking
from retrace.core.plan import plan
from retrace.core.store import Store
from retrace.core.tracking import Tracker, wandb_mode

OFFLINE = ["scale=smoke", "seed=0", "tracking.wandb=offline", "tracking.log_every=2"]


def wandb_records(path: Path) -> Iterator[Any]:
    """The protocol records of a .wandb file: LevelDB log blocks with a plain CRC."""
    from wandb.proto import wandb_internal_pb2

    block, data, position, message = 32768, path.read_bytes(), 7, b""
    while position + 7 <= len(data):
        left = block - position % block
        if left < 7:
            position += left
            continue
        crc, size, kind = struct.unpack("<IHB", data[position : position + 7])
        if kind == 0 and size == 0:
            position += left
            continue
        part = data[position + 7 : position + 7 + size]
        assert zlib.crc32(bytes([kind]) + part) == crc
        position += 7 + size
        message = part if kind in (1, 2) else message + part
        if kind in (1, 4):
            yield wandb_internal_pb2.Record.FromString(message)
            message = b""


def test_wandb_offline_files_hold_run_id_group_config_and_metrics(home: Path, retrace: Run) -> None:
    assert retrace("run", "quietstar/thoughts", *OFFLINE).returncode == 0
    store = Store(home)
    spec = next(
        s for s in plan(["quietstar/thoughts"], OFFLINE) if "thoughts/thoughts/s0" in s.labels and s.program == "train"
    )
    (path,) = store.run(spec.id).path.glob("wandb/offline-run-*/*.wandb")
    found = list(wandb_records(path))
    (run,) = (record.run for record in found if record.HasField("run"))
    assert (run.run_id, run.run_group, run.job_type) == (spec.id, "quietstar/thoughts", "train")
    config = {item.key: json.loads(item.value_json) for item in run.config.update}
    assert config["thoughts"]["num_sampled"] == spec.config.thoughts.num_sampled  # type: ignore[attr-defined]
    logged = [
        {item.key or ".".join(item.nested_key): json.loads(item.value_json) for item in record.history.item}
        for record in found
        if record.HasField("history")
    ]
    lines = [json.loads(line) for line in (store.run(spec.id).path / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in logged] == [line["step"] for line in lines]
    for ours, theirs in zip(lines, logged, strict=True):
        assert all(theirs[key] == pytest.approx(value) for key, value in ours.items())
    assert {"loss/total", "speed/tokens_per_second"} <= set(lines[0])
    assert any("reward" in key for key in lines[0])
    assert any("mixing_weight" in key for key in lines[0])


def test_auto_is_offline_without_a_key_and_online_with_one(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    tracking = Tracking(wandb="auto", project="p", entity=None, log_every=1)
    monkeypatch.delenv("WANDB_API_KEY", raising=False)
    monkeypatch.setenv("NETRC", str(tmp_path / "none"))
    monkeypatch.setenv("HOME", str(tmp_path))
    assert wandb_mode(tracking) == "offline"
    monkeypatch.setenv("WANDB_API_KEY", "x" * 40)
    assert wandb_mode(tracking) == "online"


def test_a_wandb_that_cannot_be_reached_costs_a_wait_and_no_run(home: Path, retrace: Run) -> None:
    done = retrace(
        "run", "quietstar/main", "scale=smoke", "base.optim.steps=2", "hardware.parallel_runs=1",
        WANDB_API_KEY="a" * 40, WANDB_BASE_URL="http://127.0.0.1:9",
    )  # fmt: skip
    assert done.returncode == 0, done.stdout
    logs = "".join(path.read_text() for path in home.glob("runs/*/log.txt"))
    assert logs.count("W&B failed") == 1  # the later runs of the process do not wait again
    assert len(list(home.glob("runs/*/wandb/offline-run-*/*.wandb"))) == 3


def test_a_resumed_run_forgets_lines_after_its_checkpoint_and_torn_ones(home: Path) -> None:
    spec = plan(["quietstar/main"], [*TINY, "seed=0"])[0]
    run = Store(home).run(spec.id)
    run.freeze(spec, command="test")
    tracker = Tracker(run, spec)
    for step in (1, 2, 3):
        tracker.log(step, {"loss": 1.0 / step, "unknown": None})
    with open(run.path / "metrics.jsonl", "a") as file:
        file.write('{"step": 4, "los')
    tracker.resume(2)
    tracker.log(3, {"loss": 0.25})
    assert tracker.series() == {"loss": ((1, 1.0), (2, 0.5), (3, 0.25))}


def test_a_log_with_a_damaged_line_is_refused_by_its_number_and_a_torn_end_is_cut_off(tmp_path: Path) -> None:
    tracker = Tracker(Store(tmp_path).run("run"), plan(["quietstar/main"], TINY)[0])
    tracker.run.path.mkdir(parents=True)
    file = tracker.run.path / "metrics.jsonl"
    file.write_bytes(b'{"step": 1, "loss": 2.0}\n{"step": 2, "lo')
    tracker.resume(2)
    assert tracker.series() == {"loss": ((1, 2.0),)}
    file.write_bytes(b'{"step": 1, "loss": 2.0}\n\x00\x00\xff\n{"step": 3, "loss": 1.0}\n')
    with pytest.raises(ValueError, match=r"metrics\.jsonl: line 2 is damaged; delete it"):
        tracker.resume(3)


def test_the_seconds_of_a_run_are_those_of_all_processes_that_carried_it_out(home: Path) -> None:
    spec = plan(["quietstar/main"], [*TINY, "seed=0"])[0]
    run = Store(home).run(spec.id)
    run.freeze(spec, command="test")
    assert Tracker(run, spec).seconds < 60
    run.progress(step=1, total=3, seconds_left=None, seconds=3600.0)
    second = Tracker(run, spec)
    assert 3600 <= second.seconds < 3660
    second.progress(2, 3, seconds_left=None)
    assert 3600 <= Tracker(run, spec).seconds < 3660


def test_a_log_that_somebody_deletes_or_cuts_fails_the_run_and_its_record_lacks_nothing(home: Path) -> None:
    spec = plan(["quietstar/main"], [*TINY, "seed=0"])[0]
    run = Store(home).run(spec.id)
    run.freeze(spec, command="test")
    tracker = Tracker(run, spec)
    for step in (1, 2):
        tracker.log(step, {"loss": 1.0})
    log = run.path / "metrics.jsonl"
    whole = log.read_text()
    log.write_text(whole.splitlines(keepends=True)[1])
    with pytest.raises(ValueError, match="metrics.jsonl: was deleted or cut while the run went on"):
        tracker.series()
    log.unlink()
    with pytest.raises(ValueError, match="it goes on from its last checkpoint"):
        tracker.log(3, {"loss": 1.0})
    log.write_text(whole)
    tracker.log(3, {"loss": 1.0})
    assert tracker.series() == {"loss": ((1, 1.0), (2, 1.0), (3, 1.0))}

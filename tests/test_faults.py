"""What goes wrong stays where it went wrong, is told in one line, and loses nothing that was recorded."""

from __future__ import annotations

import json
import math
import os
import re
import shlex
import shutil
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace

import psutil
import pytest
from conftest import TINY, Run

from retrace import worker
from retrace.core.lease import Busy
from retrace.core.plan import plan
from retrace.core.store import Store
from retrace.core.workers import Worker

SMALL = [*TINY, "seed=0", "base.optim.steps=3", "train.optim.steps=2", "eval.num_questions=2", "eval.num_windows=2"]


def test_bad_input_is_one_sentence_and_exit_code_2_and_leaves_nothing_behind(home: Path, retrace: Run) -> None:
    for arguments in (
        ["run", "quietstar/main", "thoughts.num_smpled=3"],
        ["run", "quietstar/nothing"],
        ["run", "scale=smoke"],
        ["run", "quietstar/main", "scale=smoke", "eval.tasks=[nothing]"],
        ["plan", "quietstar/main", "corpus.mixture.prose=0.9"],
        ["report", "nobody"],
        ["frobnicate"],
    ):
        done = retrace(*arguments)
        assert done.returncode == 2, done.stdout
        assert "Traceback" not in done.stderr
        assert done.stderr.strip()
    assert not (home / "runs").exists()


def test_an_unreachable_hub_is_told_within_seconds_and_names_the_local_way(retrace: Run) -> None:
    done = retrace(
        "run", "quietstar/main", *SMALL, "eval.tasks=[gsm8k_direct]",
        HF_ENDPOINT="http://127.0.0.1:9", HF_HUB_OFFLINE="0", RETRACE_DATA="", timeout=60,
    )  # fmt: skip
    assert done.returncode == 2
    assert "can't be reached" in done.stderr
    assert "RETRACE_DATA" in done.stderr


def test_a_loss_that_is_no_number_is_a_result_and_not_a_crash(home: Path, retrace: Run) -> None:
    arguments = ["run", "quietstar/main", *SMALL, "base.optim.steps=30", "base.optim.learning_rate=1e30"]
    done = retrace(*arguments)
    assert "1 of them diverged" in done.stdout
    assert re.search(r"was not finite at step \d+; last good values: loss/total=", done.stdout)
    assert "2 not tried because they build on those" in done.stdout
    (record,) = Store(home).records("quietstar")
    assert record.status == "DIVERGED"
    assert record.metrics["diverged_at"] >= 1
    again = retrace(*arguments)  # a result is not computed again, nor is what can't build on it tried
    assert again.returncode == 0
    assert "DIVERGED" not in again.stdout
    assert "2 not tried because they build on those" in again.stdout


def test_memory_that_runs_out_is_one_line_with_what_was_asked_for_and_what_to_lower(home: Path) -> None:
    arguments = ["run", "quietstar/main", *SMALL, "base.optim.batch_size=32768", "base.optim.micro_batch_size=32768"]
    command = f"ulimit -v 4000000; exec {sys.executable} -m retrace.cli {shlex.join(arguments)}"  # kB, of each process
    done = subprocess.run(
        ["bash", "-c", command], env={**os.environ, "RETRACE_HOME": str(home)}, capture_output=True, text=True
    )
    assert done.returncode == 1
    (line,) = (text for text in done.stdout.splitlines() if text.startswith("  quietstar-pretrain-"))
    expected = (
        r"out of memory in a pretrain run on cpu \([\d.]+ [GM]iB more were asked for\): lower micro_batch_size "
        r"\(now 32768\).*, or set hardware.activation_checkpointing=true$"
    )
    assert re.search(expected, line), line


def test_a_record_that_was_deleted_or_broken_comes_back_from_its_run(home: Path, retrace: Run) -> None:
    arguments = ["run", "quietstar/main", *SMALL]
    assert retrace(*arguments).returncode == 0
    first, second, third = sorted((home / "results/quietstar/records").glob("*.json"))
    before = [first.read_text(), second.read_text(), third.read_text()]
    first.unlink()
    second.write_text("{")
    assert retrace("plan", "quietstar/main", *SMALL).returncode == 2  # says which file is broken
    second.unlink()
    assert "3 of 3 runs finished" in retrace(*arguments).stdout
    assert [first.read_text(), second.read_text(), third.read_text()] == before


def test_a_run_that_fails_neither_hides_nor_kills_the_others(home: Path, retrace: Run) -> None:
    arguments = ["run", "quietstar/thoughts", *SMALL]
    specs = plan(["quietstar/thoughts"], SMALL)
    victim = next(s for s in specs if s.program == "train" and s.config.thoughts.num_sampled == 0)  # type: ignore[attr-defined]
    (home / "runs" / victim.id).mkdir(parents=True)
    (home / "runs" / victim.id / "model").write_text("in the way")  # the folder `model` can't replace a file
    done = retrace(*arguments)
    assert done.returncode == 1
    assert "1 failed, 1 not tried because they build on those" in done.stdout
    assert f"{victim.id}: " in done.stdout
    assert len(Store(home).records("quietstar")) == 3
    assert f"FAILED 2/2 {victim.id}" in " ".join(retrace("status", "quietstar/thoughts", *SMALL).stdout.split())
    (home / "runs" / victim.id / "model").unlink()
    assert "5 of 5 runs finished" in retrace(*arguments).stdout


@pytest.fixture
def full_disk(tmp_path: Path) -> Iterator[Path]:
    """A home on a disk of 400 kB: enough to start, too little for checkpoints and records."""
    place = tmp_path / "small"
    place.mkdir()
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=400k", "tmpfs", str(place)], capture_output=True).returncode:
        pytest.skip("needs the right to mount a tmpfs")
    yield place
    subprocess.run(["umount", str(place)], check=True)


def test_a_full_disk_fails_the_run_with_the_reason_and_room_lets_it_go_on(full_disk: Path, retrace: Run) -> None:
    ballast = full_disk / "ballast"
    ballast.write_bytes(b"0" * 330_000)
    arguments = ["run", "quietstar/main", *SMALL, "hardware.checkpoint_seconds=0"]
    done = retrace(*arguments, RETRACE_HOME=str(full_disk))
    assert done.returncode == 1
    assert "No space left on device" in done.stdout + done.stderr
    ballast.unlink()
    subprocess.run(["mount", "-o", "remount,size=40m", str(full_disk)], check=True)
    done = retrace(*arguments, RETRACE_HOME=str(full_disk))
    assert done.returncode == 0, done.stdout
    assert len(Store(full_disk).records("quietstar")) == 3


def test_a_live_run_is_left_alone_and_a_dead_one_is_taken_over(home: Path) -> None:
    (spec,) = (s for s in plan(["quietstar/main"], SMALL) if s.program == "pretrain")
    run = Store(home).run(spec.id)
    run.freeze(spec, command="test")
    with run.lease():
        assert run.state().status == "RUNNING"
        with pytest.raises(Busy), run.lease():
            pass
    lease = {"host": os.uname().nodename, "pid": 2**22 - 3, "started": 1.0}
    (run.path / "lease.json").write_text(json.dumps(lease))
    assert run.state().status == "PLANNED"
    with run.lease():
        assert run.state().status == "RUNNING"


def test_a_worker_that_is_killed_leaves_the_reason_on_disk_and_the_next_try_forgets_it(
    home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("RETRACE_HOME", str(home))
    spec = plan(["quietstar/main"], [*SMALL, "base.optim.steps=2000"])[0]
    run = Store(home).run(spec.id)
    run.freeze(spec, command="test")
    process, outcomes = Worker(), []
    for end in (psutil.Process.kill, psutil.Process.terminate):
        thread = threading.Thread(target=lambda: outcomes.append(process.run(spec, run.path)))
        thread.start()
        while run.state().status != "RUNNING" or run.state().step == 0:
            time.sleep(0.05)
        (child,) = psutil.Process().children()
        end(child)
        thread.join()
    (killed, reason), (stopped, _) = outcomes
    assert killed == "FAILED"
    assert reason.startswith("its worker died (killed by signal 9; out of memory? lower micro_batch_size")
    assert stopped == "STOPPED"
    assert (run.state().status, run.state().reason) == ("PLANNED", "")  # of a healthy run, which is not told as failed


def test_a_worker_that_is_asked_to_stop_before_it_can_listen_has_not_failed(home: Path) -> None:
    spec = plan(["quietstar/main"], SMALL)[0]
    run = Store(home).run(spec.id)
    run.freeze(spec, command="test")
    process, outcomes = Worker(), []
    thread = threading.Thread(target=lambda: outcomes.append(process.run(spec, run.path)[0]))
    thread.start()
    while process._process is None:
        time.sleep(0.001)
    process.stop()
    thread.join()
    assert outcomes == ["STOPPED"]
    assert run.state().status == "PLANNED"


def test_a_worker_whose_run_failed_on_a_gpu_is_ended_and_one_on_a_cpu_stays_warm(
    home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Some errors of CUDA stay with their process. Where there is no GPU, to ask for one fails."""
    monkeypatch.setenv("RETRACE_HOME", str(home))
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    for hardware, code in (("cpu", None), ("gpu1", 3)):
        spec = plan(["quietstar/main"], [*SMALL, f"hardware={hardware}"])[0]
        run = Store(home).run(spec.id)
        run.freeze(spec, command="test")
        if hardware == "cpu":
            (run.path / "model").write_text("in the way")
        process = Worker()
        assert process.run(spec, run.path)[0] == "FAILED"
        assert process._process is not None
        assert process._process.poll() == code
        process.close()


def test_a_metric_that_is_no_number_is_one_sentence_with_its_name(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    spec = plan(["quietstar/main"], SMALL)[0]
    run = Store(home).run(spec.id)
    run.freeze(spec, command="test")
    measured = {"eval/loss": math.nan, "eval/prob": 0.5}
    program = SimpleNamespace(load=lambda: lambda *_: measured)
    paper = SimpleNamespace(recipe=spec.recipe, programs={spec.program: program})
    monkeypatch.setattr(worker, "load_paper", lambda _: paper)
    outcome = worker.execute(run.path, store=Store(home), stop=threading.Event())
    assert outcome.status == "FAILED"
    assert outcome.reason.startswith("ValueError: measured eval/loss=nan, and a result is finite")


def test_a_base_whose_model_was_damaged_is_refused_by_name_and_made_again(home: Path, retrace: Run) -> None:
    assert retrace("run", "quietstar/main", *SMALL).returncode == 0
    base = next(path for path in (home / "runs").glob("*pretrain*"))
    weights = base / "model" / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1] + b"x")
    other = ["run", "quietstar/main", *SMALL, "train.optim.learning_rate=2.0e-4"]
    done = retrace(*other)
    assert done.returncode == 1
    assert f"runs/{base.name}/model: is damaged (model.safetensors does not match its checksum): delete" in done.stdout
    shutil.rmtree(base)
    assert "3 of 3 runs finished" in retrace(*other).stdout


def test_a_base_of_other_sizes_is_refused_by_name(home: Path, retrace: Run) -> None:
    assert retrace("run", "quietstar/main", *SMALL).returncode == 0
    base = next(path for path in (home / "runs").glob("*pretrain*"))
    other = plan(["quietstar/main"], [*SMALL, "model.hidden_size=32"])
    shutil.copytree(base, home / "runs" / other[0].id)
    done = retrace("run", "quietstar/main", *SMALL, "model.hidden_size=32")
    assert done.returncode == 1
    assert "model.hidden_size=32" in done.stdout
    assert "is another model, with 16" in done.stdout


def test_ranks_and_modules_of_the_launchers_surroundings_are_not_those_of_its_workers(
    home: Path, tmp_path: Path
) -> None:
    (tmp_path / "tokenizers.py").write_text("raise RuntimeError('a file of the user, and not the library')\n")
    ranks = {"RANK": "1", "WORLD_SIZE": "2", "LOCAL_RANK": "1", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "29511"}
    done = subprocess.run(
        [sys.executable, "-P", "-m", "retrace.cli", "run", "quietstar/main", *SMALL], cwd=tmp_path,
        env={**os.environ, **ranks, "RETRACE_HOME": str(home)}, capture_output=True, text=True, timeout=300,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    assert len(list((home / "results" / "quietstar" / "records").glob("*.json"))) == 3


def test_before_records_of_elsewhere_are_replaced_it_is_said(home: Path, retrace: Run) -> None:
    arguments = ["run", "quietstar/main", *SMALL]
    assert "made elsewhere" not in retrace(*arguments).stdout
    assert "made elsewhere" not in retrace(*arguments).stdout  # nothing to do
    shutil.rmtree(home / "runs")
    again = retrace(*arguments).stdout
    assert "3 of 3 runs have a record made elsewhere: what comes out here takes its place" in again

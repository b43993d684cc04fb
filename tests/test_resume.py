"""A run that is killed at any moment ends with the numbers of one that never was; real processes, real SIGKILL."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from conftest import TINY, Run

from retrace.core.plan import RunSpec, plan
from retrace.core.store import Store

OVERRIDES = [*TINY, "seed=0", "base.optim.steps=60", "train.optim.steps=30", "eval.num_questions=40"]
PLACEMENT = ["hardware.checkpoint_seconds=0", "tracking.log_every=7"]  # a checkpoint at every step


@pytest.fixture(scope="module")
def specs() -> dict[str, RunSpec]:
    return {spec.program: spec for spec in plan(["quietstar/main"], [*OVERRIDES, *PLACEMENT])}


@pytest.fixture(scope="module")
def undisturbed(specs: dict[str, RunSpec], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A home in which all three runs have ended in peace."""
    home = tmp_path_factory.mktemp("undisturbed")
    for spec in specs.values():
        assert worker(home, spec).wait() == 0
    return home


def worker(home: Path, spec: RunSpec) -> subprocess.Popen[bytes]:
    run = Store(home).run(spec.id)
    run.freeze(spec, command="test")
    return subprocess.Popen(
        [sys.executable, "-m", "retrace.worker", str(run.path)], env={**os.environ, "RETRACE_HOME": str(home)}
    )


def numbers(home: Path, spec: RunSpec) -> tuple[object, ...]:
    """All of a record that must not depend on having been killed: what is not a time."""
    record = next(r for r in Store(home).records(spec.paper) if r.id == spec.id)
    curves = {key: curve for key, curve in record.series.items() if not key.startswith("speed/")}
    return record.status, record.metrics, curves


@pytest.mark.parametrize(("program", "steps"), [("pretrain", (1, 25)), ("train", (3, 17)), ("evaluate", (1, 1))])
def test_a_killed_run_ends_as_an_unkilled_one(
    program: str, steps: tuple[int, int], specs: dict[str, RunSpec], undisturbed: Path, tmp_path: Path
) -> None:
    spec, home = specs[program], tmp_path
    for parent in spec.parents.values():
        shutil.copytree(undisturbed / "runs" / parent, home / "runs" / parent)
    run = Store(home).run(spec.id)
    for step in steps:  # killed twice, the second time further on
        process = worker(home, spec)
        while run.state().step < step and process.poll() is None:
            time.sleep(0.01)
        process.send_signal(signal.SIGKILL)
        assert process.wait() == -signal.SIGKILL, "the run ended before it could be killed"
        assert run.state().status == "PLANNED"
    assert worker(home, spec).wait() == 0
    assert numbers(home, spec) == numbers(undisturbed, spec)
    assert not (run.path / "checkpoints").exists()


def test_a_damaged_checkpoint_is_skipped_for_the_one_before_it(
    specs: dict[str, RunSpec], undisturbed: Path, tmp_path: Path
) -> None:
    spec, home = specs["pretrain"], tmp_path
    run = Store(home).run(spec.id)
    process = worker(home, spec)
    while run.state().step < 20 and process.poll() is None:
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    process.wait()
    newest = max((run.path / "checkpoints").glob("step_*"))
    content = bytearray((newest / "tensors.safetensors").read_bytes())
    content[-5] ^= 1
    (newest / "tensors.safetensors").write_bytes(content)
    again = subprocess.run(
        [sys.executable, "-m", "retrace.worker", str(run.path)],
        env={**os.environ, "RETRACE_HOME": str(home)}, capture_output=True, text=True,
    )  # fmt: skip
    said = (
        f"checkpoint {newest.name} is damaged (tensors.safetensors does not match its checksum): this run went on from"
    )
    assert again.stdout.startswith(f"DONE {said} step {int(newest.name[5:]) - 1}")
    assert said in (run.path / "log.txt").read_text()
    assert numbers(home, spec) == numbers(undisturbed, spec)


def test_sigterm_saves_and_the_same_command_goes_on(
    specs: dict[str, RunSpec], undisturbed: Path, tmp_path: Path
) -> None:
    spec, home = specs["pretrain"], tmp_path
    run = Store(home).run(spec.id)
    process = worker(home, spec)
    while run.state().step < 5 and process.poll() is None:
        time.sleep(0.01)
    process.terminate()
    assert process.wait() == 3
    assert list((run.path / "checkpoints").glob("step_*"))
    assert worker(home, spec).wait() == 0
    assert numbers(home, spec) == numbers(undisturbed, spec)


def test_a_sweep_whose_launcher_is_killed_goes_on_and_then_has_nothing_to_do(home: Path, retrace: Run) -> None:
    arguments = ["run", "quietstar/main", *OVERRIDES, "base.optim.steps=400", *PLACEMENT]
    process = subprocess.Popen(
        [sys.executable, "-m", "retrace.cli", *arguments], env={**os.environ, "RETRACE_HOME": str(home)}
    )
    while not list(home.glob("runs/*pretrain*/checkpoints/step_*")) and process.poll() is None:
        time.sleep(0.05)
    process.send_signal(signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL
    done = retrace(*arguments)
    assert done.returncode == 0, done.stderr
    assert "3 of 3 runs finished" in done.stdout
    written = {path: path.stat().st_mtime_ns for path in home.rglob("*.json")}
    began = time.monotonic()
    again = retrace(*arguments)
    assert "3 of 3 runs finished" in again.stdout
    assert {path: path.stat().st_mtime_ns for path in home.rglob("*.json")} == written
    assert time.monotonic() - began < 10  # nothing is started; the bound is loose since machines are shared
    assert json.loads(next(home.glob("runs/*evaluate*/result.json")).read_text())["status"] == "DONE"

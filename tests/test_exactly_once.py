"""Sweeps under attack: every run once, whoever starts them, and the same records, whoever is killed."""

from __future__ import annotations

import os
import random
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest
from conftest import TINY, Run
from test_resume import numbers

from retrace.core.plan import RunSpec, plan
from retrace.core.store import Store

SWEEP = [*TINY, "seed=0", "base.optim.steps=60", "train.optim.steps=20", "eval.num_questions=8", "eval.num_windows=2"]
KILLS = 20


def start(home: Path, *arguments: str) -> subprocess.Popen[str]:
    """`retrace run`, in a process group of its own so that it can be killed with all its workers."""
    return subprocess.Popen(
        [sys.executable, "-m", "retrace.cli", "run", *arguments],
        env={**os.environ, "RETRACE_HOME": str(home)}, start_new_session=True,
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
    )  # fmt: skip


def starts(home: Path, spec: RunSpec) -> int:
    """How often a run was begun, by its own log."""
    return len(re.findall(f"{spec.id}: start", (home / "runs" / spec.id / "log.txt").read_text()))


def test_two_launchers_that_race_for_one_sweep_carry_out_every_run_once(home: Path) -> None:
    specs = plan(["quietstar/thoughts"], SWEEP)
    racers = [start(home, "quietstar/thoughts", *SWEEP) for _ in range(2)]
    said = [racer.communicate(timeout=300)[0] for racer in racers]
    for racer, text in zip(racers, said, strict=True):
        assert racer.returncode == 0, text
        assert f"{len(specs)} of {len(specs)} runs finished" in text
    assert [starts(home, spec) for spec in specs] == [1] * len(specs)
    assert {record.id for record in Store(home).records("quietstar")} == {spec.id for spec in specs}


def attack(launcher: subprocess.Popen[str], what: str, rng: random.Random) -> bool:
    """SIGKILL to a worker, to the launcher alone, or to the whole group; False where there is nobody to kill."""
    workers = [p for p in psutil.Process(launcher.pid).children() if "retrace.worker" in p.cmdline()]
    if what == "worker" and not workers:
        return False
    if what == "worker":
        rng.choice(workers).kill()
    elif what == "launcher":
        launcher.kill()
    else:
        os.killpg(launcher.pid, signal.SIGKILL)
    return True


def under_way(home: Path, specs: list[RunSpec]) -> bool:
    states = [Store(home).run(spec.id).state() for spec in specs]
    return any(state.status == "RUNNING" and state.step > 0 for state in states)


@pytest.mark.slow  # some minutes: each of the kills costs a start
def test_soak_twenty_kills_at_random_moments_leave_the_records_of_a_sweep_in_peace(
    home: Path, retrace: Run, tmp_path: Path
) -> None:
    common = [*TINY, "seed=0", "hardware.checkpoint_seconds=0", "tracking.log_every=7"]
    arguments = {
        "quietstar/thoughts": [*common, "base.optim.steps=400", "train.optim.steps=150", "eval.num_questions=40"],
        "deepscalelm/main": [*common, "training.optim.steps=150"],
    }
    targets = list(arguments)
    peace = tmp_path / "peace"
    for target in targets:
        assert retrace("run", target, *arguments[target], timeout=900, RETRACE_HOME=str(peace)).returncode == 0
    specs = [spec for target in targets for spec in plan([target], arguments[target])]
    rng = random.Random(os.environ.get("RETRACE_SOAK_SEED", "soak"))
    kills: list[tuple[str, str, float]] = []
    began, sweeps = time.monotonic(), 0
    while len(kills) < KILLS:
        for target in targets:
            launcher = start(home, target, *arguments[target])
            while launcher.poll() is None and len(kills) < KILLS:
                what, delay = rng.choice(["worker", "launcher", "sweep"]), rng.uniform(0, 4)
                while rng.random() < 0.98 and launcher.poll() is None and not under_way(home, specs):
                    time.sleep(0.2)  # most kills are to hit a run at work, some the start of a sweep
                try:
                    launcher.wait(timeout=delay)
                except subprocess.TimeoutExpired:
                    if attack(launcher, what, rng):
                        kills.append((target, what, delay))
            launcher.communicate()
        if all(Store(home).run(spec.id).state().finished for spec in specs):
            same(home, peace, specs)
            sweeps += 1
            if len(kills) < KILLS:
                shutil.rmtree(home)
    for target in targets:
        done = retrace("run", target, *arguments[target], timeout=900)
        assert done.returncode == 0, done.stdout
    same(home, peace, specs)
    by = {what: sum(kind == what for _, kind, _ in kills) for what in ("worker", "launcher", "sweep")}
    print(
        f"{len(kills)} kills ({by}) in {time.monotonic() - began:.0f} s over {sweeps + 1} sweeps of {len(specs)} runs,"
    )
    print(f"which were begun {sum(starts(home, spec) for spec in specs)} times in the last of them")


def same(home: Path, peace: Path, specs: list[RunSpec]) -> None:
    for spec in specs:
        assert numbers(home, spec) == numbers(peace, spec), spec.id
        assert not (home / "runs" / spec.id / "checkpoints").exists()

"""Disks that are full or closed to writing: one sentence, an exit code, nothing lost, and the next `run` goes on."""

from __future__ import annotations

import shutil
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from conftest import TINY, Run
from test_resume import numbers

from retrace.core.plan import RunSpec, plan
from retrace.core.store import Store

CHAIN = [*TINY, "seed=0", "base.optim.steps=40", "train.optim.steps=2", "eval.num_questions=2", "eval.num_windows=2"]
COMMAND = ["run", "quietstar/main", *CHAIN, "hardware.checkpoint_seconds=0", "tracking.log_every=1"]
Mount = Callable[..., Path]


@pytest.fixture(scope="module")
def specs() -> dict[str, RunSpec]:
    return {spec.program: spec for spec in plan(["quietstar/main"], [*CHAIN, "tracking.log_every=1"])}


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory, specs: dict[str, RunSpec]) -> dict[str, tuple[object, ...]]:
    """What each run's record must say in the end."""
    from retrace.core.launch import Local

    home = tmp_path_factory.mktemp("undisturbed")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("RETRACE_HOME", str(home))
        summary = Local(Store(home), command="test", on_change=lambda *_: None).run(list(specs.values()))
    assert not summary.failed
    return {program: numbers(home, spec) for program, spec in specs.items()}


@pytest.fixture
def mount() -> Iterator[Mount]:
    """Mounts of this test, undone behind it: `mount(place, "-t", "tmpfs")`."""
    places: list[Path] = []

    def call(place: Path, *arguments: str) -> Path:
        place.mkdir(parents=True, exist_ok=True)
        done = subprocess.run(["mount", *arguments, str(place)], capture_output=True, text=True)
        if done.returncode:
            pytest.skip(f"needs the right to mount: {done.stderr.strip()}")
        places.append(place)
        return place

    yield call
    for place in reversed(places):
        subprocess.run(["umount", str(place)], capture_output=True)  # a test may have undone it itself


def failed_with(done: subprocess.CompletedProcess[str], run_id: str, *parts: str) -> None:
    """One line of the sweep's summary tells why, and there is no traceback in what people see."""
    assert done.returncode == 1, done.stdout + done.stderr
    assert "Traceback" not in done.stdout + done.stderr
    (line,) = (line for line in done.stdout.splitlines() if line.startswith(f"  {run_id}: "))
    for part in parts:
        assert part in line


def test_each_kind_of_file_that_cannot_be_written_is_told_and_the_run_goes_on_in_the_end(
    home: Path, retrace: Run, mount: Mount, specs: dict[str, RunSpec], undisturbed: dict[str, tuple[object, ...]]
) -> None:
    run = home / "runs" / specs["pretrain"].id
    places = [home / "runs", run / "checkpoints", run, home / "results" / "quietstar" / "records"]
    for place in places:
        for reason in ("Read-only file system", "No space left on device"):
            mount(place, "-t", "tmpfs", "-o", "ro" if reason.startswith("Read") else "size=4k", "tmpfs")
            if not reason.startswith("Read"):
                (place / "ballast").write_bytes(b"0" * 4096)
            failed_with(retrace(*COMMAND), run.name, reason)
            assert not Store(home).records("quietstar")
            subprocess.run(["umount", str(place)], check=True)
    assert (run / "model").is_dir()  # only the record of the last try could not be written
    assert retrace(*COMMAND).returncode == 0
    assert {program: numbers(home, spec) for program, spec in specs.items()} == undisturbed


def test_a_log_that_cannot_be_written_fails_the_run_and_the_curve_is_whole_in_the_end(
    home: Path, retrace: Run, mount: Mount, specs: dict[str, RunSpec], undisturbed: dict[str, tuple[object, ...]]
) -> None:
    run = home / "runs" / specs["pretrain"].id
    run.mkdir(parents=True)
    disk = mount(home / "disk", "-t", "tmpfs", "-o", "size=4k", "tmpfs")
    (run / "metrics.jsonl").symlink_to(disk / "metrics.jsonl")  # room for some lines of forty
    failed_with(retrace(*COMMAND), run.name, "No space left on device")
    assert 0 < len((disk / "metrics.jsonl").read_text().splitlines()) < 40
    assert (run / "checkpoints").is_dir()
    shutil.copyfile(disk / "metrics.jsonl", run / "copy")
    (run / "metrics.jsonl").unlink()
    (run / "copy").rename(run / "metrics.jsonl")  # torn in the middle of a line, as the full disk left it
    assert retrace(*COMMAND).returncode == 0
    assert {program: numbers(home, spec) for program, spec in specs.items()} == undisturbed


def test_a_disk_that_fills_up_in_the_middle_of_a_sweep_loses_no_finished_run(
    home: Path, retrace: Run, mount: Mount, specs: dict[str, RunSpec], undisturbed: dict[str, tuple[object, ...]]
) -> None:
    assert retrace(*COMMAND).returncode == 0
    kept = sum(file.stat().st_size for file in home.rglob("*") if file.is_file())
    ids = [specs[program].id for program in ("train", "evaluate")]
    for run_id in ids:
        shutil.rmtree(home / "runs" / run_id)
        (home / "results/quietstar/records" / f"{run_id}.json").unlink()
    small = mount(home.parent / "small", "-t", "tmpfs", "-o", "size=40m", "tmpfs")
    shutil.copytree(home, small, dirs_exist_ok=True)
    subprocess.run(["mount", "-o", f"remount,size={kept + 120_000}", str(small)], check=True)
    free = shutil.disk_usage(small).free
    (small / "ballast").write_bytes(b"0" * (free - 40_960))  # enough to freeze a run and to begin it
    done = retrace(*COMMAND, RETRACE_HOME=str(small))
    failed_with(done, ids[0], "No space left on device")
    assert [record.id for record in Store(small).records("quietstar")] == [specs["pretrain"].id]
    (small / "ballast").unlink()
    subprocess.run(["mount", "-o", "remount,size=40m", str(small)], check=True)
    assert retrace(*COMMAND, RETRACE_HOME=str(small)).returncode == 0
    assert {program: numbers(small, spec) for program, spec in specs.items()} == undisturbed

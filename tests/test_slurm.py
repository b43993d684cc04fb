"""Runs through a real Slurm: two nodes on loopback, started and stopped by tests/slurm/*.sh."""

from __future__ import annotations

import errno
import fcntl
import json
import os
import shutil
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import pytest
from conftest import TINY

from retrace.core import squeue
from retrace.core.config import Hardware, read_yaml, validate
from retrace.core.plan import RunSpec, plan
from retrace.core.record import Record
from retrace.core.slurm import Slurm
from retrace.core.store import RunDir, Store

ROOT = Path(__file__).resolve().parents[1]
SCRIPTS = ROOT / "tests" / "slurm"
PATH = f"{os.environ['PATH']}:/usr/sbin:/sbin"
MISSING = [name for name in ("slurmctld", "slurmd", "munged", "sbatch") if not shutil.which(name, path=PATH)]

SMALL = [*TINY, "eval.num_questions=2", "eval.num_windows=2"]
LONG = [*SMALL, "seed=0", "base.optim.steps=600"]
ON_SLURM = "hardware=slurm_test"


@pytest.fixture(scope="session")
def cluster() -> Iterator[Mapping[str, str]]:
    """The environment in which Slurm's commands find the cluster; its partition `high` preempts `low`."""
    if MISSING:
        pytest.skip(f"no {', '.join(MISSING)} here: apt-get install slurm-wlm munge")
    state = Path(tempfile.mkdtemp(prefix="slurm", dir="/tmp"))  # short: it holds sockets
    environment = {**os.environ, "PATH": PATH, "SLURM_CONF": str(state / "slurm.conf")}
    up = subprocess.run([SCRIPTS / "up.sh", state], capture_output=True, text=True)
    try:
        assert up.returncode == 0, up.stderr
        yield environment
    finally:
        subprocess.run([SCRIPTS / "down.sh", state], capture_output=True)
        shutil.rmtree(state, ignore_errors=True)


@dataclass
class Desk:
    """A clean git checkout of this repository, a home, and a login node's shell."""

    checkout: Path
    home: Path
    environment: Mapping[str, str]

    def shell(self, *command: str | Path, ok: bool = True) -> subprocess.CompletedProcess[str]:
        done = subprocess.run(
            command, cwd=self.checkout, env=self.environment, capture_output=True, text=True, timeout=300
        )
        assert not ok or done.returncode == 0, done.stdout + done.stderr
        return done

    def retrace(self, *words: str, ok: bool = True) -> subprocess.CompletedProcess[str]:
        return self.shell(sys.executable, "-m", "retrace.cli", *words, ok=ok)

    def running(self) -> list[str]:
        return self.shell("squeue", "-h", "-r", "-t", "R", "-o", "%i").stdout.split()

    def queued(self) -> list[str]:
        return self.shell("squeue", "-h", "-r", "-o", "%i").stdout.split()

    def job(self, run: RunDir) -> str:
        return str(json.loads((run.path / "slurm.json").read_text())[-1]["job"])

    def field(self, job: str, name: str) -> str:
        shown = self.shell("scontrol", "-o", "show", "job", job).stdout.split()
        return next(word.partition("=")[2] for word in shown if word.startswith(f"{name}="))

    def records(self) -> dict[str, Record]:
        return {record.id: record for record in Store(self.home).records("quietstar")}


@pytest.fixture
def desk(tmp_path: Path, cluster: Mapping[str, str]) -> Iterator[Desk]:
    checkout, home = tmp_path / "checkout", tmp_path / "home"
    for folder in ("src/retrace", "configs"):
        shutil.copytree(ROOT / folder, checkout / folder, ignore=shutil.ignore_patterns("__pycache__"))
    example = (checkout / "configs/hardware/slurm_1gpu.yaml").read_text()
    for old, new in (
        ("name: slurm_1gpu", "name: slurm_test"),
        ("device: cuda", "device: cpu"),
        ("threads: 8", "threads: 1"),
        ("memory_gb: 64", "memory_gb: null"),
    ):
        assert old in example
        example = example.replace(old, new)
    (checkout / "configs/hardware/slurm_test.yaml").write_text(example)
    environment = {**cluster, "PYTHONPATH": str(checkout / "src"), "RETRACE_HOME": str(home)}
    environment.pop("RETRACE_CONFIGS", None)
    made = Desk(checkout, home, environment)
    git = "git", "-c", "user.name=test", "-c", "user.email=test@example.org"
    made.shell("git", "init", "-q")
    made.shell("git", "add", ".")
    made.shell(*git, "commit", "-q", "-m", "as it is")
    yield made
    made.shell("scancel", "--user", str(os.getuid()))
    until(lambda: not made.queued())


def until(condition: Callable[[], object], *, seconds: float = 400, every: float = 0.2) -> None:
    """Wait for something that must happen."""
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "it did not happen"
        time.sleep(every)


def numbers(records: Mapping[str, Record]) -> dict[str, object]:
    """All of the records that must not depend on where and when: what is not a time."""
    return {
        run_id: (r.status, r.metrics, {key: curve for key, curve in r.series.items() if not key.startswith("speed/")})
        for run_id, r in records.items()
    }


def pretraining(overrides: list[str]) -> RunSpec:
    return next(spec for spec in plan(["quietstar/main"], overrides) if spec.program == "pretrain")


def test_a_sweep_ends_with_the_local_records_whatever_is_edited_after_submission(desk: Desk, tmp_path: Path) -> None:
    sweep = ["run", "quietstar/main", *SMALL, "seed=0,1"]
    here = Desk(desk.checkout, tmp_path / "here", {**desk.environment, "RETRACE_HOME": str(tmp_path / "here")})
    here.retrace(*sweep, "hardware=cpu")
    cluster = [*sweep, ON_SLURM, "hardware.slurm.runs_per_job=2", "hardware.slurm.extra=[--hold]"]
    assert "6 in the queue as 3 jobs" in desk.retrace(*cluster).stdout
    assert "6 in the queue as 3 jobs" in desk.retrace(*cluster).stdout  # what is queued is not submitted again
    jobs = desk.queued()
    assert len(jobs) == 3
    assert desk.retrace("status").stdout.count(" pending (JobHeldUser)") == 6
    for source in (desk.checkout / "src").rglob("*.py"):
        source.write_text("raise RuntimeError('edited')")
    for config in (desk.checkout / "configs").rglob("*.yaml"):
        config.write_text("edited: true")
    desk.shell("scontrol", "release", ",".join(jobs))
    until(lambda: not desk.queued(), seconds=240, every=0.5)
    assert numbers(desk.records()) == numbers(here.records())
    assert len(desk.records()) == 6
    for record in desk.records().values():
        assert record.provenance["git"] == desk.shell("git", "rev-parse", "HEAD").stdout.strip()
        assert record.provenance["dirty"] is False
        assert "diff" not in record.provenance
    desk.shell("git", "checkout", "-q", ".")
    assert "6 finished before, 0 in the queue" in desk.retrace(*cluster).stdout
    assert not desk.queued()


def test_uncommitted_code_is_refused_or_its_diff_recorded(desk: Desk) -> None:
    (desk.checkout / "src/retrace/new_module.py").write_text("IDEA = 1\n")
    command = ["run", "quietstar/main", *SMALL, "seed=0", ON_SLURM]
    refused = desk.retrace(*command, ok=False)
    assert refused.returncode == 2
    assert "src/retrace/new_module.py differs from the last commit: commit, or submit with" in refused.stderr
    assert not desk.queued()
    assert desk.shell("git", "status", "--porcelain").stdout == "?? src/retrace/new_module.py\n"  # staged nothing
    desk.retrace(*command, "--allow-dirty")
    until(desk.records)
    record = desk.records()[pretraining([*SMALL, "seed=0"]).id]
    assert record.provenance["dirty"] is True
    assert "+++ b/src/retrace/new_module.py" in record.provenance["diff"]
    assert "+IDEA = 1" in record.provenance["diff"]


@pytest.mark.slow
def test_no_more_jobs_than_allowed_run_at_once_and_cancel_takes_them_out(desk: Desk) -> None:
    sweep = ["quietstar/main", *SMALL, "seed=0,1,2", ON_SLURM]
    desk.retrace("run", *sweep, "hardware.slurm.array_parallelism=1")
    specs = [spec for spec in plan(["quietstar/main"], [*SMALL, "seed=0,1,2"]) if spec.program == "pretrain"]
    runs = [Store(desk.home).run(spec.id) for spec in specs]
    seen: list[list[str]] = []
    while len({job for jobs in seen for job in jobs}) < 2:  # there are four CPUs, and a run takes one
        seen.append(desk.running())
        time.sleep(0.3)
    assert {len(jobs) for jobs in seen} <= {0, 1}
    desk.retrace("run", *sweep, "thoughts.num_sampled=2")  # other arms over the same bases, which are queued already
    arm = next(
        s for s in plan(["quietstar/main"], [*SMALL, "seed=2", "thoughts.num_sampled=2"]) if s.program == "train"
    )
    waits = desk.field(desk.job(Store(desk.home).run(arm.id)), "Dependency")
    assert f"afterany:{desk.job(runs[2])}(" in waits
    desk.retrace("cancel", *sweep, "thoughts.num_sampled=2")
    shown = desk.retrace("cancel", *sweep).stdout
    assert "9 runs: " in shown
    assert shown.count(" cancelled, it was ") >= 6
    until(lambda: not desk.queued())
    assert "has no job in the queue" in desk.retrace("cancel", specs[2].id).stdout or runs[2].state().finished


def test_what_builds_on_a_run_without_result_says_so_and_ends(desk: Desk) -> None:
    sweep = ["quietstar/main", *SMALL, "seed=0", ON_SLURM]
    specs = {spec.program: spec for spec in plan(["quietstar/main"], [*SMALL, "seed=0"])}
    desk.retrace("run", *sweep)
    assert "cancelled, it was" in desk.retrace("cancel", specs["pretrain"].id).stdout
    until(lambda: not desk.queued())
    shown = desk.retrace("status", "quietstar/main", *SMALL, "seed=0", "--watch").stdout
    assert "3 runs: 3 PLANNED" in shown
    assert shown.count("has ended without a result") == 3
    run = Store(desk.home).run(specs["evaluate"].id)
    said = (desk.home / "runs/.slurm" / f"{desk.job(run)}_0_log.out").read_text()
    assert "it builds on quietstar-" in said
    assert "which is PLANNED and has no result" in said
    assert "3 in the queue" in desk.retrace("run", *sweep).stdout


def test_what_slurm_refuses_is_one_sentence_and_exit_code_2(desk: Desk) -> None:
    for override, words in (
        ("hardware.slurm.partition=nowhere", "sbatch refused the jobs of hardware=slurm_test"),
        ("hardware.slurm.minutes=1", "signal_seconds=120 with minutes=1: the signal would come before the job"),
        ("hardware.slurm.nodes=2", "processes=1 with slurm.nodes=2: expected a multiple"),
        ("hardware.slurm.extra=[exclusive]", "expected an option of sbatch in full, such as --constraint=h100"),
        ("hardware.slurm.runs_per_jb=2", "did you mean 'hardware.slurm.runs_per_job'"),
    ):
        done = desk.retrace("run", "quietstar/main", *SMALL, "seed=0", ON_SLURM, override, ok=False)
        assert done.returncode == 2
        assert words in done.stderr.replace("\n", " ")
        assert "Traceback" not in done.stderr
    assert not desk.queued()


def alone(desk: Desk, home: Path, overrides: list[str]) -> dict[str, Record]:
    """What the pretraining ends with as one process that nothing happens to."""
    spec = pretraining(overrides)
    run = Store(home).run(spec.id)
    run.freeze(spec, command="test")
    environment = {**desk.environment, "RETRACE_HOME": str(home)}
    subprocess.run([sys.executable, "-m", "retrace.worker", str(run.path)], env=environment, check=True)
    return {spec.id: Store(home).records("quietstar")[0]}


def submit(desk: Desk, overrides: list[str], *placement: str) -> tuple[RunDir, str]:
    """The pretraining, as soon as it has made some steps, and its job."""
    desk.retrace("run", "quietstar/main", *overrides, ON_SLURM, *placement)
    run = Store(desk.home).run(pretraining(overrides).id)
    until(lambda: run.state().step >= 5)
    return run, desk.job(run)


def saved(run: RunDir) -> bool:
    return any((run.path / "checkpoints").glob("step_*"))


def go_on(desk: Desk, run: RunDir, job: str) -> dict[str, Record]:
    """See that the job is requeued, let it start at once, which Slurm does after two minutes, and wait for the end."""
    until(lambda: desk.field(job, "JobState") == "PENDING", seconds=90)
    assert desk.field(job, "Restarts") == "1"
    assert saved(run)
    assert not run.state().finished
    assert f"job {job} requeued (" in desk.retrace("status").stdout

    def ended() -> bool:  # it may come to its time limit again
        if desk.field(job, "JobState") == "PENDING":
            desk.shell("scontrol", "update", f"jobid={job}", "StartTime=now", ok=False)
        return run.state().finished

    until(ended, seconds=240, every=1.0)
    return {run.id: desk.records()[run.id]}


@pytest.mark.slow
@pytest.mark.parametrize("processes", [1, 2], ids=["one_task", "two_tasks"])
def test_a_preempted_run_saves_requeues_and_ends_as_an_undisturbed_one(
    processes: int, desk: Desk, tmp_path: Path
) -> None:
    overrides = LONG if processes == 1 else [*LONG, "base.optim.micro_batch_size=4"]
    run, job = submit(desk, overrides, f"hardware.processes={processes}")
    assert f"job {job} running on " in desk.retrace("status").stdout
    desk.shell("sbatch", "--partition=high", "--nodes=2", "--ntasks-per-node=2", "--output=/dev/null", "--wrap=sleep 1")
    (ended,), (other,) = go_on(desk, run, job).values(), alone(desk, tmp_path / "alone", overrides).values()
    if processes == 1:
        assert numbers({run.id: ended}) == numbers({run.id: other})
    assert ended.metrics == pytest.approx(other.metrics, rel=1e-3)


@pytest.fixture
def sigterm_only(cluster: Mapping[str, str]) -> Iterator[None]:
    """Slurm's default: a preemption sends SIGTERM to the tasks and what they started, and no user signal."""
    file = Path(cluster["SLURM_CONF"])
    before = file.read_text()
    setting = "SlurmctldParameters=preempt_send_user_signal\n"
    assert setting in before
    for content in (before.replace(setting, ""), before):
        file.write_text(content)
        subprocess.run(["scontrol", "reconfigure"], env=cluster, check=True)
        if content != before:
            yield


@pytest.mark.slow
@pytest.mark.usefixtures("sigterm_only")
@pytest.mark.parametrize("partition", ["low", "cancelled"])
def test_a_preemption_by_sigterm_with_a_grace_time_requeues_the_job_and_what_builds_on_it_waits(
    partition: str, desk: Desk, tmp_path: Path
) -> None:
    run, job = submit(desk, LONG, f"hardware.slurm.partition={partition}")
    desk.shell("sbatch", "--partition=high", "--nodes=2", "--ntasks-per-node=2", "--output=/dev/null", "--wrap=sleep 1")
    assert numbers(go_on(desk, run, job)) == numbers(alone(desk, tmp_path / "alone", LONG))
    until(lambda: not desk.queued())
    assert {record.program: record.status for record in desk.records().values()} == dict.fromkeys(
        ("pretrain", "train", "evaluate"), "DONE"
    )


def test_a_preempted_job_is_not_in_the_queue_any_more(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Slurm shows it for minutes; a run whose job was cancelled by a preemption is submitted again."""
    commands(tmp_path, monkeypatch, ("retrace-a", "7_0", "PREEMPTED"), ("retrace-a", "7_1", "RUNNING"))
    assert list(squeue.queue() or ()) == ["7_1"]


def commands(folder: Path, monkeypatch: pytest.MonkeyPatch, *jobs: tuple[str, str, str]) -> Path:
    """Put in the way a squeue that shows these jobs (name, id, state) and a scancel; where that writes its ids."""
    lines = "".join(f"{name:<20}{job:<40}{state:<20}{'0':<8}{'n1':<60}{'None':<60}\n" for name, job, state in jobs)
    cancelled = folder / "cancelled"
    for name, script in (("squeue", f"cat <<'END'\n{lines}END\n"), ("scancel", f'echo "$@" >> {cancelled}\n')):
        (folder / name).write_text(f"#!/bin/sh\n{script}")
        (folder / name).chmod(0o700)
    monkeypatch.setenv("PATH", f"{folder}:{os.environ['PATH']}")
    return cancelled


def note(run: RunDir, *, job: str, name: str) -> None:
    squeue.note(run, job=job, name=name, logs=run.path.parent / ".slurm", snapshot=run.path)


def test_any_noted_job_that_is_in_the_queue_counts_and_cancel_takes_all_of_them(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shown = (("retrace-a", "7", "RUNNING"), ("retrace-b", "8", "PENDING"), ("sleep", "9", "RUNNING"))
    cancelled = commands(tmp_path, monkeypatch, *shown)
    store = Store(tmp_path)
    run = store.run("quietstar-pretrain-1")
    for job, name in (("7", "retrace-a"), ("8", "retrace-b"), ("6", "retrace-c")):  # the last one has ended
        note(run, job=job, name=name)
    jobs = squeue.queue()
    assert jobs is not None
    assert list(jobs) == ["7", "8"]  # and not a job of the user's own
    assert squeue.queued(run, jobs) == jobs["8"]
    assert squeue.where(run, jobs) == "job 8 pending"
    assert squeue.cancel([run], store=store) == {
        run.id: "job 8 cancelled, it was pending; job 7 cancelled, it was running"
    }
    assert cancelled.read_text().split() == ["8", "7"]


def test_a_job_of_another_cluster_with_the_same_id_is_not_taken_for_the_noted_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    cancelled = commands(tmp_path, monkeypatch, ("retrace-here", "7", "RUNNING"))
    store = Store(tmp_path)
    there, nameless = store.run("quietstar-pretrain-1"), store.run("quietstar-pretrain-2")
    note(there, job="7", name="retrace-there")
    nameless.path.mkdir()
    entry = {"job": "7", "logs": str(tmp_path), "snapshot": str(tmp_path)}
    (nameless.path / "slurm.json").write_text(json.dumps([entry]))
    jobs = squeue.queue() or {}
    for run in (there, nameless):
        assert squeue.queued(run, jobs) is None
        assert squeue.where(run, jobs).startswith("job 7 has ended without a result")
    assert squeue.cancel([there, nameless], store=store) == dict.fromkeys(
        (there.id, nameless.id), "has no job in the queue"
    )
    assert not cancelled.exists()


def test_cancel_names_the_unfinished_runs_that_nobody_asked_to_cancel_and_that_shared_the_job(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    cancelled = commands(tmp_path, monkeypatch, ("retrace-a", "11", "PENDING"))
    store = Store(tmp_path)
    runs = [store.run(f"quietstar-pretrain-{i}") for i in range(6)]
    for run in runs:
        note(run, job="11", name="retrace-a")
    runs[5].finish("DONE")
    told = "job 11 cancelled, it was pending"
    four = "; it also held 4 other runs: " + ", ".join(run.id for run in runs[1:4]) + ", ..."
    assert squeue.cancel(runs[:1], store=store) == {runs[0].id: told + four}
    three = f"; it also held 1 other run: {runs[4].id}"
    assert squeue.cancel(runs[:4], store=store) == {run.id: told + three for run in runs[:4]}
    assert squeue.cancel(runs[:5], store=store) == {run.id: told for run in runs[:5]}
    assert cancelled.read_text().split() == ["11"] * 3


def test_a_percent_sign_in_the_home_is_refused_before_anything_is_written(tmp_path: Path) -> None:
    home = tmp_path / "100%"
    with pytest.raises(ValueError, match="RETRACE_HOME=.*/100%: .* expected a path without one: set RETRACE_HOME"):
        Slurm(Store(home), command="test").run(plan(["quietstar/main"], [*SMALL, "seed=0", "hardware=slurm_1gpu"]))
    assert not home.exists()


def test_a_disk_without_locks_does_without(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def no_locks(*_: object) -> None:
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(fcntl, "flock", no_locks)
    commands(tmp_path, monkeypatch)
    assert Slurm(Store(tmp_path), command="test").run([]).queued == {}


def test_two_launchers_at_once_submit_each_run_once(desk: Desk) -> None:
    command = [sys.executable, "-m", "retrace.cli", "run", "quietstar/main", *SMALL, "seed=0", ON_SLURM]
    command += ["hardware.slurm.extra=[--hold]"]
    launchers = [
        subprocess.Popen(command, cwd=desk.checkout, env=desk.environment, text=True, stdout=subprocess.PIPE)
        for _ in range(2)
    ]
    for launcher in launchers:
        assert "3 in the queue as 3 jobs" in launcher.communicate(timeout=120)[0]
    assert len(desk.queued()) == 3
    noted = [json.loads(path.read_text()) for path in (desk.home / "runs").glob("*/slurm.json")]
    assert [len(jobs) for jobs in noted] == [1, 1, 1]


def test_a_run_that_somebody_carries_out_here_is_left_alone_with_what_builds_on_it(desk: Desk) -> None:
    spec = pretraining([*SMALL, "seed=0"])
    run = Store(desk.home).run(spec.id)
    run.freeze(spec, command="here")
    before = (run.path / "config.json").read_bytes()
    sweep = ["run", "quietstar/main", *SMALL, "seed=0,1", ON_SLURM, "hardware.slurm.extra=[--hold]"]
    with run.lease():
        done = desk.retrace(*sweep, ok=False)
    assert done.returncode == 1
    assert "6 runs: 0 finished before, 3 in the queue as 3 jobs" in done.stdout
    assert f"{run.id}: is running on {socket.gethostname()}:{os.getpid()} already" in done.stdout
    assert f": builds on {run.id}, which is not in the queue" in done.stdout
    assert (run.path / "config.json").read_bytes() == before
    assert len(desk.queued()) == 3
    assert "6 in the queue" in desk.retrace(*sweep).stdout


@pytest.mark.slow
def test_a_run_at_its_time_limit_saves_requeues_and_ends_as_an_undisturbed_one(desk: Desk, tmp_path: Path) -> None:
    (short,) = alone(desk, tmp_path / "short", [*LONG, "base.optim.steps=200"]).values()
    assert short.cost.seconds is not None
    longer = [*LONG, f"base.optim.steps={round(200 * 55 / short.cost.seconds)}"]
    # Slurm looks at limits every 30 s and signals when it might be too late the next time: here after 25 s to 55 s
    run, job = submit(desk, longer, "hardware.slurm.minutes=1", "hardware.slurm.signal_seconds=5")
    assert numbers(go_on(desk, run, job)) == numbers(alone(desk, tmp_path / "alone", longer))


@pytest.mark.slow
def test_a_job_that_dies_without_a_signal_is_taken_over_by_the_next_run(desk: Desk, tmp_path: Path) -> None:
    run, job = submit(desk, LONG, "hardware.checkpoint_seconds=0.2")
    until(lambda: saved(run))
    desk.shell("scancel", "--full", "--signal=KILL", job)
    until(lambda: job not in desk.queued())
    assert not run.state().finished
    shown = desk.retrace("run", "quietstar/main", *LONG, ON_SLURM).stdout
    assert "in the queue" in shown
    assert desk.job(run) != job
    until(lambda: run.state().finished)
    assert numbers({run.id: desk.records()[run.id]}) == numbers(alone(desk, tmp_path / "alone", LONG))


@pytest.mark.slow
@pytest.mark.parametrize("nodes", [1, 2], ids=["one_node", "two_nodes"])
def test_two_tasks_a_run_give_the_losses_of_one_process(nodes: int, desk: Desk, tmp_path: Path) -> None:
    small = [*SMALL, "seed=0", "base.optim.micro_batch_size=2"]
    desk.retrace("run", "quietstar/main", *small, ON_SLURM, "hardware.processes=2", f"hardware.slurm.nodes={nodes}")
    until(desk.records)
    assert desk.field(desk.job(Store(desk.home).run(pretraining(small).id)), "NumNodes") == str(nodes)
    two = desk.records()[pretraining(small).id]  # what builds on it may be there as well
    (one,) = alone(desk, tmp_path / "alone", small).values()
    assert two.provenance["hardware"].startswith("2 x ")
    assert two.metrics == pytest.approx(one.metrics, rel=1e-4, abs=1e-6)


def test_the_documented_examples_ask_for_a_gpu_a_process() -> None:
    gpus = {}
    for path in (ROOT / "configs/hardware").glob("slurm_*.yaml"):
        hardware = validate(Hardware, read_yaml(path), source=path.name)
        assert hardware.name == path.stem
        assert hardware.slurm is not None
        gpus[path.stem] = hardware.slurm.nodes, hardware.processes // hardware.slurm.nodes
    assert gpus == {"slurm_1gpu": (1, 1), "slurm_8gpu": (1, 8), "slurm_2x8gpu": (2, 8)}

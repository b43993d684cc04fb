"""A long sweep, for real: 504 runs on two warm workers, watched from outside while it runs."""

from __future__ import annotations

import json
import os
import statistics
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path

import psutil
import pytest

SEEDS = 56  # of nine runs each: six that measure, and a chain of pre-training, training and evaluation
PROGRAMS = ("measure", "pretrain", "train", "evaluate")
MIB = 2**20
MOST_GROWN = {  # from the middle to the last third of a program's runs
    "launcher fds": 0,
    "launcher MiB": 5,
    "worker fds": 0,
    "worker threads": 0,
    "worker MiB": 20,  # the least leak that is seen: 0.4 MiB a run where a program has 56, 0.1 where it has 336
}


def look(launcher: psutil.Process) -> dict[str, float]:
    """What the sweep holds at this moment; a process that ends meanwhile is left out."""
    workers = launcher.children(recursive=True)
    found: dict[str, float] = {"processes": len(workers), "launcher fds": launcher.num_fds()}
    found["launcher MiB"] = launcher.memory_info().rss / MIB
    found["worker fds"] = max((worker.num_fds() for worker in workers), default=0)
    found["worker MiB"] = max((worker.memory_info().rss for worker in workers), default=0) / MIB
    found["worker threads"] = max((worker.num_threads() for worker in workers), default=0)
    return found


@pytest.mark.slow
def test_five_hundred_runs_leak_no_memory_processes_or_file_handles(home: Path) -> None:
    words = ["run", "deepscalelm/rank_collapse", "quietstar/main", "scale=smoke", "tracking.wandb=off"]
    command = [sys.executable, "-m", "retrace.cli", *words, f"seed=range({SEEDS})", "hardware.parallel_runs=2"]
    with open(home.parent / "out.txt", "w") as out:
        sweep = subprocess.Popen(command, env={**os.environ, "RETRACE_HOME": str(home)}, stdout=out, stderr=out)
    seen: list[dict[str, float]] = []
    workers: set[psutil.Process] = set()
    try:
        launcher = psutil.Process(sweep.pid)
        while sweep.poll() is None:
            try:
                workers |= set(launcher.children(recursive=True))
                programs = Counter(path.name.split("-")[1] for path in home.glob("results/*/records/*.json"))
                seen.append(look(launcher) | {name: programs[name] for name in PROGRAMS})
            except psutil.NoSuchProcess:
                pass  # one of them has just ended; look again
            time.sleep(1)
    finally:
        sweep.kill()
    told = Path(out.name).read_text()
    assert sweep.returncode == 0, told[-3000:]
    assert f"{9 * SEEDS} of {9 * SEEDS} runs finished" in told
    records = [json.loads(path.read_text()) for path in home.glob("results/*/records/*.json")]
    assert len(records) == len({record["id"] for record in records}) == 9 * SEEDS

    assert max(look["processes"] for look in seen) <= 4, seen  # two workers, and now and then a git or nvidia-smi
    for program, runs in Counter(record["program"] for record in records).items():
        during = [look for look in seen if 0 < look[program] < runs]  # programs come one after another, and differ
        third = len(during) // 3
        assert third > 3, (program, len(during))
        middle, end = (
            {name: statistics.median(look[name] for look in part) for name in during[0]}
            for part in (during[third : 2 * third], during[2 * third :])
        )
        for name, most in MOST_GROWN.items():
            assert end[name] - middle[name] <= most, (program, name, middle, end)
        print(json.dumps({"program": program, "looks": len(during), "middle": middle, "end": end}))
    assert not [worker for worker in workers if worker.is_running()]
    assert not list(home.glob("runs/*/.*.tmp")) + list(home.glob("runs/*/lease.json"))

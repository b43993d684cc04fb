"""A run of several processes gives the numbers of one: real Accelerate processes over gloo on the CPU."""

from __future__ import annotations

from pathlib import Path

import pytest
from conftest import TINY, Run

from retrace.core.store import Store

SMALL = [*TINY, "seed=0", "base.optim.micro_batch_size=4", "train.optim.micro_batch_size=2", "eval.num_questions=2"]


def test_two_processes_give_the_losses_of_one(home: Path, retrace: Run, tmp_path: Path) -> None:
    found = []
    for processes, place in ((1, home), (2, tmp_path / "two")):
        done = retrace("run", "quietstar/main", *SMALL, f"hardware.processes={processes}", RETRACE_HOME=str(place))
        assert done.returncode == 0, done.stdout
        found.append({record.id: record for record in Store(place).records("quietstar")})
    one, two = found
    assert one.keys() == two.keys()
    for run_id, record in one.items():
        other = two[run_id]
        assert other.provenance["hardware"].startswith("2 x ")
        assert other.metrics == pytest.approx(record.metrics, rel=1e-4, abs=1e-6)

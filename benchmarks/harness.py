"""What the harness itself costs: planning, a rerun with nothing to do, warm workers, launching, the store.

    python benchmarks/harness.py

Every figure stands beside something measured in the same run: a bare interpreter's start for the commands, a cold
worker for a warm one. What the launcher adds to a run is the slope between a short and a long sweep, less the time that
the records say their runs took.

Commands are timed twice and the second time counts: the first composes the configs and keeps them (core/memo.py).
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from retrace.core.config import HOME
from retrace.core.identity import science
from retrace.core.plan import plan
from retrace.core.record import Record
from retrace.core.store import Store

RESULTS = Path(__file__).parent / "results" / "harness.json"
SMOKE = ["scale=smoke", "seed=0", "tracking.wandb=off"]


def seconds(*command: str, home: str) -> float:
    """Wall time of a command."""
    start = time.monotonic()
    subprocess.run(command, check=True, capture_output=True, env={**os.environ, "RETRACE_HOME": home})
    return time.monotonic() - start


def retrace(*arguments: str, home: str) -> float:
    return seconds(sys.executable, "-m", "retrace.cli", *arguments, home=home)


def launching(num_seeds: int) -> tuple[float, float, int]:
    """(wall time of a sweep, seconds within its runs, number of runs) on one warm worker."""
    with tempfile.TemporaryDirectory() as home:
        words = ["deepscalelm/rank_collapse", "scale=smoke", "tracking.wandb=off", "hardware.parallel_runs=1"]
        wall = retrace("run", *words, f"seed=range({num_seeds})", home=home)
        records = [json.loads(path.read_text()) for path in Path(home).glob("results/*/records/*.json")]
        return wall, sum(record["cost"]["seconds"] for record in records), len(records)


def fill(home: str, num_seeds: int, *, earlier: bool) -> None:
    """Put the runs of every Quiet-STaR ablation into a store, 40 a seed, all finished, with the committed records.

    `earlier`: those of the fourth seed and on are runs of the first three under earlier configs, which no report uses.
    """
    records: dict[tuple[str, str], Record] = {}
    for record in Store(HOME).records("quietstar"):
        for label in record.labels:
            records.setdefault((label.rpartition("/s")[0], record.program), record)
    store = Store(Path(home))
    for spec in plan(["quietstar"], ["scale=laptop", f"seed=range({num_seeds})"]):
        run = store.run(spec.id)
        labels = spec.labels
        if earlier and spec.seed > 2:
            labels = tuple(f"{label.rpartition('/s')[0]}/s{spec.seed % 3}" for label in labels)
        like = records[spec.labels[0].rpartition("/s")[0], spec.program]
        metrics = {name: value * (1 + spec.seed / 1000) for name, value in like.metrics.items()}  # seeds differ
        changes = {"id": spec.id, "labels": labels, "seed": spec.seed, "config": science(spec.config), "pages": ()}
        run.freeze(spec, command="retrace run quietstar")
        store.write_record(like.model_copy(update={**changes, "metrics": metrics, "parents": dict(spec.parents)}))
        run.finish("DONE")


def main() -> None:
    found: dict[str, float] = {}
    (short, inside, few), (long_, within, many) = launching(2), launching(12)
    found["launcher, a run"] = (long_ - short - (within - inside)) / (many - few)
    found["a smoke run of that sweep, in its worker"] = within / many
    for earlier, name in ((True, "4,880 of them of earlier configs"), (False, "all of them on the page")):
        with tempfile.TemporaryDirectory() as home:
            fill(home, 125, earlier=earlier)
            for words in (["status"], ["plan", "quietstar"], ["report", "quietstar"]):
                retrace(*words, home=home)
                found[f"{words[0]}, 5,000 runs in the store, {name}"] = retrace(*words, home=home)
    with tempfile.TemporaryDirectory() as home:
        found["bare interpreter"] = seconds(sys.executable, "-c", "pass", home=home)
        found["plan of every laptop run"] = retrace("plan", "quietstar", "scale=laptop", home=home)
        found["smoke: every ablation and arm, seed 0"] = retrace("run", "quietstar", *SMOKE, home=home)
        found["the same again, nothing left"] = retrace("run", "quietstar", *SMOKE, home=home)
        found["three runs, cold workers"] = retrace("run", "quietstar/main", *SMOKE, "base.seed=1", home=home)
    for name, value in found.items():
        print(f"{value:8.2f} s  {name}")
    RESULTS.write_text(json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    main()

"""What the harness itself costs: planning, a rerun with nothing to do, warm workers, and checkpoints.

    python benchmarks/harness.py

Every figure is a share of, or stands beside, something measured in the same run: a bare interpreter's start for the
commands, a cold worker for a warm one, the training time of a laptop run for its checkpoints.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

RESULTS = Path(__file__).parent / "results" / "harness.json"
SMOKE = ["scale=smoke", "seed=0", "tracking.wandb=off"]


def seconds(*command: str, home: str) -> float:
    """Wall time of a command."""
    start = time.monotonic()
    subprocess.run(command, check=True, capture_output=True, env={**os.environ, "RETRACE_HOME": home})
    return time.monotonic() - start


def retrace(*arguments: str, home: str) -> float:
    return seconds(sys.executable, "-m", "retrace.cli", *arguments, home=home)


def main() -> None:
    found: dict[str, float] = {}
    with tempfile.TemporaryDirectory() as home:
        found["bare interpreter"] = seconds(sys.executable, "-c", "pass", home=home)
        found["plan of every laptop run"] = retrace("plan", "quietstar", "scale=laptop", home=home)
        found["smoke: every ablation and arm, seed 0"] = retrace("run", "quietstar", *SMOKE, home=home)
        found["the same again, nothing left"] = retrace("run", "quietstar", *SMOKE, home=home)
        found["three runs, cold workers"] = retrace("run", "quietstar/main", *SMOKE, "base.seed=1", home=home)
    for every, name in ((1e9, "none"), (20, "every 20 s"), (0, "every step")):
        with tempfile.TemporaryDirectory() as home:
            long = [
                "scale=laptop",
                "tracking.wandb=off",
                "base.optim.steps=400",
                f"hardware.checkpoint_seconds={every}",
            ]
            long += ["train.optim.steps=1", "eval.tasks=[]", "eval.num_windows=1"]
            retrace("run", "quietstar/main", *long, home=home)
            record = next(Path(home).glob("results/*/records/*pretrain*.json"))
            found[f"400 laptop pre-training steps, checkpoints: {name}"] = json.loads(record.read_text())["cost"][
                "seconds"
            ]
    for name, value in found.items():
        print(f"{value:8.2f} s  {name}")
    RESULTS.write_text(json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    main()

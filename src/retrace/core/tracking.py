"""Who hears of a run: metrics.jsonl always, progress always, W&B when there is somebody to show it to.

The JSONL is the truth; W&B is a mirror under the same run id. This is the only file that imports wandb.
"""

from __future__ import annotations

import json
import logging
import netrc
import os
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from retrace.core.config import Tracking
from retrace.core.files import write_atomic
from retrace.core.identity import science
from retrace.core.plan import RunSpec
from retrace.core.store import RunDir

log = logging.getLogger("retrace")
INIT_SECONDS = 20.0  # for W&B to answer
MAX_POINTS = 60  # of a curve in a record; the whole curve stays beside the run


class Tracker:
    """The metrics of one run. Only the main process logs; the others hold a silent one (`main=False`)."""

    def __init__(self, run: RunDir, spec: RunSpec, *, main: bool = True) -> None:
        self.run = run
        self.log_every = spec.tracking.log_every
        self._main = main
        self._path = run.path / "metrics.jsonl"
        self._wandb = _wandb_run(run, spec) if main else None
        self._said = 0.0

    def resume(self, step: int) -> None:
        """Forget lines after `step`: a killed run may have logged past its last checkpoint."""
        if self._main and self._path.exists():
            kept = [line for line in _lines(self._path) if line["step"] <= step]
            write_atomic(self._path, "".join(json.dumps(line) + "\n" for line in kept))

    def log(self, step: int, metrics: Mapping[str, float | None]) -> None:
        """One line of metrics at a step; what is unknown (None) is left out, never written as zero."""
        if not self._main:
            return
        known = {key: value for key, value in metrics.items() if value is not None}
        with open(self._path, "a") as file:
            file.write(json.dumps({"step": step, **known}) + "\n")
        self._mirror(lambda run: run.log({"step": step, **known}))

    def progress(self, step: int, total: int, *, seconds_left: float | None) -> None:
        """Say how far the run is, twice a second at most."""
        now = time.monotonic()
        if self._main and (now - self._said > 0.5 or step == total):
            self._said = now
            self.run.progress(step=step, total=total, seconds_left=seconds_left)

    def series(self) -> dict[str, tuple[tuple[int, float], ...]]:
        """Each logged metric as a curve of at most `MAX_POINTS` points."""
        curves: dict[str, list[tuple[int, float]]] = {}
        for line in _lines(self._path) if self._path.exists() else []:
            step = line.pop("step")
            for key, value in line.items():
                curves.setdefault(key, []).append((step, value))
        return {key: _thin(curve) for key, curve in curves.items()}

    def close(self, *, summary: Mapping[str, float], exit_code: int) -> None:
        """End the W&B run with the final metrics."""
        self._mirror(lambda run: run.summary.update(dict(summary)))
        self._mirror(lambda run: run.finish(exit_code=exit_code))

    def _mirror(self, act: Callable[[Any], Any]) -> None:
        """Tell W&B; should it fail, say so once and go on without it, since the run is worth more than its mirror."""
        if self._wandb is None:
            return
        try:
            act(self._wandb)
        except Exception as error:  # its classes are many, not all public, and none of them is worth the run
            log.warning("W&B failed (%s); metrics.jsonl goes on alone", error)
            self._wandb = None


def _lines(path: Path) -> list[dict[str, Any]]:
    """The whole lines of a JSONL file; a torn last line, from a kill in the middle of a write, is left out.

    Raises ValueError for another one that is broken: steps would be missing in the record.
    """
    found = []
    for number, line in enumerate(path.read_text(errors="replace").split("\n")[:-1], start=1):
        try:
            found.append(json.loads(line))
        except ValueError:
            raise ValueError(
                f"{path}: line {number} is damaged; delete it and checkpoints/ beside it, and the run begins anew"
            ) from None
    return found


def _thin(curve: list[tuple[int, float]]) -> tuple[tuple[int, float], ...]:
    """Every k-th point and the last."""
    stride = -(-len(curve) // MAX_POINTS)
    thinned = curve[::stride]
    return tuple(thinned if thinned[-1] == curve[-1] else [*thinned[: MAX_POINTS - 1], curve[-1]])


def wandb_mode(tracking: Tracking) -> str:
    """'online', 'offline' or 'off'; auto is online with an API key and offline without, or what WANDB_MODE says."""
    if tracking.wandb != "auto":
        return tracking.wandb
    asked = os.environ.get("WANDB_MODE")  # a user's, or ours after a failure
    if asked:
        return {"disabled": "off"}.get(asked, asked)
    return "online" if os.environ.get("WANDB_API_KEY") or _netrc_has_key() else "offline"


def _netrc_has_key() -> bool:
    try:
        return netrc.netrc().authenticators("api.wandb.ai") is not None
    except (OSError, netrc.NetrcParseError):
        return False


def _wandb_run(run: RunDir, spec: RunSpec) -> Any | None:
    """The W&B run of this run id, grouped by the ablation that asked for it first; None when W&B is off."""
    mode = wandb_mode(spec.tracking)
    if mode == "off":
        return None
    import wandb

    ablation, _, arm = spec.labels[0].partition("/") if spec.labels else ("", "", spec.id)
    os.environ.setdefault("WANDB_SILENT", "true")
    settings = wandb.Settings(
        # A killed process would otherwise lose up to 15 s of an offline run, its config included.
        x_transaction_log_flush_interval=0.5,
        console="off",
        init_timeout=INIT_SECONDS,
        silent=True,
        x_disable_stats=True,
    )
    arguments: dict[str, Any] = {
        "id": spec.id,
        "name": f"{ablation}/{arm} {spec.program}",
        "group": f"{spec.paper}/{ablation}",
        "job_type": spec.program,
        "tags": [f"scale:{spec.scale}", f"seed:{spec.seed}", *sorted({label.split("/")[0] for label in spec.labels})],
        "project": spec.tracking.project,
        "entity": spec.tracking.entity,
        "config": {**science(spec.config), "scale": spec.scale, "seed": spec.seed, "labels": list(spec.labels)},
        "dir": str(run.path),
        "resume": "allow",
        "settings": settings,
    }
    try:
        handle = wandb.init(mode="online" if mode == "online" else "offline", **arguments)
    except Exception as error:  # see Tracker._mirror
        log.warning("W&B failed (%s); this process goes on offline, send its runs later with `wandb sync`", error)
        if mode != "online":
            return None
        wandb.teardown()  # else the service holds the run's id for the online attempt
        os.environ["WANDB_MODE"] = "offline"  # the next runs of this process shall not wait again
        handle = wandb.init(mode="offline", **arguments)
    handle.define_metric("step", hidden=True)
    handle.define_metric("*", step_metric="step")
    return handle

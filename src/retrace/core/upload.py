"""W&B's server, for `retrace publish`: what it has, the upload of what it lacks, the workspace and the report.

A run there is told apart by the digest in its summary, which is the last thing that a run is given: one that was
uploaded in part has none, and is uploaded again under its id.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from retrace.core.boards import Board
from retrace.core.safety import redact

DIGEST = "retrace/digest"
SECONDS = 20  # for an answer
AT_ONCE = 4  # uploads side by side


class Server:
    """A project on W&B's server, as the key's user; OSError where W&B can't be used, ValueError for its entity."""

    def __init__(self, *, project: str, entity: str | None) -> None:
        os.environ.setdefault("WANDB_SILENT", "true")  # read when wandb is imported
        import wandb

        with _one_sentence():
            self._api = wandb.Api(timeout=SECONDS)
            viewer = self._api.viewer
            mine = list(dict.fromkeys(filter(None, [viewer.entity, viewer.username, *viewer.teams])))
        if entity is not None and entity not in mine:
            raise ValueError(f"--entity {entity}: the key's user is not in it; it may write to: {', '.join(mine)}")
        self.entity: str = entity or viewer.entity
        self._path = f"{self.entity}/{project}"
        self._project = project

    def digests(self, paper: str) -> dict[str, str]:
        """What the runs of a paper there were rebuilt from, by id; empty where there is no such project."""
        self._api.flush()  # it would answer a second question from memory
        with _one_sentence():
            try:
                filters = {"config.paper.value": paper}
                found = self._api.runs(self._path, filters=filters, per_page=500, lazy=False)
                return {run.id: run.summary_metrics.get(DIGEST, "") for run in found}
            except ValueError as error:
                if "Could not find project" in str(error):
                    return {}
                raise

    def upload(self, runs: Mapping[str, tuple[str, Path]], *, paper: str) -> int:
        """Upload those of (digest, folder) by id that are not there; how many. Raises OSError where one fails."""
        there = self.digests(paper)
        lacking = {run_id: run for run_id, run in runs.items() if there.get(run_id) != run[0]}
        if not lacking:
            return 0
        command = [sys.executable, "-m", "wandb", "sync", "--yes", "--include-synced", "-n", str(AT_ONCE)]
        command += ["-e", self.entity, "-p", self._project, *(str(folder) for _, folder in lacking.values())]
        done = subprocess.run(command, capture_output=True, text=True)
        there = self.digests(paper)
        missing = [run_id for run_id, (digest, _) in lacking.items() if there.get(run_id) != digest]
        if missing:
            lines = redact(done.stderr + done.stdout).splitlines()
            said = [line for line in lines if missing[0] in line or "rror" in line][-1:]
            raise OSError(
                f"{len(missing)} of {len(lacking)} runs did not arrive at W&B, {missing[0]} the first "
                f"({' '.join(said) or 'no word from wandb sync'}); the same command uploads the rest"
            )
        return len(lacking)

    def save(self, board: Board) -> dict[str, str]:
        """Write the workspace and the report, over those of an earlier call; their addresses."""
        from wandb_workspaces.workspaces import Workspace

        name = hashlib.sha256(board.workspace.name.encode()).hexdigest()[:11]
        board.workspace._internal_name = f"nw-{name}-v"
        with _one_sentence():
            with contextlib.suppress(ValueError):  # there is none yet
                board.workspace._internal_id = Workspace.from_url(board.workspace.url)._internal_id
            board.workspace.save()
            reports = self._api.reports(self._path)
            board.report.id = next((found.id for found in reports if found.display_name == board.report.title), "")
            board.report.save()
            return {"workspace": board.workspace.url, "report": board.report.url}


@contextlib.contextmanager
def _one_sentence() -> Any:
    """Whatever W&B raises as an OSError of one sentence: of requests, of GraphQL, its own, of a service process."""
    try:
        yield
    except Exception as error:
        said = redact(str(error) or type(error).__name__).strip().splitlines()[0].rstrip(".;")
        raise OSError(
            f"W&B can't be used: {said}; check WANDB_API_KEY and the network: the offline files are complete, and the "
            "same command goes on from here"
        ) from error

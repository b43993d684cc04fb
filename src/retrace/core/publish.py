"""`retrace publish`: runs rebuilt in W&B from records and metrics.jsonl, and a workspace and a report of each paper.

A run is rebuilt from its record, with every line of its metrics.jsonl where that is here and else with the thinned
curves of the record; so runs of another machine need their records only. First everything is built on this machine:
RETRACE_HOME/wandb/offline-run-<id>, one folder a run, marked by a file `digest` once it is whole; one that is marked
with what the run is now is left alone. Then, with a key, what W&B lacks is uploaded (core/upload.py).
"""

from __future__ import annotations

import difflib
import hashlib
import json
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import track

from retrace.core import boards
from retrace.core.compose import compose
from retrace.core.config import Tracking, validate
from retrace.core.files import write_atomic
from retrace.core.lookup import names
from retrace.core.mirrors import Card, flush_offline, write_offline
from retrace.core.paper import load_paper
from retrace.core.record import Label, Record
from retrace.core.results import PaperResults, load_results
from retrace.core.safety import refuse_secrets
from retrace.core.store import RunDir, Store
from retrace.core.tracking import read_lines, wandb_mode
from retrace.core.units import say
from retrace.core.upload import DIGEST, Server

FORM = 1  # of what is published; another number publishes every run again
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.-]{0,127}")
_ORIGIN = ("git", "dirty", "command", "hardware", "hardware_config", "platform", "python", "packages", "finished")


@dataclass(frozen=True)
class Rebuilt:
    """A run as W&B gets it. `rows`: lines of metrics with their "step"; `whole`: all that were logged."""

    card: Card
    rows: tuple[Mapping[str, Any], ...]
    results: Mapping[str, Any]
    whole: bool = False

    @cached_property
    def digest(self) -> str:
        content = [FORM, self.card.name, self.card.group, self.card.tags, self.card.config, self.rows, self.results]
        return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()[:32]

    @property
    def summary(self) -> dict[str, Any]:
        """The final metrics, and the digest."""
        return {**self.results, DIGEST: self.digest}


def rebuild(record: Record, run: RunDir) -> Rebuilt:
    """A record as a run; its last row has the final metrics beside the seed, over which panels draw them.

    Raises ValueError for a metrics.jsonl that can't be read.
    """
    path = run.path / "metrics.jsonl"
    whole = path.is_file()
    try:
        rows = read_lines(path) if whole else _rows(record.series)
        last = rows[-1]["step"] if rows else 0
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{path}: not readable as lines of metrics ({error}); delete it and publish again") from None
    card = Card.of(record)
    origin = {name: record.provenance[name] for name in _ORIGIN if name in record.provenance}
    card = replace(card, config={**card.config, "provenance": origin})
    cost = {f"cost/{name}": value for name, value in record.cost.model_dump().items() if value is not None}
    final = {"step": last, "seed": record.seed, **record.metrics}
    return Rebuilt(card, (*rows, final), {**record.metrics, **cost, "status": record.status}, whole)


def _rows(series: Mapping[str, Sequence[tuple[int, float]]]) -> list[dict[str, Any]]:
    """Curves as lines, a step each."""
    steps: dict[int, dict[str, Any]] = {}
    for name, curve in series.items():
        for step, value in curve:
            steps.setdefault(step, {"step": step})[name] = value
    return [steps[step] for step in sorted(steps)]


def printed(slug: str, level: boards.Printed) -> Rebuilt:
    """What the paper prints, as a run with one row a seed: a straight line in panels over seeds."""
    ablation = level.claim.ablation
    card = Card(
        id=f"{slug}-{boards.PRINTED}-{level.claim.id}-{level.scale}",
        name=level.arm,
        group=f"{slug}/{ablation}",
        job_type=boards.PRINTED,
        tags=(f"scale:{level.scale}", ablation),
        config={
            "paper": slug,
            "scale": level.scale,
            "program": boards.PRINTED,
            "claim": level.claim.id,
            "arms": {ablation: level.arm},
        },
    )
    rows = tuple({"step": at, "seed": seed, level.metric: level.level} for at, seed in enumerate(level.seeds))
    return Rebuilt(card, rows, {level.metric: level.level})


def chosen(targets: Sequence[str], *, scale: str | None, store: Store) -> dict[str, list[Record]]:
    """Records by paper. A target is a paper, paper/ablation, paper/ablation/arm, or a run's id or the start of one.

    Raises ValueError of one sentence for a target that names no record.
    """
    found: dict[str, dict[str, Record]] = {}
    for target in targets:
        slug = re.split("[-/]", target)[0]
        load_paper(slug)
        records = [record for record in store.records(slug) if scale in (None, record.scale)]
        at = "" if scale is None else f" of scale {scale}"
        if not records:
            folder = store.record_path(slug, "x").parent
            raise ValueError(f"{target}: no records{at} in {folder}; `retrace run {slug}` makes them")
        rest = target.partition("/")[2]
        taken = [
            record
            for record in records
            if target == slug
            or (rest and any(f"{label}/".startswith(f"{rest}/") for label in record.labels))
            or names(target, record)
        ]
        if not taken:
            labels = [Label.parse(label) for record in records for label in record.labels]
            parts = [label.ablation_arm if "/" in rest else label.ablation for label in labels]
            ids = [record.id for record in records]
            known = ids if target.startswith(f"{slug}-") else sorted({f"{slug}/{name}" for name in parts})
            near = difflib.get_close_matches(target, known, n=1, cutoff=0.5)
            raise ValueError(
                f"{target}: no record{at} of it" + (f"; did you mean '{near[0]}'?" if near else "; see `retrace list`")
            )
        found.setdefault(slug, {}).update({record.id: record for record in taken})
    return {slug: list(records.values()) for slug, records in found.items()}


def publish(
    targets: Sequence[str],
    *,
    scale: str | None,
    project: str | None,
    entity: str | None,
    dry_run: bool,
    store: Store,
    console: Console,
) -> None:
    """Build and validate everything, write the offline files, and upload what W&B lacks where there is a key.

    Raises ValueError of one sentence before anything is written, and OSError where W&B can't be used: the offline files
    are complete then, and calling it again goes on.
    """
    for slug, taken in chosen(targets, scale=scale, store=store).items():
        asked = _tracking(slug, project=project, entity=entity)
        results = load_results(slug, store=store)
        runs = _runs(results, taken, store=store)
        board = boards.build_board(results, entity=asked.entity or "somebody", project=asked.project)  # before all else
        _say_built(slug, taken, runs, board, console)
        online = wandb_mode(asked.model_copy(update={"wandb": "auto"})) == "online"
        if dry_run:
            told = "upload those that W&B lacks" if online else "upload nothing: there is no key"
            _say(console, f"would write what is not yet in {store.published}, and {told}")
            continue
        folders = write(runs, project=asked.project, store=store, console=console)
        if not online:
            _say_offline(asked, len(runs), store, console)
            continue
        server = Server(project=asked.project, entity=asked.entity)
        sent = server.upload({run.card.id: (run.digest, folders[run.card.id]) for run in runs}, paper=slug)
        _say(console, f"uploaded {sent} runs to {server.entity}/{asked.project}, {len(runs) - sent} were there")
        board = boards.build_board(results, entity=server.entity, project=asked.project)
        for what, url in server.save(board).items():
            _say(console, f"{what}: {url}")


def _tracking(slug: str, *, project: str | None, entity: str | None) -> Tracking:
    """The paper's tracking config with what the command line says; raises ValueError for a name W&B can't have."""
    asked = validate(Tracking, compose(slug, [])["tracking"], source="tracking")
    asked = asked.model_copy(update={"project": project or asked.project, "entity": entity or asked.entity})
    for option, value in (("project", asked.project), ("entity", asked.entity)):
        if value is not None and not _NAME.fullmatch(value):
            raise ValueError(f"--{option} {value}: expected letters, digits, and - _ . between them, 128 at most")
        refuse_secrets(value or "", where=f"--{option}")
    return asked


def _runs(results: PaperResults, taken: Sequence[Record], *, store: Store) -> list[Rebuilt]:
    """The chosen records, and what the paper prints of their ablations at their scales."""
    asked = {(record.scale, Label.parse(label).ablation) for record in taken for label in record.labels}
    levels = boards.printed_levels(verdict for found in results.judged.values() for verdict in found)
    runs = [rebuild(record, store.run(record.id)) for record in taken]
    runs += [printed(results.paper.slug, level) for level in levels if (level.scale, level.claim.ablation) in asked]
    for run in runs:
        refuse_secrets(json.dumps([run.card.config, run.rows, run.results]), where=run.card.id)
    return runs


def write(runs: Sequence[Rebuilt], *, project: str, store: Store, console: Console) -> dict[str, Path]:
    """The folder of each run's offline files, by id; those that are there with the same content stay.

    Raises OSError where one can't be written.
    """
    folders = {run.card.id: store.published / f"offline-run-{run.card.id}" for run in runs}
    left = [run for run in runs if _digest_at(folders[run.card.id]) != run.digest]
    shown: Iterable[Rebuilt] = track(
        left, description="writing", console=console, transient=True, disable=not console.is_terminal
    )
    for run in shown:
        folder = folders[run.card.id]
        (folder / "digest").unlink(missing_ok=True)
        write_offline(run.card, project=project, folder=folder, rows=run.rows, summary=run.summary)
    if left:
        flush_offline()
    for run in left:
        _check_whole(folders[run.card.id], run.digest)
        write_atomic(folders[run.card.id] / "digest", run.digest)
    _say(console, f"wrote {len(left)} runs, {len(runs) - len(left)} were there: {store.published}")
    return folders


def _check_whole(folder: Path, digest: str) -> None:
    """Raise OSError where the digest, which is the last thing in a run's file, is not in it."""
    data = (folder / f"run-{folder.name.removeprefix('offline-run-')}.wandb").read_bytes()
    halves = (digest[: len(digest) // 2], digest[len(digest) // 2 :])  # the file's format may part it in two, once
    if not any(half.encode() in data for half in halves):
        raise OSError(f"{folder}: W&B did not write all of the run; is the disk full? The same command writes it again")


def _digest_at(folder: Path) -> str | None:
    path = folder / "digest"
    return path.read_text() if path.is_file() else None


def _say(console: Console, told: str) -> None:
    say(console, f"  {told}")


def _say_built(
    slug: str, taken: Sequence[Record], runs: Sequence[Rebuilt], board: boards.Board, console: Console
) -> None:
    scales = ", ".join(sorted({record.scale for record in taken}))
    whole = sum(run.whole for run in runs)
    built = f"{slug}: {len(taken)} runs of scale {scales}"
    built += f" ({whole} with every logged line, {len(taken) - whole} with the curves of their records)"
    built += f", {len(runs) - len(taken)} lines of what the paper prints"
    built += f"; a report with the verdicts and {board.num_panels} panels, and a workspace: all valid"
    say(console, built)


def _say_offline(asked: Tracking, num_runs: int, store: Store, console: Console) -> None:
    where = f"{asked.entity or 'the entity of the key'}, project {asked.project}"
    told = "no key, so nothing was uploaded. With WANDB_API_KEY set, the same command uploads what W&B lacks of these "
    told += f"{num_runs} runs to {where}, then writes the report and the workspace. `wandb sync {store.published}` "
    _say(console, told + "uploads the runs alone, from any machine")

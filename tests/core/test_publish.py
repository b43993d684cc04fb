"""`retrace publish`: what lands in W&B's offline files is read back; uploads go to a stand-in of W&B's server."""

from __future__ import annotations

import io
import json
import os
import re
import shutil
import socket
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from conftest import Run
from core.test_tracking import wandb_records
from rich.console import Console
from wandb_server import KEY, Kept, wandb_server

from retrace.core import boards
from retrace.core.mirrors import Card
from retrace.core.publish import chosen, printed, publish, rebuild
from retrace.core.record import Record
from retrace.core.results import load_results
from retrace.core.store import Store

COMMITTED = Path(__file__).resolve().parents[2] / "results" / "quietstar" / "records"
LINES = ["quietstar-printed-thoughts_help_arithmetic-laptop", "quietstar-printed-thoughts_help_commonsense-laptop"]
NO_KEY = {"WANDB_API_KEY": "", "NETRC": os.devnull}


@pytest.fixture
def store(home: Path) -> Store:
    """The committed records of one ablation, as they come from another machine: no runs/, no metrics.jsonl."""
    found = Store(home)
    for path in COMMITTED.glob("*.json"):
        if any(label.startswith("thoughts/") for label in Record.load(path).labels):
            target = found.record_path("quietstar", path.stem)
            target.parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(path, target)
    assert len(found.records("quietstar")) == 15
    return found


@pytest.fixture
def server() -> Iterator[Kept]:
    with wandb_server() as kept:
        yield kept


def online(kept: Kept) -> dict[str, str]:
    return {"WANDB_API_KEY": KEY, "WANDB_BASE_URL": kept.url}


def offline_files(store: Store) -> dict[str, Path]:
    """Every .wandb file, by the id of the run that it says it is of."""
    found = {}
    for path in store.published.glob("*/*.wandb"):
        (run,) = (record.run for record in wandb_records(path) if record.HasField("run"))
        assert run.run_id not in found, "one run is there twice"
        found[run.run_id] = path
    return found


def told(path: Path) -> tuple[dict[str, Any], list[dict[str, Any]], dict[str, Any]]:
    """Config, history and summary in a .wandb file."""

    def read(items: Any) -> dict[str, Any]:
        return {item.key or ".".join(item.nested_key): json.loads(item.value_json) for item in items}

    records = list(wandb_records(path))
    (config,) = (read(record.run.config.update) for record in records if record.HasField("run"))
    history = [read(record.history.item) for record in records if record.HasField("history")]
    summary: dict[str, Any] = {}
    for record in records:
        summary |= read(record.summary.update) if record.HasField("summary") else {}
    assert any(record.HasField("exit") for record in records)
    return config, history, summary


def own(row: dict[str, Any]) -> dict[str, Any]:
    """A row of history without what W&B adds."""
    return {key: value for key, value in row.items() if not key.startswith("_")}


def test_every_record_is_one_run_however_often_it_is_published(store: Store, retrace: Run) -> None:
    first = retrace("publish", "quietstar", **NO_KEY)
    assert first.returncode == 0, first.stderr
    assert "wrote 17 runs, 0 were there" in first.stdout
    assert "nothing was uploaded" in first.stdout
    before = {run_id: path.read_bytes() for run_id, path in offline_files(store).items()}
    assert before.keys() == {record.id for record in store.records("quietstar")} | set(LINES)
    assert "wrote 0 runs, 17 were there" in retrace("publish", "quietstar", "quietstar/thoughts", **NO_KEY).stdout
    assert {run_id: path.read_bytes() for run_id, path in offline_files(store).items()} == before


def test_an_offline_file_holds_curves_final_metrics_config_arms_and_origin(store: Store, retrace: Run) -> None:
    assert retrace("publish", "quietstar", **NO_KEY).returncode == 0
    files = offline_files(store)
    for record in store.records("quietstar"):
        config, history, summary = told(files[record.id])
        assert config["arms"]["thoughts"] in {label.split("/")[1] for label in record.labels} | {"none, thoughts"}
        assert (config["scale"], config["seed"], config["labels"]) == (record.scale, record.seed, list(record.labels))
        assert config["provenance"]["git"] == record.provenance["git"]
        assert all(config[key] == value for key, value in record.config.items())
        curves = {
            name: [(row["step"], row[name]) for row in history[:-1] if name in row] for name in record.series
        }  # fmt: skip
        assert curves == {name: [tuple(point) for point in curve] for name, curve in record.series.items()}
        assert own(history[-1]) == {"step": history[-1]["step"], "seed": record.seed, **record.metrics}
        assert {name: summary[name] for name in record.metrics} == record.metrics
        assert summary["status"] == record.status


def test_a_metrics_jsonl_beside_a_record_brings_every_line_and_rewrites_that_run_alone(
    store: Store, retrace: Run
) -> None:
    record = next(record for record in store.records("quietstar") if record.program == "train")
    assert retrace("publish", record.id, **NO_KEY).returncode == 0
    lines = [{"step": step, "loss/total": 1 / step} for step in range(1, 301)]
    store.run(record.id).path.mkdir(parents=True)
    whole = "".join(json.dumps(line) + "\n" for line in lines) + '{"step": 301, "lo'
    (store.run(record.id).path / "metrics.jsonl").write_text(whole)
    done = retrace("publish", "quietstar/thoughts", **NO_KEY)
    assert "1 with every logged line, 14 with the curves" in done.stdout
    assert f"wrote {17 - 2 - 1 + 1} runs, 2 were there" in done.stdout  # its lines of the paper were there
    _, history, _ = told(offline_files(store)[record.id])
    assert [own(row) for row in history[:-1]] == lines


def test_a_run_whose_writing_was_killed_is_written_again_and_no_other(store: Store, retrace: Run) -> None:
    assert retrace("publish", "quietstar", **NO_KEY).returncode == 0
    record = store.records("quietstar")[4]
    path = offline_files(store)[record.id]
    whole = told(path)
    path.write_bytes(path.read_bytes()[:7])
    (path.parent / "digest").unlink()  # it is written last
    assert "wrote 1 runs, 16 were there" in retrace("publish", "quietstar", **NO_KEY).stdout
    assert [own(row) for row in told(path)[1]] == [own(row) for row in whole[1]]


def test_a_broken_metrics_jsonl_is_named_and_nothing_is_written(store: Store, retrace: Run) -> None:
    record = store.records("quietstar")[0]
    store.run(record.id).path.mkdir(parents=True)
    (store.run(record.id).path / "metrics.jsonl").write_text('{"step": 1}\n{broken\n')
    done = retrace("publish", "quietstar", **NO_KEY)
    assert done.returncode == 2
    assert f"{record.id}/metrics.jsonl: not readable" in done.stderr
    assert not store.published.exists()


def test_what_the_paper_prints_is_a_straight_line_over_the_seeds_of_the_arms(store: Store) -> None:
    (first, _) = boards.printed_levels(load_results("quietstar", store=store).verdicts["laptop"])
    run = printed("quietstar", first)
    values = [
        record.metrics["chains_direct/prob"] for record in store.records("quietstar")
        if record.program == "evaluate" and any(label.startswith("thoughts/none/") for label in record.labels)
    ]  # fmt: skip
    assert len(values) == 3
    assert {row["seed"] for row in run.rows} == {0, 1, 2}
    for row in run.rows:
        assert row["chains_direct/prob"] == pytest.approx(sum(values) / 3 + 0.05)
    assert run.card.config["arms"] == {"thoughts": "paper: none +5 points"}


def passes(card: Card, filters: list[dict[str, Any]]) -> bool:
    """Whether W&B's filter, as it is saved, takes a run."""
    run = {"jobType": {card.job_type}, "tags": set(card.tags)}
    for item in filters:
        wanted = set(item["value"]) if item["op"] == "IN" else {item["value"]}
        key = item["key"]
        has = {card.config.get(key["name"])} if key["section"] == "config" else run[key["name"]]
        if not wanted & has:
            return False
    return True


def test_every_panel_of_the_report_finds_runs_with_its_metric_and_their_arms(store: Store) -> None:
    results = load_results("quietstar", store=store)
    board = boards.build_board(results, entity="me", project="p")
    runs = [rebuild(record, store.run(record.id)) for record in store.records("quietstar")]
    runs += [printed("quietstar", level) for level in boards.printed_levels(results.verdicts["laptop"])]
    spec = json.loads(board.report._to_model().model_dump_json(by_alias=True, exclude_none=True))["spec"]
    grids = [block["metadata"] for block in spec["blocks"] if block["type"] == "panel-grid"]
    seen: dict[str, set[str]] = {}
    for grid in grids:
        (runset,) = grid["runSets"]
        taken = [run for run in runs if passes(run.card, runset["filters"]["filters"])]
        ablation = runset["name"].split(",")[0]
        assert all(ablation in run.card.config["arms"] for run in taken)
        for panel in grid["panelBankSectionConfig"]["panels"]:
            assert panel["config"]["groupBy"] == f"arms.value.{ablation}"
            (metric,) = panel["config"]["metrics"]
            axis = panel["config"].get("xAxis", metric)
            shown = {r.card.config["arms"][ablation] for r in taken for row in r.rows if {metric, axis} <= row.keys()}
            assert shown, (runset["name"], metric)
            if ablation == "thoughts":
                seen.setdefault(metric, set()).update(shown)
    assert seen["chains_direct/prob"] == {"none", "thoughts", "paper: none +5 points"}
    assert board.num_panels == sum(len(grid["panelBankSectionConfig"]["panels"]) for grid in grids)


def test_the_verdict_table_has_every_claim_with_its_verdict_and_the_papers_words(store: Store) -> None:
    verdicts = load_results("quietstar", store=store).verdicts["laptop"]
    rows = boards.verdict_table(verdicts).splitlines()[2:]
    assert len(rows) == len(verdicts) > 30
    for row, verdict in zip(rows, verdicts, strict=True):
        assert f"**{verdict.outcome}**" in row
        assert row.count(" | ") == 4
    assert "+10.9" not in rows[0]
    assert "GSM8K 5.9 %" in rows[0]


def test_published_twice_the_server_has_one_run_each_one_workspace_and_one_report(
    store: Store, server: Kept, retrace: Run
) -> None:
    first = retrace("publish", "quietstar", **online(server))
    assert first.returncode == 0, first.stderr
    assert server.runs.keys() == {record.id for record in store.records("quietstar")} | set(LINES)
    for record in store.records("quietstar"):
        sent = server.runs[record.id]
        assert {name: sent["summary"][name] for name in record.metrics} == record.metrics
        assert own(sent["history"][max(sent["history"])]).items() >= record.metrics.items()
    assert sorted(server.uploads) == sorted(server.runs)
    assert sorted(view["type"] for view in server.views.values()) == ["project-view", "runs"]

    again = retrace("publish", "quietstar", **online(server))
    assert "uploaded 0 runs to me/retrace, 17 were there" in again.stdout
    assert len(server.uploads) == 17
    assert len(server.views) == 2

    changed = next(record for record in store.records("quietstar") if record.program == "evaluate")
    other = changed.model_copy(update={"metrics": {**changed.metrics, "text/nll": 0.125}})
    store.record_path("quietstar", changed.id).write_text(other.to_json())
    assert "uploaded 1 runs to me/retrace, 16 were there" in retrace("publish", "quietstar", **online(server)).stdout
    assert server.uploads[17:] == [changed.id]
    assert server.runs[changed.id]["summary"]["text/nll"] == 0.125
    written = [path for path in store.published.rglob("*") if path.is_file()]
    assert not [path for path in written if KEY.encode() in path.read_bytes()]
    assert KEY not in first.stdout + first.stderr + again.stdout + again.stderr


def test_an_upload_that_breaks_off_is_counted_and_the_same_command_goes_on(
    store: Store, server: Kept, retrace: Run
) -> None:
    lost = {record.id for record in store.records("quietstar")[:2]}
    server.refuse = set(lost)
    done = retrace("publish", "quietstar", **online(server))
    assert done.returncode == 2
    assert "2 of 17 runs did not arrive at W&B" in done.stderr
    assert not server.views  # no report of half of the runs
    server.refuse = set()
    assert "uploaded 2 runs to me/retrace, 15 were there" in retrace("publish", "quietstar", **online(server)).stdout
    assert set(server.uploads[17:]) == lost


@pytest.mark.parametrize(
    ("target", "options", "sentence"),
    [
        ("nope", {}, "nope: no such paper; the papers are: "),
        ("mm1", {}, "mm1: no records in "),
        ("quietstar", {"scale": "gpu"}, "quietstar: no records of scale gpu in "),
        ("quietstar/thougts", {}, "quietstar/thougts: no record of it; did you mean 'quietstar/thoughts'?"),
        ("quietstar/thoughts/nine", {}, "no record of it; did you mean 'quietstar/thoughts/none'?"),
        ("quietstar", {"entity": "me & you"}, "--entity me & you: expected letters, digits"),
        ("quietstar", {"project": "a/b"}, "--project a/b: expected letters, digits"),
        ("quietstar", {"entity": KEY}, "--entity: holds the value of WANDB_API_KEY"),
    ],
)
def test_bad_input_is_one_sentence_before_anything_is_written(
    store: Store, monkeypatch: pytest.MonkeyPatch, target: str, options: dict[str, str], sentence: str
) -> None:
    monkeypatch.setenv("WANDB_API_KEY", KEY)
    given: dict[str, Any] = {"scale": None, "project": None, "entity": None, **options}
    with pytest.raises(ValueError, match=re.escape(sentence)) as error:
        publish([target], **given, dry_run=False, store=store, console=Console(file=io.StringIO()))
    assert len(str(error.value).splitlines()) == 1
    assert not store.published.exists()


def test_an_entity_of_others_a_wrong_key_and_a_dead_server_are_one_sentence_each(
    store: Store, server: Kept, retrace: Run
) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        nobody = f"http://127.0.0.1:{taken.getsockname()[1]}"
    for given, words, sentence in (
        (online(server), ["--entity", "others"], "--entity others: the key's user is not in it; it may write"),
        ({**online(server), "WANDB_API_KEY": "short"}, [], "W&B can't be used: "),
        ({**online(server), "WANDB_BASE_URL": nobody}, [], "W&B can't be used: "),
    ):  # fmt: skip
        done = retrace("publish", "quietstar", *words, **given)
        assert done.returncode == 2
        assert sentence in done.stderr
        assert len(done.stderr.splitlines()) == 1
        assert KEY not in done.stderr
    assert not server.runs
    assert len(offline_files(store)) == 17


def test_a_dry_run_writes_nothing(store: Store, retrace: Run) -> None:
    done = retrace("publish", "quietstar", "--dry-run", **NO_KEY)
    assert done.returncode == 0
    assert "15 runs of scale laptop" in done.stdout
    assert not store.published.exists()


def test_targets_name_a_paper_an_ablation_an_arm_or_runs_by_the_start_of_their_id(store: Store) -> None:
    records = store.records("quietstar")
    arm = {record.id for record in records if any(label.startswith("thoughts/none/") for label in record.labels)}
    assert {record.id for record in chosen(["quietstar/thoughts/none"], scale=None, store=store)["quietstar"]} == arm
    assert len(arm) < len(records)
    assert chosen(["quietstar", records[0].id], scale="laptop", store=store) == {"quietstar": records}
    assert chosen([records[3].id[:-3]], scale=None, store=store) == {"quietstar": [records[3]]}

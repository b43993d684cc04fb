"""Pages that runs attach to their records: they come with the record, are linked from the report, and go after it."""

from __future__ import annotations

import re
import threading
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pytest

from retrace.core.config import CONFIGS, Experiment, Frozen, Hardware, Tracking, read_yaml, validate
from retrace.core.context import Context
from retrace.core.paper import Paper
from retrace.core.plan import Ablation, RunSpec
from retrace.core.record import Record
from retrace.core.report import build_report
from retrace.core.reportruns import origin
from retrace.core.results import PaperResults, judge_paper
from retrace.core.store import Store
from retrace.core.tracking import Tracker

PAPER = Paper("demo", "A demo", "2403.00001", 1, Experiment, stages=lambda _: pytest.fail("plans nothing"), programs={})
SIZE = Ablation(
    name="size", question="?", locus="Fig. 1", base="demo/main", seeds=(0,), baseline="small",
    arms={"small": ("size=1",), "big": ()},
)  # fmt: skip
HARDWARE = validate(Hardware, {"name": "cpu", **read_yaml(CONFIGS / "hardware" / "cpu.yaml")}, source="cpu")
TRACKING = Tracking(wandb="off", project="test", entity=None, log_every=1)


def spec(run_id: str, *, arm: str = "big") -> RunSpec:
    labels = (f"size/{arm}/s0",)
    return RunSpec(run_id, "demo", "evaluate", 1, "laptop", 0, Frozen(), {}, labels, HARDWARE, TRACKING)


def record(run_id: str, *, arm: str = "big", pages: tuple[str, ...] = ()) -> Record:
    content: dict[str, Any] = {
        "schema": 1, "id": run_id, "paper": "demo", "program": "evaluate", "recipe": 1, "labels": (f"size/{arm}/s0",),
        "scale": "laptop", "seed": 0, "status": "DONE", "config": {}, "parents": {}, "metrics": {"task/prob": 0.5},
        "series": {}, "cost": {}, "provenance": {}, "pages": pages,
    }  # fmt: skip
    return Record.model_validate(content)


def context(store: Store, run_id: str, *, is_main: bool = True) -> Context:
    run = store.run(run_id)
    run.path.mkdir(parents=True, exist_ok=True)
    tracker = Tracker(run, spec(run_id), main=False)
    return Context(run, 0, {}, HARDWARE, tracker, threading.Event(), is_main=is_main)


def finished(store: Store, run_id: str, *, arm: str = "big", name: str = "thoughts") -> Path:
    """A run that attached a page, and where that page stands."""
    ctx = context(store, run_id)
    ctx.attach(name, "<p>first</p>")
    ctx.attach(name, f"<p>{run_id}</p>")  # a run that goes on after a kill attaches its page again
    store.write_record(record(run_id, arm=arm, pages=tuple(ctx.pages)))
    return store.page_path("demo", run_id, name)


def reported(found: list[Record]) -> PaperResults:
    return judge_paper(PAPER, claims=(), ablations=(SIZE,), records=found, planned={"laptop": ()})


def test_a_page_stands_with_the_record_that_names_it(tmp_path: Path) -> None:
    store = Store(tmp_path)
    page = finished(store, "demo-evaluate-1")
    assert page == tmp_path / "results/demo/pages/demo-evaluate-1--thoughts.html"
    assert page.read_text() == "<p>demo-evaluate-1</p>"
    assert [r.pages for r in store.records("demo")] == [("thoughts",)]


def test_only_the_main_process_attaches(tmp_path: Path) -> None:
    ctx = context(Store(tmp_path), "demo-evaluate-1", is_main=False)
    ctx.attach("thoughts", "<p>")
    assert ctx.pages == []
    assert not list(tmp_path.rglob("*.html"))


def test_a_record_from_before_there_were_pages_is_read() -> None:
    old = record("demo-evaluate-1").model_dump(mode="json", by_alias=True)
    del old["pages"]
    assert Record.model_validate(old, strict=False).pages == ()


def test_a_page_that_was_deleted_comes_back_from_its_run(tmp_path: Path) -> None:
    store = Store(tmp_path)
    page = finished(store, "demo-evaluate-1")
    page.unlink()
    store.keep_record(spec("demo-evaluate-1"))
    assert page.read_text() == "<p>demo-evaluate-1</p>"


def test_pages_go_with_their_record_and_no_other_does(tmp_path: Path) -> None:
    store = Store(tmp_path)
    kept, gone = finished(store, "demo-evaluate-1"), finished(store, "demo-evaluate-2")
    store.record_path("demo", "demo-evaluate-2").unlink()
    coming = store.run("demo-evaluate-3")  # has written its page, and its record not yet
    coming.freeze(spec("demo-evaluate-3"), command="test")
    early = store.page_path("demo", "demo-evaluate-3", "thoughts")
    early.write_text("<p>")
    with coming.lease():
        store.remove_orphaned_pages("demo")
    assert kept.is_file()
    assert not gone.exists()
    assert early.is_file()
    store.remove_orphaned_pages("demo")
    assert not early.exists()


def test_the_report_links_the_pages_that_exist_and_shows_the_main_arm_first(tmp_path: Path) -> None:
    store, out = Store(tmp_path), tmp_path / "results" / "demo"
    finished(store, "demo-evaluate-1", arm="small")
    finished(store, "demo-evaluate-2", arm="big", name="look_here")
    store.write_record(record("demo-evaluate-3", arm="small"))
    lost = finished(store, "demo-evaluate-4", arm="small", name="lost")
    lost.unlink()
    now = datetime(2026, 11, 24, tzinfo=UTC)
    build_report(reported(store.records("demo")), scale="laptop", now=now, out=out)
    for name, pattern in (("index.html", r'href="(pages/[^"]+)"'), ("REPORT.md", r"\]\((pages/[^)]+)\)")):
        text = (out / name).read_text()
        links = re.findall(pattern, text)
        assert links[0] == "pages/demo-evaluate-2--look_here.html"  # `big` sets nothing: the main setting
        assert text.index("Look inside a run of the main setting") < text.index(links[0])
        assert links.count(links[0]) == 2  # there, and where its run is listed
        assert all((out / link).is_file() for link in links)
        assert "lost.html" not in text


def test_a_report_without_pages_says_nothing_of_them(tmp_path: Path) -> None:
    now = datetime(2026, 11, 24, tzinfo=UTC)
    build_report(reported([record("demo-evaluate-1")]), scale="laptop", now=now, out=tmp_path)
    for name in ("index.html", "REPORT.md"):
        assert "pages/" not in (tmp_path / name).read_text()
        assert "Look inside" not in (tmp_path / name).read_text()


def test_records_older_than_what_they_build_on_are_told() -> None:
    base, child = record("demo-base-1"), record("demo-evaluate-2")

    def told(first: str, second: str) -> str:
        old = base.model_copy(update={"provenance": {"finished": first}})
        new = child.model_copy(update={"parents": {"model": base.id}, "provenance": {"finished": second}})
        return origin([old, new]).get("Not of one piece", "")

    assert told("2026-11-28T10:00:00+00:00", "2026-11-28T11:00:00+00:00") == ""
    assert told("2026-11-28T12:00:00+00:00", "2026-11-28T11:00:00+00:00").startswith("1 records are older than")
    assert told("2026-11-28T12:00:00+00:00", "") == ""  # not known

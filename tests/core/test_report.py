"""The report holds every claim and every sample, stays text whatever the text, and never differs between two builds."""

from __future__ import annotations

import re
import time
import xml.etree.ElementTree as ElementTree
from datetime import UTC, datetime
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from rich.console import Console

from retrace.core.claims import Claim
from retrace.core.config import Experiment
from retrace.core.figures import curve_figure
from retrace.core.outlook import Need, Outlook
from retrace.core.paper import Panel, Paper
from retrace.core.plan import Ablation
from retrace.core.record import Record
from retrace.core.report import build_report, print_verdicts
from retrace.core.results import PaperResults, judge_paper
from retrace.core.samples import Planned, Samples
from retrace.core.svg import number, ticks

NOW = datetime(2026, 11, 23, 22, 0, tzinfo=UTC)
NASTY = 'a < b & <script>alert(1)</script> | "quoted" *starred*'
PAPER = Paper(
    slug="demo",
    title=f"A demo: {NASTY}",
    arxiv="2403.00001",
    recipe=1,
    config=Experiment,
    stages=lambda _: pytest.fail("a report plans nothing"),
    programs={},
    panels="test_report:panels",
)
SIZE = Ablation(
    name="size", question="Is bigger better?", locus="Fig. 1", base="demo/main", seeds=(0, 1, 2), baseline="small",
    arms={"small": (), "big": ("model.hidden_size=8",)},
)  # fmt: skip
DEPTH = Ablation(
    name="depth", question=NASTY, locus="Fig. 2", base="demo/main", seeds=(0, 1), baseline="flat", arms={"flat": ()}
)
VALUES = {"small": (0.1011, 0.1022, 0.1033), "big": (0.7044, 0.7255, None)}  # big, seed 2, diverged


def claim(**changes: Any) -> Claim:
    values: dict[str, Any] = {
        "id": "bigger", "says": "bigger is better", "locus": "Fig. 1", "ablation": "size", "metric": "task/prob",
        "compare": ("big", "small"), "expect": {"direction": "up"}, "testable_at": ("laptop",),
    }  # fmt: skip
    return Claim.model_validate(values | changes)


CLAIMS = (
    claim(paper="5.9 -> 10.9"),
    claim(id="nasty", says=NASTY, note=NASTY, compare=("small", "big")),
    claim(id="later", says="needs a large model", testable_at=("paper",)),
    claim(id="stable", says="the big arm diverges", metric="diverged"),
    claim(id="flat", says="depth helps", ablation="depth", compare=("deep", "flat")),
)


def records() -> list[Record]:
    found = []
    for arm, values in VALUES.items():
        for seed, value in enumerate(values):
            content: dict[str, Any] = {
                "schema": 1, "id": f"demo-evaluate-{arm}{seed}", "paper": "demo", "program": "evaluate", "recipe": 1,
                "labels": (f"size/{arm}/s{seed}",), "scale": "laptop", "seed": seed, "config": {}, "parents": {},
                "status": "DONE" if value is not None else "DIVERGED",
                "metrics": {"diverged_at": 40.0} if value is None else {"task/prob": value, "task/other": -value},
                "series": {"train/loss": ((0, 2.0), (10, 1.5), (20, 1.0 + seed / 10))},
                "cost": {"tokens": 100.0, "flops": 2e9, "seconds": 61.0, "mfu": None},
                "provenance": {"hardware": NASTY, "git": "abc123", "packages": {"torch": "2.13.0"}, "python": "3.11.7"},
            }  # fmt: skip
            found.append(Record.model_validate(content))
    return found


def results(planned: tuple[Planned, ...] = (), **changes: Any) -> PaperResults:
    values: dict[str, Any] = {"claims": CLAIMS, "ablations": (SIZE, DEPTH), "records": records()}
    return judge_paper(PAPER, planned={"laptop": planned}, **(values | changes))


def build(out: Path, found: list[Record] | None = None, planned: tuple[Planned, ...] = ()) -> dict[str, str]:
    found = records() if found is None else found
    build_report(results(planned, records=found), scale="laptop", now=NOW, out=out)
    return {str(path.relative_to(out)): path.read_text() for path in sorted(out.rglob("*")) if path.is_file()}


def panels(arms: dict[str, tuple[str, ...]], samples: Samples) -> dict[str, list[Panel]]:
    """What only this paper draws: its runs' notes, over the steps at which they were made."""
    found = {}
    for ablation, names in arms.items():
        notes = [(arm, note) for arm in names for note in samples.notes(ablation, arm, "levels")]
        drawn = tuple(curve_figure(f"{ablation}--own--{arm}", NASTY, {arm: [note]}) for arm, note in notes)
        if drawn:
            found[ablation] = [Panel(NASTY, drawn[:1], note=NASTY), Panel(f"folded {NASTY}", drawn[1:], folded=True)]
    return found


class Page(HTMLParser):
    """What a browser would see: tags, their attributes, and text."""

    VOID = frozenset({"meta", "link", "br", "input"})

    def __init__(self, content: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.text, self.open = "", []
        self.feed(content)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.text += data

    def values(self, key: str) -> list[str]:
        return [value for _, attributes in self.tags if (value := attributes.get(key)) is not None]


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    return build(tmp_path_factory.mktemp("report"))


def test_every_claim_and_every_sample_is_in_both(files: dict[str, str]) -> None:
    for name in ("index.html", "REPORT.md"):
        for value in ("0.101", "0.102", "0.103", "0.704", "0.726", "-0.704".replace("-", "\u2212")):
            assert value in files[name], (name, value)
        for entry in CLAIMS:
            assert entry.says in files[name] or entry.id == "nasty"
        for record in records():
            assert f"records/{record.id}.json" in files[name] or record.status == "DIVERGED"
        for outcome in ("inconclusive", "no records", "not tested at this scale"):
            assert outcome in files[name]
        assert "diverged at step 40" in files[name]
        assert "retrace run demo/depth scale=laptop seed=0,1" in files[name]
        assert "No run of this ablation is on record" in files[name]


def test_the_page_is_whole_escaped_and_fetches_nothing(files: dict[str, str]) -> None:
    page = Page(files["index.html"])
    assert page.open == []
    assert "script" not in {tag for tag, _ in page.tags}
    assert NASTY in page.text
    assert page.values("src") == []
    assert {link for link in page.values("href") if link.startswith("http")} == {"https://arxiv.org/abs/2403.00001"}
    assert "url(" not in files["index.html"]
    assert "@import" not in files["index.html"]
    ids = page.values("id")
    assert len(ids) == len(set(ids))
    assert {link[1:] for link in page.values("href") if link.startswith("#")} <= set(ids)
    assert {attributes["role"] for tag, attributes in page.tags if tag == "svg"} == {"img"}
    assert all(attributes["aria-label"] for tag, attributes in page.tags if tag == "svg")


def test_markdown_links_to_files_that_exist_and_has_no_raw_html(files: dict[str, str]) -> None:
    text = files["REPORT.md"]
    pictures = re.findall(r"!\[.*?\]\((figures/[^)]+)\)", text)
    assert pictures
    assert set(pictures) == {name for name in files if name.startswith("figures/")}
    assert set(re.findall(r"<(/?\w+)", text)) <= {"details", "/details", "summary", "/summary"}
    tables = [line for line in text.splitlines() if line.startswith("|")]
    rows = [re.sub(r"\\\|", "", line).count("|") for line in tables]
    heads = [index for index, line in enumerate(tables) if set(line) <= set("|-: ")]
    for head, following in zip(heads, [*heads[1:], len(tables) + 1], strict=True):
        assert len(set(rows[head - 1 : following - 1])) == 1, tables[head - 1]


def test_figures_are_well_formed_and_show_each_seed(files: dict[str, str]) -> None:
    for name, content in files.items():
        if name.endswith(".svg"):
            ElementTree.fromstring(content)
    drawing = files["figures/size--task-prob.svg"]
    assert drawing.count("<circle") == 5
    assert "diverged" in drawing
    assert "baseline" in drawing
    assert files["figures/size--curve--train-loss.svg"].count('<path d="M') == 6


def test_two_builds_are_the_same_and_old_figures_go(tmp_path: Path, files: dict[str, str]) -> None:
    (tmp_path / "figures").mkdir()
    (tmp_path / "figures" / "gone.svg").write_text("old")
    assert build(tmp_path, list(reversed(records()))) == files


def test_nothing_on_record(tmp_path: Path) -> None:
    text = build(tmp_path, [])["REPORT.md"]
    assert "no records" in text
    assert "0.000" not in text  # missing is missing


def test_what_failed_is_told_with_its_reason(tmp_path: Path) -> None:
    planned = (Planned("demo-train-1", "train", ("depth/flat/s1",), "FAILED", "OSError: No space left on device"),)
    for name in ("index.html", "REPORT.md"):
        assert "train failed: OSError: No space left on device" in build(tmp_path, planned=planned)[name]


def test_the_terminal_table(tmp_path: Path) -> None:
    console = Console(width=160, record=True, file=open(tmp_path / "terminal", "w"))  # noqa: SIM115
    print_verdicts(results().verdicts["laptop"], console=console)
    shown = console.export_text()
    assert "<script>" in shown
    told = "At scale laptop, 0 of 3 judged claims reproduced, 3 inconclusive; 1 without records, 1 needs another scale."
    assert told in shown


def test_a_paper_adds_figures_of_its_own_open_and_folded_and_their_texts_stay_text(tmp_path: Path) -> None:
    noted = {"demo-evaluate-small0": 1.0, "demo-evaluate-big0": 3.0}
    found = [
        record.model_copy(update={"provenance": {"levels": ((0, noted[record.id]), (10, 5.0))}})
        if record.id in noted
        else record
        for record in records()
    ]
    built = build(tmp_path, found)
    drawn = [f"figures/size--own--{arm}.svg" for arm in ("big", "small")]
    assert [name for name in built if "--own--" in name] == drawn
    page = Page(built["index.html"])
    assert "script" not in [tag for tag, _ in page.tags]
    assert page.text.count(f"folded {NASTY}") == 1
    for name in drawn:
        assert built["REPORT.md"].count(f"]({name})") == 1
    assert "<script>" not in built["REPORT.md"]


def test_five_thousand_records_are_reported_in_two_seconds(tmp_path: Path) -> None:
    template = records()[0]
    arms: dict[str, tuple[str, ...]] = {f"arm{index}": () for index in range(20)}
    many = [
        template.model_copy(update={"id": f"r{arm}-{seed}", "labels": (f"size/{arm}/s{seed}",), "seed": seed})
        for arm in arms
        for seed in range(250)
    ]
    wide = SIZE.model_copy(update={"arms": arms, "baseline": "arm0", "seeds": tuple(range(250))})
    claims = [claim(compare=("arm1", "arm0"))]
    began = time.process_time()
    build_report(results(claims=claims, ablations=[wide], records=many), scale="laptop", now=NOW, out=tmp_path)
    assert time.process_time() - began < 2.0
    page = (tmp_path / "index.html").read_text()
    assert len(page) < 3_000_000
    assert page.count('<a href="#rarm7-77">') == 1  # with the metric that a claim is about
    assert "these are many seeds, and each has its record" in page  # the others have means alone


def test_a_number_leads_to_the_line_of_its_run_and_that_to_its_record_and_to_the_command_that_makes_it_again(
    files: dict[str, str],
) -> None:
    page = Page(files["index.html"])
    lines = {attributes["id"] for tag, attributes in page.tags if tag == "tr" and "id" in attributes}
    for record in records():
        name = record.id.removeprefix("demo-evaluate-")
        assert name in lines
        assert f"records/{record.id}.json" in page.values("href")
        arm, seed = name[:-1], record.seed
        for content in (page.text, files["REPORT.md"]):
            assert f"retrace run demo/size/{arm} scale=laptop seed={seed}" in content
        if record.status == "DONE":
            assert page.values("href").count(f"#{name}") > 2  # in claims and in tables


def test_every_outcome_can_be_chosen_and_marks_its_claims(files: dict[str, str]) -> None:
    page = Page(files["index.html"])
    chosen = [attributes["id"] for tag, attributes in page.tags if tag == "input"]
    assert chosen == ["show-all", "show-inconclusive", "show-not-tested-at-this-scale", "show-no-records"]
    classes = [attributes.get("class") or "" for tag, attributes in page.tags if tag == "tr"]
    for outcome in chosen[1:]:
        assert any(f"claim is-{str(outcome).removeprefix('show-')}" in name for name in classes)
        assert f"body:has(#{outcome}:checked)" in files["index.html"]


def test_metrics_are_told_in_words_and_ablations_come_in_the_order_of_the_claims(tmp_path: Path) -> None:
    claims = (claim(id="flat", ablation="depth", compare=("deep", "flat")), claim())
    words = {"task/prob": "probability of the right answer"}
    build_report(results(claims=claims, words=words), scale="laptop", now=NOW, out=tmp_path)
    for name in ("index.html", "REPORT.md", "figures/size--task-prob.svg"):
        assert "probability of the right answer" in (tmp_path / name).read_text()
    page = (tmp_path / "index.html").read_text()
    assert page.index('<article id="depth"') < page.index('<article id="size"')


def test_what_was_not_run_is_told_with_its_cost(tmp_path: Path) -> None:
    need = Need("size", 3, 2.5e15, 1.25)
    look = Outlook(
        "gpu", ("later",), need, (need, Need("depth", 1, 1e9, None)), "GPU-hours", "planned", "retrace plan demo",
        "retrace run demo",
    )  # fmt: skip
    build_report(results(), scale="laptop", now=NOW, out=tmp_path, outlook=(look,))
    for name in ("index.html", "REPORT.md"):
        text = (tmp_path / name).read_text()
        for told in ("3 runs not on record", "about 1.2 GPU-hours", "2.5P FLOPs", "retrace plan demo", "not known"):
            assert told in text, (name, told)


def test_numbers() -> None:
    assert [number(x, 2, sign=True) for x in (0.5, -0.5, -0.001)] == ["+0.50", "\u22120.50", "0.00"]


@given(st.floats(-1e9, 1e9), st.floats(1e-6, 1e9))
def test_ticks_are_few_and_within(low: float, width: float) -> None:
    marks = ticks(low, low + width)
    assert len(marks) <= 6
    slack = 1e-6 * (abs(low) + width)
    assert all(low - slack <= mark <= low + width + slack for mark in marks)

"""The same claims at two scales: what the smaller one called, and what the larger one made of it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pytest

from retrace.core.claims import Claim
from retrace.core.config import Experiment
from retrace.core.paper import Paper
from retrace.core.plan import Ablation
from retrace.core.record import Record
from retrace.core.report import build_overview, build_report
from retrace.core.results import PaperResults, judge_paper
from retrace.core.samples import Planned
from retrace.core.scales import Comparison, compare_scales
from retrace.core.verdicts import Verdict

NOW = datetime(2026, 11, 25, tzinfo=UTC)
PAPER = Paper("demo", "A demo", "2403.00001", 1, Experiment, stages=lambda _: pytest.fail("plans nothing"), programs={})
SIZE = Ablation(
    name="size", question="?", locus="", base="demo/main", seeds=(0, 1, 2), baseline="a", arms={"a": (), "b": ("x=1",)}
)
UP, DOWN, OPEN = (1.0, 1.1, 0.9), (-1.0, -1.1, -0.9), (1.0, -1.1, 0.2)  # of b less a, by seed
DIFFERENCES = {  # metric -> at laptop, at gpu
    "kept": (UP, UP), "turned": (UP, DOWN), "left": (UP, OPEN), "found": (OPEN, UP), "open": (OPEN, OPEN),
    "here": (UP, None), "against": (DOWN, DOWN),
}  # fmt: skip


def claim(metric: str) -> Claim:
    values: dict[str, Any] = {
        "id": metric, "says": f"b has more {metric}", "locus": "Fig. 1", "ablation": "size", "metric": metric,
        "compare": ("b", "a"), "expect": {"direction": "up"}, "testable_at": ("laptop", "gpu"),
    }  # fmt: skip
    return Claim.model_validate(values)


CLAIMS = tuple(map(claim, DIFFERENCES))


def records() -> list[Record]:
    found = []
    for at, scale in enumerate(("laptop", "gpu")):
        for seed in range(3):
            for arm in ("a", "b"):
                differences = {metric: pair[at] for metric, pair in DIFFERENCES.items()}
                metrics = {m: d[seed] if arm == "b" else 0.0 for m, d in differences.items() if d is not None}
                content: dict[str, Any] = {
                    "schema": 1, "id": f"demo-evaluate-{scale}{arm}{seed}", "paper": "demo", "program": "evaluate",
                    "recipe": 1, "labels": (f"size/{arm}/s{seed}",), "scale": scale, "seed": seed, "status": "DONE",
                    "config": {}, "parents": {}, "metrics": metrics, "series": {}, "cost": {}, "provenance": {},
                }  # fmt: skip
                found.append(Record.model_validate(content))
    return found


def results(*scales: str) -> PaperResults:
    found = [record for record in records() if record.scale in scales]
    planned: dict[str, list[Planned]] = {scale: [] for scale in scales}
    return judge_paper(PAPER, claims=CLAIMS, ablations=(SIZE,), records=found, planned=planned)


def verdicts() -> Mapping[str, Sequence[Verdict]]:
    return results("laptop", "gpu").verdicts


def compared() -> Comparison:
    found = compare_scales(verdicts())
    assert found is not None
    return found


def test_calls_of_the_small_scale_are_counted_by_what_the_large_one_made_of_them() -> None:
    (pair,) = compared().pairs
    assert (pair.small, pair.large, pair.both, pair.same) == ("laptop", "gpu", 6, 3)
    assert (pair.called, pair.kept, pair.turned, pair.found) == (4, 2, 1, 1)
    assert "Of 4 that laptop called, gpu called 2 the same way, 1 the other way, and left 1 open" in pair.told()


def test_only_claims_that_two_scales_have_judged_are_compared() -> None:
    assert [row[0].claim.id for row in compared().rows if row[0]] == [m for m in DIFFERENCES if m != "here"]
    assert compare_scales({"laptop": verdicts()["laptop"]}) is None
    assert compare_scales({}) is None


def test_the_report_and_the_overview_show_the_comparison_and_without_a_second_scale_do_not(tmp_path: Path) -> None:
    for folder, found in (("both", results("laptop", "gpu")), ("one", results("laptop"))):
        build_report(found, scale="laptop", now=NOW, out=tmp_path / folder / "demo")
        build_overview([found], now=NOW, out=tmp_path / folder)
        for page in ("demo/index.html", "demo/REPORT.md", "index.html", "README.md"):
            told = "6 claims were judged at both laptop and gpu" in (tmp_path / folder / page).read_text()
            assert told == (folder == "both"), (folder, page)

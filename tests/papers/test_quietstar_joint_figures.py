"""Joint distributions as drawings: cells, the darker the more; runs that ablations share are drawn once."""

from __future__ import annotations

import xml.etree.ElementTree as ElementTree

import pytest
from drawings import SVG, steps

from retrace.core.record import Record
from retrace.core.samples import Samples
from retrace.papers.quietstar.joint_figures import joint_figure, panels


def cells(counts: list[list[int]]) -> tuple[str, list[ElementTree.Element]]:
    drawn = joint_figure(
        "joint", "a < b", x_edges=(-0.5, 0.5, 2.0), y_edges=(1.0,), counts=counts, x_label="gain", y_label="loss"
    )
    root = ElementTree.fromstring(drawn.standalone())
    return drawn.alt, [cell for group in root.iter(f"{SVG}g") for cell in group]


def test_every_bin_that_holds_tokens_is_a_cell_and_darker_the_more_it_holds() -> None:
    alt, found = cells([[0, 90, 3, 0], [1, 0, 0, 6]])
    shades = {rect.findtext(f"{SVG}title"): float(rect.get("fill-opacity") or 0) for rect in found}
    assert list(shades) == [
        "-0.5 to 0.5; below 1: 90.00%",
        "0.5 to 2; below 1: 3.00%",
        "below -0.5; from 1: 1.00%",
        "from 2; from 1: 6.00%",
    ]
    by_count = [shades[title] for title in sorted(shades, key=lambda title: float(title.split()[-1][:-1]))]
    assert by_count == sorted(by_count)
    assert by_count[-1] == pytest.approx(1.0)
    assert "9% of 100 right of the middle" in alt
    assert "a < b" in alt
    corners = [steps(cell)[0] for cell in found]
    assert corners[-1][1] < corners[0][1]  # larger losses stand higher
    assert corners[1][0] > corners[0][0]


def test_nothing_is_an_empty_drawing() -> None:
    alt, found = cells([[0] * 4, [0] * 4])
    assert found == []
    assert "none" in alt


def record(run_id: str, *labels: str, counts: list[list[int]]) -> Record:
    joint = {
        "title": "tokens",
        "x_label": "gain",
        "y_label": "loss",
        "x_edges": [0.0],
        "y_edges": [1.0],
        "counts": counts,
    }
    content = {
        "schema": 1, "id": run_id, "paper": "demo", "program": "evaluate", "recipe": 1, "labels": labels,
        "scale": "laptop", "seed": 0, "status": "DONE", "config": {}, "parents": {}, "metrics": {}, "series": {},
        "cost": {}, "provenance": {"joint": joint | {"counts": counts}},
    }  # fmt: skip
    return Record.model_validate(content)


def test_seeds_are_summed_and_runs_that_two_ablations_share_are_drawn_in_the_first() -> None:
    shared = [
        record(f"a{seed}", f"one/base/s{seed}", f"two/base/s{seed}", counts=[[1, 0], [0, seed]]) for seed in (0, 1)
    ]
    own = record("b", "two/other/s0", counts=[[0, 3], [0, 0]])
    found = panels(
        {"one": ("base",), "two": ("base", "other"), "three": ("x",)}, Samples([*shared, own], scale="laptop")
    )
    (first,), (second,) = found["one"], found["two"]
    assert first.figures[0].alt.endswith("33% of 3 right of the middle.")
    assert (len(first.figures), first.note) == (1, "")
    assert [figure.name for figure in second.figures] == ["two--joint--other"]
    assert second.note == "The runs of base are those of an earlier ablation, which shows theirs."
    assert "three" not in found

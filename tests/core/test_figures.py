"""The joint distribution as a drawing: a cell for each bin that holds something, its share in words."""

from __future__ import annotations

import xml.etree.ElementTree as ElementTree

import pytest

from retrace.core.figures import joint_figure

SVG = "{http://www.w3.org/2000/svg}"


def cells(counts: list[list[int]]) -> tuple[str, list[ElementTree.Element]]:
    drawn = joint_figure(
        "joint", "a < b", x_edges=(-0.5, 0.5, 2.0), y_edges=(1.0,), counts=counts, x_label="gain", y_label="loss"
    )
    root = ElementTree.fromstring(drawn.standalone())
    return drawn.alt, [rect for rect in root.iter(f"{SVG}rect") if rect.get("class") == "cell"]


def test_every_bin_that_holds_tokens_is_a_cell_and_darker_the_more_it_holds() -> None:
    alt, found = cells([[0, 90, 3, 0], [1, 0, 0, 6]])
    shades = {rect.findtext(f"{SVG}title"): float(rect.get("fill-opacity") or 0) for rect in found}
    assert list(shades) == [
        "gain -0.5 to 0.5, loss below 1: 90.00%",
        "gain 0.5 to 2, loss below 1: 3.00%",
        "gain below -0.5, loss from 1: 1.00%",
        "gain from 2, loss from 1: 6.00%",
    ]
    by_count = [shades[title] for title in sorted(shades, key=lambda title: float(title.split()[-1][:-1]))]
    assert by_count == sorted(by_count)
    assert by_count[-1] == pytest.approx(1.0)
    assert "9% of 100 right of the middle" in alt
    assert "a < b" in alt
    low, high = (float(rect.get("y") or 0) for rect in (found[0], found[-1]))
    assert high < low  # larger losses stand higher
    assert float(found[1].get("x") or 0) > float(found[0].get("x") or 0)


def test_nothing_is_an_empty_drawing() -> None:
    alt, found = cells([[0] * 4, [0] * 4])
    assert found == []
    assert "none" in alt

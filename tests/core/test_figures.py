"""Figures as drawings: cells of a joint distribution; profiles over depth, measured upon predicted."""

from __future__ import annotations

import xml.etree.ElementTree as ElementTree

import pytest

from retrace.core.figures import joint_figure
from retrace.core.profiles import ArmProfile, arm_profiles, profile_figures

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


def lines(drawing: str, kind: str) -> list[list[tuple[float, float]]]:
    found = [line for line in ElementTree.fromstring(drawing).iter(f"{SVG}polyline") if kind in str(line.get("class"))]
    return [[tuple(map(float, pair.split(","))) for pair in str(line.get("points")).split()] for line in found]  # type: ignore[misc]


def test_a_profile_falls_by_equal_steps_for_equal_factors_and_leaves_out_what_has_no_logarithm() -> None:
    arm = ArmProfile("a < b", [[(0.0, 1e-6), (0.25, 0.0), (0.5, 1e-3), (1.0, 1.0)]], [(0.0, 1e-6), (1.0, 1.0)])
    (found,) = profile_figures("profile", "gradient", [arm], logarithmic=True)
    ((_, low), (_, middle), (_, high)) = lines(found.standalone(), "curve")[0]
    assert low - middle == pytest.approx(middle - high, abs=0.02)
    assert low > middle > high
    (theory,) = lines(found.standalone(), "theory")
    assert theory == [lines(found.standalone(), "curve")[0][i] for i in (0, 2)]
    assert "a < b: from 1e-06 to 1" in found.alt


def test_more_arms_than_colours_are_spread_over_figures_of_one_scale() -> None:
    arms = [ArmProfile(f"arm {i}", [[(0.0, 1.0), (1.0, 1.0 + i)]]) for i in range(8)]
    one, two = profile_figures("profile", "variance", arms, logarithmic=False)
    assert (one.name, two.name) == ("profile--1", "profile--2")
    assert len(lines(one.standalone(), "curve")) + len(lines(two.standalone(), "curve")) == 8
    flat = [lines(one.standalone(), "curve")[0][0][1], lines(two.standalone(), "curve")[0][0][1]]
    assert flat[0] == flat[1]


def test_notes_of_records_become_profiles_an_arm_each_with_a_curve_for_every_seed() -> None:
    note = {"variance": {"log": True, "measured": [[0.0, 1.0], [1.0, 2.0]], "predicted": [[0.0, 1.0], [1.0, 2.1]]}}
    found = arm_profiles({"deep": [note, note], "none": []})
    logarithmic, (deep,) = found["variance"]
    assert logarithmic
    assert (deep.arm, len(deep.measured), len(deep.predicted)) == ("deep", 2, 2)

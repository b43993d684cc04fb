"""Profiles over depth as drawings, measured upon predicted."""

from __future__ import annotations

import xml.etree.ElementTree as ElementTree

import pytest
from drawings import SVG, lines, steps

from retrace.papers.deepscalelm.profile_figures import ArmProfile, agreement_figure, arm_profiles, profile_figures


def test_a_profile_falls_by_equal_steps_for_equal_factors_and_leaves_out_what_has_no_logarithm() -> None:
    arm = ArmProfile("a < b", [[(0.0, 1e-6), (0.25, 0.0), (0.5, 1e-3), (1.0, 1.0)]], [(0.0, 1e-6), (1.0, 1.0)])
    (found,) = profile_figures("profile", "gradient", [arm], logarithmic=True)
    ((_, low), (_, middle), (_, high)) = lines(found.standalone(), "curve")[0]
    assert low - middle == pytest.approx(middle - high, abs=0.11)
    assert low > middle > high
    (theory,) = lines(found.standalone(), "theory")
    assert theory == [pytest.approx(lines(found.standalone(), "curve")[0][i]) for i in (0, 2)]
    assert "a < b: from 1e-06 to 1" in found.alt


def test_more_arms_than_colours_are_spread_over_figures_of_one_scale() -> None:
    arms = [ArmProfile(f"arm {i}", [[(0.0, 1.0), (1.0, 1.0 + i)]]) for i in range(8)]
    one, two = profile_figures("profile", "variance", arms, logarithmic=False)
    assert (one.name, two.name) == ("profile--1", "profile--2")
    assert len(lines(one.standalone(), "curve")) + len(lines(two.standalone(), "curve")) == 8
    flat = [lines(one.standalone(), "curve")[0][0][1], lines(two.standalone(), "curve")[0][0][1]]
    assert flat[0] == flat[1]
    assert [len(lines(drawn.standalone(), "curve")) for drawn in (one, two)] == [4, 4]  # shared out evenly


def test_notes_of_records_become_profiles_an_arm_each_with_a_curve_for_every_seed() -> None:
    note = {"variance": {"log": True, "measured": [[0.0, 1.0], [1.0, 2.0]], "predicted": [[0.0, 1.0], [1.0, 2.1]]}}
    found = arm_profiles({"deep": [note, note], "none": []})
    logarithmic, (deep,) = found["variance"]
    assert logarithmic
    assert (deep.arm, len(deep.measured), len(deep.predicted)) == ("deep", 2, 2)


def test_measured_against_predicted_lies_on_the_diagonal_where_both_agree_and_the_error_is_told() -> None:
    places = [index / 9 for index in range(10)]
    exact = ArmProfile("exact", [[(x, 10 ** (3 * x)) for x in places]], [(x, 10 ** (3 * x)) for x in places])
    off = ArmProfile("off", [[(x, 1.2 * 10 ** (3 * x)) for x in places]], [(x, 10 ** (3 * x)) for x in places])
    found = agreement_figure("f", "variance", [exact, off], logarithmic=True)
    assert found is not None
    assert "largest of an arm 20.0 %, off" in found.alt
    tree = ElementTree.fromstring(found.standalone())
    diagonal = next(line for line in tree.iter(f"{SVG}line") if line.get("class") == "base")
    left, bottom, right, top = (float(str(diagonal.get(key))) for key in ("x1", "y1", "x2", "y2"))
    on, above = ([(x, y - bottom - (x - left) * (top - bottom) / (right - left)) for x, y in dots] for dots in
                 (steps_of_dots(path) for path in tree.iter(f"{SVG}path")))  # fmt: skip
    assert len(on) == len(above) == 4
    assert max(abs(distance) for _, distance in on) < 0.2
    assert all(distance < -1 for _, distance in above)
    assert agreement_figure("f", "variance", [ArmProfile("a", [[(0.0, 1.0)]])], logarithmic=True) is None
    zero = ArmProfile("zero", [[(0.0, 0.1), (1.0, 0.1)]], predicted=[(0.0, 0.0), (1.0, 0.0)])
    assert agreement_figure("f", "correlation", [zero], logarithmic=False) is None


def steps_of_dots(path: ElementTree.Element) -> list[tuple[float, float]]:
    element = ElementTree.Element("path", {"d": str(path.get("d")).replace("h0", " ")})
    return steps(element)

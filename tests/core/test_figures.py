"""Figures as drawings: cells of a joint distribution; profiles over depth, measured upon predicted."""

from __future__ import annotations

import re
import xml.etree.ElementTree as ElementTree
from itertools import accumulate, pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from retrace.core.figures import MANY_SEEDS, curve_figure, joint_figure
from retrace.core.profiles import ArmProfile, agreement_figure, arm_profiles, profile_figures
from retrace.core.samplefigure import ArmValues, sample_figure
from retrace.core.svg import polyline

SVG = "{http://www.w3.org/2000/svg}"


def steps(path: ElementTree.Element) -> list[tuple[float, float]]:
    """The points of a path, whose numbers are steps from each to the next."""
    numbers = [float(number) for number in re.findall(r"-?(?:\d*\.\d+|\d+)", str(path.get("d")))]
    return list(zip(accumulate(numbers[0::2]), accumulate(numbers[1::2]), strict=False))


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


def lines(drawing: str, kind: str) -> list[list[tuple[float, float]]]:
    found = [line for line in ElementTree.fromstring(drawing).iter(f"{SVG}path") if kind in str(line.get("class"))]
    return [steps(line) for line in found]


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


def test_curves_of_many_seeds_become_their_median_in_a_band_that_holds_all_of_them() -> None:
    curves = [((0, 0.0), (10, float(seed)), *(((20, 1.0),) if seed else ())) for seed in range(MANY_SEEDS + 1)]
    few, many = (curve_figure("c", "loss", {"a": curves[:n]}) for n in (MANY_SEEDS, MANY_SEEDS + 1))
    assert len(lines(few.standalone(), "curve")) == MANY_SEEDS
    assert lines(few.standalone(), "band") == []
    (band,), (median,) = (lines(many.standalone(), kind) for kind in ("band", "curve"))
    assert len(median) == 3  # also where a run that ended early has no value
    (_, lowest, _), (_, highest, _) = band[:3], band[:2:-1]
    assert median[1][1] == pytest.approx((lowest[1] + highest[1]) / 2, abs=0.1)  # upwards is smaller
    assert lowest[1] > median[1][1] > highest[1]
    assert "the median of the seeds in a band that holds all of them" in many.alt


def test_many_dots_of_an_arm_are_one_mark_with_all_of_them() -> None:
    arms = [ArmValues(name, {seed: seed / 7 for seed in range(MANY_SEEDS + 1)}) for name in ("a", "b")]
    drawn = sample_figure("s", "metric", arms, baseline="a").standalone()
    assert [len(lines(drawn, kind)) for kind in ("dots", "pair")] == [2, 0]
    assert drawn.count("h0") == 2 * (MANY_SEEDS + 1)


@given(st.lists(st.tuples(st.floats(-1e4, 1e4), st.floats(-1e4, 1e4)), min_size=1, max_size=20))
def test_a_line_in_steps_passes_its_points_to_a_tenth(points: list[tuple[float, float]]) -> None:
    drawn = steps(ElementTree.fromstring(polyline(points, "curve")))
    assert drawn == [pytest.approx(point, abs=0.051) for point in points]


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


def names(drawing: str) -> dict[str, float]:
    """The heights at which arms are named."""
    found = ElementTree.fromstring(drawing).iter(f"{SVG}text")
    return {str(text.text): float(str(text.get("y"))) for text in found if text.get("class") == "strong"}


def test_few_arms_stand_side_by_side_and_many_in_rows_in_which_each_is_named_in_full() -> None:
    few = [ArmValues(arm, {0: 1.0, 1: 2.0}) for arm in ("none", "one")]
    assert len(set(names(sample_figure("f", "score", few, baseline="none").standalone()).values())) == 1
    many = [ArmValues(f"vanilla_with_{2**i}_layers", {0: 1.0, 1: 2.0}) for i in range(8)]
    drawn = names(sample_figure("f", "score", many, baseline="vanilla_with_1_layers").standalone())
    assert list(drawn) == [arm.arm for arm in many]
    assert all(two - one > 15 for one, two in pairwise(drawn.values()))


def test_an_axis_is_logarithmic_where_values_span_decades_and_says_so() -> None:
    def drawn(values: list[float]) -> str:
        arms = [ArmValues(f"an arm of a long name {i}", {0: value}) for i, value in enumerate(values)]
        return sample_figure("f", "variance", arms, baseline="").standalone()

    assert "logarithmic axis" in drawn([1.0, 10.0, 100.0, 1000.0])
    for values in ([1.0, 2.0, 3.0, 4.0], [-1.0, 10.0, 100.0, 1000.0], [0.001, 0.01, 0.1, 1.0]):
        assert "logarithmic axis" not in drawn(values)

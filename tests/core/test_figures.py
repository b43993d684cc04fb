"""Figures as drawings: every sample, curves over training, and how many of them are drawn as one."""

from __future__ import annotations

import xml.etree.ElementTree as ElementTree
from itertools import pairwise

import pytest
from drawings import SVG, lines, steps
from hypothesis import given
from hypothesis import strategies as st

from retrace.core.figures import MANY_SEEDS, curve_figure, file_name
from retrace.core.samplefigure import ArmValues, sample_figure
from retrace.core.svg import polyline


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


def test_an_arm_with_many_overrides_gives_a_name_that_a_file_system_takes_and_no_other_arm_has() -> None:
    one, two = (file_name("size", f"{'key=value,' * 60}last={last}") for last in range(2))
    assert one != two
    assert max(map(len, (one, two))) < 200
    assert file_name("size", "a/b c") == "size--a-b-c"

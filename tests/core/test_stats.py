"""Closed forms against simulation and against numbers worked out by hand."""

from __future__ import annotations

import math
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy.special import stdtrit

from retrace.core.stats import detectable_effect, estimate, paired_differences, sign_test, t_quantile, trend_slopes

FINITE = st.floats(-1e6, 1e6)


def test_an_interval_worked_out_by_hand() -> None:
    found = estimate([1.0, 2.0, 3.0])  # mean 2, sd 1, t(2, 97.5 %) = 4.302653
    assert found is not None
    assert (found.mean, found.n, found.sd) == (2.0, 3, 1.0)
    half = 4.302652729911275 / math.sqrt(3)
    assert found.low == pytest.approx(2 - half, rel=1e-9)
    assert found.high == pytest.approx(2 + half, rel=1e-9)
    assert found.side == 0
    assert found.contains(0.0)


def test_missing_is_missing() -> None:
    assert estimate([]) is None
    one = estimate([0.0])
    assert one is not None
    assert (one.mean, one.sd, one.low, one.high, one.side) == (0.0, None, None, None, 0)
    assert not one.contains(0.0)
    with pytest.raises(ValueError, match="finite"):
        estimate([1.0, math.nan])


def test_equal_samples_have_no_spread_and_rounding_is_none() -> None:
    for values in ([1.0, 1.0, 1.0], [0.1 + 0.2, 0.3, 0.3]):
        found = estimate(values)
        assert found is not None
        assert not found.has_spread
        assert found.low == found.high == found.mean


def test_differences_are_paired_by_seed() -> None:
    a, b = {0: 0.9, 1: 0.8, 3: 0.5}, {3: 0.1, 0: 0.4, 2: 7.0}
    assert paired_differences(a, b) == pytest.approx({0: 0.5, 3: 0.4})


def test_pairing_takes_out_what_seeds_share() -> None:
    shared = [10.0, -3.0, 50.0, 7.0]
    a, b = {s: x + 1 + 0.01 * s for s, x in enumerate(shared)}, dict(enumerate(shared))
    paired = estimate(paired_differences(a, b).values())
    assert paired is not None
    assert paired.side == 1


def test_trend_by_hand_and_against_least_squares() -> None:
    arms = [{0: 1.0, 1: 5.0}, {0: 2.0, 1: 5.0}, {0: 4.0, 1: 5.0, 2: 9.0}]
    slopes = trend_slopes(arms)
    assert slopes == pytest.approx({0: 1.5, 1: 0.0})  # seed 2 lacks two arms
    assert slopes[0] == pytest.approx(np.polyfit([0, 1, 2], [1.0, 2.0, 4.0], 1)[0])
    with pytest.raises(ValueError, match="two or more"):
        trend_slopes(arms[:1])


@given(st.lists(st.tuples(FINITE, FINITE), min_size=2, max_size=8))
def test_a_trend_over_two_arms_is_the_paired_difference(pairs: list[tuple[float, float]]) -> None:
    first, second = ({seed: pair[k] for seed, pair in enumerate(pairs)} for k in (0, 1))
    assert trend_slopes([first, second]) == pytest.approx(paired_differences(second, first), abs=1e-6)


@given(st.lists(FINITE, min_size=2, max_size=20), FINITE)
def test_an_interval_moves_with_its_samples(values: list[float], shift: float) -> None:
    found, moved = estimate(values), estimate([value + shift for value in values])
    assert found is not None
    assert moved is not None
    assert found.low is not None
    assert found.high is not None
    assert found.low <= found.mean <= found.high
    assert moved.mean == pytest.approx(found.mean + shift, abs=1e-6)


@pytest.mark.parametrize("n", [3, 5, 10])
def test_the_interval_covers_the_truth_in_95_of_100(n: int) -> None:
    draws = np.random.default_rng(n).normal(0.3, 2.0, size=(20_000, n))
    half = t_quantile(n - 1) * draws.std(axis=1, ddof=1) / math.sqrt(n)
    covered = (abs(draws.mean(axis=1) - 0.3) <= half).mean()
    assert covered == pytest.approx(0.95, abs=0.006)  # four standard errors
    first = estimate(draws[0])
    assert first is not None
    assert first.high is not None
    assert first.high - first.mean == pytest.approx(half[0])


@pytest.mark.parametrize("n", [2, 3, 5, 10])
def test_the_detectable_effect_is_called_in_80_of_100(n: int) -> None:
    effect = detectable_effect(sd=0.7, n=n)
    assert effect is not None
    draws = np.random.default_rng(n).normal(effect, 0.7, size=(20_000, n))
    half = t_quantile(n - 1) * draws.std(axis=1, ddof=1) / math.sqrt(n)
    called = (draws.mean(axis=1) - half > 0).mean()
    assert called == pytest.approx(0.80, abs=0.012)


def test_what_can_not_be_known_has_no_detectable_effect() -> None:
    assert detectable_effect(sd=1.0, n=1) is None
    assert detectable_effect(sd=0.0, n=9) is None
    few, many = detectable_effect(sd=1.0, n=3), detectable_effect(sd=1.0, n=30)
    assert few is not None
    assert many is not None
    assert few > 3.0 > 0.6 > many


def test_sign_test() -> None:
    assert [sign_test(n) for n in (1, 3, 6)] == [1.0, 0.25, 0.03125]


def test_a_value_of_scipy_is_kept_on_disk_to_the_last_digit_and_needs_no_import_the_next_time(tmp_path: Path) -> None:
    code = (
        "import sys; from retrace.core.stats import detectable_effect, t_quantile; "
        "print(t_quantile(7), detectable_effect(sd=1.5, n=8), 'scipy.special' in sys.modules)"
    )
    environment = {**os.environ, "XDG_CACHE_HOME": str(tmp_path)}
    first, second = (
        subprocess.run(
            [sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True
        ).stdout.split()
        for _ in range(2)
    )
    assert first[:2] == second[:2] == [repr(t_quantile(7)), repr(detectable_effect(sd=1.5, n=8))]
    assert float(first[0]) == float(stdtrit(7, 0.975))
    assert [first[2], second[2]] == ["True", "False"]

"""Power plans: seeds that decide a claim, checked by drawing seeds, and what no number of seeds decides."""

from __future__ import annotations

import io
import math

import numpy as np
import pytest
from rich.console import Console

from retrace.core.claims import Claim, load_claims
from retrace.core.config import CONFIGS, validate
from retrace.core.cost import Expected
from retrace.core.plan import RunSpec, plan
from retrace.core.power import PowerPlan, plan_power, show
from retrace.core.samples import Samples
from retrace.core.stats import estimate, seeds_needed, spread_range
from retrace.core.verdicts import Verdict, judge

SLUG = "quietstar"


def share_decided(n: int, *, mean: float, sd: float, low: float, high: float) -> float:
    """The share of 20,000 experiments of n seeds whose interval lies between low and high."""
    samples = np.random.default_rng(n).normal(mean, sd, size=(20_000, n))
    found = [estimate(row) for row in samples.tolist()]
    return sum(e.low > low and e.high < high for e in found if e and e.low is not None and e.high is not None) / 20_000


@pytest.mark.parametrize(
    ("mean", "sd", "low", "high"),
    [(1.0, 1.0, 0, math.inf), (-0.5, 0.3, -math.inf, 0), (0.02, 0.1, -0.1, 0.1), (0.0, 0.2, -0.15, 0.15)],
)
def test_with_so_many_seeds_four_experiments_of_five_decide_and_with_one_less_fewer(
    mean: float, sd: float, low: float, high: float
) -> None:
    n = seeds_needed(mean=mean, sd=sd, low=low, high=high)
    assert n is not None
    assert share_decided(n, mean=mean, sd=sd, low=low, high=high) >= 0.79
    if n > 3:
        assert share_decided(n - 1, mean=mean, sd=sd, low=low, high=high) < 0.81


def test_no_number_of_seeds_decides_what_lies_on_the_other_side() -> None:
    assert seeds_needed(mean=-0.1, sd=1, low=0, high=math.inf) is None
    assert seeds_needed(mean=0.2, sd=1, low=-0.1, high=0.1) is None
    assert seeds_needed(mean=1e-9, sd=1, low=0, high=math.inf) is None  # a million would not do


def test_the_range_of_a_spread_holds_the_true_one_in_four_of_five_draws() -> None:
    draws = np.random.default_rng(0).normal(0, 2.0, size=(10_000, 3)).std(axis=1, ddof=1)
    held = [low <= 2.0 <= high for low, high in (spread_range(sd=float(sd), n=3) for sd in draws)]
    assert np.mean(held) == pytest.approx(0.8, abs=0.02)


CLAIM = {"id": "one", "says": "x", "locus": "x", "ablation": "thoughts", "metric": "test/prob"}
CLAIM |= {"compare": ["thoughts", "none"], "expect": {"direction": "up"}, "testable_at": ["laptop", "gpu"]}


def claim(**changes: object) -> Claim:
    return validate(Claim, {**CLAIM, **changes}, source="test")


def seen(of: Claim, *differences: float, scale: str = "laptop") -> Verdict:
    by_seed = dict(enumerate(differences))
    blank = judge(of, Samples([], scale=scale))
    return Verdict(of, scale, blank.outcome, "", blank.arms, by_seed, estimate(differences), None)


def power_of(of: Claim, *verdicts: Verdict, scale: str = "laptop") -> PowerPlan:
    specs = plan([f"{SLUG}/thoughts"], [f"scale={scale}"])
    by_scale: dict[str, list[Verdict]] = {}
    for verdict in verdicts:
        by_scale.setdefault(verdict.scale, []).append(verdict)
    times: dict[str, Expected | None] = {spec.id: Expected(3600.0, ("a CPU",)) for spec in specs}
    return plan_power([of], by_scale, specs, times, scale=scale)


def test_seeds_are_told_with_what_the_spread_of_three_leaves_open_and_with_what_one_costs() -> None:
    (power,) = power_of(claim(), seen(claim(), 0.3, 0.1, 0.2)).known
    assert power.needed == seeds_needed(mean=0.2, sd=0.1, low=0, high=math.inf)
    assert power.fewest is not None
    assert power.needed is not None
    assert power.most is not None
    assert power.fewest < power.needed < power.most
    assert power.planned == 3
    specs = plan([f"{SLUG}/thoughts"], ["scale=laptop"])
    assert power.hours == pytest.approx(len(specs) / 3)  # an hour a run, base models too


@pytest.mark.parametrize(
    ("expect", "differences", "beyond"),
    [
        ({"direction": "up"}, (-0.3, 0.1, -0.1), (-math.inf, 0)),
        ({"direction": "down"}, (0.3, -0.1, 0.1), (0, math.inf)),
        ({"direction": "none", "margin": 0.05}, (0.3, -0.1, 0.1), (0.05, math.inf)),
        ({"direction": "none", "margin": 0.05}, (-0.3, 0.1, -0.1), (-math.inf, -0.05)),
    ],
)
def test_where_the_mean_speaks_against_a_claim_the_seeds_are_those_that_contradict_it(
    expect: dict[str, object], differences: tuple[float, ...], beyond: tuple[float, float]
) -> None:
    of = claim(expect=expect)
    (power,) = power_of(of, seen(of, *differences)).known
    found = estimate(differences)
    assert found is not None
    assert found.sd is not None
    assert power.against
    assert power.needed == seeds_needed(mean=found.mean, sd=found.sd, low=beyond[0], high=beyond[1])
    out = io.StringIO()
    show(SLUG, PowerPlan((power,), ()), "laptop", unit="core-hours", console=Console(file=out, width=200))
    assert f"against: {power.needed} (" in out.getvalue()
    assert "with so many seeds would contradict it" in out.getvalue()


@pytest.mark.parametrize(("differences", "seeds"), [((-1.0, -1.0, -1.0), 3), ((0.0, 0.0, 0.0), None)])
def test_seeds_that_agree_are_enough_to_contradict_and_no_number_where_none_differs(
    differences: tuple[float, ...], seeds: int | None
) -> None:
    (power,) = power_of(claim(), seen(claim(), *differences)).known
    assert (power.against, power.needed) == (True, seeds)
    out = io.StringIO()
    show(SLUG, PowerPlan((power,), ()), "laptop", unit="core-hours", console=Console(file=out, width=200))
    assert ("against: 3" if seeds else "none: no seed differs") in out.getvalue()


def test_without_spread_three_seeds_that_agree_are_enough() -> None:
    (power,) = power_of(claim(), seen(claim(), 1.0, 1.0, 1.0)).known
    assert (power.against, power.needed) == (False, 3)


def test_the_largest_scale_on_record_that_is_no_larger_is_taken_and_none_where_there_is_none() -> None:
    both = (seen(claim(), 0.3, 0.1, 0.2), seen(claim(), 0.5, 0.6, 0.4, scale="gpu"))
    assert power_of(claim(), *both, scale="gpu").known[0].seen.scale == "gpu"
    assert power_of(claim(), *both).known[0].seen.scale == "laptop"
    assert power_of(claim(), both[1]).unknown == (claim(),)
    assert power_of(claim(), seen(claim(), 0.3)).unknown == (claim(),)  # one seed has no spread
    assert power_of(claim(testable_at=["paper"]), *both) == PowerPlan((), ())


def test_a_claim_of_another_test_takes_the_widest_of_its_like_and_says_so() -> None:
    asked = claim(id="real", metric="real/prob", testable_at=["gpu"])
    like = [seen(claim(id="narrow"), 0.3, 0.1, 0.2), seen(claim(id="wide"), 0.9, 0.1, 0.2)]
    other = [
        seen(claim(id="loss", metric="test/loss"), 0.3, -8, 9),
        seen(claim(id="x", expect={"direction": "down"}), 9, 0),
    ]
    found = power_of(asked, *like, *other, scale="gpu")
    assert [power.seen.claim.id for power in found.known] == ["wide"]
    out = io.StringIO()
    show(SLUG, found, "gpu", unit="GPU-hours", console=Console(file=out, width=200))
    assert "laptop, n=3, wide" in out.getvalue()
    assert (
        "assumed: at scale gpu the true difference and its spread over seeds are those seen at laptop" in out.getvalue()
    )


def test_hours_that_leave_out_runs_of_unknown_time_are_told_as_the_least() -> None:
    specs = plan([f"{SLUG}/thoughts"], ["scale=laptop"])
    times: dict[str, Expected | None] = {spec.id: Expected(3600.0, ("a CPU",)) for spec in specs}
    times[specs[0].id] = None
    out = io.StringIO()
    found = plan_power([claim()], {"laptop": [seen(claim(), 0.3, 0.1, 0.2)]}, specs, times, scale="laptop")
    show(SLUG, found, "laptop", unit="core-hours", console=Console(file=out, width=200))
    assert f"at least {(len(specs) - 1) / 3:.3g}" in out.getvalue()


@pytest.mark.parametrize("scale", ["laptop", "gpu", "paper"])
@pytest.mark.parametrize("paper", sorted(path.parent.name for path in CONFIGS.glob("*/claims.yaml")))
def test_every_claim_of_a_scale_is_in_its_power_plan_once(paper: str, scale: str) -> None:
    claims = load_claims(CONFIGS / paper / "claims.yaml")
    specs: list[RunSpec] = plan([paper], [f"scale={scale}"])
    found = plan_power(claims, {}, specs, {}, scale=scale)
    assert [c.id for c in found.unknown] == [c.id for c in claims if scale in c.testable_at]

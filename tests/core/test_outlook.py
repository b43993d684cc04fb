"""What was not run: the numbers of `retrace plan`, for those runs that have no record."""

from __future__ import annotations

import pytest

from retrace.core.claims import load_claims
from retrace.core.config import CONFIGS
from retrace.core.outlook import MACHINES, outlooks
from retrace.core.plan import plan
from retrace.core.planview import cost_of

SLUG = "quietstar"
CLAIMS = load_claims(CONFIGS / SLUG / "claims.yaml")


def test_the_paper_scale_costs_what_its_plan_says_and_each_run_counts_once() -> None:
    (found,) = outlooks(SLUG, CLAIMS, scales=["smoke", "paper"], records=[])
    specs = plan([SLUG], ["scale=paper", f"hardware={MACHINES['paper']}"])
    hardware = specs[0].hardware
    assert hardware.peak_flops is not None
    assert hardware.planned_mfu is not None
    assert found.total.runs == len(specs)
    assert found.total.flops == pytest.approx(sum(cost_of(spec).flops for spec in specs))
    assert found.unit == "GPU-hours"
    held = [cost.flops * (1 if cost.shared else hardware.processes) for cost in map(cost_of, specs)]  # idle ones too
    expected = sum(held) / (hardware.peak_flops * hardware.planned_mfu) / 3600
    assert found.total.hours == pytest.approx(expected)
    assert sum(need.runs for need in found.ablations) > found.total.runs  # shared runs count in each ablation
    assert found.claims == tuple(claim.id for claim in CLAIMS if "paper" in claim.testable_at)


def test_time_that_is_not_known_is_not_guessed() -> None:
    (found,) = outlooks(SLUG, CLAIMS, scales=["laptop"], records=[])
    assert found.unit == "core-hours"
    assert found.total.hours is None

"""Every config file composes, at every scale, into a plan; labels and ids are unique where they must be."""

from __future__ import annotations

import pytest

from retrace.core.config import CONFIGS, papers
from retrace.core.plan import load_ablations, plan

SCALES = [(slug, path.stem) for slug in papers() for path in sorted((CONFIGS / slug / "scale").glob("*.yaml"))]


@pytest.mark.parametrize(("slug", "scale"), SCALES)
def test_every_ablation_plans_at_every_scale(slug: str, scale: str) -> None:
    specs = plan([slug], [f"scale={scale}", "seed=0"])
    assert {spec.scale for spec in specs} == {scale}
    asked = {label for spec in specs for label in spec.labels}
    ablations = load_ablations(slug)
    assert asked == {f"{name}/{arm}/s0" for name, ablation in ablations.items() for arm in ablation.arms}


@pytest.mark.parametrize("slug", papers())
def test_arms_of_an_ablation_are_different_experiments(slug: str) -> None:
    for name, ablation in load_ablations(slug).items():
        specs = plan([f"{slug}/{name}"], ["scale=smoke", "seed=0"])
        leaves = [spec for spec in specs if not any(spec.id in other.parents.values() for other in specs)]
        assert len(leaves) == len(ablation.arms), f"two arms of {name} are the same run"


@pytest.mark.parametrize("slug", papers())
def test_ablations_have_three_seeds_at_least(slug: str) -> None:
    assert all(len(ablation.seeds) >= 3 for ablation in load_ablations(slug).values())

"""Every config file composes, at every scale, into a plan; labels and ids are unique where they must be."""

from __future__ import annotations

import pytest

from retrace.core.claims import load_claims, load_words
from retrace.core.config import CONFIGS
from retrace.core.discovery import papers
from retrace.core.plan import load_ablations, plan
from retrace.core.planview import cost_of

SCALES = [(slug, path.stem) for slug in papers() for path in sorted((CONFIGS / slug / "scale").glob("*.yaml"))]

SENSELESS = {  # ablations that name what other scales do not have
    "c4": ("smoke", "laptop"),  # text: theirs is generated
    "encoder_published": ("smoke", "laptop", "gpu"),  # weights: theirs are made
    "recipes": ("smoke", "laptop", "gpu"),
    "encoder_objective": ("paper",),  # how an encoder is made: there it is pretrained
}


@pytest.mark.parametrize(("slug", "scale"), SCALES)
def test_a_paper_plans_at_every_scale_the_ablations_that_are_asked_there(slug: str, scale: str) -> None:
    specs = plan([slug], [f"scale={scale}", "seed=0"])
    assert {spec.scale for spec in specs} == {scale}
    asked = {label for spec in specs for label in spec.labels}
    ablations = {name: ablation for name, ablation in load_ablations(slug).items() if scale in ablation.scales}
    assert asked == {f"{name}/{arm}/s0" for name, ablation in ablations.items() for arm in ablation.arms}


@pytest.mark.parametrize(("slug", "scale"), SCALES)
def test_an_ablation_plans_by_name_where_it_makes_sense_and_says_so_elsewhere(slug: str, scale: str) -> None:
    for name, ablation in load_ablations(slug).items():
        command = [f"{slug}/{name}"], [f"scale={scale}", "seed=0"]
        if scale in SENSELESS.get(name, ()):
            asked = " or ".join(load_ablations(slug)[name].scales)
            with pytest.raises(ValueError, match=f"{slug}/{name} is asked at scale {asked}, not at {scale}"):
                plan(*command)
            continue
        specs = plan(*command)
        assert {label for spec in specs for label in spec.labels} == {f"{name}/{arm}/s0" for arm in ablation.arms}
        assert all(cost_of(spec).flops > 0 for spec in specs)


@pytest.mark.parametrize("slug", papers())
def test_a_claim_is_testable_only_where_its_ablation_is_asked(slug: str) -> None:
    ablations = load_ablations(slug)
    for claim in load_claims(CONFIGS / slug / "claims.yaml"):
        assert set(claim.testable_at) <= set(ablations[claim.ablation].scales), claim.id


@pytest.mark.parametrize("slug", papers())
def test_arms_of_an_ablation_are_different_experiments(slug: str) -> None:
    for name, ablation in load_ablations(slug).items():
        specs = plan([f"{slug}/{name}"], [f"scale={ablation.scales[0]}", "seed=0"])
        leaves = [spec for spec in specs if not any(spec.id in other.parents.values() for other in specs)]
        assert len(leaves) == len(ablation.arms), f"two arms of {name} are the same run"


@pytest.mark.parametrize("slug", papers())
def test_ablations_have_three_seeds_at_least(slug: str) -> None:
    assert all(len(ablation.seeds) >= 3 for ablation in load_ablations(slug).values())


@pytest.mark.parametrize("slug", papers())
def test_every_metric_of_a_claim_is_told_in_words(slug: str) -> None:
    words = load_words(CONFIGS / slug / "metrics.yaml")
    metrics = {metric for claim in load_claims(CONFIGS / slug / "claims.yaml") for _, metric in claim.cells}
    assert metrics <= words.keys()
    assert len(set(words.values())) == len(words), "two metrics of one name"

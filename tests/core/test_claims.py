"""Claims as they are written, and the verdict in every case that records can come to."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from retrace.core.claims import Claim, load_claims
from retrace.core.record import Record
from retrace.core.samples import Planned, Samples
from retrace.core.verdicts import Verdict, judge

METRIC = "questions/prob"


def record(label: str, *, program: str = "evaluate", status: str = "DONE", **changes: Any) -> Record:
    """A record of one label; its id says what it is."""
    seed = int(label.rpartition("/s")[2])
    values: dict[str, Any] = {
        "schema": 1, "id": f"demo-{program}-{label.replace('/', '-')}", "paper": "demo", "program": program,
        "recipe": 1, "labels": (label,), "scale": "laptop", "seed": seed, "status": status, "config": {},
        "parents": {}, "metrics": {}, "series": {}, "cost": {},
        "provenance": {"hardware": "one CPU", "finished": "2026-01-01T00:00:00+00:00"},
    }  # fmt: skip
    return Record.model_validate(values | changes)


def records(arms: Mapping[str, Sequence[float | None]], *, metric: str = METRIC, **changes: Any) -> list[Record]:
    """Evaluations of ablation `size`: a value for every seed from 0; None leaves a seed out."""
    found = []
    for arm, values in arms.items():
        for seed, value in enumerate(values):
            if value is not None:
                found.append(record(f"size/{arm}/s{seed}", metrics={metric: value}, **changes))
    return found


def claim(**changes: Any) -> Claim:
    values: dict[str, Any] = {
        "id": "bigger_is_better", "says": "bigger is better", "locus": "Fig. 1", "ablation": "size", "metric": METRIC,
        "compare": ("big", "small"), "expect": {"direction": "up"}, "testable_at": ("laptop", "gpu", "paper"),
    }  # fmt: skip
    return Claim.model_validate(values | changes)


def verdict(
    found: Sequence[Record], *, scale: str = "laptop", planned: Sequence[Planned] = (), **changes: Any
) -> Verdict:
    return judge(claim(**changes), Samples(found, scale=scale, planned=planned))


CLEAR = {"big": [0.72, 0.70, 0.71], "small": [0.20, 0.21, 0.19]}  # differences 0.52, 0.49, 0.52


def test_reproduced_with_everything_that_it_was_computed_from() -> None:
    found = verdict(records(CLEAR))
    assert found.outcome == "reproduced"
    assert found.differences == pytest.approx({0: 0.52, 1: 0.49, 2: 0.52})
    assert found.estimate is not None
    assert found.estimate.mean == pytest.approx(0.51)
    assert found.estimate.low == pytest.approx(0.51 - 4.302652729911275 * 0.01)  # sd 0.01732 over sqrt 3
    assert [arm.values for arm in found.arms] == [dict(enumerate(CLEAR["big"])), dict(enumerate(CLEAR["small"]))]
    assert found.seeds == (0, 1, 2)
    assert found.hardware == ("one CPU",)
    assert len(found.records) == 6
    assert found.missing == ()


@pytest.mark.parametrize(
    ("expect", "outcome"),
    [
        ({"direction": "down"}, "contradicted"),
        ({"direction": "up", "value": 0.5}, "reproduced"),
        ({"direction": "up", "value": 50.0, "unit": "points"}, "reproduced"),
        ({"direction": "up", "value": 0.9}, "direction only"),
        ({"direction": "down", "value": -0.5}, "contradicted"),
    ],
)
def test_values_are_judged_at_the_scale_of_the_paper(expect: dict[str, Any], outcome: str) -> None:
    assert verdict(records(CLEAR, scale="paper"), scale="paper", expect=expect).outcome == outcome


@pytest.mark.parametrize(
    ("expect", "words"),
    [
        ({"direction": "up", "value": 3.5}, "up by 3.5"),
        ({"direction": "down", "value": -1.0}, "down by 1"),
        ({"direction": "none", "margin": 0.3}, "no difference above 0.3"),
        ({"direction": "none", "margin": 0.09, "unit": "share"}, "no difference above 9 % of small"),
    ],
)
def test_what_is_expected_is_told_without_a_second_minus(expect: dict[str, Any], words: str) -> None:
    assert claim(expect=expect).expected == words


def test_a_printed_value_can_not_be_judged_at_a_smaller_scale() -> None:
    found = verdict(records(CLEAR), expect={"direction": "up", "value": 0.51})
    assert found.outcome == "direction only"
    assert "scale laptop" in found.reason


def test_inconclusive_says_what_could_have_been_seen() -> None:
    found = verdict(records({"big": [0.5, 0.1, 0.9], "small": [0.4, 0.5, 0.2]}))
    assert found.outcome == "inconclusive"
    assert found.detectable is not None
    assert found.detectable > 1.0


def test_fewer_than_three_pairs_are_inconclusive_however_clear() -> None:
    found = verdict(records({"big": [0.9, 0.91, None], "small": [0.1, 0.1, 0.1]}))
    assert found.outcome == "inconclusive"
    assert "only 2 seeds" in found.reason
    assert found.missing == (f"big seed 2: no {METRIC} on record",)
    assert "only 1 seed has" in verdict(records({"big": [0.9], "small": [0.1]})).reason


def test_missing_seeds_are_left_out_and_named_never_zero() -> None:
    found = verdict(records({"big": [0.9, None, 0.8, 0.85], "small": [0.1, 0.12, 0.11, 0.1]}))
    assert found.outcome == "reproduced"
    assert found.seeds == (0, 2, 3)
    assert found.missing == (f"big seed 1: no {METRIC} on record",)


def test_no_records_and_not_tested() -> None:
    assert verdict([]).outcome == "no records"
    one_arm = verdict(records({"big": [0.9, 0.8, 0.7]}))
    assert one_arm.outcome == "no records"
    assert "arm small" in one_arm.reason
    other_scale = verdict(records(CLEAR, scale="smoke"), testable_at=("gpu",))
    assert other_scale.outcome == "not tested at this scale"
    assert "scale gpu" in other_scale.reason
    assert verdict(records(CLEAR, scale="smoke")).outcome == "no records"


def test_the_same_difference_in_every_seed_stands_on_agreement() -> None:
    found = verdict(records({"big": [1.0, 1.0, 1.0], "small": [0.0, 0.0, 0.0]}))
    assert found.outcome == "reproduced"
    assert "p = 0.25" in found.reason
    assert found.detectable is None
    none = verdict(records({"big": [0.3, 0.4, 0.5], "small": [0.3, 0.4, 0.5]}))
    assert none.outcome == "inconclusive"
    assert "no difference at all" in none.reason


def test_a_diverged_run_has_no_value_and_is_named() -> None:
    lost = record("size/small/s2", status="DIVERGED", metrics={METRIC: 99.0, "diverged_at": 7.0})
    found = verdict([*records(CLEAR)[:5], lost])
    assert found.outcome == "inconclusive"
    assert found.missing == ("small seed 2: diverged",)
    all_lost = [record(f"size/small/s{seed}", status="DIVERGED") for seed in range(3)]
    assert "every run of arm small diverged" in verdict([*records(CLEAR)[:3], *all_lost]).reason


def test_divergence_itself_can_be_claimed() -> None:
    lost = [record(f"size/small/s{seed}", program="train", status="DIVERGED") for seed in range(3)]
    fine = [record(f"size/big/s{seed}", program="train") for seed in range(3)]
    found = verdict([*fine, *lost], metric="diverged", expect={"direction": "down"})
    assert found.outcome == "reproduced"
    assert found.differences == {0: -1.0, 1: -1.0, 2: -1.0}
    mixed = verdict([*fine, *lost[:2], record("size/small/s2", program="train")], metric="diverged")
    assert mixed.outcome == "inconclusive"


def rates(arm: str, seed: int, statuses: Sequence[str], *, chosen: str | None) -> tuple[list[Record], list[Planned]]:
    """A chain of one training for each status, and a choice among them (`chosen`: its status, None if not yet run)."""
    label = f"size/{arm}/s{seed}"
    found = [
        record(label, program="train", id=f"demo-train-{arm}-{seed}-{i}", status=status, metrics={"loss": float(i)})
        for i, status in enumerate(statuses)
    ]
    parents = {f"rate_{i}": r.id for i, r in enumerate(found)}
    choice = record(label, program="select", status=chosen or "DONE", parents=parents, metrics={METRIC: 0.5})
    planned = [Planned(r.id, r.program, r.labels, r.status) for r in found]
    planned.append(Planned(choice.id, "select", choice.labels, chosen or "PLANNED", accepts_diverged=True))
    return [*found, *([choice] if chosen else [])], planned


def test_a_diverged_run_that_another_one_makes_use_of_is_no_divergence_of_the_arm() -> None:
    found, planned = rates("small", 0, ["DONE", "DIVERGED"], chosen="DONE")
    samples = Samples(found, scale="laptop", planned=planned)
    assert samples.values("size", "small", METRIC)[0].value == 0.5
    assert samples.values("size", "small", "diverged")[0].value == 0.0
    assert samples.trouble("size", "small") == {}


def test_an_arm_all_of_whose_runs_diverged_has_diverged() -> None:
    found, planned = rates("small", 0, ["DIVERGED", "DIVERGED"], chosen="DIVERGED")
    samples = Samples(found, scale="laptop", planned=planned)
    assert samples.values("size", "small", "diverged")[0].value == 1.0
    assert samples.trouble("size", "small") == {0: "diverged"}


def test_before_the_choice_a_diverged_run_says_nothing_of_the_arm() -> None:
    found, planned = rates("small", 0, ["DIVERGED", "DONE"], chosen=None)
    samples = Samples(found, scale="laptop", planned=planned)
    assert samples.values("size", "small", "diverged") == {}
    assert samples.trouble("size", "small") == {}


def test_whether_an_unfinished_chain_diverged_is_not_known() -> None:
    base = [record(f"size/{arm}/s{seed}", program="pretrain") for arm in CLEAR for seed in range(3)]
    trained = [record(f"size/big/s{seed}", program="train") for seed in range(3)]
    found = verdict([*base, *trained], metric="diverged", expect={"direction": "down"})
    assert found.outcome == "no records"
    assert set(found.arms[0].values.values()) == {0.0}
    assert found.arms[1].values == {}


def test_a_base_models_metric_never_stands_in_for_that_of_a_training() -> None:
    base = [record(f"size/{arm}/s{s}", program="pretrain", metrics={METRIC: 0.5}) for arm in CLEAR for s in range(3)]
    trained = [
        record(f"size/big/s{s}", program="train", metrics={METRIC: 0.9 + s / 100}, parents={"base": base[s].id})
        for s in range(3)
    ]
    found = verdict([*base, *trained])
    assert found.outcome == "no records"
    assert found.arms[0].values == {0: 0.9, 1: 0.91, 2: 0.92}


def test_a_failed_run_is_missing() -> None:
    found = records(CLEAR)
    planned = [Planned(r.id, r.program, r.labels, "FAILED" if r is found[2] else "DONE", "disk full") for r in found]
    told = verdict([r for r in found if r is not found[2]], planned=planned)
    assert told.outcome == "inconclusive"
    assert told.missing == ("big seed 2: failed",)


def test_a_trend_over_ordered_arms() -> None:
    arms = {"a": [0.1, 0.12, 0.11], "b": [0.3, 0.29, 0.3], "c": [0.5, 0.52, 0.51]}
    found = verdict(records(arms), compare=None, trend=("a", "b", "c"))
    assert found.outcome == "reproduced"
    assert found.differences == pytest.approx({0: 0.2, 1: 0.2, 2: 0.2}, abs=1e-9)
    shuffled = verdict(records(arms), compare=None, trend=("c", "b", "a"), expect={"direction": "up"})
    assert shuffled.outcome == "contradicted"


@pytest.mark.parametrize(
    ("big", "outcome"),
    [
        ([0.20, 0.22, 0.19], "reproduced"),  # differences 0, 0.01, 0
        ([0.20, 0.21, 0.19], "reproduced"),  # none in any seed
        ([0.50, 0.52, 0.49], "contradicted"),
        ([0.15, 0.30, 0.24], "inconclusive"),
    ],
)
def test_that_something_makes_no_difference_is_shown_by_an_interval_within_the_margin(
    big: list[float], outcome: str
) -> None:
    found = verdict(records({"big": big, "small": CLEAR["small"]}), expect={"direction": "none", "margin": 0.05})
    assert (found.outcome, found.detectable) == (outcome, None)
    assert "margin of 0.05" in found.reason
    turned = verdict(
        records({"big": big, "small": CLEAR["small"]}),
        compare=("small", "big"),
        expect={"direction": "none", "margin": 0.05},
    )
    assert turned.outcome == outcome


def test_a_margin_that_is_a_share_is_one_of_the_arm_that_is_compared_against() -> None:
    arms = {"big": [0.20, 0.22, 0.19], "small": [0.20, 0.21, 0.19]}
    found = verdict(records(arms), expect={"direction": "none", "margin": 0.25, "unit": "share"})
    assert found.margin == pytest.approx(0.05)
    assert found.outcome == "reproduced"
    narrow = verdict(records(arms), expect={"direction": "none", "margin": 0.01, "unit": "share"})
    assert narrow.outcome == "inconclusive"


def test_two_seeds_show_no_absence_of_a_difference() -> None:
    found = records({"big": [0.2, 0.2], "small": [0.2, 0.2]})
    assert verdict(found, expect={"direction": "none", "margin": 0.5}).outcome == "inconclusive"


def test_one_difference_beyond_another() -> None:
    arms = {**CLEAR, "wide": [0.25, 0.24, 0.25], "narrow": [0.20, 0.21, 0.21]}
    found = verdict(records(arms), beyond=("wide", "narrow"))
    assert found.outcome == "reproduced"
    assert found.differences == pytest.approx({0: 0.47, 1: 0.46, 2: 0.48})
    assert len(found.records) == 12
    other = verdict(records(arms), compare=("wide", "narrow"), beyond=("big", "small"))
    assert other.outcome == "contradicted"


def test_two_metrics_of_one_arm() -> None:
    found = [record(f"size/big/s{s}", metrics={"hard": 0.5 + s / 100, "easy": 0.01 * s**2}) for s in range(3)]
    assert verdict(found, metric=("hard", "easy"), compare=("big", "big")).outcome == "reproduced"


def test_records_of_an_earlier_config_are_left_out() -> None:
    old = [r.model_copy(update={"id": f"old-{r.id}"}) for r in records({"big": [0.0] * 3, "small": [0.9] * 3})]
    new = records(CLEAR)
    planned = [Planned(r.id, r.program, r.labels, "DONE") for r in new]
    samples = Samples([*new, *old], scale="laptop", planned=planned)
    assert judge(claim(), samples).outcome == "reproduced"
    assert samples.unused == 6
    later = [r.model_copy(update={"provenance": {"finished": "2027-01-01"}}) for r in old]
    assert verdict([*later, *new]).outcome == "contradicted"  # without a plan, the last that finished counts


def test_a_planned_run_counts_for_every_label_of_the_plan_also_for_those_that_its_record_does_not_have() -> None:
    found = records(CLEAR)
    planned = [Planned(r.id, r.program, (*r.labels, r.labels[0].replace("size", "width")), "DONE") for r in found]
    assert verdict(found, planned=planned, ablation="width").outcome == "reproduced"


@given(st.lists(st.tuples(st.floats(-1, 1), st.floats(-1, 1)), min_size=3, max_size=6))
def test_swapping_the_arms_swaps_the_verdict(pairs: list[tuple[float, float]]) -> None:
    found = records({"big": [a for a, _ in pairs], "small": [b for _, b in pairs]})
    one, other = verdict(found).outcome, verdict(found, compare=("small", "big")).outcome
    assert {one, other} in ({"reproduced", "contradicted"}, {"inconclusive"})


YAML = """
- id: bigger_is_better
  says: bigger is better
  locus: Fig. 1
  ablation: size
  metric: questions/prob
  compare: [big, small]
  expect: {direction: up, value: 5.0, unit: points}
  paper: "5.9 -> 10.9 (GSM8K, Mistral-7B)"
  testable_at: [laptop, gpu, paper]
- id: order
  says: more is more
  locus: Fig. 2
  ablation: size
  metric: questions/prob
  trend: [small, middle, big]
  expect: {direction: up, value: null}
  testable_at: [laptop]
"""
ARMS = {"size": ["small", "middle", "big"]}


def test_claims_are_read_in_order(tmp_path: Path) -> None:
    path = tmp_path / "claims.yaml"
    path.write_text(YAML)
    first, second = load_claims(path, arms=ARMS)
    assert (first.value, first.sign, first.paper) == (0.05, 1, "5.9 -> 10.9 (GSM8K, Mistral-7B)")
    assert second.cells == (("small", METRIC), ("middle", METRIC), ("big", METRIC))


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("direction: up, value: 5.0", "direction: more, value: 5.0", "expect.direction='more'"),
        ("locus: Fig. 1", "place: Fig. 1", "place: no such key"),
        ("compare: [big, small]", "compare: [big, huge]", "arm 'huge' is not in ablation size"),
        ("compare: [big, small]", "compare: [big, big]", "an arm against itself"),
        ("compare: [big, small]", "compare: [big, small]\n  trend: [small, middle, big]", "not both"),
        ("trend: [small, middle, big]", "trend: [small, big]", "three or more"),
        ("value: null", "value: 3", "expect.value: null"),
        ("direction: up, value: null", "direction: none", "direction none needs a margin"),
        ("direction: up, value: null", "direction: up, margin: 0.1", "others have none"),
        ("direction: up, value: 5.0", "direction: none, margin: 1.0, value: 5.0", "no difference has no value"),
        ("direction: up, value: null", "direction: none, margin: 1.0, unit: points", "a margin may be a share"),
        ("direction: up, value: null", "direction: up, unit: share", "a margin may be a share"),
        ("trend: [small, middle, big]", "trend: [small, middle, big]\n  beyond: [small, big]", "beside compare"),
        ("ablation: size", "ablation: colour", "no such ablation"),
        ("id: order", "id: bigger_is_better", "a second claim of this id"),
        ("testable_at: [laptop]", "testable_at: [smoke]", "judges nothing"),
        ("testable_at: [laptop]", "testable_at: [phone]", "testable_at"),
        ("- id: bigger", "-- id: bigger", "claims.yaml"),
    ],
)
def test_a_wrong_claim_is_one_sentence(tmp_path: Path, old: str, new: str, message: str) -> None:
    path = tmp_path / "claims.yaml"
    path.write_text(YAML.replace(old, new))
    with pytest.raises(ValueError, match=r"claims\.yaml") as error:
        load_claims(path, arms=ARMS)
    assert message in str(error.value)
    assert "\n" not in str(error.value)


def test_five_thousand_records_are_judged_in_two_seconds() -> None:
    many = [record(f"size/arm{arm}/s{seed}", metrics={METRIC: seed / 1000}) for arm in range(50) for seed in range(100)]
    claims = [claim(id=f"claim_{arm}", compare=(f"arm{arm}", "arm0")) for arm in range(1, 50)]
    began = time.process_time()
    samples = Samples(many, scale="laptop")
    assert len([judge(claim, samples) for claim in claims]) == 49
    assert time.process_time() - began < 2.0


def test_of_several_trainings_in_a_chain_only_the_last_has_the_say() -> None:
    """Also while it is missing: the stage before it does not stand in."""
    found, planned = [], []
    for arm, value in (("big", 0.9), ("small", 0.1)):
        for seed in range(3):
            label, first = f"size/{arm}/s{seed}", f"demo-train-first-{arm}{seed}"
            early = record(label, program="train", metrics={METRIC: 0.5}, id=first)
            last = record(label, program="train", metrics={METRIC: value + seed / 100}, parents={"model": first})
            found += [last, early] if arm == "big" else [early]  # in whatever order they stand on disk
            planned += [Planned(r.id, r.program, r.labels, "DONE") for r in (early, last)]
    samples = Samples(found, scale="laptop", planned=planned)
    assert {s: v.value for s, v in samples.values("size", "big", METRIC).items()} == {0: 0.9, 1: 0.91, 2: 0.92}
    assert samples.values("size", "small", METRIC) == {}
    assert len(samples.chains["size"]["big"][0].records) == 2
    assert samples.chains["size"]["big"][0].complete
    assert not samples.chains["size"]["small"][0].complete


@pytest.mark.parametrize("expect", [{"direction": "down", "value": 5.0}, {"direction": "up", "value": -0.1}])
def test_a_printed_value_on_the_other_side_of_its_direction_is_refused(expect: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match="expected values above 0 with up, else below"):
        claim(expect=expect)

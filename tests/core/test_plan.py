"""Arms, seeds, shared runs, and what an override does to them."""

from __future__ import annotations

import pytest

from retrace.core.plan import RunSpec, plan

SMOKE = ["scale=smoke"]


def leaves(specs: list[RunSpec]) -> list[RunSpec]:
    parents = {parent for spec in specs for parent in spec.parents.values()}
    return [spec for spec in specs if spec.id not in parents]


def test_parents_come_before_children_and_each_run_once() -> None:
    specs = plan(["quietstar"], SMOKE)
    seen: set[str] = set()
    for spec in specs:
        assert spec.id not in seen
        assert set(spec.parents.values()) <= seen
        seen.add(spec.id)


def test_all_arms_of_a_seed_share_one_base_model() -> None:
    specs = plan(["quietstar"], SMOKE)
    assert len([spec for spec in specs if spec.program == "pretrain"]) == len({spec.seed for spec in specs}) == 3


def test_an_arm_shared_by_ablations_runs_once_with_all_labels() -> None:
    main = [s for s in plan(["quietstar"], [*SMOKE, "seed=0"]) if "mixing_head/head/s0" in s.labels][-1]
    assert {"mixing_head/head/s0", "thoughts/thoughts/s0", "reward/mixed/s0"} <= set(main.labels)


def test_evaluation_settings_do_not_retrain() -> None:
    one = {s.program: s.id for s in plan(["quietstar/main"], SMOKE)}
    two = {s.program: s.id for s in plan(["quietstar/main"], [*SMOKE, "eval.thought_seeds=[0,1,2]"])}
    assert (one["pretrain"], one["train"]) == (two["pretrain"], two["train"])
    assert one["evaluate"] != two["evaluate"]


def test_placement_changes_no_id() -> None:
    ids = [s.id for s in plan(["quietstar/main"], SMOKE)]
    moved = ["hardware.threads=4", "hardware.checkpoint_seconds=1", "tracking.wandb=off", "tracking.log_every=3"]
    assert [s.id for s in plan(["quietstar/main"], [*SMOKE, *moved])] == ids


def test_sweeping_the_key_of_the_arms_makes_arms_of_its_own() -> None:
    specs = plan(["quietstar/thought_length"], [*SMOKE, "thoughts.num_sampled=2,4", "seed=range(2)"])
    labels = {label for spec in leaves(specs) for label in spec.labels}
    assert labels == {f"thought_length/thoughts.num_sampled={n}/s{s}" for n in (2, 4) for s in (0, 1)}


def test_an_override_of_another_key_is_named_in_the_label() -> None:
    specs = plan(["quietstar/thoughts"], [*SMOKE, "seed=0", "train.meta_learning_rate=0.5"])
    labels = {label for spec in leaves(specs) for label in spec.labels}
    assert labels == {f"thoughts/{arm},train.meta_learning_rate=0.5/s0" for arm in ("none", "thoughts")}


def test_seeds_of_the_command_line_replace_those_of_the_file() -> None:
    assert {spec.seed for spec in plan(["quietstar/thoughts"], [*SMOKE, "seed=7,8"])} == {7, 8}


def test_one_arm_of_an_ablation_is_a_target_and_its_runs_are_those_of_the_ablation() -> None:
    whole = {spec.id: spec for spec in plan(["quietstar/thoughts"], [*SMOKE, "seed=0"])}
    one = plan(["quietstar/thoughts/thoughts"], [*SMOKE, "seed=0"])
    assert [spec.id for spec in one] == [spec.id for spec in whole.values() if "thoughts/thoughts/s0" in spec.labels]
    assert {label for spec in one for label in spec.labels} == {"thoughts/thoughts/s0"}
    with pytest.raises(ValueError, match=r"quietstar/thoughts/thought: no such arm; did you mean 'thoughts'\?"):
        plan(["quietstar/thoughts/thought"], SMOKE)


@pytest.mark.parametrize("sweep", ["hardware=cpu,gpu1", "hardware.threads=1,2", "tracking.log_every=range(1,3)"])
def test_a_sweep_over_where_runs_happen_is_refused_since_its_runs_are_the_same_ones(sweep: str) -> None:
    with pytest.raises(ValueError, match=r"=\w+: one of several values, and a run is the same one under each"):
        plan(["quietstar/main"], [*SMOKE, sweep])


def test_a_target_may_end_with_a_slash() -> None:
    for target in ("quietstar/main", "quietstar/thoughts", "quietstar/thoughts/none"):
        assert plan([f"{target}/"], SMOKE) == plan([target], SMOKE)

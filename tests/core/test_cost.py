"""Bytes and seconds from a config: by hand, on made-up hardware."""

from __future__ import annotations

import pytest

from retrace.core.config import Hardware
from retrace.core.cost import Cost, Expected, Memory, Rate, check_times, expected_time, measured_rates
from retrace.core.optim import Precision
from retrace.core.record import Record, RunCost

N = 1000
RATE = Rate(5e11, ("a CPU",))


def hardware(**changes: object) -> Hardware:
    settings = {
        "name": "made_up",
        "device": "cuda",
        "processes": 1,
        "threads": 1,
        "parallel_runs": 1,
        "shard": False,
        "activation_checkpointing": False,
        "compile": False,
        "peak_flops": None,
        "planned_mfu": None,
        "checkpoint_seconds": 60.0,
    }
    return Hardware.model_validate({**settings, **changes})


def state(
    precision: Precision, *, several: bool = False, micro_batches: int = 1, trained: int = N, **on: object
) -> float:
    memory = Memory(N, trained, precision, 0.0, 0.0, micro_batches=micro_batches, several_passes=several)
    return memory.state(hardware(**on)) / N


@pytest.mark.parametrize(
    ("precision", "alone", "sharded"), [("fp32", 16, 8), ("fp32_master", 18, 6), ("pure_bf16", 8, 4)]
)
def test_bytes_a_parameter_of_weights_gradients_and_moments(precision: Precision, alone: int, sharded: int) -> None:
    assert state(precision) == alone  # weight, gradient and two moments; under fp32_master a copy in bf16 too
    assert state(precision, processes=2, micro_batches=2) == alone
    assert state(precision, processes=4, micro_batches=4, shard=True) == sharded  # a quarter, and gathered weights


def test_gradients_on_their_way_count_where_the_model_runs_several_times_before_they_are_kept() -> None:
    assert state("fp32", several=True) == 16  # they become those that are kept
    assert state("fp32", several=True, micro_batches=2) == 20
    assert state("pure_bf16", several=True, processes=2, micro_batches=2) == 10
    assert state("fp32_master", several=True) == 20
    assert state("pure_bf16", several=True, processes=4, micro_batches=4, shard=True) == 6
    assert state("fp32_master", several=True, processes=4, micro_batches=8, shard=True) == 12  # the first ones wait


def test_frozen_parameters_have_neither_gradients_nor_moments() -> None:
    assert state("fp32", trained=0) == 4
    assert state("pure_bf16", trained=0, processes=2, micro_batches=2, shard=True) == 3


def test_work_that_one_process_does_is_neither_split_nor_sped_up() -> None:
    memory = Memory(N, 0, "fp32", 7.0, 3.0)
    node = hardware(processes=8, shard=True, activation_checkpointing=True, peak_flops=1e12, planned_mfu=0.5)
    shared, lone = (Cost(1, 4e12, memory, shared=shared) for shared in (True, False))
    assert (shared.state_bytes(node), lone.state_bytes(node)) == (4 * N / 8 + 4 * N, 4 * N)
    assert expected_time(shared, "p", {}, node) == Expected(1.0)
    assert expected_time(lone, "p", {}, node) == Expected(8.0)
    assert (lone.activation_bytes(node), lone.activation_bytes(hardware())) == (3.0, 7.0)


def test_time_is_measured_before_it_is_planned_and_unknown_without_either() -> None:
    cost = Cost(1, 1e12, Memory(N, N, "fp32", 0.0, 0.0))
    planned = hardware(peak_flops=1e12, planned_mfu=0.25)
    assert expected_time(cost, "train", {"train": RATE}, planned) == Expected(2.0, ("a CPU",))
    assert expected_time(cost, "train", {"evaluate": RATE}, planned) == Expected(4.0)
    assert expected_time(cost, "train", {}, hardware(peak_flops=1e12)) is None
    assert expected_time(cost, "train", {}, hardware(planned_mfu=0.5)) is None


def record(
    arm: str,
    seconds: float,
    *,
    flops: float = 100.0,
    program: str = "train",
    hardware: str = "cpu",
    processor: str = "a CPU",
) -> Record:
    return Record(
        id=f"demo-{program}-{arm}-{seconds:g}".replace(".", "-"),
        paper="demo",
        program=program,
        recipe=1,
        labels=(f"size/{arm}/s0",),
        scale="laptop",
        seed=0,
        status="DONE",
        config={},
        parents={},
        metrics={},
        series={},
        cost=RunCost(flops=flops, seconds=seconds),
        provenance={"hardware_config": hardware, "hardware": f"{processor}, 1 thread"},
    )


def test_times_on_record_are_checked_against_the_speed_of_other_arms() -> None:
    found = check_times([record("small", 1.0), record("large", 2.0, flops=300.0), record("alone", 9.0, program="fit")])
    assert found is not None
    assert found.runs == 2  # no other arm has a run of the second program
    # 100 FLOPs at 150 a second: 0.67 s where it took 1; 300 FLOPs at 100 a second: 3 s where it took 2
    assert found.half == pytest.approx((1 / 3 + 1 / 2) / 2)
    assert found.most == pytest.approx(1 / 2)
    assert found.total == pytest.approx((2 / 3 + 3) / 3)
    assert found.where == ("laptop on cpu",)


def test_speeds_are_those_of_this_processor_where_it_has_runs_and_say_whose_they_are_where_not() -> None:
    records = [record("small", 1.0), record("small", 4.0, processor="mine"), record("fit", 2.0, program="fit")]
    found = measured_rates(records, hardware="cpu", scale="laptop", processor="mine")
    assert found == {"train": Rate(25.0, ("mine, 1 thread",)), "fit": Rate(50.0, ("a CPU, 1 thread",))}
    both = measured_rates(records, hardware="cpu", scale="laptop", processor="another")["train"]
    assert both == Rate((25 + 100) / 2, ("a CPU, 1 thread", "mine, 1 thread"))
    assert measured_rates(records, hardware="gpu1", scale="laptop") == {}


def test_runs_of_one_arm_or_of_other_hardware_predict_nothing() -> None:
    assert check_times([record("small", 1.0), record("large", 2.0, processor="mine")]) is None
    assert check_times([record("small", 1.0), record("small", 2.0)]) is None
    assert check_times([record("small", 1.0), record("large", 2.0, hardware="gpu1")]) is None


def test_what_has_no_model_is_planned_from_no_peak() -> None:
    counting = Cost(10, 10.0, Memory(0, 0, "fp32", 0.0, 0.0))
    planned = hardware(peak_flops=1e12, planned_mfu=0.5)
    assert expected_time(counting, "prepare", {}, planned) is None
    assert expected_time(counting, "prepare", {"prepare": Rate(5.0, ("a CPU",))}, planned) == Expected(2.0, ("a CPU",))

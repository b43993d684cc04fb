"""The learning rate's law: the paper's constants, and the choice among rates that its fit rests on."""

from __future__ import annotations

import math
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from multimodal import carry_out

from retrace.core.plan import plan
from retrace.core.record import Record
from retrace.core.store import Store
from retrace.papers.mm1.program_configs import ChooseConfig, LawConfig
from retrace.papers.mm1.rates import OFFSET, SLOPE, fit_law, law, line


@pytest.mark.parametrize(
    ("num_parameters", "rate"), [(9e6, 6.7e-4), (85e6, 2.6e-4), (302e6, 1.5e-4), (1.2e9, 8.6e-5), (30e9, 2.2e-5)]
)
def test_the_law_has_the_papers_constants(num_parameters: float, rate: float) -> None:
    assert law(int(num_parameters)) == pytest.approx(rate, rel=0.03)


def test_the_choice_is_the_mean_in_decades_of_the_rates_near_the_best_score(tmp_path: Path) -> None:
    specs = plan(["mm1/learning_rate/small"], ["scale=smoke", "seed=0", "tracking.wandb=off"])
    chosen = specs[-1]
    assert isinstance(chosen.config, ChooseConfig)
    assert [spec.program for spec in specs].count("pretrain") == 5
    assert (chosen.program, sorted(chosen.parents)) == ("choose_rate", [f"rate_{index}" for index in range(5)])
    carry_out(specs[:-1], tmp_path)
    for index, score in enumerate([0.1, 0.395, 0.4, 0.2, 0.0]):  # after two steps all models say the same
        file = Store(tmp_path).run(chosen.parents[f"rate_{index}"]).path / "record.json"
        record = Record.load(file)
        told = record.model_copy(update={"metrics": {**record.metrics, chosen.config.metric: score}})
        file.write_text(told.model_dump_json(by_alias=True))
    found = carry_out([chosen], tmp_path)["choose_rate"].metrics
    rates = chosen.config.rates.learning_rates
    assert found["rate/log10"] == pytest.approx((math.log10(rates[1]) + math.log10(rates[2])) / 2)
    assert (found["rate/kept"], found["rate/at_lowest"], found["rate/at_highest"]) == (2.0, 0.0, 0.0)
    over = found["rate/log10"] - math.log10(law(chosen.config.num_parameters))
    assert found["rate/log10_over_law"] == pytest.approx(over)


def test_the_law_is_fit_through_the_runs_of_the_choices_and_trains_nothing_more() -> None:
    small = ["scale=smoke", "seed=0", "tracking.wandb=off"]
    chosen = {spec.id for spec in plan(["mm1/learning_rate"], small)}
    (more,) = (spec for spec in plan(["mm1/rate_law"], small) if spec.id not in chosen)
    assert more.program == "fit_law"
    assert isinstance(more.config, LawConfig)
    assert list(more.config.num_parameters) == ["small", "medium", "large"]
    assert sorted(more.parents) == ["large", "medium", "small"]
    assert set(more.parents.values()) < chosen


def test_the_fit_of_rates_that_follow_the_papers_law_has_its_constants(tmp_path: Path) -> None:
    counts = {"small": 9_000_000, "medium": 85_000_000, "large": 302_000_000}
    for name, count in counts.items():
        record = Record(
            id=f"mm1-{name}", paper="mm1", program="choose_rate", recipe=1, labels=(), scale="gpu", seed=0, schema=1,
            status="DONE", config={}, parents={}, metrics={"rate/log10": math.log10(law(count))}, series={},
            cost={}, provenance={},
        )  # fmt: skip
        (tmp_path / name).mkdir()
        (tmp_path / name / "record.json").write_text(record.to_json())
    ctx: Any = SimpleNamespace(
        is_main=True, cost={}, parents={name: SimpleNamespace(path=tmp_path / name) for name in counts}
    )
    found = fit_law(LawConfig(num_parameters=counts, seed=0), ctx)
    assert (found["law/slope"], found["law/offset"]) == pytest.approx((SLOPE, OFFSET))
    assert found["law/slope_high"] - found["law/slope_low"] == pytest.approx(0, abs=1e-9)


def test_the_interval_of_a_slope_is_students() -> None:
    """By hand: y = 0, 1, 1 at x = 0, 1, 2 has slope 1/2, residuals 1/6, 1/3, 1/6 of squares 1/6, and t of 12.706."""
    slope, offset, half = line([0, 1, 2], [0, 1, 1])
    assert (slope, offset) == pytest.approx((0.5, 1 / 6))
    assert half == pytest.approx(12.7062 * math.sqrt(1 / 6 / 2), rel=1e-4)
    with pytest.raises(ValueError, match="2 points: an interval of a slope needs three"):
        line([0, 1], [0, 1])


def test_decoders_of_the_law_that_cannot_be_are_refused_before_anything_runs() -> None:
    law = "rates={learning_rates: [1.0e-4, 2.0e-4], near: 0.02, law: true}"
    with pytest.raises(ValueError, match=r"experts.every=3 with sizes.decoders.small.num_layers=2: no layer would"):
        plan(["mm1/main"], ["scale=laptop", law, "experts={num_experts: 4, every: 3}"])
    with pytest.raises(ValueError, match=r"rates.law=true: its decoders are made here"):
        plan(["mm1/main"], ["scale=paper", law], check=True)

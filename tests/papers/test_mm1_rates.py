"""The learning rate's law: the paper's constants, and the choice among rates that its fit rests on."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
from multimodal import carry_out

from retrace.core.plan import plan
from retrace.core.record import Record
from retrace.core.store import Store
from retrace.papers.mm1.program_configs import ChooseConfig
from retrace.papers.mm1.rates import law


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

"""Science has an identity, placement has none."""

from __future__ import annotations

import math

import pytest

from retrace.core.config import Frozen, Placement
from retrace.core.identity import canonical, run_id, science


class Machine(Placement):
    gpus: int = 1


class Inner(Frozen):
    width: int = 4


class Config(Frozen):
    seed: int = 0
    rate: float = 0.1
    names: tuple[str, ...] = ("a",)
    inner: Inner = Inner()
    machine: Machine = Machine()


def identity(config: Frozen, **changes: object) -> str:
    arguments = {"paper": "p", "program": "train", "recipe": 1, "scale": "smoke", "parents": {"base": "x"}}
    return run_id(config=config, **{**arguments, **changes})  # type: ignore[arg-type]


def test_everything_scientific_changes_the_id_and_placement_does_not() -> None:
    base = identity(Config())
    assert identity(Config(machine=Machine(gpus=8))) == base
    changed = [
        identity(Config(seed=1)),
        identity(Config(rate=0.2)),
        identity(Config(names=("a", "b"))),
        identity(Config(inner=Inner(width=5))),
        identity(Config(), recipe=2),
        identity(Config(), scale="laptop"),
        identity(Config(), program="evaluate"),
        identity(Config(), parents={"base": "y"}),
    ]
    assert len({base, *changed}) == len(changed) + 1


def test_science_leaves_placement_out_at_any_depth() -> None:
    assert science(Config()) == {"seed": 0, "rate": 0.1, "names": ["a"], "inner": {"width": 4}}


def test_key_order_does_not_matter_and_the_form_is_stable() -> None:
    assert canonical({"b": 1, "a": [1.5, None, True]}) == '{"a":[1.5,null,true],"b":1}'


@pytest.mark.parametrize("value", [math.nan, math.inf, object(), {1: "x"}, {"a": {2, 3}}, b"bytes"])
def test_what_has_no_canonical_form_is_refused(value: object) -> None:
    with pytest.raises((TypeError, ValueError), match="config"):
        canonical(value)

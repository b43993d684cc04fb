"""A run is found by every name that people have for it, and a name that fits several is never guessed at."""

from __future__ import annotations

from pathlib import Path

import pytest

from retrace.core.files import write_json
from retrace.core.lookup import find_run
from retrace.core.store import Store

LABEL = "size/big/s0"
PARENTS = {"base": "demo-pretrain-0"}


def put(
    store: Store,
    run_id: str,
    *,
    status: str = "DONE",
    program: str = "train",
    labels: tuple[str, ...] = (LABEL,),
    before: str = "",
) -> None:
    parents = PARENTS if program == "train" else {"model": "demo-train-abc1"}
    parents = parents | ({"before": before} if before else {})
    tree = {"paper": "demo", "program": program, "scale": "smoke", "seed": 0, "labels": labels, "parents": parents}
    write_json(store.runs / run_id / "config.json", tree)
    if status != "PLANNED":
        write_json(store.runs / run_id / "result.json", {"status": status})


@pytest.fixture
def store(tmp_path: Path) -> Store:
    store = Store(tmp_path)
    put(store, "demo-train-abc1")
    put(store, "demo-evaluate-abc9", program="evaluate")
    return store


def find(word: str, store: Store) -> str | None:
    found = find_run(word, paper="demo", program="train", store=store)
    return found and found.id


@pytest.mark.parametrize("word", ["demo-train-abc1", "demo-train-a", "demo-t", LABEL, f"demo/{LABEL}", "demo-"])
def test_an_id_the_start_of_one_and_a_label_name_the_run_of_the_program(word: str, store: Store) -> None:
    assert find(word, store) == "demo-train-abc1"


def test_a_label_that_only_a_later_plan_gave_names_it_too(store: Store) -> None:
    write_json(store.record_path("demo", "demo-train-abc1"), {"labels": ["main/main/s0"]})
    assert find("main/main/s0", store) == "demo-train-abc1"


@pytest.mark.parametrize("word", ["", "train", "size/big", "other/size/big/s0", "demo-train-abc12"])
def test_what_names_no_run_is_none(word: str, store: Store) -> None:
    assert find(word, store) is None


def test_a_whole_id_wins_over_longer_ones(store: Store) -> None:
    put(store, "demo-train-abc12", labels=("size/small/s0",))
    assert find("demo-train-abc1", store) == "demo-train-abc1"


def test_several_runs_are_named_with_their_ids_unless_one_alone_is_finished(store: Store) -> None:
    put(store, "demo-train-abd2", status="FAILED")
    assert find(LABEL, store) == "demo-train-abc1"
    put(store, "demo-train-abe3")
    for word in (LABEL, "demo-train-ab"):
        with pytest.raises(
            ValueError, match=r"give the id of one: demo-train-abc1 \(scale smoke, seed 0\), demo-train-"
        ):
            find(word, store)


def test_of_several_stages_of_a_training_the_last_is_meant(store: Store) -> None:
    put(store, "demo-train-aaa", before="demo-train-abc1")
    assert find(LABEL, store) == "demo-train-aaa"
    assert find("demo-train-abc1", store) == "demo-train-abc1"


def test_a_run_that_will_not_do_is_told_with_the_reason(store: Store) -> None:
    with pytest.raises(
        ValueError, match="a run of program 'evaluate': expected one of 'train'; it builds on demo-train"
    ):
        find("demo-evaluate", store)
    put(store, "demo-train-bad", status="PLANNED", labels=("size/bad/s0",))
    with pytest.raises(ValueError, match="demo-train-bad is PLANNED: expected one that is DONE"):
        find("size/bad/s0", store)

"""What the command line's words name among the runs on disk, and what `status` says of them."""

from __future__ import annotations

import io
from pathlib import Path

import pytest
from rich.console import Console

from retrace.core import statusview
from retrace.core.plan import RunSpec, plan
from retrace.core.statusview import named_runs
from retrace.core.store import State, Store

TARGET, SCALES = "quietstar/main", ("scale=smoke", "scale=laptop")


@pytest.fixture
def store(tmp_path: Path) -> Store:
    store = Store(tmp_path)
    for spec in runs(*SCALES):
        store.run(spec.id).freeze(spec, command="test")
    return store


def runs(*scales: str) -> list[RunSpec]:
    return [spec for scale in scales for spec in plan([TARGET], [scale])]


@pytest.mark.parametrize("target", [TARGET, f"{TARGET}/"])
def test_overrides_choose_among_the_runs_of_a_target(store: Store, target: str) -> None:
    assert named_runs([target, SCALES[0]], store=store).keys() == {spec.id for spec in runs(SCALES[0])}


def test_a_paper_is_what_run_would_start_and_not_every_id_that_begins_with_its_name(store: Store) -> None:
    named = named_runs(["quietstar", SCALES[0]], store=store).keys()
    assert named == {spec.id for spec in plan(["quietstar"], [SCALES[0]])}
    assert not named & {spec.id for spec in runs(SCALES[1])}


def test_an_id_the_start_of_one_and_a_label_name_runs_on_disk(store: Store) -> None:
    first, *_ = runs(SCALES[0])
    assert named_runs([first.id], store=store) == named_runs([first.id[:-3]], store=store)
    assert named_runs([first.id], store=store) == {first.id: first.labels[0]}
    assert named_runs([first.labels[0]], store=store).keys() == {spec.id for spec in runs(*SCALES)}


@pytest.mark.parametrize("word", ["quietstar-train", "main/main/s0"])
def test_overrides_that_no_target_could_use_are_refused(store: Store, word: str) -> None:
    with pytest.raises(ValueError, match=f"scale=smoke: chooses among the runs of a target, and {word} is none"):
        named_runs([word, "scale=smoke"], store=store)


@pytest.mark.parametrize("word", ["q", "quiet", "main/main/s7", "quietstar-zzz"])
def test_what_names_nothing_is_refused(store: Store, word: str) -> None:
    with pytest.raises(ValueError, match="no such paper"):
        named_runs([word], store=store)
    with pytest.raises(ValueError, match="no run named"):
        named_runs(["scale=smoke"], store=store)


def test_watching_goes_on_where_no_run_is_under_way_for_a_moment(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    looks = iter([True, False, True, False, False])

    def look(*_: object, **__: object) -> statusview.Status:
        return statusview.Status({}, frozenset(), "total", next(looks))

    monkeypatch.setattr(statusview, "look", look)
    statusview.watch(None, store=store, console=Console(file=io.StringIO()), every=0.0)
    assert not list(looks)


def test_of_a_run_that_was_stopped_only_the_rest_is_left() -> None:
    left = statusview._seconds_left
    assert left(State("PLANNED", step=3, total=4), 100.0) == 25.0
    assert left(State("PLANNED"), 100.0) == 100.0
    assert left(State("RUNNING", step=3, total=4, seconds_left=7.0), 100.0) == 7.0
    assert left(State("PLANNED", step=3, total=4), None) is None

"""The lines and the ETA of a sweep, for runs that are skipped or that somebody else carries out."""

from __future__ import annotations

import io
import time
from pathlib import Path

import pytest
from rich.console import Console
from test_launch import run

from retrace.core.progress import SweepProgress
from retrace.core.store import Store


@pytest.fixture
def shown(tmp_path: Path) -> tuple[SweepProgress, io.StringIO]:
    out, specs = io.StringIO(), [run("one"), run("two"), run("three")]
    specs = [spec.__class__(**{**vars(spec), "labels": (f"size/{spec.id}/s0",)}) for spec in specs]
    expected = {spec.id: 3600.0 for spec in specs}
    return SweepProgress(specs, store=Store(tmp_path), console=Console(file=out, width=200), expected=expected), out


def test_a_run_that_is_skipped_counts_and_is_no_longer_waited_for(shown: tuple[SweepProgress, io.StringIO]) -> None:
    progress, out = shown
    progress.on_change("two", "SKIPPED", "it builds on one")
    progress.on_change("three", "SKIPPED", "it builds on one")
    assert "[2/3] SKIPPED  three  size/three/s0  -" in out.getvalue()
    assert progress.seconds_left() == 3600.0
    progress.on_change("one", "RUNNING", "")
    progress.on_change("one", "FAILED", "why")
    assert "[3/3] FAILED   one" in out.getvalue()


def test_the_time_for_which_somebody_else_held_a_run_is_not_taken_for_that_of_its_like(
    shown: tuple[SweepProgress, io.StringIO], monkeypatch: pytest.MonkeyPatch
) -> None:
    progress, out = shown
    now = time.monotonic()
    progress.on_change("one", "RUNNING", "")
    progress.on_change("one", "BUSY", "held")
    monkeypatch.setattr(time, "monotonic", lambda: now + 50_000)
    progress.on_change("one", "DONE", "")
    assert progress.seconds_left() == 3600  # of the two that are left, side by side, as expected before
    progress.on_change("two", "BUSY", "held")
    progress.on_change("two", "RUNNING", "")
    monkeypatch.setattr(time, "monotonic", lambda: now + 50_100)
    progress.on_change("two", "DONE", "")
    assert progress.seconds_left() == 100
    assert "BUSY" not in out.getvalue()

"""Shared fixtures. Everything runs offline, on one thread, in a home folder of its own."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["TOKENIZERS_PARALLELISM"] = "false"

TINY = ["scale=smoke", "tracking.wandb=off"]

Run = Callable[..., subprocess.CompletedProcess[str]]


@pytest.fixture
def home(tmp_path: Path) -> Path:
    """An empty home: runs/ and results/ appear in it."""
    return tmp_path / "home"


@pytest.fixture
def retrace(home: Path) -> Run:
    """The command line as a user calls it: `retrace("run", "quietstar/main", ...)`."""

    def call(*arguments: str, timeout: float = 300, **environment: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [sys.executable, "-m", "retrace.cli", *arguments],
            env={**os.environ, "RETRACE_HOME": str(home), **environment},
            capture_output=True,
            text=True,
            timeout=timeout,
        )

    return call

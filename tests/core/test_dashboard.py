"""trackio holds what metrics.jsonl holds, and `retrace dashboard` shows it to this machine alone; in a real browser."""

from __future__ import annotations

import json
import os
import re
import signal
import socket
import sqlite3
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import psutil
import pytest
from browser import CHROMIUM, chromium
from conftest import Run

from retrace.core.files import read_json
from retrace.core.plan import RunSpec, plan
from retrace.core.store import RunDir, Store
from retrace.core.tracking import read_lines

LIVE = ["scale=smoke", "seed=0", "base.optim.steps=60", "hardware.checkpoint_seconds=0", "tracking=trackio",
        "tracking.log_every=7"]  # fmt: skip


@pytest.fixture(scope="module")
def spec() -> RunSpec:
    return next(spec for spec in plan(["quietstar/main"], LIVE) if spec.program == "pretrain")


def worker(home: Path, spec: RunSpec, **environment: str) -> tuple[RunDir, subprocess.Popen[bytes]]:
    run = Store(home).run(spec.id)
    run.freeze(spec, command="test")
    command = [sys.executable, "-m", "retrace.worker", str(run.path)]
    return run, subprocess.Popen(command, env={**os.environ, "RETRACE_HOME": str(home), **environment})


@pytest.fixture(scope="module")
def killed(spec: RunSpec, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A home with one run that was killed on its way, and then ended."""
    home = tmp_path_factory.mktemp("killed")
    run, process = worker(home, spec)
    while (read_json(run.path / "progress.json") or {}).get("step", 0) < 20:
        assert process.poll() is None
        time.sleep(0.02)
    process.kill()
    process.wait()
    run, process = worker(home, spec)
    assert process.wait() == 0
    return home


def logged(home: Path) -> dict[str, list[dict[str, Any]]]:
    """Rows of every run in trackio's database."""
    found: dict[str, list[dict[str, Any]]] = {}
    with sqlite3.connect(home / "trackio" / "retrace.db") as database:
        for name, step, metrics in database.execute("SELECT run_name, step, metrics FROM metrics ORDER BY id"):
            found.setdefault(name, []).append({"step": step, **json.loads(metrics)})
    return found


def test_a_run_that_was_killed_is_there_once_with_the_lines_of_its_metrics_jsonl(killed: Path, spec: RunSpec) -> None:
    lines = read_lines(Store(killed).run(spec.id).path / "metrics.jsonl")
    assert [line["step"] for line in lines] == [7, 14, 21, 28, 35, 42, 49, 56, 60]
    ((name, rows),) = logged(killed).items()
    assert name == f"{spec.labels[0]} pretrain {spec.id.rpartition('-')[2]}"
    assert rows == lines


def test_final_metrics_that_no_line_has_are_a_row_of_their_own(home: Path) -> None:
    script = (
        "from retrace.core.mirrors import Card, Trackio\n"
        "for value in (0.1, 0.5):\n"
        "    shown = Trackio(Card('p-train-01', 'a/b/s0 train', 'p/a', 'train', (), {}), project='retrace')\n"
        "    shown.log(4, {'loss': 1.0})\n"
        "    shown.finish({'loss': 1.0, 'accuracy': value}, exit_code=0)\n"
    )
    subprocess.run([sys.executable, "-c", script], env={**os.environ, "RETRACE_HOME": str(home)}, check=True)
    assert logged(home) == {"a/b/s0 train 01": [{"step": 4, "loss": 1.0}, {"step": 4, "accuracy": 0.5}]}


def test_trackio_that_fails_costs_no_run(spec: RunSpec, tmp_path: Path) -> None:
    run, process = worker(tmp_path, spec, TRACKIO_DIR="/dev/null/nowhere")
    assert process.wait() == 0
    assert run.state().status == "DONE"
    assert "trackio failed to flush" in (run.path / "log.txt").read_text()


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        return int(taken.getsockname()[1])


@pytest.fixture
def dashboard(killed: Path) -> Any:
    """(address, process) of a dashboard that is up."""
    process = subprocess.Popen(
        [sys.executable, "-m", "retrace.cli", "dashboard", "--port", str(free_port())],
        env={**os.environ, "RETRACE_HOME": str(killed), "GRADIO_SHARE": "true"},  # which trackio would heed
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),  # a shell's background jobs ignore it
    )
    try:
        assert process.stdout
        line = process.stdout.readline()
        found = re.search(r"open (http://127\.0\.0\.1:\d+/) ", line)
        assert found, line + process.stdout.read()
        yield found[1], process
    finally:
        process.kill()
        process.wait()


def test_the_dashboard_listens_on_this_machine_alone_and_ends_with_ctrl_c(dashboard: Any) -> None:
    address, process = dashboard
    listening = [c.laddr for c in psutil.Process(process.pid).net_connections() if c.status == psutil.CONN_LISTEN]
    assert [(place.ip, f"http://{place.ip}:{place.port}/") for place in listening] == [("127.0.0.1", address)]
    process.send_signal(signal.SIGINT)
    rest, _ = process.communicate(timeout=30)
    assert process.returncode == 0
    assert "token" not in rest  # trackio's own, which lets its bearer change runs


@pytest.mark.skipif(CHROMIUM is None, reason="no Chromium here")
def test_the_dashboard_shows_the_run_and_its_curves_and_fetches_nothing_from_elsewhere(
    dashboard: Any, spec: RunSpec
) -> None:
    address, _ = dashboard
    with chromium() as browser:
        browser.open(address)
        until = time.monotonic() + 30
        text = ""
        while not ("pretrain" in text and "loss" in text) and time.monotonic() < until:
            text = browser.evaluate("document.body.innerText")
        assert f"{spec.labels[0]} pretrain" in text
        assert "loss" in text
        assert "speed" in text
        requested = {url for url in browser.requests if not url.startswith("data:")}
        assert [url for url in requested if not url.startswith(address)] == []
        assert browser.problems == []


def test_no_run_that_has_logged_and_a_port_that_is_taken_are_one_sentence_each(
    home: Path, killed: Path, retrace: Run
) -> None:
    done = retrace("dashboard")
    assert done.returncode == 2
    assert "no run has logged there; start some with `retrace run ... tracking=trackio`" in done.stderr
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        done = retrace("dashboard", "--port", str(port), RETRACE_HOME=str(killed))
    assert done.returncode == 2
    assert f"--port {port}: taken" in done.stderr
    assert not home.exists() or not (home / "trackio").exists()

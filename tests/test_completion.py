"""What Tab gives in a real bash, on a terminal of its own, and what zsh and fish are handed."""

from __future__ import annotations

import os
import pty
import select
import subprocess
import sys
import termios
from collections.abc import Iterator
from pathlib import Path

import pytest

from retrace.core.config import CONFIGS

PROMPT = "ready$ "
PATIENCE = 60.0  # for something to be shown


class Bash:
    """An interactive bash that has evaluated the line of the README."""

    def __init__(self, environment: dict[str, str]) -> None:
        self._master, terminal = pty.openpty()
        termios.tcsetwinsize(terminal, (50, 400))
        self._process = subprocess.Popen(
            ["bash", "--norc", "--noprofile", "-i"],
            stdin=terminal,
            stdout=terminal,
            stderr=terminal,
            start_new_session=True,
            env={**environment, "PS1": PROMPT, "TERM": "dumb"},
        )
        os.close(terminal)
        self._do("bind 'set bell-style none'; bind 'set show-all-if-ambiguous on'")
        self._do('eval "$(_RETRACE_COMPLETE=source_bash retrace)"')

    def tab(self, line: str, *expected: str) -> None:
        """Type a line and Tab, and wait until the terminal shows all that is expected."""
        self._send(f"{line}\t", *expected)
        self._do("\x15")  # Ctrl-U: the line is gone

    def close(self) -> None:
        self._process.kill()
        self._process.wait()
        os.close(self._master)

    def _do(self, command: str) -> None:
        """Carry out a command, and wait for the prompt behind it: what is typed before it is read by nobody's Tab."""
        self._send(f"{command}\necho done-$((40 + 2))\n", f"done-42\r\n{PROMPT}")

    def _send(self, text: str, *expected: str) -> None:
        os.write(self._master, text.encode())
        self._until(*expected)

    def _until(self, *expected: str) -> None:
        shown = ""
        while not all(text in shown for text in expected):
            ready, _, _ = select.select([self._master], [], [], PATIENCE)
            assert ready, f"the terminal shows {shown!r} and not {expected}"
            shown += os.read(self._master, 65536).decode()


@pytest.fixture(scope="module")
def environment(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    folder = tmp_path_factory.mktemp("bin")
    (folder / "retrace").write_text(f'#!/bin/sh\nexec "{sys.executable}" -m retrace.cli "$@"\n')
    (folder / "retrace").chmod(0o755)
    return {**os.environ, "PATH": f"{folder}:{os.environ['PATH']}"}


@pytest.fixture(scope="module")
def bash(environment: dict[str, str]) -> Iterator[Bash]:
    shell = Bash(environment)
    yield shell
    shell.close()


@pytest.mark.parametrize(
    ("line", "completed"),
    [
        ("retrace rep", "retrace report "),
        ("retrace list mm", "retrace list mm1 "),
        ("retrace run quietstar/thought_", "retrace run quietstar/thought_length "),
        ("retrace run quietstar/thoughts/n", "retrace run quietstar/thoughts/none "),
        ("retrace run quietstar scale=la", "retrace run quietstar scale=laptop "),
        ("retrace plan mm1 hardware=slurm_8", "retrace plan mm1 hardware=slurm_8gpu "),
        ("retrace report mm1 --scale sm", "retrace report mm1 --scale smoke "),
        ("retrace run deepsc", "retrace run deepscalelm"),  # no space: an ablation may follow
    ],
)
def test_bash_completes_a_word(bash: Bash, line: str, completed: str) -> None:
    bash.tab(line, completed)


def test_bash_offers_every_scale_and_every_machine(bash: Bash) -> None:
    bash.tab("retrace run quietstar scale=", "smoke", "laptop", "gpu", "paper")
    bash.tab("retrace run quietstar hardware=", *(path.stem for path in (CONFIGS / "hardware").glob("*.yaml")))


@pytest.mark.parametrize(("shell", "more"), [("zsh", {}), ("fish", {"_TYPER_COMPLETE_FISH_ACTION": "get-args"})])
def test_zsh_and_fish_are_handed_whole_words(shell: str, more: dict[str, str], environment: dict[str, str]) -> None:
    def offered(line: str) -> str:
        asked = {"_TYPER_COMPLETE_ARGS": line, "_RETRACE_COMPLETE": f"complete_{shell}", **more}
        return subprocess.run(["retrace"], env={**environment, **asked}, capture_output=True, text=True).stdout

    assert "scale=laptop" in offered("retrace run quietstar scale=la")
    assert "quietstar/thought_length" in offered("retrace run quietstar/thought_")
    assert "deepscalelm" not in offered("retrace run quietstar/thought_")
    source = {"_RETRACE_COMPLETE": f"source_{shell}"}
    script = subprocess.run(["retrace"], env={**environment, **source}, capture_output=True, text=True, check=True)
    assert "retrace" in script.stdout


def test_a_broken_yaml_offers_nothing_and_says_nothing(environment: dict[str, str], tmp_path: Path) -> None:
    (tmp_path / "broken" / "ablations").mkdir(parents=True)
    (tmp_path / "broken" / "main.yaml").write_text("")
    (tmp_path / "broken" / "ablations" / "odd.yaml").write_text("arms: [")
    asked = {"_TYPER_COMPLETE_ARGS": "retrace run broken/odd/", "_RETRACE_COMPLETE": "complete_zsh"}
    done = subprocess.run(
        ["retrace"], env={**environment, **asked, "RETRACE_CONFIGS": str(tmp_path)}, capture_output=True, text=True
    )
    assert (done.stdout.strip(), done.stderr) == ("_files", "")

"""Commands that papers bring stand beside the built-in ones, and cost nothing until they are called."""

from __future__ import annotations

import subprocess
import sys

import pytest
from conftest import Run

from retrace.cli import app
from retrace.core import paper as contract
from retrace.core.discovery import papers
from retrace.core.paper import Command, Paper, load_paper, paper_commands

BUILT_IN = {command.name or command.callback.__name__.rstrip("_") for command in app.registered_commands}  # type: ignore[union-attr]
HEAVY = "torch", "transformers", "accelerate", "datasets", "lm_eval", "wandb", "wandb_workspaces", "trackio"


def loaded(*arguments: str) -> set[str]:
    """The heavy libraries, and the papers, that a command line imports."""
    script = (
        "import sys; from retrace.cli import main; sys.argv = ['retrace', *sys.argv[1:]]\n"
        "try: main()\n"
        "except SystemExit as end: assert not end.code\n"
        "sys.stderr.write(' '.join(sys.modules))"
    )
    done = subprocess.run([sys.executable, "-c", script, *arguments], capture_output=True, text=True, check=True)
    return {name for name in done.stderr.split() if name in HEAVY or name.startswith("retrace.papers.")}


def test_no_two_commands_have_the_same_name() -> None:
    assert {"list", "plan", "run", "status", "report", "doctor"} <= BUILT_IN
    assert not BUILT_IN & set(paper_commands())
    assert all(callable(command.load()) and command.load().__doc__ for _, command in paper_commands().values())


def test_two_papers_that_bring_the_same_command_are_told_apart(monkeypatch: pytest.MonkeyPatch) -> None:
    (slug, command), *_ = paper_commands().values()
    real = load_paper(slug)

    def fake(name: str) -> Paper:
        assert name in ("one", "two")
        return Paper(name, "", "", 1, real.config, real.stages, {}, commands=(Command(command.name, "", "x:y"),))

    monkeypatch.setattr(contract, "papers", lambda: ["one", "two"])
    monkeypatch.setattr(contract, "load_paper", fake)
    with pytest.raises(ValueError, match=f"retrace {command.name}` is brought by one and by two: rename one"):
        paper_commands()


def test_help_lists_them_under_their_papers_name(retrace: Run) -> None:
    shown = retrace("--help").stdout
    for name, (slug, command) in paper_commands().items():
        after = shown[shown.index(f"\u2500 {slug} \u2500") :]
        assert f" {name} " in after
        assert command.help.split()[0] in after


def test_help_is_answered_without_any_heavy_library() -> None:
    assert not loaded("--help") & set(HEAVY)
    for name in paper_commands():
        assert not loaded(name, "--help") & set(HEAVY)


def test_a_built_in_command_looks_at_no_paper() -> None:
    assert not [name for name in loaded("doctor", "--help") if name.startswith("retrace.papers.")]


def test_their_help_teaches_with_an_example_and_wrong_options_are_told(retrace: Run) -> None:
    for name in paper_commands():
        done = retrace(name, "--help")
        assert done.returncode == 0
        assert f"retrace {name} " in done.stdout.partition("Examples")[2]
        wrong = retrace(name, "--frobnicate")
        assert wrong.returncode == 2
        assert "--frobnicate" in wrong.stderr
        assert "Traceback" not in wrong.stderr
    typo = retrace("thnik")
    assert typo.returncode == 2
    assert not papers() or "think" in typo.stderr

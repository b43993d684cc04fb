"""How the command line teaches: examples in every `--help`, commands of papers, and a wrong one in one sentence."""

from __future__ import annotations

import os
import re
import signal
import sys
from typing import Any

import typer
from rich.console import Console
from typer.core import TyperCommand, TyperGroup

from retrace.core.paper import Command, paper_commands

WrongUsage: type[Exception] = typer.BadParameter.__mro__[1]  # click's UsageError, or that of typer's own copy of click

PIPE_WIDTH = 200
_EXAMPLES = {
    "": """
        retrace doctor                            # what this machine has and lacks
        retrace list                              # papers, ablations, arms
        retrace plan quietstar/thought_length     # its runs and what they cost
        retrace run quietstar scale=smoke seed=0  # all of it at its smallest
        retrace run quietstar/thought_length      # start, go on, or do nothing
        retrace report quietstar                  # the verdicts, and the page
        """,
    "list": """
        retrace list
        retrace list mm1
        """,
    "plan": """
        retrace plan quietstar/thought_length
        retrace plan quietstar/thoughts scale=paper hardware=gpu8  # without a GPU
        retrace plan deepscalelm scale=gpu hardware=gpu1           # all of a paper
        """,
    "run": """
        retrace run quietstar/thought_length            # all arms and seeds
        retrace run quietstar/thoughts/none seed=0      # one run
        retrace run quietstar/main thoughts.num_sampled=2,4 "seed=range(3)"
        retrace run quietstar scale=smoke seed=0        # all, at its smallest
        retrace run mm1/connector scale=gpu hardware=gpu1
        retrace run mm1 scale=paper hardware=slurm_8gpu # submits, and returns
        """,
    "status": """
        retrace status                                  # all runs on disk
        retrace status quietstar/thought_length         # those of an ablation
        retrace status mm1 scale=gpu --watch --every 30 # until nothing goes on
        """,
    "cancel": """
        retrace cancel mm1/connector scale=paper        # what `run` would start
        retrace cancel quietstar-train-a429             # by the start of an id
        retrace cancel thoughts/none/s0                 # by a label
        """,
    "report": """
        retrace report                                  # all papers with records
        retrace report quietstar --scale laptop
        """,
    "publish": """
        retrace publish quietstar                       # runs, workspace, report
        retrace publish quietstar/thoughts --dry-run    # builds, writes nothing
        """,
    "dashboard": """
        retrace run quietstar/main scale=smoke tracking=trackio
        retrace dashboard
        """,
    "doctor": """
        retrace doctor
        """,
}
_EXIT_CODES = {
    "": "0 all is well; 1 runs failed, or something is missing; 2 wrong input, and nothing was started; 130 Ctrl-C",
    "run": "0 finished or submitted; 1 some failed or were stopped; 2 wrong input, and nothing was started; 130 Ctrl-C",
    "publish": "0; 2 wrong input, or not all of it arrived",
    "cancel": "0; 2 wrong input, or no Slurm here",
    "report": "0 whatever the verdicts; 2 wrong input, or a record that can't be read",
    "doctor": "0 all that is needed is there; 1 something is missing",
}


class Output(Console):
    """Standard output. A pipe has no width of its own; a reader that goes away, such as `head`, ends the command."""

    def __init__(self) -> None:
        super().__init__(width=None if sys.stdout is not None and sys.stdout.isatty() else PIPE_WIDTH)

    def on_broken_pipe(self) -> None:
        """Quietly, with the exit code that a shell gives for it."""
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        raise SystemExit(128 + signal.SIGPIPE)


def teach(command: str) -> str:
    """The end of a command's `--help`; typer keeps the lines of a paragraph that begins with a backspace."""
    examples = "\n".join(line.strip() for line in _EXAMPLES[command].strip().splitlines())
    codes = _EXIT_CODES.get(command, "0; 2 wrong input")
    return f"[bold]Examples[/]\n\n\b\n{examples}\n\n[bold]Exit codes[/]: {codes}"


class PaperCommand(TyperCommand):
    """A command that a paper brings; its module is imported when it is called."""

    def __init__(self, slug: str, command: Command) -> None:
        super().__init__(command.name, help=command.help, rich_help_panel=slug)
        self._command = command

    def make_context(self, info_name: str | None, args: list[str], parent: Any = None, **extra: Any) -> Any:
        """Hand the rest of the command line to the paper's function, as typer reads it."""
        own = typer.Typer(add_completion=False, rich_markup_mode="rich")
        own.command(self.name)(self._command.load())
        return typer.main.get_command(own).make_context(info_name, args, parent, **extra)


class Commands(TyperGroup):
    """The commands below; those of the papers are looked up only for what is not among them, and for `--help`."""

    def list_commands(self, ctx: Any) -> list[str]:
        self._add_those_of_papers()
        return super().list_commands(ctx)

    def get_command(self, ctx: Any, cmd_name: str) -> Any:
        if cmd_name not in self.commands:
            self._add_those_of_papers()
        return super().get_command(ctx, cmd_name)

    def _add_those_of_papers(self) -> None:
        for name, (slug, command) in paper_commands().items():
            self.commands.setdefault(name, PaperCommand(slug, command))


def explain_usage(error: Exception) -> str:
    """What was wrong and where to read how it is done; a key written as an option is told how to write it."""
    message = getattr(error, "format_message")().rstrip(".")  # noqa: B009  # of a class that only typer knows
    context = getattr(error, "ctx", None)
    called = next((word for word in sys.argv[1:2] if not word.startswith("-")), "")  # not every error knows its command
    command = context.command_path if context else f"retrace {called}".rstrip()
    key = re.search(r"No such option:? '?--?([a-z_.]+)", message)
    hint = f"a key of the config is written {key[1]}=VALUE, without dashes; " if key and command != "retrace" else ""
    end = "" if message.endswith("?") else ";"
    return f"{command}: {message[:1].lower()}{message[1:]}{end} {hint}see `{command} --help`"

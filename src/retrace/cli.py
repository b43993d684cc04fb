"""The command line: parses and delegates. `retrace run quietstar/thought_length scale=laptop seed=0,1,2`.

Modules are imported by the command that needs them, so that each answers as fast as it can.
"""

from __future__ import annotations

import logging
import os
import shlex
import sys
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console
from rich.markup import escape
from rich.table import Table
from typer.core import TyperCommand, TyperGroup

from retrace.core.config import CONFIGS, HOME, papers
from retrace.core.paper import Command, load_paper, paper_commands
from retrace.core.safety import RedactingFormatter, deny_others, redact, redact_tracebacks

if TYPE_CHECKING:
    from retrace.core.plan import RunSpec


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


app = typer.Typer(
    cls=Commands,
    no_args_is_help=True,
    add_completion=True,
    pretty_exceptions_enable=False,
    rich_markup_mode="rich",
    help="Run the ablations of a paper and see, from recorded runs, which of its claims came back.",
)
console = Console(width=None if sys.stdout.isatty() else 140)  # a pipe has no width of its own

Words = Annotated[
    list[str],
    typer.Argument(
        help="Targets (a paper, paper/ablation, paper/main) and Hydra overrides: scale=smoke seed=0,1",
        show_default=False,
    ),
]


def split(words: list[str]) -> tuple[list[str], list[str]]:
    """Targets and overrides of a command line; raises ValueError without a target."""
    targets = [word for word in words if "=" not in word and not word.startswith(("+", "~"))]
    if not targets:
        raise ValueError(f"no target given: name a paper ({', '.join(papers())}) or paper/ablation; see `retrace list`")
    return targets, [word for word in words if word not in targets]


@app.command("list")
def list_() -> None:
    """Show every paper with its ablations and arms."""
    from retrace.core.plan import load_ablations

    for slug in papers():
        paper = load_paper(slug)
        table = Table("ablation", "question", "where", "arms (baseline first)", "seeds", box=None, title_justify="left")
        table.title = f"[bold]{slug}[/]: {paper.title} (arXiv {paper.arxiv})"
        for name, ablation in load_ablations(slug).items():
            arms = [ablation.baseline, *(arm for arm in ablation.arms if arm != ablation.baseline)]
            seeds = " ".join(map(str, ablation.seeds))
            table.add_row(f"{slug}/{name}", ablation.question, ablation.locus, ", ".join(arms), seeds)
        console.print(table)


@app.command()
def plan(words: Words) -> None:
    """Show the runs that a command would need, with what each costs, and start nothing."""
    from retrace.core import plan as planning
    from retrace.core.planview import print_plan
    from retrace.core.store import Store

    targets, overrides = split(words)
    print_plan(planning.plan(targets, overrides), store=Store(), console=console)


@app.command()
def run(
    words: Words,
    allow_dirty: Annotated[
        bool, typer.Option("--allow-dirty", help="On Slurm: submit uncommitted code, and keep its diff in the records")
    ] = False,
) -> None:
    """Start, resume, or do nothing where nothing is left; the same command serves for all three."""
    from retrace.core import plan as planning

    targets, overrides = split(words)
    specs = planning.plan(targets, overrides, check=True)
    places = {spec.hardware.name: spec.hardware.slurm is not None for spec in specs}
    if len(set(places.values())) > 1:
        raise ValueError(f"hardware={','.join(places)}: some on Slurm and some here; give them in two commands")
    raise typer.Exit(submit(specs, allow_dirty=allow_dirty) if any(places.values()) else sweep(specs))


def submit(specs: list[RunSpec], *, allow_dirty: bool) -> int:
    """Put runs into Slurm's queue; exit code 0, or 1 when some can't be tried."""
    from retrace.core.slurm import Slurm
    from retrace.core.store import Store

    summary = Slurm(Store(), command=shlex.join(["retrace", *sys.argv[1:]]), allow_dirty=allow_dirty).run(specs)
    jobs = list(dict.fromkeys(summary.queued.values()))
    finished = len(specs) - len(summary.queued) - len(summary.skipped)
    counts = f"{len(specs)} runs: {finished} finished before, {len(summary.queued)} in the queue"
    counts += (
        f" as {len(jobs)} jobs, {jobs[0]} to {jobs[-1]}" if len(jobs) > 1 else f" as job {jobs[0]}" if jobs else ""
    )
    counts += f", {len(summary.skipped)} not tried because they build on diverged ones" if summary.skipped else ""
    console.print(counts, highlight=False, soft_wrap=True)
    if jobs:
        console.print("follow them with `retrace status --watch`, stop them with `retrace cancel`", highlight=False)
    return 1 if summary.skipped else 0


def sweep(specs: list[RunSpec]) -> int:
    """Carry out runs on this machine; exit code 0, or 1 when some failed or were stopped."""
    from retrace.core import planview
    from retrace.core.launch import Local
    from retrace.core.progress import SweepProgress
    from retrace.core.store import Store
    from retrace.core.units import duration

    store = Store()
    command = shlex.join(["retrace", *sys.argv[1:]])
    expected = planview.expected_seconds(specs, store=store)
    with SweepProgress(specs, store=store, console=console, expected=expected) as progress:
        try:
            summary = Local(store, command=command, on_change=progress.on_change).run(specs)
        except KeyboardInterrupt:
            console.print("stopped; every run keeps its last checkpoint, and the same command goes on from there")
            return 130
    finished = len(specs) - len(summary.failed) - len(summary.skipped) - len(summary.stopped)
    counts = f"{finished} of {len(specs)} runs finished"
    counts += f", {len(summary.diverged)} of them diverged" if summary.diverged else ""
    counts += f", {len(summary.stopped)} stopped (the same command goes on)" if summary.stopped else ""
    counts += f", {len(summary.failed)} failed" if summary.failed else ""
    counts += f", {len(summary.skipped)} not tried because they build on those" if summary.skipped else ""
    console.print(f"{counts}; {duration(progress.seconds)} here", highlight=False, soft_wrap=True)
    for run_id, reason in summary.failed.items():
        console.print(f"  {run_id}: {reason}", highlight=False, markup=False, soft_wrap=True)
    return 1 if summary.failed or summary.stopped else 0


@app.command()
def status(
    words: Annotated[list[str] | None, typer.Argument(help="As for `run`; nothing: all runs on disk")] = None,
    watch: Annotated[bool, typer.Option("--watch", help="Again and again, until nothing runs or is queued")] = False,
    every: Annotated[float, typer.Option(min=0.1, help="Seconds between two looks of --watch")] = 5.0,
) -> None:
    """Show how far runs are, where they are in Slurm's queue, and why failed ones failed."""
    from retrace.core import plan as planning
    from retrace.core import statusview
    from retrace.core.store import Store

    specs = planning.plan(*split(words)) if words else None
    if watch:
        statusview.watch(specs, store=Store(), console=console, every=every)
    else:
        statusview.print_status(specs, store=Store(), console=console)


@app.command()
def cancel(
    words: Annotated[
        list[str], typer.Argument(help="Ids of runs, starts of ids, labels, or targets with overrides as for `run`")
    ],
) -> None:
    """Take the Slurm jobs of runs out of the queue; what runs saves first, and `run` goes on from there."""
    from retrace.core import squeue
    from retrace.core.statusview import named_runs
    from retrace.core.store import Store

    store = Store()
    chosen = named_runs(words, store=store)
    told = squeue.cancel([store.run(run_id) for run_id in chosen if not store.run(run_id).state().finished])
    for run_id, what in told.items():
        console.print(f"{run_id}  {chosen[run_id]}  {what}", highlight=False, markup=False, soft_wrap=True)
    cancelled = sum(" cancelled, " in what for what in told.values())
    console.print(f"{len(chosen)} runs: {cancelled} cancelled, {len(chosen) - len(told)} finished", highlight=False)


@app.command()
def report(
    slugs: Annotated[
        list[str] | None,
        typer.Argument(help="Papers; none: all that have records", metavar="[PAPER]...", show_default=False),
    ] = None,
    scale: Annotated[str, typer.Option(help="Judge the records of this scale")] = "laptop",
) -> None:
    """Judge every claim from the records, print the verdicts, and write REPORT.md, index.html and the overview."""
    from retrace.core import results
    from retrace.core.store import Store

    for slug in slugs or [slug for slug in papers() if Store().records(slug)]:
        results.report(slug, scale=scale, store=Store(), console=console)
    results.overview(store=Store(), console=console)


@app.command()
def publish(
    targets: Annotated[
        list[str],
        typer.Argument(
            help="A paper, paper/ablation, paper/ablation/arm, or a run's id or its start", show_default=False
        ),
    ],
    scale: Annotated[str | None, typer.Option(help="Runs of this scale only", show_default="all")] = None,
    project: Annotated[str | None, typer.Option(help="W&B project", show_default="that of configs/tracking")] = None,
    entity: Annotated[str | None, typer.Option(help="W&B user or team", show_default="the key's own")] = None,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Build, validate and say; write and upload nothing")
    ] = False,
) -> None:
    """Rebuild recorded runs in W&B, with a workspace and a report of the paper; again, and nothing is there twice.

    Records are enough, also those of another machine; metrics.jsonl adds every logged line. Without WANDB_API_KEY
    everything is built and validated as W&B's offline files, and nothing is uploaded.
    """
    from retrace.core.publish import publish as publish_runs
    from retrace.core.store import Store

    publish_runs(targets, scale=scale, project=project, entity=entity, dry_run=dry_run, store=Store(), console=console)


@app.command()
def dashboard(
    port: Annotated[int, typer.Option(min=1, max=65535, help="Of 127.0.0.1")] = 7860,
) -> None:
    """Serve a live page of the runs started with tracking=trackio, on this machine, without an account.

    Their curves appear as they are logged, in RETRACE_HOME/trackio. It runs until Ctrl-C; runs need it for nothing.
    """
    import threading

    from retrace.core.dashboard import serving

    with serving(port=port) as url:
        console.print(f"open {url}  (Ctrl-C ends it; the runs go on)", highlight=False, soft_wrap=True)
        try:
            threading.Event().wait()
        except KeyboardInterrupt:
            console.print("stopped")


@app.command()
def doctor() -> None:
    """Say what this machine has, what is missing, and how to get it."""
    from retrace.core.doctor import print_checks

    raise typer.Exit(print_checks(console, home=HOME, configs=CONFIGS))


def main() -> None:
    """Entry point: bad input is one sentence and exit code 2."""
    handler = logging.StreamHandler()
    handler.setFormatter(RedactingFormatter("%(message)s"))
    logging.basicConfig(level=logging.WARNING, handlers=[handler])
    redact_tracebacks()
    deny_others()
    try:
        app()
    except (ValueError, OSError) as error:
        if os.environ.get("RETRACE_TRACEBACK"):
            raise
        Console(stderr=True).print(f"[red]error:[/] {escape(redact(str(error)))}", highlight=False, soft_wrap=True)
        sys.exit(2)


if __name__ == "__main__":
    main()

"""The command line: parses and delegates. `retrace run quietstar/thought_length scale=laptop seed=0,1,2`.

Modules are imported by the command that needs them, so that each answers as fast as it can.
"""

from __future__ import annotations

import atexit
import gc
import logging
import os
import shlex
import sys
from typing import Annotated

import typer
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from retrace.core.completion import complete_papers, complete_scales, complete_words
from retrace.core.config import CONFIGS, HOME
from retrace.core.discovery import papers
from retrace.core.paper import load_paper
from retrace.core.safety import RedactingFormatter, deny_others, redact, redact_tracebacks
from retrace.core.units import say
from retrace.usage import Commands, Output, WrongUsage, explain_usage, teach

app = typer.Typer(cls=Commands, add_completion=True, pretty_exceptions_enable=False, rich_markup_mode="rich")
console = Output()

Words = Annotated[
    list[str],
    typer.Argument(
        metavar="TARGET|KEY=VALUE",
        help="Targets: PAPER, PAPER/ABLATION, PAPER/ABLATION/ARM or PAPER/main (the base alone). Overrides: any key of "
        "the config, as in scale=smoke, hardware=gpu1, seed=0,1",
        show_default=False,
        autocompletion=complete_words,
    ),
]
Slugs = Annotated[
    list[str] | None,
    typer.Argument(metavar="PAPER", help="None: all", show_default=False, autocompletion=complete_papers),
]


@app.callback(invoke_without_command=True, epilog=teach(""))
def retrace(
    context: typer.Context,
    version: Annotated[bool, typer.Option("--version", help="Print the version and the commit, and end")] = False,
) -> None:
    """Run the ablations of a paper and see, from recorded runs, which of its claims came back."""
    if version:
        from retrace.core.provenance import code, packages

        console.print(f"retrace {packages().get('retrace', 'from source')}, commit {code()['git']}", highlight=False)
    elif context.invoked_subcommand is None:
        console.print(context.get_help(), highlight=False, markup=False)


def split(words: list[str]) -> tuple[list[str], list[str]]:
    """Targets and overrides of a command line; raises ValueError without a target."""
    targets = [word for word in words if "=" not in word and not word.startswith(("+", "~"))]
    for word in {"scale", "hardware", "tracking", "seed"} & set(targets):
        raise ValueError(f"{word}: a key without a value; write {word}=VALUE, without spaces around =")
    if not targets:
        raise ValueError(f"no target given: name a paper ({', '.join(papers())}) or paper/ablation; see `retrace list`")
    return targets, [word for word in words if word not in targets]


@app.command("list", epilog=teach("list"))
def list_(slugs: Slugs = None) -> None:
    """Show papers with their ablations and arms."""
    from retrace.core.plan import load_ablations

    for slug in slugs or papers():
        paper = load_paper(slug)
        table = Table("ablation", "question", "where", "arms (baseline first)", "seeds", box=None, title_justify="left")
        table.title = f"[bold]{slug}[/]: {paper.title} (arXiv {paper.arxiv})"
        for name, ablation in load_ablations(slug).items():
            arms = [ablation.baseline, *(arm for arm in ablation.arms if arm != ablation.baseline)]
            seeds = " ".join(map(str, ablation.seeds))
            table.add_row(f"{slug}/{name}", ablation.question, ablation.locus, ", ".join(arms), seeds)
        console.print(table)


@app.command(epilog=teach("plan"))
def plan(
    words: Words,
    power: Annotated[bool, typer.Option("--power", help="Show instead how many seeds would decide each claim")] = False,
) -> None:
    """Show the runs that a command would need, with time, memory, GPU-hours and price, and start nothing."""
    from retrace.core import plan as planning
    from retrace.core.store import Store

    targets, overrides = split(words)
    specs = planning.plan(targets, overrides)
    if power:
        from retrace.core.power import print_power

        print_power(specs, store=Store(), console=console)
    else:
        from retrace.core.planview import print_plan

        print_plan(specs, store=Store(), console=console)


@app.command(epilog=teach("run"))
def run(
    words: Words,
    allow_dirty: Annotated[
        bool, typer.Option("--allow-dirty", help="On Slurm: submit uncommitted code, and keep its diff in the records")
    ] = False,
) -> None:
    """Start runs, go on with them, or do nothing where nothing is left: one command for all three.

    Ctrl-C, a kill or a power cut costs the steps since the last checkpoint. Finished runs are never run again.
    """
    from retrace.core import plan as planning
    from retrace.core.sweep import submit, sweep

    targets, overrides = split(words)
    specs = planning.plan(targets, overrides, check=True)
    command = shlex.join(["retrace", *sys.argv[1:]])
    if specs[0].hardware.slurm:
        raise typer.Exit(submit(specs, command=command, allow_dirty=allow_dirty, console=console))
    raise typer.Exit(sweep(specs, command=command, console=console))


@app.command(epilog=teach("status"))
def status(
    words: Annotated[
        list[str] | None,
        typer.Argument(
            metavar="TARGET|KEY=VALUE",
            help="As for `run`; none: all runs on disk",
            show_default=False,
            autocompletion=complete_words,
        ),
    ] = None,
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


@app.command(epilog=teach("cancel"))
def cancel(
    words: Annotated[
        list[str],
        typer.Argument(
            metavar="RUN|TARGET|KEY=VALUE",
            help="Ids of runs, starts of ids, labels, or targets with overrides as for `run`",
            show_default=False,
            autocompletion=complete_words,
        ),
    ],
) -> None:
    """Take the Slurm jobs of runs out of the queue; what runs saves first, and `run` goes on from there."""
    from retrace.core import squeue
    from retrace.core.statusview import named_runs
    from retrace.core.store import Store

    store = Store()
    chosen = named_runs(words, store=store)
    unfinished = [store.run(run_id) for run_id in chosen if not store.run(run_id).state().finished]
    told = squeue.cancel(unfinished, store=store)
    for run_id, what in told.items():
        say(console, f"{run_id}  {chosen[run_id]}  {what}")
    cancelled = sum(" cancelled, " in what for what in told.values())
    console.print(f"{len(chosen)} runs: {cancelled} cancelled, {len(chosen) - len(told)} finished", highlight=False)


@app.command(epilog=teach("report"))
def report(
    slugs: Slugs = None,
    scale: Annotated[
        str, typer.Option(metavar="SCALE", help="Judge the records of this scale", autocompletion=complete_scales)
    ] = "laptop",
) -> None:
    """Judge every claim from the records, print the verdicts, and write REPORT.md, index.html and the overview.

    Starts no run and needs none on disk: the records in results/ are enough.
    """
    from datetime import UTC, datetime

    gc.disable()  # of what thousands of records become nothing is garbage, and looking takes a tenth of the time
    from retrace.core.report import report_papers
    from retrace.core.store import Store

    for slug in slugs or ():
        if "=" in slug or "/" in slug:
            raise ValueError(f"{slug}: `report` takes papers and --scale, as in retrace report quietstar --scale gpu")
        load_paper(slug)
    report_papers(slugs, scale=scale, now=datetime.now(UTC), store=Store(), console=console)


@app.command(epilog=teach("publish"))
def publish(
    targets: Annotated[
        list[str],
        typer.Argument(
            metavar="RUN|TARGET",
            help="A paper, paper/ablation, paper/ablation/arm, or a run's id or its start",
            show_default=False,
            autocompletion=complete_words,
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


@app.command(epilog=teach("dashboard"))
def dashboard(
    port: Annotated[int, typer.Option(min=1, max=65535, help="Of 127.0.0.1")] = 7860,
) -> None:
    """Serve a live page of the runs started with tracking=trackio, on this machine, without an account.

    Their curves appear as they are logged, in RETRACE_HOME/trackio. It runs until Ctrl-C; runs need it for nothing.
    """
    import threading

    from retrace.core.dashboard import serving

    with serving(port=port) as url:
        say(console, f"open {url}  (Ctrl-C ends it; the runs go on)")
        try:
            threading.Event().wait()
        except KeyboardInterrupt:
            console.print("stopped")


@app.command(epilog=teach("doctor"))
def doctor() -> None:
    """Say what this machine has, what is missing, and how to get it."""
    from retrace.core.doctor import print_checks

    raise typer.Exit(print_checks(console, home=HOME, configs=CONFIGS))


def main() -> None:
    """Entry point: bad input is one sentence and exit code 2."""
    gc.set_threshold(100_000)  # thousands of records are millions of objects, none of them garbage: look less often
    atexit.register(gc.freeze)  # nor at the end, which takes a tenth of a second
    handler = logging.StreamHandler()
    handler.setFormatter(RedactingFormatter("%(message)s"))
    logging.basicConfig(level=logging.WARNING, handlers=[handler])
    redact_tracebacks()
    deny_others()
    try:
        sys.exit(app(prog_name="retrace", standalone_mode=False))
    except typer.Abort:
        sys.exit(130)
    except (ValueError, OSError, WrongUsage) as error:
        if os.environ.get("RETRACE_TRACEBACK"):
            raise
        text = explain_usage(error) if isinstance(error, WrongUsage) else str(error)
        Console(stderr=True).print(f"[red]error:[/] {escape(redact(text))}", highlight=False, soft_wrap=True)
        sys.exit(2)


if __name__ == "__main__":
    main()

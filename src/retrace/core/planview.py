"""What `plan` and `status` print. Layer 0: answers at once on a login node."""

from __future__ import annotations

from collections.abc import Sequence

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from retrace.core.cost import Cost, expected_seconds_of, makespan, measured_rates
from retrace.core.paper import load_paper
from retrace.core.plan import RunSpec
from retrace.core.store import State, Store
from retrace.core.units import duration, si


def cost_of(spec: RunSpec) -> Cost:
    """By the paper's own counting."""
    return load_paper(spec.paper).programs[spec.program].cost(spec.config)


def expected_seconds(specs: Sequence[RunSpec], *, store: Store) -> dict[str, float | None]:
    """Seconds that each run should take, from recorded runs of the same program on the same hardware config."""
    rates: dict[tuple[str, str, str], dict[str, float]] = {}
    expected = {}
    for spec in specs:
        key = (spec.paper, spec.hardware.name, spec.scale)
        if key not in rates:
            rates[key] = measured_rates(store.records(spec.paper), hardware=spec.hardware.name, scale=spec.scale)
        expected[spec.id] = expected_seconds_of(cost_of(spec), spec.program, rates[key])
    return expected


def print_plan(specs: Sequence[RunSpec], *, store: Store, console: Console) -> None:
    """A line for each run, parents before children, and a line for all of them."""
    expected = expected_seconds(specs, store=store)
    table = Table("run", "asked for by", "status", "tokens", "FLOPs", "time", "memory", box=None, header_style="bold")
    todo: list[float | None] = []
    flops = 0.0
    for spec in specs:
        state, cost = store.run(spec.id).state(), cost_of(spec)
        if not state.finished:
            todo.append(expected[spec.id])
            flops += cost.flops
        label = spec.labels[0] + (f" +{len(spec.labels) - 1}" if len(spec.labels) > 1 else "")
        numbers = (si(cost.tokens), si(cost.flops), duration(expected[spec.id]), f"{si(cost.memory)}B")
        table.add_row(spec.id, escape(label), _shown(state), *numbers)
    if console.is_terminal:
        console.print(table)
    else:
        Console(file=console.file, width=200).print(table)
    slots = specs[0].hardware.slots
    wall = duration(makespan(todo, slots))
    console.print(
        f"{len(specs)} runs, {len(specs) - len(todo)} finished; {len(todo)} to do: {si(flops)} FLOPs, "
        f"about {wall} with {slots} side by side on '{specs[0].hardware.name}'",
        highlight=False,
        soft_wrap=True,
    )
    console.print("memory: tensors of a run; its process takes about 0.6 GB more for libraries", soft_wrap=True)
    if todo and any(seconds is None for seconds in todo):
        console.print("time '-': no run of that program and scale is on record for this hardware yet", soft_wrap=True)


def print_status(specs: Sequence[RunSpec] | None, *, store: Store, console: Console) -> None:
    """Each run's state, reasons in full, and counts; all runs on disk where `specs` is None."""
    labels = {spec.id: spec.labels[0] for spec in specs} if specs is not None else store.labels()
    counts: dict[str, int] = {}
    for run_id, label in labels.items():
        state = store.run(run_id).state()
        counts[state.status] = counts.get(state.status, 0) + 1
        line = f"{_shown(state):<22} {run_id}  {label}  {state.reason}"
        console.print(line.rstrip(), highlight=False, markup=False, soft_wrap=True)
    total = ", ".join(f"{count} {status}" for status, count in sorted(counts.items()))
    console.print(
        f"{len(labels)} runs: {total}" if labels else "no runs yet; start with `retrace run PAPER`", highlight=False
    )


def _shown(state: State) -> str:
    if state.finished or not state.total:
        return state.status
    left = f" ETA {duration(state.seconds_left)}" if state.status == "RUNNING" else ""
    return f"{state.status} {state.step}/{state.total}{left}"

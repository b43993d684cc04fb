"""What `plan` and `status` print. Layer 0: answers at once on a login node."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from retrace.core.config import Hardware
from retrace.core.cost import Cost, Expected, expected_time, makespan, measured_rates
from retrace.core.paper import load_paper
from retrace.core.plan import RunSpec
from retrace.core.record import Record
from retrace.core.store import State, Store
from retrace.core.units import duration, si


def cost_of(spec: RunSpec) -> Cost:
    """By the paper's own counting."""
    return load_paper(spec.paper).programs[spec.program].cost(spec.config)


def records_of(specs: Iterable[RunSpec], *, store: Store) -> list[Record]:
    """Every record of the papers that the runs are of."""
    return [record for slug in dict.fromkeys(spec.paper for spec in specs) for record in store.records(slug)]


def expected_times(
    specs: Sequence[RunSpec], costs: Mapping[str, Cost], records: Sequence[Record]
) -> dict[str, Expected | None]:
    """How long each run should take, and how that is known; None where it is not. `costs`: of each run."""
    rates: dict[tuple[str, str, str], dict[str, float]] = {}
    expected = {}
    for spec in specs:
        key = (spec.paper, spec.hardware.name, spec.scale)
        if key not in rates:
            own = (record for record in records if record.paper == spec.paper)
            rates[key] = measured_rates(own, hardware=spec.hardware.name, scale=spec.scale)
        expected[spec.id] = expected_time(costs[spec.id], spec.program, rates[key], spec.hardware)
    return expected


def expected_seconds(specs: Sequence[RunSpec], *, store: Store) -> dict[str, float | None]:
    """Seconds that each run should take, None where that is not known."""
    times = expected_times(specs, {spec.id: cost_of(spec) for spec in specs}, records_of(specs, store=store))
    return {run_id: None if time is None else time.seconds for run_id, time in times.items()}


def print_plan(specs: Sequence[RunSpec], *, store: Store, console: Console) -> None:
    """A line for each run, parents before children, and some for all of them."""
    hardware = specs[0].hardware
    costs = {spec.id: cost_of(spec) for spec in specs}
    expected = expected_times(specs, costs, records_of(specs, store=store))
    on_gpu = hardware.device == "cuda"
    columns = ["run", "asked for by", "status", "tokens", "FLOPs", "time", *(["GPU-hours"] if on_gpu else [])]
    table = Table(*columns, f"memory of a {'GPU' if on_gpu else 'process'}", box=None, header_style="bold")
    todo: list[float | None] = []
    flops = 0.0
    for spec in specs:
        state, cost, time = store.run(spec.id).state(), costs[spec.id], expected[spec.id]
        seconds = None if time is None else time.seconds
        if not state.finished:
            todo.append(seconds)
            flops += cost.flops
        label = spec.labels[0] + (f" +{len(spec.labels) - 1}" if len(spec.labels) > 1 else "")
        numbers = [si(cost.tokens), si(cost.flops), _shown_time(time)]
        numbers += [_gpu_hours([seconds], spec.hardware)] if on_gpu else []
        table.add_row(spec.id, escape(label), shown(state), *numbers, _shown_memory(cost, spec.hardware))
    if console.is_terminal:
        console.print(table)
    else:
        Console(file=console.file, width=200).print(table)
    wall = duration(makespan(todo, hardware.slots))
    hours = f", {_gpu_hours(todo, hardware)} GPU-hours" if on_gpu else ""
    console.print(
        f"{len(specs)} runs, {len(specs) - len(todo)} finished; {len(todo)} to do: {si(flops)} FLOPs, "
        f"about {wall}{hours} with {hardware.slots} side by side on '{hardware.name}'",
        highlight=False,
        soft_wrap=True,
    )
    for line in _notes(list(expected.values()), hardware):
        console.print(line, highlight=False, soft_wrap=True)


def _notes(expected: Sequence[Expected | None], hardware: Hardware) -> list[str]:
    """What the columns mean, for those kinds of values that occur."""
    notes = [
        "memory: tensors that stay (weights, gradients, moments) + those of one micro-batch; a process takes about "
        "0.6 GB more for libraries"
    ]
    if any(time is not None and not time.measured for time in expected):
        notes.append(
            f"time '~': planned, not measured: hardware.planned_mfu={hardware.planned_mfu} of "
            f"{si(hardware.peak_flops or 0)}FLOP/s on each of {hardware.processes} x {hardware.device}"
        )
    if any(time is not None and time.measured for time in expected):
        notes.append("time without '~': at the speed of runs of that program and scale on record for this hardware")
    if any(time is None for time in expected):
        notes.append("time '-': no run of that program and scale is on record for this hardware yet")
    return notes


def _gpu_hours(seconds: Sequence[float | None], hardware: Hardware) -> str:
    """Of all GPUs that a run holds, whether or not they have work."""
    known = [value for value in seconds if value is not None]
    return "-" if len(known) < len(seconds) else f"{sum(known) * hardware.processes / 3600:.3g}"


def _shown_time(time: Expected | None) -> str:
    return duration(None) if time is None else ("" if time.measured else "~") + duration(time.seconds)


def _shown_memory(cost: Cost, hardware: Hardware) -> str:
    return f"{si(cost.state_bytes(hardware))}B + {si(cost.activation_bytes(hardware))}B"


def shown(state: State) -> str:
    """'RUNNING 12/60 ETA 30 s', or the status alone."""
    if state.finished or not state.total:
        return state.status
    left = f" ETA {duration(state.seconds_left)}" if state.status == "RUNNING" else ""
    return f"{state.status} {state.step}/{state.total}{left}"

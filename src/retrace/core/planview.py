"""What `plan` and `status` print. Layer 0: answers at once on a login node."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from retrace.core.config import Hardware
from retrace.core.cost import Check, Cost, Expected, Rate, check_times, expected_time, makespan, measured_rates
from retrace.core.paper import load_paper
from retrace.core.plan import RunSpec
from retrace.core.provenance import processor
from retrace.core.record import Label, Record
from retrace.core.store import State, Store
from retrace.core.units import duration, say, si

LIBRARIES = 0.6e9  # bytes that a process takes beside its tensors


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
    rates: dict[tuple[str, str, str], dict[str, Rate]] = {}
    expected = {}
    for spec in specs:
        key = (spec.paper, spec.hardware.name, spec.scale)
        if key not in rates:
            own = (record for record in records if record.paper == spec.paper)
            here = processor() if spec.hardware.device == "cpu" and spec.hardware.slurm is None else ""
            rates[key] = measured_rates(own, hardware=spec.hardware.name, scale=spec.scale, processor=here)
        expected[spec.id] = expected_time(costs[spec.id], spec.program, rates[key], spec.hardware)
    return expected


def expected_seconds(specs: Sequence[RunSpec], *, store: Store) -> dict[str, float | None]:
    """Seconds that each run should take, None where that is not known."""
    times = expected_times(specs, {spec.id: cost_of(spec) for spec in specs}, records_of(specs, store=store))
    return {run_id: None if time is None else time.seconds for run_id, time in times.items()}


def print_plan(specs: Sequence[RunSpec], *, store: Store, console: Console) -> None:
    """A line for the runs of each arm that cost the same, parents before children, and what all of them come to."""
    hardware = specs[0].hardware
    records = records_of(specs, store=store)
    costs = {spec.id: cost_of(spec) for spec in specs}
    times = expected_times(specs, costs, records)
    states = {spec.id: store.run(spec.id).state() for spec in specs}
    lines: dict[object, list[RunSpec]] = {}
    for spec in specs:
        lines.setdefault((spec.paper, spec.program, _arm(spec), spec.hardware.name, costs[spec.id]), []).append(spec)
    on_gpu = hardware.device == "cuda"
    columns = ["run", "asked for by", "runs", "status", "tokens", "FLOPs", "time of one"]
    columns += ["GPU-hours of all", "memory of a GPU"] if on_gpu else ["memory of a process"]
    table = Table(*columns, box=None, header_style="bold")
    for runs in lines.values():
        table.add_row(*_cells(runs, costs[runs[0].id], times[runs[0].id], states, on_gpu=on_gpu))
    console.print(table)
    todo = [spec for spec in specs if not states[spec.id].finished]
    for text in _totals(specs, todo, costs, times, hardware):
        say(console, text)
    unknown = [costs[spec.id] for spec in specs if times[spec.id] is None]
    for text in _reckoned(list(times.values()), unknown, hardware, check_times(_alike(records, specs))):
        say(console, text)


def _cells(
    runs: Sequence[RunSpec], cost: Cost, time: Expected | None, states: Mapping[str, State], *, on_gpu: bool
) -> list[str]:
    """A line: runs of one program for one arm that cost the same, its seeds, or what it chooses from."""
    first, one = runs[0], len(runs) == 1
    counts = Counter(shown(states[spec.id]) for spec in runs)
    status = ", ".join(text if len(counts) == 1 else f"{count} {text}" for text, count in counts.items())
    label = (first.labels[0] if one else _arm(first)) + (f" +{len(first.labels) - 1}" if len(first.labels) > 1 else "")
    name = first.id if one else f"{first.paper}-{first.program}"
    cells = [name, escape(label), str(len(runs)), status, si(cost.tokens), si(cost.flops), _shown_time(time)]
    cells += [_hours(len(runs) * time.seconds * first.hardware.processes / 3600) if time else "-"] if on_gpu else []
    return [*cells, f"{si(cost.state_bytes(first.hardware))}B + {si(cost.activation_bytes(first.hardware))}B"]


def _arm(spec: RunSpec) -> str:
    return Label.parse(spec.labels[0]).ablation_arm


def _alike(records: Sequence[Record], specs: Sequence[RunSpec]) -> Sequence[Record]:
    """The records of the plan's scales and hardware, or, where there are none, all."""
    wanted = {(spec.scale, spec.hardware.name) for spec in specs}
    found = [record for record in records if (record.scale, record.provenance.get("hardware_config")) in wanted]
    return found or records


def _totals(
    specs: Sequence[RunSpec],
    todo: Sequence[RunSpec],
    costs: Mapping[str, Cost],
    times: Mapping[str, Expected | None],
    hardware: Hardware,
) -> Iterator[str]:
    """What the runs that are left come to: FLOPs, time, hours of all processors that they hold, money, memory."""
    flops = sum(costs[spec.id].flops for spec in todo)
    yield f"{len(specs)} runs, {len(specs) - len(todo)} finished; {len(todo)} to do: {si(flops)} FLOPs"
    seconds = [time.seconds for spec in todo if (time := times[spec.id]) is not None]
    unknown = len(todo) - len(seconds)
    least = "at least " if unknown else ""
    rest = f", and {unknown} run{'s' * (unknown != 1)} of unknown time" if unknown else ""
    unit = hardware.unit
    if seconds or not todo:
        hours, held = sum(seconds) / 3600, sum(seconds) / 3600 * hardware.processes
        yield (
            f"wall time: {least}{duration(makespan(seconds, hardware.slots))} with {hardware.slots} "
            f"run{'s' * (hardware.slots != 1)} at a time on '{hardware.name}'{rest}"
        )
        formula = f" = {_hours(hours)} hours of runs x {hardware.processes} {unit}s" if hardware.processes > 1 else ""
        yield f"{unit}-hours: {least}{_hours(held)}{formula}"
        if hardware.price_per_hour is not None:
            price = held * hardware.price_per_hour
            shown_price = f"{price:,.0f}" if price >= 100 else f"{price:.2f}"
            yield f"price: {least}{shown_price} = {unit}-hours x hardware.price_per_hour={hardware.price_per_hour:g}"
        elif unit == "GPU":
            yield "price: add hardware.price_per_hour=PRICE, that of one GPU"
    else:
        yield f"wall time, {unit}-hours: not known"
    yield _memory(specs, costs, hardware)


def _memory(specs: Sequence[RunSpec], costs: Mapping[str, Cost], hardware: Hardware) -> str:
    """The run that needs the most memory, and how many do not fit."""
    sizes = {
        spec.id: (costs[spec.id].state_bytes(hardware) + costs[spec.id].activation_bytes(hardware) + LIBRARIES) / 1e9
        for spec in specs
    }
    most = max(specs, key=lambda spec: sizes[spec.id])
    unit = "GPU" if hardware.device == "cuda" else "process"
    text = f"memory: {sizes[most.id]:,.1f} GB on a {unit} at most ({most.program} of {_arm(most)})"
    if hardware.memory_gb is None:
        return text
    large = [spec for spec in specs if sizes[spec.id] > hardware.memory_gb]
    if not large:
        return f"{text}; all runs fit into {hardware.memory_gb:g} GB"
    spread = hardware.model_copy(update={"shard": True, "processes": 4096})  # where next to nothing is left to share
    whole = sum(costs[spec.id].state_bytes(spread) / 1e9 + LIBRARIES / 1e9 > hardware.memory_gb for spec in large)
    able = len(large) - whole
    ways = ["lower micro_batch_size, or an evaluation's batch_size"]
    ways += [] if hardware.activation_checkpointing else ["set hardware.activation_checkpointing=true"]
    ways += ["shard over more GPUs"] if any(costs[spec.id].shared for spec in large) else []
    advice = f": {', and/or '.join(ways)}" if able else ""
    advice += f"; {whole} of them need larger GPUs: what each has whole (docs/plan.md) is too much" if whole else ""
    return f"{text}; {len(large)} of {len(specs)} runs DO NOT FIT into {hardware.memory_gb:g} GB{advice}"


def _reckoned(
    times: Sequence[Expected | None], unknown: Sequence[Cost], hardware: Hardware, check: Check | None
) -> Iterator[str]:
    """The formulas, for those kinds of values that occur, and what they were checked against. `unknown`: no time."""
    planned = any(time is not None and not time.measured for time in times)
    state = "weights, gradients, moments"
    if hardware.shard:
        state += f", each / {hardware.processes}, + what a step has whole: gathered weights, gradients on their way"
    yield f"how: memory = {state} + activations of one micro-batch; above, + 0.6 GB of libraries"
    if planned:
        several = f"{hardware.processes} GPUs, or 1 for work that is not shared, x " if hardware.processes > 1 else ""
        yield (
            f"how: time '~' = FLOPs / ({several}{si(hardware.peak_flops or 0)} FLOP/s x "
            f"hardware.planned_mfu={hardware.planned_mfu}): planned, not measured"
        )
    where = sorted({place for time in times if time is not None for place in time.where})
    if where:
        yield (
            "how: time without '~' = FLOPs / speed of runs of that program and scale on record for "
            f"'{hardware.name}' ({'; '.join(where)})"
        )
    if unknown:
        hints = ["hardware.peak_flops and hardware.planned_mfu plan it"] if any(c.has_model for c in unknown) else []
        hints += [] if all(c.has_model for c in unknown) else ["a program without a model is not planned from FLOPs"]
        yield f"how: time '-': no run of that program and scale is on record for '{hardware.name}'; {'; '.join(hints)}"
    if check is not None:
        yield (
            f"checked: {check.runs} runs on record ({'; '.join(check.where)}), each predicted from FLOPs and the speed "
            f"of other arms: half are within {100 * check.half:.0f} %, nine in ten within {100 * check.most:.0f} %; "
            f"their sum is off by {100 * (check.total - 1):+.0f} %"
        )
    if planned:
        yield f"not checked: peak x planned_mfu, since no run of these programs is on record for '{hardware.name}'"


def _hours(hours: float) -> str:
    return f"{hours:,.0f}" if hours >= 100 else "<0.001" if 0 < hours < 0.001 else f"{hours:.3g}"


def _shown_time(time: Expected | None) -> str:
    return duration(None) if time is None else ("" if time.measured else "~") + duration(time.seconds)


def shown(state: State) -> str:
    """'RUNNING 12/60 ETA 30 s', or the status alone."""
    if state.finished or not state.total:
        return state.status
    left = f" ETA {duration(state.seconds_left)}" if state.status == "RUNNING" else ""
    return f"{state.status} {state.step}/{state.total}{left}"

"""What has not been run and what it would cost: the runs that each scale still needs, as `retrace plan` counts."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import lru_cache

from retrace.core.claims import Claim
from retrace.core.config import Hardware
from retrace.core.plan import RunSpec, plan
from retrace.core.planview import cost_of, expected_times
from retrace.core.record import Label, Record
from retrace.core.units import si

MACHINES = {"laptop": "cpu", "gpu": "gpu1_h100", "paper": "gpu8"}  # the smallest hardware that each scale is made for


@dataclass(frozen=True)
class Need:
    """Runs without a record, and what they would take. `hours`: of all processors that they hold; None: not known."""

    name: str
    runs: int
    flops: float
    hours: float | None


@dataclass(frozen=True)
class Outlook:
    """One scale. `total` counts a run that several ablations share once, `ablations` in each of them."""

    scale: str
    claims: tuple[str, ...]  # ids of those that can be judged there
    total: Need
    ablations: tuple[Need, ...]
    unit: str  # of hours
    assumption: str
    plan: str  # the command that shows each run
    run: str  # the command that starts them


@lru_cache(maxsize=16)
def runs_asked(slug: str, scale: str) -> tuple[RunSpec, ...]:
    """The runs that a paper's ablation files ask for, on the scale's hardware; composing them takes a second."""
    return tuple(plan([slug], _words(scale)))


def _words(scale: str) -> list[str]:
    return [f"scale={scale}", *([f"hardware={MACHINES[scale]}"] if scale in MACHINES else [])]


def outlooks(
    slug: str, claims: Sequence[Claim], *, scales: Sequence[str], records: Sequence[Record]
) -> tuple[Outlook, ...]:
    """Of every scale that judges claims and has runs without a record. `records`: all of the paper's."""
    recorded = {record.id for record in records}
    found = []
    for scale in scales:
        judged = tuple(claim.id for claim in claims if scale in claim.testable_at)
        if scale in MACHINES and judged:
            specs = [spec for spec in runs_asked(slug, scale) if spec.id not in recorded]
            if specs:
                found.append(_outlook(slug, scale, judged, specs, records))
    return tuple(found)


def _outlook(
    slug: str,
    scale: str,
    claims: tuple[str, ...],
    specs: Sequence[RunSpec],
    records: Sequence[Record],
) -> Outlook:
    hardware = specs[0].hardware
    costs = {spec.id: cost_of(spec) for spec in specs}
    times = expected_times(specs, costs, records)

    def need(name: str, runs: Iterable[RunSpec]) -> Need:
        some = list(runs)
        counted = [spec for spec in some if costs[spec.id].has_model or times[spec.id] is not None]
        known = [time.seconds for spec in counted if (time := times[spec.id]) is not None]
        total = sum(known) * hardware.processes / 3600 if len(known) == len(counted) else None
        return Need(name, len(some), sum(costs[spec.id].flops for spec in some), total)

    asked: dict[str, dict[str, RunSpec]] = {}
    for spec in specs:
        for label in spec.labels:
            asked.setdefault(Label.parse(label).ablation, {})[spec.id] = spec
    return Outlook(
        scale=scale,
        claims=claims,
        total=need("all", specs),
        ablations=tuple(need(name, runs.values()) for name, runs in asked.items()),
        unit=f"{hardware.unit}-hours",
        assumption=_assumption(hardware),
        plan=f"retrace plan {slug} {' '.join(_words(scale))}",
        run=f"retrace run {slug} {' '.join(_words(scale))}",
    )


def _assumption(hardware: Hardware) -> str:
    if hardware.peak_flops is None or hardware.planned_mfu is None:
        return f"hardware '{hardware.name}', at the speed of runs on record; unknown where there are none"
    each = f"{si(hardware.peak_flops)} FLOP/s"
    processors = f"{hardware.processes} GPU{'s' * (hardware.processes > 1)} of {each}"
    idle = "; GPUs that a run holds and leaves idle count" if hardware.processes > 1 else ""
    return f"planned, not measured: {processors}, {100 * hardware.planned_mfu:.0f} % of it in use{idle}"

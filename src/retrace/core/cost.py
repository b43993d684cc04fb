"""FLOPs, memory, time: what a run needs, from its config alone (no torch), and what it reached.

Unknown stays None: a machine without a stated peak has no MFU, and a run whose like was never measured has no expected
time.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from statistics import median

from retrace.core.record import Record


@dataclass(frozen=True)
class Cost:
    """`tokens`: text tokens trained on or scored. `flops`: model FLOPs, forward and backward. `memory`: peak bytes."""

    tokens: int
    flops: float
    memory: float


@dataclass(frozen=True)
class DecoderShape:
    """A Llama-like decoder as the counting sees it."""

    hidden_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    intermediate_size: int
    vocab_size: int

    @property
    def trunk_parameters(self) -> int:
        """Parameters in matrix products of the blocks: q, k, v, o and the three MLP matrices."""
        kv = self.hidden_size * self.num_kv_heads // self.num_heads
        attention = 2 * self.hidden_size * self.hidden_size + 2 * self.hidden_size * kv
        return self.num_layers * (attention + 3 * self.hidden_size * self.intermediate_size)

    @property
    def parameters(self) -> int:
        """All parameters, embedding and head counted apart."""
        return self.trunk_parameters + 2 * self.vocab_size * self.hidden_size

    def forward_flops(self, *, tokens: float, keys: float, logits: float) -> float:
        """Two FLOPs a multiply-add: `tokens` through the trunk, each seeing `keys` keys on average, `logits` heads."""
        attention = 4 * self.num_layers * self.hidden_size * keys * tokens
        return 2 * self.trunk_parameters * tokens + attention + 2 * self.vocab_size * self.hidden_size * logits


def mfu(flops: float, seconds: float, peak_flops: float | None, processes: int) -> float | None:
    """Model FLOPs utilisation; None where the peak is not known."""
    return None if peak_flops is None or seconds <= 0 else flops / seconds / (peak_flops * processes)


def measured_rates(records: Iterable[Record], *, hardware: str, scale: str) -> dict[str, float]:
    """FLOPs a second of each program, the median over finished runs of this scale on this hardware config."""
    rates: dict[str, list[float]] = {}
    for record in records:
        seconds = record.cost.seconds
        if (
            record.scale == scale
            and record.provenance.get("hardware_config") == hardware
            and seconds
            and record.cost.flops
        ):
            rates.setdefault(record.program, []).append(record.cost.flops / seconds)
    return {program: median(values) for program, values in rates.items()}


def expected_seconds_of(cost: Cost, program: str, rates: dict[str, float]) -> float | None:
    """Seconds that a run of this program should take, from runs that were measured; None without any."""
    rate = rates.get(program)
    return None if rate is None else cost.flops / rate


def makespan(seconds: Sequence[float | None], slots: int) -> float | None:
    """Wall time of independent runs side by side; None as soon as one of them is unknown."""
    if any(value is None for value in seconds):
        return None
    return max(sum(v for v in seconds if v) / max(1, slots), max((v for v in seconds if v), default=0.0))

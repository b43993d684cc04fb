"""FLOPs, memory, time: what a run needs, from its config alone (no torch), and what it reached.

Unknown stays None: a machine without a stated peak has no MFU, and a run whose like was never measured has no expected
time, unless the machine's YAML assumes a share of its peak.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from statistics import median

from retrace.core.config import Hardware
from retrace.core.optim import Precision
from retrace.core.record import Label, Record

FP32, BF16 = 4, 2
KEPT: dict[Precision, int] = {"fp32": FP32, "fp32_master": FP32, "pure_bf16": BF16}  # bytes that the optimizer keeps
COMPUTED: dict[Precision, int] = {"fp32": FP32, "fp32_master": BF16, "pure_bf16": BF16}  # bytes that a step uses


@dataclass(frozen=True)
class Memory:
    """Bytes of a run's tensors, by what they grow with: the model (`state`), or a micro-batch (`activations`).

    `trained` of the `parameters` have gradients and two moments. A step that runs the model several times before its
    backward pass (`several_passes`) has the gradients of all layers in hand at once, beside those that are kept.
    """

    parameters: int
    trained: int
    precision: Precision
    activations: float  # kept for the backward pass of one micro-batch
    checkpointed: float  # the same, with activation checkpointing
    micro_batches: int = 1  # in one update, over all processes
    several_passes: bool = False
    beside: float = 0.0  # what every process has whole in any case, such as another model's weights

    def state(self, hardware: Hardware) -> float:
        """Bytes in one process: weights, gradients, moments, and what stands beside them while a step computes."""
        kept, used = KEPT[self.precision], COMPUTED[self.precision]
        total = kept * (self.parameters + 3 * self.trained)
        passing = used * self.trained if self.several_passes else 0
        accumulates = self.micro_batches > hardware.processes
        if hardware.shard:  # beside its part: gathered weights, and gradients that are whole until they are reduced
            waiting = kept * self.trained if accumulates else 0
            return self.beside + total / hardware.processes + used * self.parameters + passing + waiting
        if used < kept:
            return self.beside + total + used * self.parameters + passing
        becoming = not accumulates and hardware.processes == 1  # those on their way are those that are kept
        return self.beside + total + (0 if becoming else passing)


@dataclass(frozen=True)
class Cost:
    """`tokens`: text tokens trained on or scored. `flops`: model FLOPs, forward and backward.

    `shared`: whether a run's processes share the work; if not, one does it, whole, and the others are idle.
    """

    tokens: int
    flops: float
    memory: Memory
    shared: bool = True

    @property
    def has_model(self) -> bool:
        """Whether the FLOPs are those of matrix products."""
        return self.memory.parameters > 0

    def state_bytes(self, hardware: Hardware) -> float:
        """Bytes in one process that stay: weights, gradients, moments."""
        return self.memory.state(hardware if self.shared else _alone(hardware))

    def activation_bytes(self, hardware: Hardware) -> float:
        """Bytes in one process that come and go with each micro-batch."""
        return self.memory.checkpointed if hardware.activation_checkpointing else self.memory.activations


def _alone(hardware: Hardware) -> Hardware:
    return hardware.model_copy(update={"processes": 1, "shard": False})


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


@dataclass(frozen=True)
class Rate:
    """FLOPs a second, and the processors that they were measured on."""

    speed: float
    where: tuple[str, ...]


def measured_rates(records: Iterable[Record], *, hardware: str, scale: str, processor: str = "") -> dict[str, Rate]:
    """Of each program, the median over finished runs of this scale on this hardware config.

    Where some of them ran on `processor`, those alone count: a config such as "cpu" stands for many.
    """
    found: dict[str, list[tuple[str, float]]] = {}
    for record in records:
        flops, seconds, where = record.cost.flops, record.cost.seconds, record.provenance
        if record.scale == scale and where.get("hardware_config") == hardware and seconds and flops:
            found.setdefault(record.program, []).append((str(where.get("hardware", "unknown")), flops / seconds))
    rates = {}
    for program, runs in found.items():
        chosen = [run for run in runs if processor and processor in run[0]] or runs
        rates[program] = Rate(median(rate for _, rate in chosen), tuple(sorted({place for place, _ in chosen})))
    return rates


@dataclass(frozen=True)
class Expected:
    """Seconds that a run should take: by runs like it on the processors `where`, or else by a share of the peak."""

    seconds: float
    where: tuple[str, ...] = ()

    @property
    def measured(self) -> bool:
        return bool(self.where)


def expected_time(cost: Cost, program: str, rates: Mapping[str, Rate], hardware: Hardware) -> Expected | None:
    """From runs of this program that were measured; else from the hardware's peak and planned MFU; else None.

    What has no model, such as the training of a tokenizer, reaches no share of a peak.
    """
    if program in rates:
        return Expected(cost.flops / rates[program].speed, rates[program].where)
    if hardware.peak_flops is None or hardware.planned_mfu is None or not cost.has_model:
        return None
    workers = hardware.processes if cost.shared else 1
    return Expected(cost.flops / (workers * hardware.peak_flops * hardware.planned_mfu))


@dataclass(frozen=True)
class Check:
    """How well counted FLOPs predict the times of `runs` on record, each from the speed of the other arms' runs.

    `half` and `most`: the errors, as shares of the measured time, that half and nine tenths of the runs stay within.
    `total`: predicted over measured time of all of them. `where`: scales and hardware configs of the runs.
    """

    runs: int
    half: float
    most: float
    total: float
    where: tuple[str, ...]


def check_times(records: Iterable[Record]) -> Check | None:
    """None where no program of one scale and hardware config has runs of two arms."""
    groups: dict[tuple[str, ...], dict[frozenset[str], list[tuple[float, float]]]] = {}
    for record in records:
        flops, seconds = record.cost.flops, record.cost.seconds
        if flops and seconds:
            machine = [str(record.provenance.get(name)) for name in ("hardware_config", "hardware")]
            key = (record.paper, record.program, record.scale, *machine)
            arms = frozenset(Label.parse(label).ablation_arm for label in record.labels)
            groups.setdefault(key, {}).setdefault(arms, []).append((flops, seconds))
    pairs: list[tuple[float, float]] = []
    where: set[str] = set()
    for (_, _, scale, hardware, _), by_arms in groups.items():
        rates = {arms: sorted(flops / seconds for flops, seconds in runs) for arms, runs in by_arms.items()}
        for arms, runs in by_arms.items():
            others = [rate for theirs, found in rates.items() if not arms & theirs for rate in found]
            if others:
                speed = median(others)
                pairs += [(flops / speed, seconds) for flops, seconds in runs]
                where.add(f"{scale} on {hardware}")
    if not pairs:
        return None
    errors = sorted(abs(predicted / measured - 1) for predicted, measured in pairs)
    most = errors[min(len(errors) - 1, 9 * len(errors) // 10)]
    total = sum(predicted for predicted, _ in pairs) / sum(measured for _, measured in pairs)
    return Check(len(pairs), median(errors), most, total, tuple(sorted(where)))


def makespan(seconds: Sequence[float | None], slots: int) -> float | None:
    """Wall time of independent runs side by side; None as soon as one of them is unknown."""
    if any(value is None for value in seconds):
        return None
    return max(sum(v for v in seconds if v) / max(1, slots), max((v for v in seconds if v), default=0.0))

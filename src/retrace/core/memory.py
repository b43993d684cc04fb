"""What to say when memory is exhausted: what was tried, and which settings ask for less."""

from __future__ import annotations

import errno
import re
from collections.abc import Iterator, Mapping
from typing import Any

from retrace.core.plan import RunSpec


def out_of_memory(error: BaseException, spec: RunSpec) -> str | None:
    """One sentence where the error is one of memory, of Python, torch or the system; else None."""
    text = str(error)
    if not (
        isinstance(error, MemoryError)
        or (isinstance(error, OSError) and error.errno == errno.ENOMEM)
        or re.search(r"can't allocate memory|out of memory", text)
    ):
        return None
    size = re.search(r"tried to allocate ([\d.]+) (bytes|[KMGT]iB)", text, re.IGNORECASE)
    amount = f" ({_readable(float(size[1]), size[2])} more were asked for)" if size else ""
    return f"out of memory in a {spec.program} run on {spec.hardware.device}{amount}: {what_to_lower(spec)}"


def what_to_lower(spec: RunSpec) -> str:
    """The settings of a run that memory depends on, with their values."""
    sizes = sorted({size for size in _micro_batch_sizes(spec.config.model_dump()) if size > 1}, reverse=True)
    ways = [f"micro_batch_size (now {', '.join(map(str, sizes))})"] if sizes else []
    if spec.hardware.slurm is None and spec.hardware.slots > 1:
        ways.append(f"hardware.parallel_runs (now {spec.hardware.slots})")
    again = "" if spec.hardware.activation_checkpointing else "set hardware.activation_checkpointing=true"
    lower = f"lower {' or '.join(ways)}" if ways else "take a machine with more memory"
    return ", or ".join(filter(None, (lower, again)))


def _micro_batch_sizes(tree: Mapping[str, Any]) -> Iterator[int]:
    for key, value in tree.items():
        if isinstance(value, Mapping):
            yield from _micro_batch_sizes(value)
        elif key == "micro_batch_size":
            yield value


def _readable(amount: float, unit: str) -> str:
    if unit != "bytes":
        return f"{amount:g} {unit}"
    return f"{amount / 2**30:.1f} GiB" if amount >= 2**30 else f"{amount / 2**20:.1f} MiB"

"""What a layer keeps of a text and its threads, and which of the text a thread may see.

Shapes: B sequences, T text tokens, N positions that think, P thoughts per position, J tokens of a thread, G key-value
heads, D head size.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass
class LayerMemory:
    """Keys and values of one layer for later passes, and where their gradients gather during the backward pass."""

    text_BGTD: tuple[Tensor, Tensor]
    own_BGNPJD: tuple[Tensor, ...] = ()  # made for the first pass of threads
    gradients: list[Tensor] | None = None

    def make_room(self, num_positions: int, num_thoughts: int, num_slots: int) -> None:
        """For the keys and values of `num_slots` tokens of every thread."""
        shape = (*self.text_BGTD[0].shape[:2], num_positions, num_thoughts, num_slots)
        self.own_BGNPJD = tuple(x.new_zeros(*shape, x.shape[3]) for x in self.text_BGTD)

    def gathered(self) -> list[Tensor]:
        """Gradients of (text key, text value, own key, own value), zero at first, in fp32 or wider."""
        if self.gradients is None:
            wide = torch.promote_types(self.text_BGTD[0].dtype, torch.float32)
            self.gradients = [torch.zeros_like(x, dtype=wide) for x in (*self.text_BGTD, *self.own_BGNPJD)]
        return self.gradients


@dataclass(frozen=True)
class Reach:
    """Which text keys a thread may see: those up to its position, and of them the allowed ones.

    `positions` are the text positions that think: a range for all sequences, or a tensor (B, N). `text_allowed_BT` is
    False at padding that stands before real text, and None where causality already hides it all.
    """

    num_text: int
    positions: range | Tensor
    text_allowed_BT: Tensor | None = None

    @property
    def num_positions(self) -> int:
        return len(self.positions) if isinstance(self.positions, range) else self.positions.shape[1]

    def last(self, start: int, stop: int) -> int:
        """One more than the last text key that any of the positions [start, stop) of the N sees."""
        if isinstance(self.positions, range):
            return self.positions[stop - 1] + 1
        if self.positions.device.type != "cpu":
            return self.num_text  # to ask would wait for the device
        return int(self.positions[:, start:stop].max()) + 1

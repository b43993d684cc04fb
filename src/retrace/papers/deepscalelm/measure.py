"""Moments of any torch model, measured while it runs: forward and backward, at initialisation or in any training step.

    with measure(model, mask_BT=mask) as found:
        loss(model(ids)).backward()
    moments = found.moments()

Nothing is kept of an activation but three sums, taken as it passes; several passes in one context add up. Estimators of
Section 1.0. Shapes: B sequences, T positions, D features, P points of the stream, N layers.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from types import TracebackType
from typing import Any, Self

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from retrace.papers.deepscalelm.layouts import Point, layer_lists, stream_points

Array = NDArray[np.float64]
PER_POINT = ("mean", "var", "corr", "grad_mean", "grad_var", "grad_corr")


@dataclass(frozen=True)
class Moments:
    """Of the stream at each point, [P], and of its gradient; NaN where nothing passed, or no pair of positions.

    `corr` is Cov(x_i, x_j) / var over pairs of different positions at one feature. `weight_grad_norms` [N]: root of the
    summed squares of the gradients of each layer's matrices, as the last backward pass left them.
    """

    names: tuple[str, ...]
    mean: Array
    var: Array
    corr: Array
    grad_mean: Array
    grad_var: Array
    grad_corr: Array
    layer_names: tuple[str, ...]
    weight_grad_norms: Array

    def at(self, names: Sequence[str]) -> Moments:
        """The same at some of the points; raises ValueError for a name that is none of them."""
        for name in names:
            if name not in self.names:
                raise ValueError(f"point '{name}': not measured; the first of {len(self.names)} are {self.names[:3]}")
        chosen = [self.names.index(name) for name in names]
        return replace(self, names=tuple(names), **{name: getattr(self, name)[chosen] for name in PER_POINT})

    def stream(self) -> Moments:
        """Without the sums in front of Post-LN's norms."""
        return self.at([name for name in self.names if not name.endswith(".sum")])

    def sums(self) -> Moments:
        """Only the sums in front of Post-LN's norms."""
        return self.at([name for name in self.names if name.endswith(".sum")])


@dataclass
class _Sums:
    """Of what passed a point: elements, pairs of positions times features, and three sums."""

    elements: int = 0
    pairs: int = 0
    sums: Tensor | None = None  # of x, of x^2, and of x_i x_j over pairs

    def add(self, x_BTD: Tensor, mask_BT: Tensor | None) -> None:
        x = x_BTD.detach()
        x = x.reshape(x.shape[0], -1, x.shape[-1])
        if mask_BT is not None:
            x = x * mask_BT[:, :, None].to(x)
            counts = mask_BT.sum(1).to(torch.int64)
            self.elements += int(counts.sum()) * x.shape[2]
            self.pairs += int((counts * (counts - 1)).sum()) * x.shape[2]
        else:
            self.elements += x.numel()
            self.pairs += x.numel() * (x.shape[1] - 1)
        total_BD = x.sum(1, dtype=torch.float32)
        square = torch.linalg.vector_norm(x, dtype=torch.float32).double().square()
        new = torch.stack((total_BD.sum(dtype=torch.float64), square, total_BD.double().square().sum() - square))
        self.sums = new if self.sums is None else self.sums + new

    def moments(self) -> tuple[float, float, float]:
        """Mean, variance and correlation."""
        if self.sums is None or not self.elements:
            return np.nan, np.nan, np.nan
        total, square, pairs = self.sums.tolist()
        mean = total / self.elements
        var = square / self.elements - mean**2
        return mean, var, (pairs / self.pairs - mean**2) / var if self.pairs and var > 0 else np.nan


@dataclass
class Measurement:
    """A context in which a model is measured; `measure` makes one."""

    model: nn.Module
    points: list[Point]
    mask_BT: Tensor | None
    _forward: list[_Sums] = field(init=False)
    _backward: list[_Sums] = field(init=False)
    _squares: dict[str, Tensor] = field(init=False, default_factory=dict)
    _handles: list[RemovableHandle] = field(init=False, default_factory=list)

    def __post_init__(self) -> None:
        self._forward = [_Sums() for _ in self.points]
        self._backward = [_Sums() for _ in self.points]
        self._layers = [f"{path}.{i}" for path, layers in layer_lists(self.model) for i in range(len(layers))]

    def __enter__(self) -> Self:
        for index, point in enumerate(self.points):
            if point.side == "input":
                hook = self._input_hook(index)
                self._handles.append(point.module.register_forward_pre_hook(hook, with_kwargs=True))
            else:
                self._handles.append(point.module.register_forward_hook(self._output_hook(index)))
        for name, parameter in self.model.named_parameters():
            found = re.match(r"(.*?\.\d+)\.", name)
            if found and found[1] in self._layers and parameter.dim() > 1 and parameter.requires_grad:
                self._handles.append(parameter.register_post_accumulate_grad_hook(self._weight_hook(name)))
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        for handle in self._handles:
            handle.remove()
        self._handles.clear()

    def moments(self) -> Moments:
        """What passed so far."""
        both = [(*there.moments(), *back.moments()) for there, back in zip(self._forward, self._backward, strict=True)]
        arrays = dict(zip(PER_POINT, np.array(both).T, strict=True))
        squares = dict.fromkeys(self._layers, np.nan)
        for name, square in self._squares.items():
            layer = re.match(r"(.*?\.\d+)\.", name)[1]  # type: ignore[index]
            squares[layer] = np.nansum([squares[layer], float(square)])
        norms = np.sqrt(np.array(list(squares.values())))
        names = tuple(point.name for point in self.points)
        return Moments(names=names, layer_names=tuple(squares), weight_grad_norms=norms, **arrays)

    def _see(self, index: int, x: Any) -> None:
        if not isinstance(x, Tensor):
            raise ValueError(f"point '{self.points[index].name}': expected a tensor to pass, found {type(x).__name__}")
        self._forward[index].add(x, self._mask(x))
        if x.requires_grad:
            x.register_hook(lambda grad: self._backward[index].add(grad, self._mask(grad)))

    def _mask(self, x: Tensor) -> Tensor | None:
        """Of a tensor of the mask's own positions: an encoder's padding says nothing of the decoder's."""
        return self.mask_BT if self.mask_BT is not None and self.mask_BT.shape == x.shape[:2] else None

    def _input_hook(self, index: int) -> Any:
        def hook(_: nn.Module, given: tuple[Any, ...], named: dict[str, Any]) -> None:
            self._see(index, given[0] if given else named.get("hidden_states"))

        return hook

    def _output_hook(self, index: int) -> Any:
        def hook(_: nn.Module, __: tuple[Any, ...], made: Any) -> None:
            self._see(index, made[0] if isinstance(made, tuple) else made)

        return hook

    def _weight_hook(self, name: str) -> Any:
        def hook(parameter: Tensor) -> None:
            assert parameter.grad is not None
            self._squares[name] = torch.linalg.vector_norm(parameter.grad.detach(), dtype=torch.float32).square()

        return hook


def measure(model: nn.Module, *, mask_BT: Tensor | None = None, points: Sequence[str] | None = None) -> Measurement:
    """A context that measures what passes the stream of `model`: ours, or any with a list of layers.

    `mask_BT`: 1 at positions that count; padding is left out of every sum. `points`: names of modules whose outputs are
    measured instead of the stream. Raises ValueError for a name that is no module, and for a model with no layers.
    """
    if points is None:
        return Measurement(model, stream_points(model), mask_BT)
    modules = dict(model.named_modules())
    for name in points:
        if name not in modules:
            raise ValueError(f"point '{name}': {type(model).__name__} has no such module; see model.named_modules()")
    return Measurement(model, [Point(name, modules[name], "output") for name in points], mask_BT)

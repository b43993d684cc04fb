"""Where the residual stream of a torch model runs: found by the structure of its layers, not by its name.

A layer of a known layout has two branches. Each reads the stream through a norm ("pre"), or its sum with the stream
goes through one ("post"). Ours (layers.py) and transformers' Llama, GPT-2, GPT-NeoX, BERT and those built like them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Literal, cast

from torch import Tensor, nn

from retrace.papers.deepscalelm.model import Layer, Transformer
from retrace.papers.deepscalelm.shape import Placement


@dataclass(frozen=True)
class Layout:
    """Paths of modules in a layer; of two, attention's comes first."""

    placement: Placement
    norms: tuple[str, str]
    writers: tuple[str, str]  # their outputs are added to the stream; of "post", behind a dropout
    sums: tuple[str, str] | None  # "post": modules that are handed the stream as their second argument
    attention: str
    scores: tuple[str, ...]  # query and key
    values: str  # the value matrix, or one of queries, keys and values together
    joint: str | None  # "rows": q, k, v one after the other; "heads": q, k, v of each head
    output: str
    inner: tuple[str, ...]  # of two, the first is the gate
    outer: str
    activation: str
    dropout: str | None  # of the branches


_LLAMA = Layout(
    "pre", ("input_layernorm", "post_attention_layernorm"), ("self_attn", "mlp"), None, "self_attn",
    ("self_attn.q_proj", "self_attn.k_proj"), "self_attn.v_proj", None, "self_attn.o_proj",
    ("mlp.gate_proj", "mlp.up_proj"), "mlp.down_proj", "mlp.act_fn", None,
)  # fmt: skip
_GPT2 = Layout(
    "pre", ("ln_1", "ln_2"), ("attn", "mlp"), None, "attn", (), "attn.c_attn", "rows", "attn.c_proj",
    ("mlp.c_fc",), "mlp.c_proj", "mlp.act", "mlp.dropout",
)  # fmt: skip
_NEOX = Layout(
    "pre", ("input_layernorm", "post_attention_layernorm"), ("post_attention_dropout", "post_mlp_dropout"), None,
    "attention", (), "attention.query_key_value", "heads", "attention.dense", ("mlp.dense_h_to_4h",),
    "mlp.dense_4h_to_h", "mlp.act", "post_mlp_dropout",
)  # fmt: skip
_BERT = Layout(
    "post", ("attention.output.LayerNorm", "output.LayerNorm"), ("attention.output.dense", "output.dense"),
    ("attention.output", "output"), "attention.self", ("attention.self.query", "attention.self.key"),
    "attention.self.value", None, "attention.output.dense", ("intermediate.dense",), "output.dense",
    "intermediate.intermediate_act_fn", "output.dropout",
)  # fmt: skip
LAYOUTS = (_LLAMA, _GPT2, _NEOX, _BERT)


def part(layer: nn.Module, path: str) -> nn.Module | Callable[[Tensor], Tensor] | None:
    """What stands at a path, or None. An activation may be a plain function."""
    found: object = layer
    for name in path.split("."):
        found = getattr(found, name, None)
    return found  # type: ignore[return-value]


def module(layer: nn.Module, path: str) -> nn.Module:
    found = part(layer, path)
    assert isinstance(found, nn.Module), path
    return found


@dataclass(frozen=True)
class Trunk:
    """Layers of one layout, and the list that holds them."""

    layout: Layout
    path: str  # of the list
    parent: nn.Module  # of the list
    layers: tuple[nn.Module, ...]

    def sibling(self, kind: Callable[[nn.Module], bool]) -> nn.Module | None:
        """The first module of a kind that stands beside the list of layers."""
        return next((child for child in self.parent.children() if kind(child)), None)

    @property
    def final_norm(self) -> nn.Module | None:
        return self.sibling(is_norm)


def is_norm(module: nn.Module) -> bool:
    return "Norm" in type(module).__name__


def layer_lists(model: nn.Module) -> Iterator[tuple[str, nn.ModuleList]]:
    """Lists of modules of one class that are in no other such list: a model's stacks of layers."""
    inside: list[str] = []
    for path, child in model.named_modules():
        alike = isinstance(child, nn.ModuleList) and len({type(layer) for layer in child}) == 1
        if isinstance(child, nn.ModuleList) and alike and not path.startswith(tuple(inside)):
            inside.append(path + ".")
            yield path, child


def layout_of(layer: nn.Module) -> Layout | None:
    """The layout whose every module `layer` has, with no norm on the stream beside the two."""
    for layout in LAYOUTS:
        paths = (*layout.norms, *layout.writers, *layout.scores, layout.values, layout.output, *layout.inner)
        more = (layout.outer, layout.activation, *([layout.dropout] if layout.dropout else []))
        if all(part(layer, path) is not None for path in (*paths, *more)):
            known = {part(layer, path) for path in layout.norms}
            if all(child in known for child in layer.children() if is_norm(child)):
                return layout
    return None


def trunk_of(model: nn.Module) -> Trunk | None:
    """The one stack of layers of a known layout in `model`; None where there is none, or more than one."""
    found = []
    for path, layers in layer_lists(model):
        layout = layout_of(layers[0])
        if layout is not None:
            found.append(Trunk(layout, path, model.get_submodule(path.rpartition(".")[0]), tuple(layers)))
    return found[0] if len(found) == 1 else None


@dataclass(frozen=True)
class Point:
    """A tensor of the stream: the input or the output of a module."""

    name: str
    module: nn.Module
    side: Literal["input", "output"]


def stream_points(model: nn.Module) -> list[Point]:
    """In the order of the computation: what each sub-block reads, then what leaves the last.

    In Post-LN also the sums in front of the norms, named `....sum`. Of a model of unknown layout: what each layer
    reads, and what leaves the last. Raises ValueError for a model without a list of layers.
    """
    if isinstance(model, Transformer):
        return _our_points(model)
    trunk = trunk_of(model)
    if trunk is not None:
        return list(_known_points(trunk))
    points: list[Point] = []
    for path, layers in layer_lists(model):
        points += [Point(f"{path}.{i}", layer, "input") for i, layer in enumerate(layers)]
        points.append(Point(f"{path}.end", layers[-1], "output"))
    if not points:
        raise ValueError(f"{type(model).__name__} has no list of layers (nn.ModuleList): name the points to measure")
    return points


def _our_points(model: Transformer) -> list[Point]:
    names = {child: name for name, child in model.named_modules()}
    points: list[Point] = []
    for stack in (model.stack, model.decoder):
        if stack is None:
            continue
        for layer in stack.layers:
            for block in cast(Layer, layer).sub_blocks():
                name = names[block]
                points.append(Point(name, block, "input"))
                if block.placement == "post":
                    points.append(Point(f"{name}.sum", block.norm, "input"))
        points.append(Point(f"{names[stack]}.end", block, "output"))
    return points


def _known_points(trunk: Trunk) -> Iterator[Point]:
    layout = trunk.layout
    for index, layer in enumerate(trunk.layers):
        for which, name in enumerate(("attention", "feed_forward")):
            at, norm = f"{trunk.path}.{index}.{name}", module(layer, layout.norms[which])
            if layout.placement == "pre":
                yield Point(at, norm, "input")
            else:
                first = Point(at, layer, "input")
                yield first if which == 0 else Point(at, module(layer, layout.norms[0]), "output")
                yield Point(f"{at}.sum", norm, "input")
    yield Point(f"{trunk.path}.end", trunk.layers[-1], "output")

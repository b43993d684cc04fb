"""One transformer for every method: built from a ModelShape and a ModelInit.

Encoder (masked tokens), decoder (next token), or encoder-decoder; Pre-LN, Post-LN, or no norm. "Post" has a norm on the
embeddings too, and its last norm is the final one (Section 3.4).

Shapes: B sequences, T positions, S positions of the encoder beside a decoder, D hidden_size, V vocab_size, M positions
that have a label.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from retrace.papers.deepscalelm.draws import fill, generator_of
from retrace.papers.deepscalelm.dropout import dropout
from retrace.papers.deepscalelm.layers import (
    Attention,
    Context,
    Embedding,
    FeedForward,
    Linear,
    SubBlock,
    activate,
    additive,
    make_norm,
    rotation,
)
from retrace.papers.deepscalelm.scheme import AttentionInit, LayerInit, ModelInit
from retrace.papers.deepscalelm.shape import ModelShape

IGNORED = -100  # a label of no consequence


class Layer(nn.Module):
    """Self-attention, cross-attention in a decoder beside an encoder, feed-forward."""

    def __init__(self, shape: ModelShape, init: LayerInit, *, causal: bool, norms: bool, inner_norms: bool) -> None:
        super().__init__()
        own = Attention(shape, causal=causal, inner_norm=inner_norms)
        self.attention = SubBlock(own, init.attention.residual, shape=shape, norms=norms)
        self.cross: SubBlock | None = None
        if init.cross is not None:
            other = Attention(shape, causal=False, cross=True, inner_norm=inner_norms)
            self.cross = SubBlock(other, init.cross.residual, shape=shape, norms=norms)
        wide = FeedForward(shape, inner_norm=inner_norms)
        self.feed_forward = SubBlock(wide, init.feed_forward.residual, shape=shape, norms=norms)

    def sub_blocks(self) -> list[SubBlock]:
        return [block for block in (self.attention, self.cross, self.feed_forward) if block is not None]

    def forward(self, x_BTD: Tensor, context: Context) -> Tensor:
        x_BTD = self.attention(x_BTD, context)
        if self.cross is not None:
            x_BTD = self.cross(x_BTD, context)
        return self.feed_forward(x_BTD, context)


class Stack(nn.Module):
    """Layers, and the norm behind them in Pre-LN or in front of them in Post-LN."""

    def __init__(self, shape: ModelShape, init: ModelInit, layers: Sequence[LayerInit], *, causal: bool) -> None:
        super().__init__()
        options = {"causal": causal, "norms": init.norms, "inner_norms": init.inner_norms}
        self.layers = nn.ModuleList(Layer(shape, layer, **options) for layer in layers)
        norm = make_norm(shape, shape.hidden_size, wanted=init.norms)
        self.first_norm = norm if shape.placement == "post" else nn.Identity()
        self.final_norm = norm if shape.placement == "pre" else nn.Identity()

    def forward(self, x_BTD: Tensor, context: Context) -> Tensor:
        x_BTD = self.first_norm(x_BTD)
        for layer in self.layers:
            x_BTD = layer(x_BTD, context)
        return self.final_norm(x_BTD)


class Transformer(nn.Module):
    """`forward` gives final hidden states, `logits` and `loss` go on from there.

    Weights are drawn for (seed, name of the parameter), so they depend neither on the order of construction nor on
    other layers. `profile_ids` [B, T]: tokens of the profiling pass, for a method that needs one (Admin); None: tokens
    drawn evenly. Raises ValueError where `init` has not the layers of `shape`.
    """

    _no_split_modules = ("Layer",)  # what sharding splits a model into, named as transformers does

    def __init__(
        self, shape: ModelShape, init: ModelInit, *, seed: int = 0, profile_ids_BT: Tensor | None = None
    ) -> None:
        super().__init__()
        _check(shape, init)
        self.shape, self.init = shape, init
        size = shape.hidden_size
        self.tokens = Embedding(shape.vocab_size, size)
        self.positions = Embedding(shape.seq_len, size) if shape.positions == "learned" else None
        self.stack = Stack(shape, init, init.layers, causal=shape.kind == "decoder")
        beside = shape.kind == "encoder_decoder"
        self.decoder = Stack(shape, init, init.decoder_layers, causal=True) if beside else None
        masked = shape.kind == "encoder"
        self.head_dense = Linear(size, size) if masked else None
        self.head_norm = make_norm(shape, size, wanted=init.norms) if masked else None
        draw(self, init, seed=seed)
        if any(block.fixed.profiled for block in self.sub_blocks()):
            profile(self, profile_ids_BT, seed=seed)

    def sub_blocks(self) -> list[SubBlock]:
        """In the order of the computation."""
        stacks = [self.stack] if self.decoder is None else [self.stack, self.decoder]
        return [block for stack in stacks for layer in stack.layers for block in cast(Layer, layer).sub_blocks()]

    def forward(
        self,
        input_ids_BT: Tensor | None = None,
        *,
        attention_mask_BT: Tensor | None = None,
        inputs_embeds_BTD: Tensor | None = None,
        decoder_input_ids_BT: Tensor | None = None,
    ) -> Tensor:
        """Final hidden states [B, T, D]: of the decoder where there are two stacks.

        `inputs_embeds_BTD` stands in for the rows of the token table. `attention_mask_BT` is 0 at padding of
        `input_ids_BT`, which a decoder must have behind the text; a decoder beside an encoder needs no mask of its own.
        """
        x_BTD = self.embed(input_ids_BT, inputs_embeds_BTD)
        mask = additive(attention_mask_BT, x_BTD.dtype)
        hidden_BTD = self.stack(x_BTD, self._context(x_BTD, mask=mask))
        if self.decoder is None:
            return hidden_BTD
        if decoder_input_ids_BT is None:
            raise ValueError("decoder_input_ids: an encoder-decoder needs them beside input_ids")
        y_BTD = self.embed(decoder_input_ids_BT)
        return self.decoder(y_BTD, self._context(y_BTD, memory_BSD=hidden_BTD, memory_mask=mask))

    def embed(self, input_ids_BT: Tensor | None, inputs_embeds_BTD: Tensor | None = None) -> Tensor:
        """The sum of the tables after dropout, [B, T, D]."""
        if (input_ids_BT is None) == (inputs_embeds_BTD is None):
            raise ValueError("input_ids, inputs_embeds: give one of the two")
        x_BTD = self.tokens(input_ids_BT) if inputs_embeds_BTD is None else inputs_embeds_BTD
        length = x_BTD.shape[1]
        if self.positions is not None:
            if length > self.shape.seq_len:
                raise ValueError(f"input of {length} positions: seq_len={self.shape.seq_len}, with learned positions")
            x_BTD = x_BTD + self.positions.weight[:length]
        return dropout(x_BTD, self.shape.dropout if self.training else 0.0)

    def logits(self, hidden: Tensor) -> Tensor:
        """[..., D] -> [..., V], through the tied embedding matrix; an encoder's head stands before it."""
        if self.head_dense is not None and self.head_norm is not None:
            gate = "gelu" if self.shape.activation == "swiglu" else self.shape.activation
            hidden = self.head_norm(activate(self.head_dense(hidden), gate))
        scale = self.init.logit_scale
        return F.linear(hidden if scale == 1 else hidden * scale, self.tokens.weight)

    def loss(self, hidden_BTD: Tensor, labels_BT: Tensor) -> Tensor:
        """Mean cross-entropy in nats over the positions whose label is not -100; logits are made for those only.

        `labels_BT` says what is to be predicted at each position: a decoder's are the next tokens.
        """
        chosen = labels_BT.flatten() != IGNORED
        labels_M = labels_BT.flatten()[chosen]
        hidden = hidden_BTD.flatten(0, 1)
        hidden_MD = hidden if len(labels_M) == len(hidden) else hidden[chosen]
        return F.cross_entropy(self.logits(hidden_MD).float(), labels_M)

    def _context(self, x_BTD: Tensor, **rest: Tensor | None) -> Context:
        rope = self.shape.positions == "rope"
        tables = rotation(x_BTD.shape[1], self.shape.head_size, like=x_BTD) if rope else None
        return Context(rotation=tables, **rest)


def _check(shape: ModelShape, init: ModelInit) -> None:
    expected = (shape.num_layers, shape.num_layers if shape.kind == "encoder_decoder" else 0)
    if (len(init.layers), len(init.decoder_layers)) != expected:
        raise ValueError(
            f"init of method '{init.method}' has {len(init.layers)} and {len(init.decoder_layers)} layers, and "
            f"the shape {expected[0]} and {expected[1]}: make it of the same shape"
        )


@torch.no_grad()
def draw(model: Transformer, init: ModelInit, *, seed: int) -> None:
    """Every parameter as `init` says, in place: matrices at random, biases 0, gains of norms 1."""
    for module in model.modules():
        if isinstance(module, Linear):
            module.bias.zero_()
        elif isinstance(module, SubBlock) and module.trained is not None:
            vector = module.fixed.trained == "skip_vector"
            module.trained.fill_(module.fixed.skip if vector else module.fixed.scale)
    stds = dict(matrix_stds(model, init))
    for name, parameter in model.named_parameters():
        if name in stds:
            generator, table = generator_of(name, seed=seed), name.startswith(("tokens", "positions"))
            for rows, std in zip(parameter.chunk(len(stds[name])), stds[name], strict=True):
                fill(rows, std, generator, uniform=init.distribution == "uniform" and not table)


def matrix_stds(model: Transformer, init: ModelInit) -> list[tuple[str, tuple[float, ...]]]:
    """Name of each matrix, and the standard deviations of its equal parts: (q, k, v) of a joint one."""
    found: list[tuple[str, tuple[float, ...]]] = [("tokens.weight", (init.token_std,))]
    if model.positions is not None:
        found.append(("positions.weight", (init.position_std,)))
    if model.head_dense is not None:
        found.append(("head_dense.weight", (init.head_std,)))
    for stack, layers in (("stack", init.layers), ("decoder", init.decoder_layers)):
        for index, layer in enumerate(layers):
            at, wide = f"{stack}.layers.{index}", layer.feed_forward
            found += _attention_stds(f"{at}.attention.branch", layer.attention, cross=False)
            if layer.cross is not None:
                found += _attention_stds(f"{at}.cross.branch", layer.cross, cross=True)
            found.append((f"{at}.feed_forward.branch.inner.weight", (wide.inner,)))
            found.append((f"{at}.feed_forward.branch.outer.weight", (wide.outer,)))
    return found


def _attention_stds(at: str, init: AttentionInit, *, cross: bool) -> list[tuple[str, tuple[float, ...]]]:
    output = (f"{at}.output.weight", (init.output,))
    if cross:
        return [(f"{at}.query.weight", (init.query,)), (f"{at}.rows.weight", (init.key, init.value)), output]
    return [(f"{at}.rows.weight", (init.query, init.key, init.value)), output]


@torch.no_grad()
def profile(model: Transformer, ids_BT: Tensor | None, *, seed: int) -> None:
    """Admin's skips, from one pass without dropout: w_1 = 1, w_{i+1}^2 = Var(w_i x_i) + Var(f_i) (Section 4).

    Each stack begins with 1.
    """
    shape = model.shape
    if ids_BT is None:
        generator = torch.Generator().manual_seed(seed)
        ids_BT = torch.randint(shape.vocab_size, (8, min(shape.seq_len, 128)), generator=generator)
    firsts = {cast(Layer, stack.layers[0]).attention for stack in (model.stack, model.decoder) if stack is not None}
    total = 1.0  # w^2 of the sub-block that comes next

    def before(block: nn.Module, _: object) -> None:
        nonlocal total
        assert isinstance(block, SubBlock)
        assert block.trained is not None
        total = 1.0 if block in firsts else total
        block.trained.fill_(total**0.5)

    def behind(_: nn.Module, given: tuple[Tensor, ...], branch_BTD: Tensor) -> None:
        nonlocal total
        total = total * float(given[0].var(correction=0)) + float(branch_BTD.var(correction=0))

    blocks, training = model.sub_blocks(), model.training
    handles = [block.register_forward_pre_hook(before) for block in blocks]
    handles += [block.branch.register_forward_hook(behind) for block in blocks]
    beside = {"decoder_input_ids_BT": ids_BT} if model.decoder is not None else {}
    model.eval()(ids_BT, **beside)
    model.train(training)
    for handle in handles:
        handle.remove()

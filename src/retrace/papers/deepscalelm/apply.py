"""DeepScaleLM for a transformers model one already has: new weights, and every residual branch scaled.

    from retrace.papers.deepscalelm.apply import apply
    apply(model, k=2.0, seq_len=512)             # Llama, GPT-2, GPT-NeoX/Pythia, BERT, and models built like them
    model.save_pretrained(folder)                # plain weights, plain names; the scales are in config.json
    attach(AutoModel.from_pretrained(folder))    # scaling.py: the same function again
    fold(model)                                  # scaling.py: the same function without hooks, to be served anywhere

A model is taken for what its layers are made of, and then tried: on a few tokens the first and the last layer must
give lambda x + beta f.
"""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from retrace.papers.deepscalelm import dslm
from retrace.papers.deepscalelm.correlations import Array
from retrace.papers.deepscalelm.draws import fill, generator_of
from retrace.papers.deepscalelm.embedding_moments import POSITIONS, SEGMENTS, zipf_collision
from retrace.papers.deepscalelm.gains import Gain, measured_gain
from retrace.papers.deepscalelm.layouts import Trunk, is_norm, module, part
from retrace.papers.deepscalelm.scaling import Scales, attach, detach, fold, hook, output_matrix, parallel, recognise
from retrace.papers.deepscalelm.scheme import AttentionInit, FeedForwardInit, Residual
from retrace.papers.deepscalelm.trial import check, run

__all__ = ["apply", "attach", "detach", "fold"]

USUAL_LENGTH = 128  # of sequences, where nothing is said and a model could take more


def apply(
    model: Any,
    *,
    k: float | dslm.Reading = "layers2",
    alpha: float = 1.0,
    beta_sq: float | None = None,
    corr0: float | None = None,
    seq_len: int | None = None,
    seed: int = 0,
) -> Scales:
    """Draw all weights of a transformers model anew by DSLM's rule, and scale its residual branches by hooks.

    beta^2 = k / N^alpha for each branch, or `beta_sq`; lambda^2 = 1 - beta^2, or 1 - 2 beta^2 where both branches of a
    layer join at once (GPT-NeoX's parallel residual). `seq_len`: of the sequences to come, on which the first layers of
    a causal model depend; None: the model's longest, up to 128. `corr0`: of their summed embeddings before dropout,
    None: by Zipf's law of tokens and, of segments, 2/3. Dropout is that which the model has now: it is part of the
    balance, so variances are one in training mode. Gains of activations are by quadrature. Returns what the hooks
    multiply by. Raises ValueError for a model that can't be scaled, and for k >= N.
    """
    trunk = recognise(model)
    layers = len(trunk.layers)
    both = 2 if parallel(trunk) else 1
    share = dslm.beta_squared(layers, k=k, alpha=alpha, beta_sq=beta_sq)
    if both * share >= 1:
        raise ValueError(f"beta^2={share:g} for each of two branches that join at once: choose k below {layers / 2:g}")
    joined = Residual(skip=math.sqrt(1 - both * share), scale=math.sqrt(share))
    p, gain = _dropout(trunk), _gain(trunk)
    length = min(getattr(model.config, "max_position_embeddings", USUAL_LENGTH), USUAL_LENGTH)
    causal = trunk.layout.placement == "pre" or bool(getattr(model.config, "is_decoder", False))
    plan = dslm.plan(
        layers,
        gain=gain,
        beta_sq=share,
        corr0=_corr0(model) if corr0 is None else corr0,
        dropout=p,
        attention_dropout=_attention_dropout(model),
        seq_len=length if seq_len is None else seq_len,
        causal=causal,
        finite=True,
        parallel=both == 2,
    )
    detach(model)
    for index, layer in enumerate(trunk.layers):
        _draw_layer(trunk, layer, f"{seed}/{index}", gain=gain, dropout=p, passed=float(plan.own[index]), joined=joined)
    scale = _draw_rest(model, trunk, seed=seed)
    scales = Scales(joined.skip, joined.scale, scale)
    hook(model, scales)
    try:
        check(model, trunk, scales)
    except ValueError:
        detach(model)
        raise
    return scales


def _dropout(trunk: Trunk) -> float:
    found = part(trunk.layers[0], trunk.layout.dropout) if trunk.layout.dropout else None
    return found.p if isinstance(found, nn.Dropout) else 0.0


def _attention_dropout(model: Any) -> float:
    for name in ("attention_dropout", "attn_pdrop", "attention_probs_dropout_prob"):
        if isinstance(getattr(model.config, name, None), float):
            return float(getattr(model.config, name))
    return 0.0


def _gain(trunk: Trunk) -> Gain:
    """Of the layer's own activation, whichever it is, on standard normals."""
    function = part(trunk.layers[0], trunk.layout.activation)
    assert callable(function)

    def on_arrays(z: Array) -> Array:
        with torch.no_grad():
            return np.asarray(function(torch.from_numpy(np.ascontiguousarray(z))).double())

    gated = len(trunk.layout.inner) == 2
    z = np.linspace(-2, 2, 41)
    homogeneous = not gated and bool(np.allclose(on_arrays(2 * z), 2 * on_arrays(z)))
    return replace(measured_gain(on_arrays, gated=gated), homogeneous=homogeneous)


def _tables(model: Any) -> dict[str, nn.Embedding]:
    found = {name: child for name, child in model.base_model.named_modules() if isinstance(child, nn.Embedding)}
    if not found:
        raise ValueError(f"model '{model.config.model_type}': it has no table of embeddings (nn.Embedding)")
    return found


def _corr0(model: Any) -> float:
    """Of the sum of the tables: Zipf's tokens, positions of their own, segments cut at random (Section 1.4)."""
    shares = []
    for name, table in _tables(model).items():
        if "token_type" in name:
            shares.append(SEGMENTS if table.num_embeddings > 1 else 1.0)
        else:
            tokens = table is model.get_input_embeddings()
            shares.append(zipf_collision(table.num_embeddings) if tokens else POSITIONS)
    return sum(shares) / len(shares)


@torch.no_grad()
def _draw_layer(
    trunk: Trunk, layer: nn.Module, name: str, *, gain: Gain, dropout: float, passed: float, joined: Residual
) -> None:
    layout = trunk.layout
    attention, output = module(layer, layout.attention), module(layer, layout.output)
    values = module(layer, layout.values)
    hidden = _inputs(values)
    made = dslm.attention(hidden, passed=passed, dropout=dropout, joined=joined, output_size=_inputs(output))
    wide = dslm.feed_forward(hidden, _inputs(module(layer, layout.outer)), gain=gain, dropout=dropout, joined=joined)
    scores = made.query * _sharpness(attention) ** -0.5
    made = replace(made, query=scores, key=scores)
    for path, std in _stds(trunk, made, wide):
        _draw(module(layer, path), (std,), f"{name}/{path}")
    if layout.joint is not None:
        stds = (made.query, made.key, made.value)
        _draw(values, stds, f"{name}/{layout.values}", groups=_heads(attention) if layout.joint == "heads" else 1)


def _stds(trunk: Trunk, attention: AttentionInit, wide: FeedForwardInit) -> list[tuple[str, float]]:
    layout = trunk.layout
    found = [(path, attention.query) for path in layout.scores] + [(layout.output, attention.output)]
    found += [(path, wide.inner) for path in layout.inner] + [(layout.outer, wide.outer)]
    return found if layout.joint is not None else [*found, (layout.values, attention.value)]


def _sharpness(attention: nn.Module) -> float:
    """What attention multiplies scores by, as a multiple of 1/sqrt(head size); scores are to have variance one."""
    scaling, size = getattr(attention, "scaling", None), getattr(attention, "head_dim", None)
    return scaling * math.sqrt(size) if isinstance(scaling, float) and isinstance(size, int) else 1.0


def _heads(attention: Any) -> int:
    return int(attention.config.num_attention_heads)


def _inputs(matrix: nn.Module) -> int:
    """Columns of a linear layer, whichever way it stores them."""
    weight = matrix.weight
    assert isinstance(weight, Tensor)
    return weight.shape[1] if isinstance(matrix, nn.Linear) else weight.shape[0]


@torch.no_grad()
def _draw(matrix: nn.Module, stds: tuple[float, ...], name: str, *, groups: int = 1) -> None:
    """Rows in `groups`, each of parts with a standard deviation; a bias becomes 0."""
    weight, bias = matrix.weight, getattr(matrix, "bias", None)
    assert isinstance(weight, Tensor)
    rows = weight if isinstance(matrix, nn.Linear) else weight.T
    generator = generator_of(name, seed=0)
    for group in rows.chunk(groups):
        for rows_of_part, std in zip(group.chunk(len(stds)), stds, strict=True):
            fill(rows_of_part, std, generator)
    if isinstance(bias, Tensor):
        bias.zero_()


@torch.no_grad()
def _draw_rest(model: Any, trunk: Trunk, *, seed: int) -> float:
    """Norms, embeddings and heads; the result is what states are multiplied with in front of the output matrix."""
    inside = {child for layer in trunk.layers for child in layer.modules()}
    for child in model.modules():
        if is_norm(child):
            model._init_weights(child)
    tables = _tables(model)
    home = next(child for child in model.modules() if model.get_input_embeddings() in set(child.children()))
    p = next((child.p for child in home.children() if isinstance(child, nn.Dropout)), 0.0)
    std = dslm.embedding_std(p, num_tables=len(tables))
    for name, table in tables.items():
        fill(table.weight, std, generator_of(f"{seed}/{name}", seed=0))
    if trunk.layout.placement == "post":  # transformers drops behind this norm, the official code in front of it
        for child in home.children():
            if is_norm(child):
                child.weight.mul_(math.sqrt(1 - p))
    else:
        _rescale(model, trunk, list(tables.values()), expected=1 - p)
    for table in tables.values():
        if table.padding_idx is not None:
            table.weight[table.padding_idx].zero_()
    words, head = model.get_input_embeddings().weight, output_matrix(model)
    for name, child in model.named_modules():
        if isinstance(child, nn.Linear) and child not in inside and child.weight is not words:
            _draw(child, (child.in_features**-0.5,), f"{seed}/{name}")
    tied = head is not None and head.weight is words
    return dslm.logit_scale(words.shape[1], token_std=float(words.std())) if tied else 1.0


@torch.no_grad()
def _rescale(model: Any, trunk: Trunk, tables: list[nn.Embedding], *, expected: float) -> None:
    """Where a model multiplies its embeddings (Gemma), the tables make that good: the stream starts at `expected`."""
    (stream,) = run(model, watch=[(trunk.layers[0], "input")])
    ratio = float(stream.float().var()) / expected
    if not 0.8 < ratio < 1.25:  # beyond what a draw of a few tokens does by chance
        for table in tables:
            table.weight.mul_(ratio**-0.5)

"""The transformer: what it is built of, against a plain reference, and what it must never do."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from retrace.papers.deepscalelm.dropout import dropout, keep
from retrace.papers.deepscalelm.measure import measure
from retrace.papers.deepscalelm.methods import METHODS, initialise
from retrace.papers.deepscalelm.model import Transformer, matrix_stds
from retrace.papers.deepscalelm.shape import ModelShape

BASE: dict[str, Any] = {
    "kind": "encoder",
    "placement": "pre",
    "norm": "layernorm",
    "activation": "relu",
    "positions": "learned",
    "num_layers": 3,
    "hidden_size": 32,
    "num_heads": 4,
    "intermediate_size": 96,
    "dropout": 0.1,
    "attention_dropout": 0.1,
    "vocab_size": 41,
    "seq_len": 12,
}
KINDS = ("encoder", "decoder", "encoder_decoder")
PLACED = {"deepnorm": "post", "admin": "post", "sub_ln": "pre"}


@pytest.fixture(autouse=True)
def _one_thread() -> None:
    torch.set_num_threads(1)
    torch.manual_seed(0)


def shape_of(**changes: Any) -> ModelShape:
    return ModelShape(**{**BASE, **changes})


def build(method: str = "dslm", *, seed: int = 0, **changes: Any) -> Transformer:
    changes.setdefault("placement", PLACED.get(method, "pre"))
    shape = shape_of(**changes)
    return Transformer(shape, initialise(shape, method), seed=seed)


def tokens(batch: int = 2, length: int = 12) -> Tensor:
    return torch.randint(41, (batch, length))


def beside(model: Transformer, ids: Tensor) -> dict[str, Tensor]:
    return {"decoder_input_ids_BT": ids} if model.decoder is not None else {}


def norm(x: Tensor, kind: str) -> Tensor:
    """Gain 1 and bias 0, written out."""
    if kind == "rmsnorm":
        return x / (x.square().mean(-1, keepdim=True) + 1e-5).sqrt()
    centred = x - x.mean(-1, keepdim=True)
    return centred / (centred.square().mean(-1, keepdim=True) + 1e-5).sqrt()


def attend(x: Tensor, other: Tensor, parts: list[Tensor], shape: ModelShape, *, causal: bool, rope: bool) -> Tensor:
    """One head, one query at a time."""
    query, key, value = (source @ w.T for source, w in zip((x, other, other), parts, strict=True))
    size = shape.head_size
    heads = []
    for head in range(shape.num_heads):
        q, k, v = (t[..., head * size : (head + 1) * size] for t in (query, key, value))
        if rope:
            q, k = turn(q), turn(k)
        rows = []
        for i in range(x.shape[1]):
            last = i + 1 if causal else k.shape[1]
            scores = (k[:, :last] * q[:, i : i + 1]).sum(-1) / math.sqrt(size)
            weights = scores.exp() / scores.exp().sum(-1, keepdim=True)
            rows.append((weights[..., None] * v[:, :last]).sum(1))
        heads.append(torch.stack(rows, 1))
    return torch.cat(heads, -1)


def turn(x: Tensor) -> Tensor:
    """RoPE as complex numbers."""
    half = x.shape[-1] // 2
    angle = torch.arange(x.shape[1])[:, None] * 10_000.0 ** (-torch.arange(half) / half)
    turned = torch.complex(x[..., :half], x[..., half:]) * torch.polar(torch.ones_like(angle), angle)
    return torch.cat((turned.real, turned.imag), -1)


def reference(model: Transformer, ids: Tensor, target: Tensor | None = None) -> Tensor:
    """Logits of the same weights without dropout, in the plainest words; biases are 0 and gains 1."""
    shape, init = model.shape, model.init
    kind = shape.norm

    def read(x: Tensor) -> Tensor:
        return norm(x, kind) if shape.placement == "pre" else x

    def stack(stack_module: Any, layers: Any, ids: Tensor, memory: Tensor | None, causal: bool) -> Tensor:
        x = model.tokens.weight[ids]
        if model.positions is not None:
            x = x + model.positions.weight[: ids.shape[1]]
        if shape.placement == "post":
            x = norm(x, kind)
        for layer, said in zip(stack_module.layers, layers, strict=True):
            parts = list(layer.attention.branch.rows.weight.chunk(3))
            rope = shape.positions == "rope"
            y = (
                attend(read(x), read(x), parts, shape, causal=causal, rope=rope)
                @ layer.attention.branch.output.weight.T
            )
            x = said.attention.residual.skip * x + said.attention.residual.scale * y
            x = norm(x, kind) if shape.placement == "post" else x
            if memory is not None:
                branch = layer.cross.branch
                parts = [branch.query.weight, *branch.rows.weight.chunk(2)]
                y = attend(read(x), memory, parts, shape, causal=False, rope=False) @ branch.output.weight.T
                x = said.cross.residual.skip * x + said.cross.residual.scale * y
                x = norm(x, kind) if shape.placement == "post" else x
            wide = read(x) @ layer.feed_forward.branch.inner.weight.T
            if shape.activation == "swiglu":
                gate, up = wide.chunk(2, -1)
                wide = gate / (1 + (-gate).exp()) * up
            elif shape.activation == "gelu":
                wide = wide * (1 + torch.erf(wide / math.sqrt(2))) / 2
            else:
                wide = wide * (wide > 0)
            y = wide @ layer.feed_forward.branch.outer.weight.T
            x = said.feed_forward.residual.skip * x + said.feed_forward.residual.scale * y
            x = norm(x, kind) if shape.placement == "post" else x
        return read(x)

    hidden = stack(model.stack, init.layers, ids, None, shape.kind == "decoder")
    if target is not None:
        hidden = stack(model.decoder, init.decoder_layers, target, hidden, True)
    if model.head_dense is not None:
        wide = hidden @ model.head_dense.weight.T
        hidden = norm(wide * (wide > 0) if shape.activation == "relu" else F.gelu(wide), kind)
    return (init.logit_scale * hidden) @ model.tokens.weight.T


VARIANTS = [
    {"kind": "encoder", "placement": "pre"},
    {"kind": "encoder", "placement": "post", "activation": "gelu"},
    {"kind": "decoder", "placement": "post"},
    {"kind": "decoder", "placement": "pre", "norm": "rmsnorm", "activation": "swiglu", "positions": "rope"},
    {"kind": "encoder_decoder", "placement": "pre", "activation": "swiglu"},
    {"kind": "encoder_decoder", "placement": "post", "positions": "rope"},
]


@pytest.mark.parametrize("changes", VARIANTS, ids=lambda changes: "-".join(changes.values()))
def test_logits_and_gradients_are_those_of_a_plain_reference(changes: dict[str, Any]) -> None:
    model = build(**changes).eval()
    ids, target = tokens(), tokens(2, 9)
    both = {"decoder_input_ids_BT": target} if model.decoder is not None else {}
    ours = model.logits(model(ids, **both))
    theirs = reference(model, ids, target if model.decoder is not None else None)
    assert torch.allclose(ours, theirs, atol=2e-5)
    direction, weights = torch.randn_like(ours), [p for p in model.parameters() if p.dim() > 1]
    found = torch.autograd.grad((ours * direction).sum(), weights)
    expected = torch.autograd.grad((theirs * direction).sum(), weights)
    for one, other in zip(found, expected, strict=True):
        assert torch.allclose(one, other, atol=2e-4 * float(other.abs().max()))


@pytest.mark.parametrize("p", [0.1, 0.4])
def test_attention_with_dropout_has_the_attention_without_it_as_its_mean(p: float) -> None:
    model = build(kind="decoder", attention_dropout=p, dropout=0.0)
    ids = tokens()
    with torch.no_grad():
        plain = model.eval()(ids)
        attention = model.stack.layers[0].attention.branch
        x, context = torch.randn(2, 12, 32), model._context(torch.zeros(2, 12, 32))
        expected = attention.eval()(x, context)
        attention.train()
        mean = torch.stack([attention(x, context) for _ in range(2000)]).mean(0)
    assert plain.isfinite().all()
    assert (mean - expected).abs().max() < 0.1 * expected.std()


def test_later_tokens_change_no_earlier_logit_of_a_decoder() -> None:
    for kind in ("decoder", "encoder_decoder"):
        for training in (False, True):
            model = build(kind=kind).train(training)
            ids, source = tokens(1), tokens(1)

            def run(ids: Tensor, model: Transformer = model, source: Tensor = source) -> Tensor:
                torch.manual_seed(1)
                if model.decoder is not None:
                    return model.logits(model(source, decoder_input_ids_BT=ids))
                return model.logits(model(ids))

            changed = ids.clone()
            changed[:, 7:] = (changed[:, 7:] + 1) % 41
            one, other = run(ids), run(changed)
            assert torch.equal(one[:, :7], other[:, :7])
            assert not torch.allclose(one[:, 7:], other[:, 7:])


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("kind", KINDS)
def test_padding_changes_no_real_position(kind: str, training: bool) -> None:
    model = build(kind=kind, dropout=0.0, attention_dropout=0.0).train(training)
    ids, target = tokens(2, 8), tokens(2, 5)
    padded = torch.cat((ids, torch.zeros(2, 4, dtype=torch.long)), 1)
    mask = (torch.arange(12) < 8).expand(2, 12).long()
    both = {"decoder_input_ids_BT": target} if model.decoder is not None else {}
    short, long = model(ids, **both), model(padded, attention_mask_BT=mask, **both)
    assert torch.allclose(short, long[:, : short.shape[1]], atol=1e-5)


def test_padding_is_hidden_from_attention_with_dropout_too() -> None:
    model = build(kind="encoder", dropout=0.0, attention_dropout=0.3).train()
    ids, mask = tokens(), (torch.arange(12) < 8).expand(2, 12).long()
    results = []
    for filler in (0, 5):
        torch.manual_seed(1)
        ids[:, 8:] = filler
        results.append(model(ids, attention_mask_BT=mask)[:, :8])
    assert torch.equal(*results)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("kind", KINDS)
def test_every_method_builds_with_the_standard_deviations_it_says_and_trains(method: str, kind: str) -> None:
    model = build(method, kind=kind, hidden_size=64, intermediate_size=256)
    parameters = dict(model.named_parameters())
    named = dict(matrix_stds(model, model.init))
    assert {name for name, p in parameters.items() if p.dim() > 1} == set(named)
    for name, stds in named.items():
        for rows, std in zip(parameters[name].chunk(len(stds)), stds, strict=True):
            assert float(rows.detach().std()) == pytest.approx(std, rel=5 / math.sqrt(2 * rows.numel()))
    assert not any(p.any() for name, p in parameters.items() if name.endswith("bias"))
    ids = tokens()
    loss = model.loss(model(ids, **beside(model, ids)), ids)
    loss.backward()
    assert loss.isfinite()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in parameters.values())
    assert any(isinstance(child, nn.LayerNorm) for child in model.modules()) == model.init.norms


def test_uniform_weights_stay_within_their_bounds() -> None:
    model = build("ds_init")
    matrix, std = model.stack.layers[1].attention.branch.output.weight.detach(), model.init.layers[1].attention.output
    assert 0.95 * math.sqrt(3) * std < float(matrix.abs().max()) <= math.sqrt(3) * std
    assert float(model.tokens.weight.detach().abs().max()) > 2 * model.init.token_std  # a table is normal


def test_weights_are_of_the_seed_and_the_name_alone() -> None:
    one, again, other, deeper = build(), build(), build(seed=1), build("vanilla_xavier", num_layers=5)
    for name, p in one.named_parameters():
        assert torch.equal(p, again.get_parameter(name))
    matrix = "stack.layers.2.attention.branch.output.weight"
    assert not torch.equal(one.get_parameter(matrix), other.get_parameter(matrix))
    drawn, deep = one.get_parameter(matrix), deeper.get_parameter(matrix)
    assert torch.allclose(drawn / drawn.std(), deep / deep.std(), atol=1e-5)


def test_branches_that_start_at_zero_leave_the_embeddings_alone() -> None:
    for method in ("rezero", "skip_init"):
        model = build(method, kind="decoder").eval()
        ids = tokens()
        embedded = model.embed(ids)
        expected = embedded if method == "rezero" else norm(embedded, "layernorm")
        assert torch.allclose(model(ids), expected, atol=1e-5)


def test_trained_scales_start_where_the_method_says_and_get_gradients() -> None:
    for method, size, start in (
        ("skip_init", 1, 0.0),
        ("rezero", 1, 0.0),
        ("layerscale", 32, 0.1),
        ("admin", 32, None),
    ):
        model = build(method)
        model.loss(model(tokens()), tokens()).backward()
        for block in model.sub_blocks():
            assert block.trained is not None
            assert block.trained.shape == (size,)
            assert start is None or bool((block.trained == torch.tensor(start)).all())
            assert block.trained.grad is not None


def test_admin_measures_its_skips_in_one_pass() -> None:
    """Against a pass by hand: each sub-block's skip is the root of the variances summed so far."""
    ids = tokens(4)
    shape = shape_of(placement="post")
    model = Transformer(shape, initialise(shape, "admin"), profile_ids_BT=ids).eval()
    assert model.training is False
    with torch.no_grad():
        x, context = model.stack.first_norm(model.embed(ids)), model._context(torch.zeros(4, 12, 32))
        skip = 1.0
        for block in model.sub_blocks():
            assert block.trained is not None
            assert torch.allclose(block.trained, torch.tensor(skip), rtol=1e-5)
            branch = block.branch(x, context)
            total = float((skip * x).var(correction=0) + branch.var(correction=0))
            x, skip = norm(skip * x + branch, "layernorm"), math.sqrt(total)
    assert skip > 1.5


def test_the_loss_is_of_labelled_positions_only_and_makes_no_other_logits() -> None:
    for kind in KINDS:
        model = build(kind=kind).eval()
        ids, labels = tokens(), tokens()
        labels[torch.rand(labels.shape) < 0.7] = -100
        hidden = model(ids, **beside(model, ids))
        expected = F.cross_entropy(model.logits(hidden).flatten(0, 1), labels.flatten(), ignore_index=-100)
        assert torch.allclose(model.loss(hidden, labels), expected)


def test_embeddings_from_a_front_end_stand_in_for_tokens() -> None:
    model = build().eval()
    ids = tokens()
    assert torch.equal(model(ids), model(inputs_embeds_BTD=model.tokens(ids)))
    with pytest.raises(ValueError, match="give one of the two"):
        model(ids, inputs_embeds_BTD=model.tokens(ids))
    with pytest.raises(ValueError, match="seq_len=12"):
        model(tokens(1, 13))
    with pytest.raises(ValueError, match="decoder_input_ids"):
        build(kind="encoder_decoder")(ids)


def test_an_init_of_another_depth_is_refused() -> None:
    with pytest.raises(ValueError, match="'dslm' has 3 and 0 layers, and the shape 4 and 0"):
        Transformer(shape_of(num_layers=4), initialise(shape_of(), "dslm"))


@pytest.mark.parametrize("kind", ["encoder", "decoder"])
@pytest.mark.parametrize("placement", ["pre", "post"])
def test_dslm_has_logits_of_standard_deviation_one_with_dropout_on(kind: str, placement: str) -> None:
    """Item 6 of Section 9."""
    model = build(kind=kind, placement=placement, num_layers=24, hidden_size=128, intermediate_size=512, vocab_size=500,
                  seq_len=64).train()  # fmt: skip
    with torch.no_grad():
        logits = model.logits(model(torch.randint(500, (8, 64))))
    assert float(logits.std()) == pytest.approx(1.0, abs=0.1)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("placement", ["pre", "post"])
@pytest.mark.parametrize("activation", ["relu", "swiglu"])
def test_dslm_has_residual_variance_one_at_depth_with_dropout_on(kind: str, placement: str, activation: str) -> None:
    """On tokens by Zipf's law, as the method assumes them; over a stack's points and three draws, within 10 %.

    One draw of 128 features scatters by up to sqrt(2/128) around it.
    """
    found: dict[str, list[float]] = {}
    for seed in range(3):
        model = build(kind=kind, placement=placement, num_layers=24, hidden_size=128, intermediate_size=256,
                      vocab_size=500, seq_len=32, activation=activation, seed=seed).train()  # fmt: skip
        ids = torch.multinomial(1 / torch.arange(1, 501.0), 4 * 32, replacement=True).view(4, 32)
        with measure(model) as measured, torch.no_grad():
            model(ids, **beside(model, ids))
        moments = measured.moments().sums() if placement == "post" else measured.moments()
        for name, var in zip(moments.names, moments.var, strict=True):
            found.setdefault(name.partition(".")[0], []).append(var)
    assert len(found) == (2 if kind == "encoder_decoder" else 1)
    for values in found.values():
        assert sum(values) / len(values) == pytest.approx(1.0, abs=0.1)


def test_dropout_keeps_the_mean_repeats_with_the_seed_and_drops_its_share() -> None:
    x = torch.ones(100_000)
    for p in (0.1, 0.5):
        torch.manual_seed(3)
        kept = keep(x, p, scale=0.7)
        torch.manual_seed(3)
        assert torch.equal(kept, dropout(x, p, scale=0.7))
        assert not torch.equal(kept, dropout(x, p, scale=0.7))
        assert float((kept == 0).float().mean()) == pytest.approx(p, abs=4 * math.sqrt(p * (1 - p) / 1e5))
        assert kept.unique().tolist() == pytest.approx([0, 0.7 / (1 - p)], rel=1e-4)
        neighbours = float(torch.corrcoef(torch.stack((kept[:-1], kept[1:])))[0, 1])
        assert abs(neighbours) < 4 / math.sqrt(1e5)
    assert dropout(x, 0.0) is x


def test_the_same_scales_with_a_trained_residual_as_with_a_fixed_one() -> None:
    """A vector of ones times a scale is that scale: the paths of `join` agree."""
    shape = shape_of(dropout=0.0)
    plain, vector = initialise(shape, "one_over_sqrt_n"), initialise(shape, "layerscale", initial=3**-0.5)
    ids = tokens()
    one, other = Transformer(shape, plain).eval()(ids), Transformer(shape, vector).eval()(ids)
    assert torch.allclose(one, other, atol=1e-5)
    assert replace(plain, layers=vector.layers).layers == vector.layers

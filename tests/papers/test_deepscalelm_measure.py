"""Measured moments: against sums by hand, on models of ours and of others, with padding, and streaming."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from torch import Tensor, nn

from retrace.papers.deepscalelm.measure import Moments, measure
from retrace.papers.deepscalelm.methods import initialise
from retrace.papers.deepscalelm.model import Transformer
from retrace.papers.deepscalelm.shape import ModelShape

SMALL = {"vocab_size": 41, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 3, "num_attention_heads": 2}


@pytest.fixture(autouse=True)
def _one_thread() -> None:
    torch.set_num_threads(1)
    torch.manual_seed(0)
    transformers.logging.set_verbosity_error()


def build(**changes: Any) -> Transformer:
    sizes: dict[str, Any] = {
        "kind": "encoder", "placement": "pre", "norm": "layernorm", "activation": "relu", "positions": "learned",
        "num_layers": 3, "hidden_size": 32, "num_heads": 4, "intermediate_size": 96, "dropout": 0.1,
        "attention_dropout": 0.1, "vocab_size": 41, "seq_len": 12,
    }  # fmt: skip
    shape = ModelShape(**{**sizes, **changes})
    return Transformer(shape, initialise(shape, "vanilla_xavier"))


def by_hand(x_BTD: Tensor, mask_BT: Tensor) -> tuple[float, float, float]:
    """Mean, variance, and the correlation over every pair of different real positions, pair by pair."""
    chosen = x_BTD[mask_BT.bool()].double()
    mean, var = float(chosen.mean()), float(chosen.var(correction=0))
    products = []
    for x_TD, mask_T in zip(x_BTD.double(), mask_BT, strict=True):
        real = x_TD[mask_T.bool()]
        products += [real[i] * real[j] for i in range(len(real)) for j in range(len(real)) if i != j]
    return mean, var, (float(torch.stack(products).mean()) - mean**2) / var


@pytest.mark.parametrize("padded", [False, True])
def test_moments_of_activations_and_gradients_are_those_by_hand(padded: bool) -> None:
    model = build().eval()
    ids = torch.randint(41, (3, 12))
    mask = torch.ones(3, 12, dtype=torch.long)
    if padded:
        mask[1, 7:] = mask[2, 3:] = 0
    stream: list[Tensor] = []
    block = model.stack.layers[1].feed_forward
    handle = block.register_forward_pre_hook(lambda _, given: stream.append(given[0]))
    with measure(model, mask_BT=mask if padded else None) as found:
        model.loss(model(ids, attention_mask_BT=mask), ids).backward()
    handle.remove()
    moments = found.moments()
    at = moments.at(["stack.layers.1.feed_forward"])
    (x,) = stream
    assert np.allclose([at.mean[0], at.var[0], at.corr[0]], by_hand(x.detach(), mask), rtol=1e-4, atol=1e-6)
    with torch.enable_grad():  # the gradient, by cutting the model there
        cut = x.detach().requires_grad_()
        context = model._context(cut, mask=None)
        if padded:
            from retrace.papers.deepscalelm.layers import additive

            context = model._context(cut, mask=additive(mask, cut.dtype))
        y = model.stack.layers[1].feed_forward(cut, context)
        y = model.stack.layers[2](y, context)
        (grad,) = torch.autograd.grad(model.loss(model.stack.final_norm(y), ids), cut)
    assert np.allclose([at.grad_mean[0], at.grad_var[0], at.grad_corr[0]], by_hand(grad, mask), rtol=1e-3, atol=1e-7)
    for index, norm in enumerate(moments.weight_grad_norms):
        layer = model.stack.layers[index]
        squares = [float(p.grad.square().sum()) for p in layer.parameters() if p.dim() > 1 and p.grad is not None]
        assert norm == pytest.approx(math.sqrt(sum(squares)), rel=1e-4)


def test_two_passes_add_up_to_one_of_both_halves() -> None:
    model = build().eval()
    ids = torch.randint(41, (4, 12))
    with measure(model) as whole:
        model(ids).sum().backward()
    with measure(model) as parts:
        for half in ids.chunk(2):
            model(half).sum().backward()
    one, two = whole.moments(), parts.moments()
    for name in ("mean", "var", "corr", "grad_var", "grad_corr"):
        assert np.allclose(getattr(one, name), getattr(two, name), rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("kind", ["encoder", "decoder", "encoder_decoder"])
@pytest.mark.parametrize("placement", ["pre", "post"])
def test_points_follow_the_stream_of_our_model(kind: str, placement: str) -> None:
    model = build(kind=kind, placement=placement)
    ids = torch.randint(41, (2, 12))
    beside = {"decoder_input_ids_BT": ids} if kind == "encoder_decoder" else {}
    with measure(model) as found:
        model(ids, **beside).square().sum().backward()
    moments = found.moments()
    branches = 6 if kind != "encoder_decoder" else 6 + 9
    assert len(moments.stream().names) == branches + (2 if kind == "encoder_decoder" else 1)
    assert len(moments.names) - len(moments.stream().names) == (branches if placement == "post" else 0)
    assert len(moments.weight_grad_norms) == (6 if kind == "encoder_decoder" else 3)
    for field in ("var", "corr", "grad_var", "grad_corr", "weight_grad_norms"):
        assert np.isfinite(getattr(moments, field)).all(), field
    if placement == "post":
        assert np.allclose(moments.stream().var, 1, atol=1e-3)
        assert moments.sums().var[1:].mean() > 1.2


OTHERS = {
    "llama": lambda: transformers.LlamaForCausalLM(transformers.LlamaConfig(**SMALL)),
    "gpt2": lambda: transformers.GPT2LMHeadModel(
        transformers.GPT2Config(vocab_size=41, n_embd=32, n_layer=3, n_head=2, bos_token_id=0, eos_token_id=0)
    ),
    "gpt_neox": lambda: transformers.GPTNeoXForCausalLM(transformers.GPTNeoXConfig(**SMALL)),
    "bert": lambda: transformers.BertForMaskedLM(transformers.BertConfig(**SMALL)),
    "opt": lambda: transformers.OPTForCausalLM(
        transformers.OPTConfig(
            vocab_size=41,
            hidden_size=32,
            word_embed_proj_dim=32,
            ffn_dim=48,
            num_hidden_layers=3,
            num_attention_heads=2,
        )
    ),
}


@pytest.mark.parametrize("family", OTHERS)
def test_a_model_of_transformers_is_measured_where_its_hidden_states_are(family: str) -> None:
    """Layer by layer its own `output_hidden_states` say what the variance is; `opt` is of a layout we don't know."""
    model = OTHERS[family]().eval()
    ids = torch.randint(41, (2, 12))
    with measure(model) as found:
        made = model(input_ids=ids, labels=ids, output_hidden_states=True)
        made.loss.backward()
    moments = found.moments()
    starts = [name for name in moments.names if name.endswith(("attention", ".0", ".1", ".2")) and "sum" not in name]
    expected = [float(h.detach().var(correction=0)) for h in made.hidden_states[:3]]
    assert np.allclose(moments.at(starts).var, expected, rtol=1e-3)
    assert len(moments.names) == {"opt": 4, "bert": 7 + 6}.get(family, 7)
    assert (moments.grad_var > 0).all()
    assert len(moments.weight_grad_norms) == 3
    assert (moments.weight_grad_norms > 0).all()


def test_named_modules_are_measured_at_their_outputs() -> None:
    model = nn.Sequential(nn.Embedding(41, 8), nn.Linear(8, 6), nn.ReLU())
    ids = torch.randint(41, (2, 5))
    with measure(model, points=["1", "2"]) as found:
        model(ids).sum().backward()
    moments = found.moments()
    assert moments.names == ("1", "2")
    mean, var, corr = by_hand(model(ids).detach(), torch.ones(2, 5))
    assert np.allclose([moments.mean[1], moments.var[1], moments.corr[1]], (mean, var, corr), rtol=1e-4)
    with pytest.raises(ValueError, match="point 'x': Sequential has no such module"):
        measure(model, points=["x"])
    with pytest.raises(ValueError, match="no list of layers"):
        measure(model)
    with pytest.raises(ValueError, match="point 'y': not measured"):
        moments.at(["y"])


def test_measuring_changes_neither_results_nor_gradients_and_leaves_no_hook() -> None:
    model, ids = build(), torch.randint(41, (2, 12))

    def step() -> list[Tensor]:
        torch.manual_seed(0)
        model.zero_grad()
        model.loss(model(ids), ids).backward()
        return [p.grad.clone() for p in model.parameters() if p.grad is not None]

    plain = step()
    with measure(model):
        measured = step()
    assert all(torch.equal(one, other) for one, other in zip(plain, measured, strict=True))
    hooks = [h for m in model.modules() for h in (m._forward_hooks, m._forward_pre_hooks)]
    assert not any(hooks)
    assert not any(p._post_accumulate_grad_hooks for p in model.parameters())


def test_no_activation_outlives_its_pass() -> None:
    """Only sums are kept: after a pass without gradients every tensor of the stream is gone."""
    import gc
    import weakref

    model, alive = build(num_layers=6), []
    with measure(model) as found, torch.no_grad():
        for block in model.sub_blocks():
            block.register_forward_pre_hook(lambda _, given: alive.append(weakref.ref(given[0])))
        model(torch.randint(41, (2, 12)))
        gc.collect()
        assert len(alive) == 12
        assert not [ref for ref in alive if ref() is not None]
    moments = found.moments()
    assert isinstance(moments, Moments)
    assert np.isnan(moments.grad_var).all()


@pytest.mark.slow
def test_a_thousand_layers_are_built_and_measured_within_a_minute() -> None:
    import time

    start = time.monotonic()
    sizes = {"num_layers": 1000, "hidden_size": 128, "intermediate_size": 512, "seq_len": 64, "vocab_size": 500}
    model, ids = build(**sizes), torch.randint(500, (4, 64))
    with measure(model) as found:
        model.loss(model(ids), ids).backward()
    moments = found.moments()
    assert time.monotonic() - start < 60
    assert len(moments.names) == 2001
    assert np.isfinite(moments.grad_corr).all()


@pytest.mark.slow
@pytest.mark.parametrize("placement", ["pre", "post"])
def test_a_thousand_layers_of_dslm_learn_within_a_hundred_steps(placement: str) -> None:
    """Texts count upwards from a random start, so that every token but the first follows from the one before."""
    size = 41
    shape = ModelShape(
        kind="decoder", placement=placement, norm="layernorm", activation="relu", positions="learned", num_layers=1000,
        hidden_size=64, num_heads=2, intermediate_size=256, dropout=0.1, attention_dropout=0.1, vocab_size=size,
        seq_len=16,
    )  # fmt: skip
    model = Transformer(shape, initialise(shape, "dslm"))
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, fused=True)
    losses = []
    for _ in range(100):
        ids = (torch.randint(size, (4, 1)) + torch.arange(17)) % size
        loss = model.loss(model(ids[:, :-1]), ids[:, 1:])
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        losses.append(float(loss))
    assert np.mean(losses[-10:]) < 0.8 * min(math.log(size), float(np.mean(losses[:10])))

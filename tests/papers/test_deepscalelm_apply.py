"""DSLM for transformers models: moments of one at any depth, scales that survive saving, and clear refusals."""

from __future__ import annotations

import copy
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from torch import Tensor, nn

from retrace.papers.deepscalelm.apply import apply, attach, detach, fold
from retrace.papers.deepscalelm.layouts import trunk_of
from retrace.papers.deepscalelm.measure import measure
from retrace.papers.deepscalelm.trial import check

NEW = {"num_attention_heads": 4, "vocab_size": 500, "max_position_embeddings": 64}
CASES: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("Llama", {"num_key_value_heads": 2, "intermediate_size": 200}),
    "llama-odd": ("Llama", {"head_dim": 24, "num_key_value_heads": 1, "intermediate_size": 77, "hidden_act": "relu",
                            "tie_word_embeddings": True, "attention_dropout": 0.1}),
    "gpt2": ("GPT2", {}),
    "gpt2-odd": ("GPT2", {"n_inner": 300, "resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0,
                          "scale_attn_weights": False}),
    "pythia": ("GPTNeoX", {"intermediate_size": 256}),
    "pythia-odd": ("GPTNeoX", {"intermediate_size": 300, "use_parallel_residual": False, "hidden_dropout": 0.2,
                               "attention_dropout": 0.1, "tie_word_embeddings": True}),
    "bert": ("Bert", {"intermediate_size": 512}),
    "bert-odd": ("Bert", {"intermediate_size": 300, "hidden_act": "silu", "hidden_dropout_prob": 0.0}),
    "gemma": ("Gemma", {"num_key_value_heads": 1, "head_dim": 48, "intermediate_size": 256}),
    "qwen2": ("Qwen2", {"num_key_value_heads": 2, "intermediate_size": 200}),
}  # fmt: skip


@pytest.fixture(autouse=True)
def _one_thread() -> None:
    torch.set_num_threads(1)
    torch.manual_seed(0)
    transformers.logging.set_verbosity_error()


def build(case: str, layers: int = 6, hidden: int = 128) -> Any:
    family, options = CASES[case]
    if family == "GPT2":
        sizes = {"n_layer": layers, "n_embd": hidden, "n_head": 4, "n_positions": 64, "vocab_size": 500}
        config = transformers.GPT2Config(**sizes, bos_token_id=0, eos_token_id=0, **options)
        return transformers.GPT2LMHeadModel(config)
    config = getattr(transformers, f"{family}Config")(
        num_hidden_layers=layers, hidden_size=hidden, pad_token_id=None, **NEW, **options
    )
    head = "MaskedLM" if family == "Bert" else "CausalLM"
    return getattr(transformers, f"{family}For{head}")(config)


def zipf(batch: int = 8, length: int = 64) -> Tensor:
    return torch.multinomial(1 / torch.arange(1, 501.0), batch * length, replacement=True).view(batch, length)


def variances(model: Any, ids: Tensor) -> Any:
    """Of the stream; in Post-LN of the sums in front of its norms."""
    with measure(model) as found, torch.no_grad():
        model.train().base_model(input_ids=ids)
    moments = found.moments()
    return (moments if "Bert" not in type(model).__name__ else moments.sums()).var


@pytest.mark.parametrize("case", CASES)
def test_residual_variance_is_one_within_ten_percent_at_twelve_layers(case: str) -> None:
    """At each point, as the mean of seeds: one draw of 128 features scatters by sqrt(2/128) around it."""
    found = []
    for seed in range(4):
        model = build(case, layers=12)
        apply(model, k=1, seed=seed)
        found.append(variances(model, zipf()))
    assert np.abs(np.mean(found, 0) - 1).max() < 0.1 + 2 * math.sqrt(2 / 128 / 4)
    assert abs(np.mean(found) - 1) < 0.1


@pytest.mark.parametrize(
    ("layers", "hidden"), [(96, 128), pytest.param(384, 64, marks=pytest.mark.slow)], ids=["96", "384"]
)
@pytest.mark.parametrize("case", ["llama", "gpt2", "pythia", "bert"])
def test_residual_variance_is_one_within_ten_percent_at_depth(case: str, layers: int, hidden: int) -> None:
    model = build(case, layers=layers, hidden=hidden)
    apply(model, k=1)
    assert abs(float(variances(model, zipf(4)).mean()) - 1) < 0.1


def test_the_same_models_explode_or_shrink_without_it() -> None:
    """So the tests above can fail: with all matrices at 1/sqrt(fan_in), plain residuals grow with depth."""
    model = build("llama", layers=24)
    for child in model.modules():
        if isinstance(child, nn.Linear | nn.Embedding):
            nn.init.normal_(child.weight, std=child.weight.shape[1] ** -0.5)
    assert variances(model, zipf(2))[-1] > 3


@pytest.mark.parametrize("case", CASES)
def test_logits_have_standard_deviation_one(case: str) -> None:
    model = build(case)
    apply(model, k=1)
    with torch.no_grad():
        logits = model.train()(zipf()).logits
    assert float(logits.std()) == pytest.approx(1.0, abs=0.1)


@pytest.mark.parametrize("case", CASES)
def test_a_model_saved_and_loaded_has_plain_weights_and_the_same_function_once_attached(
    case: str, tmp_path: Path
) -> None:
    model = build(case)
    names = set(model.state_dict())
    scales = apply(model, k=1)
    assert set(model.state_dict()) == names
    ids = zipf(1, 16)
    with torch.no_grad():
        before = model.eval()(ids).logits
        model.save_pretrained(tmp_path)
        loaded = type(model).from_pretrained(tmp_path).eval()
        assert not torch.allclose(loaded(ids).logits, before, atol=1e-2)  # without its scales: predictably another
        assert attach(loaded) == scales
        assert torch.equal(loaded(ids).logits, before)
        attach(loaded)  # twice is once
        assert torch.equal(loaded(ids).logits, before)
        assert torch.equal(copy.deepcopy(model)(ids).logits, before)


@pytest.mark.parametrize("case", CASES)
def test_folded_weights_give_the_same_function_without_hooks(case: str, tmp_path: Path) -> None:
    model = build(case)
    apply(model, k=2)
    ids = zipf(1, 16)
    with torch.no_grad():
        before = model.eval()(ids).logits
        fold(model)
        assert torch.allclose(model(ids).logits, before, atol=1e-3)
        model.save_pretrained(tmp_path)
        assert torch.allclose(type(model).from_pretrained(tmp_path).eval()(ids).logits, before, atol=1e-3)
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())
    with pytest.raises(ValueError, match="wasn't made by apply"):
        attach(model)


def test_post_ln_sums_are_lambda_x_plus_beta_f_and_other_numbers_are_noticed() -> None:
    model = build("bert")
    scales, trunk = apply(model, k=1), trunk_of(model)
    assert trunk is not None
    check(model, trunk, scales)
    with pytest.raises(ValueError, match="more with the stream"):
        check(model, trunk, replace(scales, skip=scales.skip * 0.99))


@pytest.mark.parametrize("case", ["llama", "gpt2", "pythia", "pythia-odd"])
def test_each_sub_block_is_lambda_x_plus_beta_f(case: str) -> None:
    """Against the layer of the same model without hooks, whose branches are added as they are."""
    model = build(case, layers=2).eval()
    scales = apply(model, k=0.5)
    plain = copy.deepcopy(model)
    detach(plain)
    layer, other = (
        next(m for m in x.modules() if type(m).__name__.endswith(("Layer", "Block"))) for x in (model, plain)
    )
    seen: dict[str, Tensor] = {}
    for name, which in (("ours", layer), ("plain", other)):
        which.register_forward_pre_hook(lambda _, given, named, name=name: seen.update(
            {f"{name} in": given[0] if given else named["hidden_states"]}), with_kwargs=True)  # fmt: skip
        which.register_forward_hook(lambda _, __, made, name=name: seen.update(
            {f"{name} out": made[0] if isinstance(made, tuple) else made}))  # fmt: skip
    for x in (layer, other):  # the first branch alone, so that the second reads nothing that the first changed
        last = [m for m in x.mlp.modules() if hasattr(m, "weight")][-1]
        nn.init.zeros_(last.weight)
    ids = zipf(1, 16)
    with torch.no_grad():
        model(ids)
        plain(ids)
    assert torch.equal(seen["ours in"], seen["plain in"])
    x, branch = seen["plain in"], seen["plain out"] - seen["plain in"]
    once = scales.skip * x + scales.scale * branch
    both = once if case == "pythia" else scales.skip * once  # the second branch gives 0, and scales the skip again
    assert torch.allclose(seen["ours out"], both, atol=1e-5)


def test_training_moves_the_weights_and_the_scales_stay() -> None:
    model = build("gpt2", layers=4)
    scales = apply(model, k=1)
    ids, optimizer = zipf(4, 32), torch.optim.AdamW(model.parameters(), lr=3e-3)
    losses = []
    for _ in range(20):
        loss = model.train()(ids, labels=ids).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(float(loss.detach()))
    assert losses[-1] < losses[0] - 0.5
    assert vars(scales) == model.config.deepscalelm


def test_gradient_checkpointing_gives_the_same_gradients() -> None:
    model = build("llama", layers=4).train()
    apply(model, k=1)
    ids, found = zipf(1, 16), []
    for light in (False, True):
        if light:
            model.activation_checkpointing_enable()
        model.zero_grad()
        model(ids, labels=ids).loss.backward()
        found.append([p.grad.clone() for p in model.parameters()])
    assert all(torch.allclose(one, other, atol=1e-6) for one, other in zip(*found, strict=True))


def test_apply_twice_is_the_last_one_and_the_seed_decides_the_weights() -> None:
    one, other = build("llama"), build("llama")
    apply(one, k=2, seed=3)
    apply(one, k=1, seed=0)
    apply(other, k=1, seed=0)
    assert all(torch.equal(p, q) for p, q in zip(one.parameters(), other.parameters(), strict=True))
    ids = zipf(1, 8)
    assert torch.equal(one.eval()(ids).logits, other.eval()(ids).logits)
    apply(other, k=1, seed=1)
    assert not torch.equal(next(one.parameters()), next(other.parameters()))


def test_a_base_model_without_a_head_is_scaled_too() -> None:
    config = transformers.BertConfig(num_hidden_layers=3, hidden_size=64, intermediate_size=128, **NEW)
    assert apply(transformers.BertModel(config), k=1).logit == 1


def test_what_cannot_be_scaled_is_refused_by_name_with_the_reason() -> None:
    small = {"num_hidden_layers": 3, "hidden_size": 32, "num_attention_heads": 2, "vocab_size": 50}
    t5 = transformers.T5ForConditionalGeneration(
        transformers.T5Config(d_model=32, d_ff=64, num_layers=3, num_heads=2, vocab_size=50)
    )
    with pytest.raises(ValueError, match="model 't5': .*llama, gpt2, gpt_neox or bert"):
        apply(t5)
    crossed = transformers.BertConfig(**small, intermediate_size=64, is_decoder=True, add_cross_attention=True)
    with pytest.raises(ValueError, match="model 'bert': .*cross-attention"):
        apply(transformers.BertLMHeadModel(crossed))
    granite = transformers.GraniteForCausalLM(
        transformers.GraniteConfig(**small, intermediate_size=64, residual_multiplier=0.5, num_key_value_heads=2)
    )
    with pytest.raises(ValueError, match="model 'granite': .*more with the stream"):
        apply(granite, k=1)
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in granite.modules())
    with pytest.raises(ValueError, match=r"k=6: .*num_layers=6"):
        apply(build("llama"), k=6)
    with pytest.raises(ValueError, match="two branches that join at once: choose k below 3"):
        apply(build("pythia"), k=4)
    with pytest.raises(ValueError, match=r"config\.deepscalelm: not there"):
        attach(build("llama"))

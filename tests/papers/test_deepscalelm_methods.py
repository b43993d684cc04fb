"""Methods: their numbers, what they refuse, and that each builds on every kind it is made for."""

from __future__ import annotations

import math
import subprocess
import sys
from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from retrace.papers.deepscalelm import dslm
from retrace.papers.deepscalelm.causal import Positions, causal_gains
from retrace.papers.deepscalelm.correlations import effective_correlation
from retrace.papers.deepscalelm.gains import gain_of, measured_gain
from retrace.papers.deepscalelm.methods import METHODS, initialise
from retrace.papers.deepscalelm.scheme import LayerInit, ModelInit
from retrace.papers.deepscalelm.shape import ModelShape

BASE: dict[str, Any] = {
    "kind": "encoder",
    "placement": "pre",
    "norm": "layernorm",
    "activation": "relu",
    "positions": "learned",
    "num_layers": 12,
    "hidden_size": 768,
    "num_heads": 12,
    "intermediate_size": 3072,
    "dropout": 0.1,
    "attention_dropout": 0.1,
    "vocab_size": 30522,
    "seq_len": 512,
}
KINDS = ("encoder", "decoder", "encoder_decoder")
PLACED = {"deepnorm": "post", "admin": "post", "sub_ln": "pre"}  # the others take both


def shape_of(**changes: Any) -> ModelShape:
    return ModelShape(**{**BASE, **changes})


def six(value: float) -> str:
    return f"{value:.6g}"


def all_layers(init: ModelInit) -> tuple[LayerInit, ...]:
    return (*init.layers, *init.decoder_layers)


DEEP = {"num_layers": 192, "hidden_size": 1024, "num_heads": 16, "intermediate_size": 4096}
VECTORS: list[tuple[dict[str, Any], dict[str, Any], dict[int, float], float, float, float]] = [
    (DEEP, {"beta_sq": 0.005, "corr0": 0.221},
     {1: 0.0455777, 2: 0.0453284, 3: 0.0450876, 96: 0.0361582, 192: 0.0337879}, 0.0255949, 0.9974969, 0.0707107),
    ({}, {"k": "code", "corr0": 0.221},
     {1: 0.0526285, 2: 0.0487483, 3: 0.046266, 6: 0.042207, 12: 0.0390583}, 0.0295544, 0.9574271, 0.2886751),
    ({}, {"k": 2, "corr0": 0.2274},
     {1: 0.0522543, 2: 0.0459799, 3: 0.0429839, 6: 0.0392458, 12: 0.0373372}, 0.0295544, math.sqrt(10 / 12),
     math.sqrt(2 / 12)),
]  # fmt: skip


@pytest.mark.parametrize(("changes", "options", "last", "wide", "skip", "scale"), VECTORS)
def test_dslm_gives_the_test_vectors_of_section_3_3_to_six_digits(
    changes: dict[str, Any], options: dict[str, Any], last: dict[int, float], wide: float, skip: float, scale: float
) -> None:
    init = initialise(shape_of(**changes), "dslm", **options)
    for number, std in last.items():
        layer = init.layers[number - 1]
        assert abs(layer.attention.value - std) < 6e-8  # the vectors have seven decimals
        assert layer.attention.output == layer.attention.value
    assert abs(init.layers[0].feed_forward.inner - wide) < 6e-8
    assert abs(init.layers[-1].feed_forward.residual.skip - skip) < 6e-8
    assert abs(init.layers[-1].attention.residual.scale - scale) < 6e-8
    assert init.layers[0].attention.query == shape_of(**changes).hidden_size ** -0.5


def test_without_dropout_the_feed_forward_std_is_that_of_section_3_3() -> None:
    init = initialise(shape_of(dropout=0.0, attention_dropout=0.0), "dslm", k=1, corr0=0.221)
    assert six(init.layers[0].feed_forward.outer) == "0.0303432"


def test_three_tables_and_their_logit_scale_are_those_of_section_3_3() -> None:
    std = dslm.embedding_std(0.1, num_tables=3)
    assert six(std) == "0.547723"
    assert six(dslm.embedding_std(0.0, num_tables=3)) == "0.57735"
    assert six(dslm.logit_scale(1024, token_std=std)) == "0.0570544"
    assert six(dslm.logit_scale(768, token_std=std)) == "0.0658808"


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("method", ["dslm", "dslm_simplified"])
def test_lambda_and_beta_squared_sum_to_one_in_every_branch(kind: str, method: str) -> None:
    init = initialise(shape_of(kind=kind), method, k="layers2", alpha=1.1)
    for layer in all_layers(init):
        for block in (layer.attention, layer.feed_forward, *([layer.cross] if layer.cross else [])):
            assert block.residual.skip**2 + block.residual.scale**2 == pytest.approx(1, abs=1e-14)


def test_a_decoder_beside_an_encoder_has_the_same_sum_of_beta_squared() -> None:
    init = initialise(shape_of(kind="encoder_decoder"), "dslm")

    def total(layers: tuple[LayerInit, ...]) -> float:
        blocks = [b for layer in layers for b in (layer.attention, layer.cross, layer.feed_forward) if b is not None]
        return sum(block.residual.scale**2 for block in blocks)

    assert total(init.decoder_layers) == pytest.approx(total(init.layers))


def test_the_two_readings_of_k_differ_by_a_factor_of_two_in_beta_squared() -> None:
    code, layers2 = (initialise(shape_of(), "dslm", k=k).layers[0].attention.residual for k in ("code", "layers2"))
    assert layers2.scale**2 == pytest.approx(2 * code.scale**2)


@pytest.mark.parametrize(("activation", "inner", "square"), [("gelu", 1 / 768, 0.42522), ("swiglu", 1 / 768, 0.355776)])
def test_other_activations_get_their_own_gain(activation: str, inner: float, square: float) -> None:
    """E[gelu^2] is the number of Section 1.2; E[silu^2] was integrated with scipy.integrate.quad."""
    wide = initialise(shape_of(activation=activation), "dslm").layers[0].feed_forward
    assert wide.inner**2 == pytest.approx(inner)
    assert wide.outer**2 == pytest.approx(0.9 / (3072 * square), rel=2e-5)


def test_a_measured_gain_agrees_with_the_closed_form() -> None:
    from scipy.special import erf

    measured, closed = measured_gain(lambda z: z * (1 + erf(z / math.sqrt(2))) / 2, gated=False), gain_of("gelu")
    corr = np.linspace(-0.5, 1, 13)
    assert measured.square == pytest.approx(closed.square, rel=1e-6)
    assert np.allclose(measured.kernel(corr), closed.kernel(corr), atol=1e-5)


def test_causal_gains_at_uncorrelated_short_inputs_are_those_of_averages() -> None:
    """Without scores a position's variance is 1/i, so the mean is H_L / L; grouping positions may cost a percent."""
    for length in (2, 16, 64, 1000):
        attended = Positions(length).attend(
            np.zeros((len(Positions(length).weight),) * 2), score_var=0.0, attention_dropout=0.0
        )
        plain = effective_correlation(0.0, seq_len=length, score_var=0.0, attention_dropout=0.0, causal=True)
        assert attended.passed == pytest.approx(float(plain), rel=0.01)


def test_causal_gains_of_equal_positions_are_one() -> None:
    found, final = causal_gains(
        3, gain=gain_of("relu"), beta_sq=0.1, corr0=1.0, dropout=0.0, attention_dropout=0.0, seq_len=50, score_var=1.0
    )
    assert np.allclose(found, 1)
    assert final == pytest.approx(1)


def test_deepnorm_has_the_numbers_of_torchscale_s_rule() -> None:
    encoder = initialise(shape_of(placement="post", num_layers=18), "deepnorm").layers[0]
    assert encoder.attention.residual.skip == pytest.approx(36**0.25)
    assert encoder.attention.value == pytest.approx(144**-0.25 / math.sqrt(768))
    assert encoder.attention.query == pytest.approx(1 / math.sqrt(768))
    both = initialise(shape_of(placement="post", num_layers=18, kind="encoder_decoder"), "deepnorm")
    assert both.layers[0].attention.residual.skip == pytest.approx(0.81 * 18 ** (5 / 16))
    assert both.decoder_layers[0].attention.residual.skip == pytest.approx(54**0.25)


def test_each_rule_of_section_4_scales_what_it_says() -> None:
    square, wide = 1 / math.sqrt(768), math.sqrt(2 / (768 + 3072))
    official = initialise(shape_of(), "official_xavier").layers[0]
    assert official.attention.key == pytest.approx(math.sqrt(2 / (768 + 64)))
    assert official.feed_forward.outer**2 == pytest.approx(2 / (5 * 768))
    gpt2 = initialise(shape_of(), "vanilla_gpt2").layers[0]
    assert (gpt2.attention.value, gpt2.attention.output) == (0.02, 0.02 / math.sqrt(24))
    paper, code = (initialise(shape_of(), "ds_init", reading=reading).layers[8] for reading in ("paper", "code"))
    assert paper.attention.query == pytest.approx(square / 3)
    assert code.feed_forward.inner == pytest.approx(wide / math.sqrt(3))
    sub_ln = initialise(shape_of(), "sub_ln")
    assert sub_ln.inner_norms
    assert sub_ln.layers[0].attention.output == pytest.approx(square * math.sqrt(math.log(24)))
    t_fixup = initialise(shape_of(), "t_fixup")
    assert not t_fixup.norms
    assert t_fixup.layers[0].feed_forward.outer == pytest.approx(wide * 0.67 * 12**-0.25)
    depths = {n: initialise(shape_of(num_layers=n), "layerscale").layers[0] for n in (18, 24, 25)}
    assert [layer.attention.residual.scale for layer in depths.values()] == [0.1, 1e-5, 1e-6]
    assert initialise(shape_of(), "one_over_sqrt_n").layers[0].attention.residual.scale == 12**-0.5
    simple = initialise(shape_of(), "dslm_simplified")
    assert simple.layers[7].attention.value == pytest.approx(math.sqrt(math.sqrt(0.45) / 768))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("method", METHODS)
def test_every_method_fills_every_kind_and_refuses_the_other_placement(method: str, kind: str) -> None:
    for placement in ("pre", "post"):
        shape = shape_of(kind=kind, placement=placement, num_layers=5)
        if PLACED.get(method, placement) != placement:
            with pytest.raises(ValueError, match=f"placement={PLACED[method]}"):
                initialise(shape, method)
            continue
        init = initialise(shape, method)
        assert init.method == method
        assert len(init.layers) == 5
        assert [layer.cross is not None for layer in init.decoder_layers] == [True] * (5 * (kind == "encoder_decoder"))
        assert replace(init) == init


@pytest.mark.parametrize(
    ("method", "options", "words"),
    [
        ("dslmm", {}, "did you mean 'dslm'"),
        ("dslm", {"kk": 1}, "no option 'kk'; did you mean 'k'"),
        ("rezero", {"k": 1}, "it has none"),
        ("dslm", {"k": 12}, "k=12: .*num_layers=12"),
        ("dslm", {"k": 0}, "k=0"),
        ("dslm", {"k": 11.9, "alpha": 0.5}, "alpha=0.5"),
        ("dslm", {"k": "papr"}, "'code', 'layers2'"),
        ("dslm", {"beta_sq": 1.0}, "beta_sq=1.0"),
        ("dslm", {"corr0": -0.02}, "corr0: .* -0.018 of the variance.* alike on average"),
        ("ds_init", {"reading": "tf"}, "'paper'.*'code'"),
    ],
)
def test_what_a_method_cannot_take_is_refused_in_one_sentence(method: str, options: dict[str, Any], words: str) -> None:
    with pytest.raises(ValueError, match=words) as caught:
        initialise(shape_of(), method, **options)
    assert "\n" not in str(caught.value)


def test_methods_reach_no_torch() -> None:
    code = "import sys, retrace.papers.deepscalelm.methods; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0

"""The whole-model recursion: the numbers of the specification, its invariants, and what `retrace moments` shows."""

from __future__ import annotations

import importlib.util
import json
import math
import subprocess
import sys
import time
import xml.etree.ElementTree as ET
from decimal import Decimal
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from retrace.papers.deepscalelm.components import GradMoments, Moments
from retrace.papers.deepscalelm.correlations import dslm_correlations, effective_correlation
from retrace.papers.deepscalelm.model_config import model_shape
from retrace.papers.deepscalelm.moments_view import profile_figure, table
from retrace.papers.deepscalelm.recursion import Profile, input_moments, profile
from retrace.papers.deepscalelm.scheme import AttentionInit, FeedForwardInit, LayerInit, ModelInit, Residual
from retrace.papers.deepscalelm.shape import ModelShape

START = Moments(0.0, 1.0, 0.2)  # of Section 2.4
D = 128
SIMPLE = math.sqrt(math.sqrt(0.45) / D)  # DSLM's feed-forward standard deviation at dropout 0.1, Section 3.1

VECTORS = [  # Section 3.3: dropout, beta_sq, num_layers, corr0, {layer: r}, {layer: std_VO}, hidden_size
    (0.1, 0.005, 192, 0.221, {1: 0.198900, 2: 0.203311, 3: 0.207689, 96: 0.502131, 192: 0.658565},
     {1: 0.0455777, 2: 0.0453284, 3: 0.0450876, 96: 0.0361582, 192: 0.0337879}, 1024),
    (0.1, 1 / 12, 12, 0.221, {1: 0.1989, 2: 0.270199, 3: 0.33302, 6: 0.48082, 12: 0.65564},
     {1: 0.0526285, 2: 0.0487483, 3: 0.046266, 6: 0.042207, 12: 0.0390583}, 768),
    (0.1, 2 / 12, 12, 0.2274, {1: 0.20466, 2: 0.341387, 3: 0.44699, 6: 0.643201, 12: 0.785153},
     {1: 0.0522543, 2: 0.0459799, 3: 0.0429839, 6: 0.0392458, 12: 0.0373372}, 768),
    (0.0, 1 / 12, 12, 0.221, {1: 0.221, 2: 0.301621, 3: 0.373089, 6: 0.543436, 12: 0.751912}, {}, 768),
]  # fmt: skip

COLUMNS = [  # Section 2.4: N, placement, method, k, last variance, last r, gradient behind layer 1
    (12, "pre", "xavier", 0, "13.39", "0.760", "2.566"), (12, "post", "xavier", 0, "1.356", "0.858", "0.0462"),
    (12, "pre", "dslm", 1, "1.014", "0.673", "0.453"), (12, "post", "dslm", 1, "1.000", "0.678", "0.444"),
    (48, "pre", "xavier", 0, "58.9", "0.837", "5.27"), (48, "post", "xavier", 0, None, "0.859", "1.1e-2"),
    (192, "pre", "xavier", 0, "247.1", "0.861", "13.1"), (192, "post", "xavier", 0, None, "0.859", "3.9e-5"),
    (192, "pre", "dslm", 1, "1.013", "0.668", "0.454"), (192, "post", "dslm", 1, "1.000", "0.673", "0.440"),
    (192, "pre", "dslm", 2, "1.005", "0.789", "0.211"), (192, "post", "dslm", 2, "1.000", "0.791", "0.206"),
    (192, "pre", "simple", 2, "0.655", "0.651", "0.364"), (192, "post", "simple", 2, "1.000", "0.570", "0.702"),
    (768, "pre", "xavier", 0, "1008", "0.868", "39.2"), (768, "post", "xavier", 0, None, "0.859", "6.6e-15"),
    (768, "pre", "dslm", 1, "1.013", "0.668", "0.454"), (768, "post", "dslm", 1, "1.000", "0.673", "0.440"),
]  # fmt: skip


def shaped(num_layers: int, **changes: Any) -> ModelShape:
    values = {
        "kind": "encoder", "placement": "pre", "norm": "layernorm", "activation": "relu", "positions": "learned",
        "num_layers": num_layers, "hidden_size": D, "num_heads": 4, "intermediate_size": 4 * D, "dropout": 0.1,
        "attention_dropout": 0.1, "vocab_size": 1000, "seq_len": 64,
    }  # fmt: skip
    return ModelShape(**{**values, **changes})


def model(layers: list[LayerInit], **changes: Any) -> ModelInit:
    return ModelInit("here", token_std=0.1, position_std=0.1, layers=tuple(layers), **changes)


PLAIN = Residual()


def xavier(*, cross: bool = False, residual: Residual = PLAIN) -> LayerInit:
    square = AttentionInit(*[D**-0.5] * 4, residual)
    wide = math.sqrt(2 / (5 * D))
    return LayerInit(square, FeedForwardInit(wide, wide, residual), square if cross else None)


def built(num_layers: int, method: str, k: float) -> ModelInit:
    if method == "xavier":
        return model([xavier()] * num_layers)
    beta_sq = k / num_layers
    residual = Residual(math.sqrt(1 - beta_sq), math.sqrt(beta_sq))
    corrs = dslm_correlations(num_layers, dropout=0.1, beta_sq=beta_sq, lambda_sq=1 - beta_sq, corr0=0.2 / 0.9)
    last = [SIMPLE if method == "simple" else math.sqrt(math.sqrt(0.9 / r) / D) for r in corrs]
    wide = FeedForwardInit(SIMPLE, SIMPLE, residual)
    return model([LayerInit(AttentionInit(D**-0.5, D**-0.5, std, std, residual), wide) for std in last])


@pytest.mark.parametrize(("p", "beta_sq", "layers", "corr0", "corrs", "stds", "width"), VECTORS)
def test_dslm_correlations_and_value_stds_are_those_of_the_specification_to_six_digits(
    p: float, beta_sq: float, layers: int, corr0: float, corrs: dict[int, float], stds: dict[int, float], width: int
) -> None:
    found = dslm_correlations(layers, dropout=p, beta_sq=beta_sq, lambda_sq=1 - beta_sq, corr0=corr0)
    assert {n: found[n - 1] for n in corrs} == pytest.approx(corrs, abs=5.01e-7)  # six printed decimals
    std_vo = np.sqrt(np.sqrt((1 - p) / found) / width)
    assert {n: std_vo[n - 1] for n in stds} == pytest.approx(stds, abs=5.01e-8)


def rounds_to(value: float, printed: str) -> bool:
    """Whether a number is the printed one within 0.55 units of its last digit: two are off by more than 0.5."""
    digits = Decimal(printed).as_tuple()
    assert isinstance(digits.exponent, int)
    return abs(value - float(printed)) <= 0.55 * 10.0**digits.exponent


@pytest.mark.parametrize(("n", "placement", "method", "k", "var", "corr", "grad"), COLUMNS)
def test_the_recursion_gives_the_theory_columns_of_section_2_4_to_the_printed_digits(
    n: int, placement: str, method: str, k: float, var: str | None, corr: str, grad: str
) -> None:
    found = profile(shaped(n, placement=placement), built(n, method, k), inputs=START, finite_width=False)
    assert var is None or rounds_to(found.var[-1], var)
    assert rounds_to(found.corr[-1], corr)
    assert rounds_to(found.grad_var[2], grad)
    assert found.places[2] == "1.feed_forward"


def test_the_official_xavier_reaches_421_at_layer_192() -> None:
    d = 1024
    into, wide, out = math.sqrt(2 / (d + 64)), math.sqrt(2 / (5 * d)), d**-0.5
    layer = LayerInit(AttentionInit(into, into, into, out), FeedForwardInit(wide, wide))
    shape = shaped(192, hidden_size=d, num_heads=16, intermediate_size=4 * d, seq_len=256)
    found = profile(shape, model([layer] * 192), inputs=Moments(0.0, 3 / d / 0.9, 0.2045))
    assert found.var[-1] == pytest.approx(421, abs=1)
    assert any("above 1" in note for note in found.approximate)  # S = 3.54


@pytest.mark.parametrize(("p", "fixed"), [(0.05, 0.745), (0.1, 0.627), (0.2, 0.473), (0.3, 0.366)])
def test_feed_forward_alone_has_the_fixed_points_of_section_2_5(p: float, fixed: float) -> None:
    silent = AttentionInit(0.0, 0.0, 0.0, 0.0, Residual(scale=0.0))
    shape = shaped(200, placement="post", dropout=p)
    layer = LayerInit(silent, xavier().feed_forward)
    assert profile(shape, model([layer] * 200), inputs=START).corr[-1] == pytest.approx(fixed, abs=6e-4)


@pytest.mark.parametrize(("p", "fixed", "rate"), [(0.0, 1.0, 1.0), (0.1, 0.859, 0.958), (0.3, 0.599, 0.911)])
def test_post_ln_xavier_has_the_fixed_point_and_the_rate_of_section_2_5(p: float, fixed: float, rate: float) -> None:
    shape = shaped(300, placement="post", dropout=p, attention_dropout=p, seq_len=8192, hidden_size=2**15)
    std, wide = 2**-7.5, math.sqrt(2 / (5 * 2**15))
    layer = LayerInit(AttentionInit(0.0, 0.0, std, std), FeedForwardInit(wide, 2 * wide * 128 / 256 * 2**0))
    shape = shape.model_copy(update={"intermediate_size": 4 * 2**15})
    found = profile(shape, model([layer] * 300), inputs=Moments(0.0, 1.0, 0.9), top_corr=0.9, finite_width=False)
    assert found.corr[-1] == pytest.approx(fixed, abs=2e-3)
    assert found.grad_var[100] / found.grad_var[102] == pytest.approx(rate, abs=2e-3)


@pytest.mark.parametrize("kind", ["encoder", "decoder", "encoder_decoder"])
@pytest.mark.parametrize("activation", ["relu", "gelu", "swiglu"])
@pytest.mark.parametrize("placement", ["pre", "post"])
def test_every_kind_of_model_has_a_profile_at_each_sub_block(kind: str, activation: str, placement: str) -> None:
    shape = shaped(3, kind=kind, activation=activation, placement=placement)
    beside = [xavier(cross=True)] * 3 if kind == "encoder_decoder" else []
    found = profile(shape, model([xavier()] * 3, decoder_layers=tuple(beside)))
    assert len(found.places) == (7 + 10 if beside else 7)
    for values in (found.var, found.corr, found.grad_var, found.grad_corr):
        assert values.shape == (len(found.places),)
        assert np.isfinite(values).all()
    if beside:
        assert found.places[-2:] == ("decoder.3.cross", "decoder.3.feed_forward")
        top_of_encoder = found.places.index("encoder.3.feed_forward")
        assert found.grad_var[top_of_encoder] > 0  # it comes through cross-attention alone


def test_branches_that_start_at_zero_leave_variance_and_gradient_alone() -> None:
    residual = Residual(scale=0.0, trained="scale")
    found = profile(shaped(4), model([xavier(residual=residual)] * 4, norms=False), inputs=START)
    assert found.var == pytest.approx(1) and found.grad_var == pytest.approx(1)  # noqa: PT018
    assert found.corr == pytest.approx(0.2)


def test_without_norms_the_branch_scales_with_the_residual() -> None:
    small = profile(shaped(2), model([xavier()] * 2, norms=False), inputs=Moments(0.0, 1e-4, 0.2))
    large = profile(shaped(2), model([xavier()] * 2, norms=False), inputs=Moments(0.0, 1e-2, 0.2))
    assert large.var / small.var == pytest.approx(100, rel=1e-3)
    assert large.grad_var == pytest.approx(small.grad_var, rel=1e-3)


def test_inner_norms_give_the_last_matrix_a_unit_input() -> None:
    found = profile(shaped(1), model([xavier()], inner_norms=True), inputs=START)
    assert found.branch_var[1] == pytest.approx(1 / 0.9)  # d * (1/d) * 1 / (1-p)
    assert found.branch_var[2] == pytest.approx(4 * D * 2 / (5 * D) / 0.9)


def test_profiled_skips_add_up_the_variances_of_the_branches() -> None:
    layers = [xavier(residual=Residual(trained="skip_vector", profiled=True))] * 2
    found = profile(shaped(2, placement="post"), model(layers), inputs=START)
    assert found.var == pytest.approx(1 + np.nancumsum(found.branch_var))
    assert any("profiled" in note for note in found.approximate)


def test_a_profile_names_what_is_approximate() -> None:
    hot = AttentionInit(0.5, 0.5, D**-0.5, D**-0.5)
    found = profile(shaped(1, positions="rope"), model([LayerInit(hot, xavier().feed_forward)]), inputs=START)
    assert [note.split(":")[0] for note in found.approximate] == [
        "scores of variance above 1", "scores of variance above 64 counted as 64", "rope",
    ]  # fmt: skip


def test_input_moments_are_those_of_tables_and_dropout() -> None:
    found = input_moments(shaped(1), model([xavier()]))
    assert found.var == pytest.approx(0.02 / 0.9)
    alone = input_moments(shaped(1, positions="rope"), model([xavier()]))
    assert alone.corr == pytest.approx(2 * float(found.corr))


def test_effective_correlation_tends_to_the_correlation_for_long_sequences() -> None:
    kwargs = {"score_var": 1.0, "attention_dropout": 0.1}
    near = [float(effective_correlation(0.2, seq_len=n, causal=True, **kwargs)) for n in (64, 1024, 2**20)]
    assert near[0] > near[1] > near[2] > 0.2
    assert near[2] == pytest.approx(0.2, abs=1e-4)


def test_a_thousand_layers_take_less_than_a_second() -> None:
    start = time.process_time()
    profile(shaped(1000, kind="decoder"), model([xavier()] * 1000))
    assert time.process_time() - start < 1.5  # 0.5 s alone on the machine


CONFIGS = {
    "bert": {"model_type": "bert", "hidden_size": 96, "num_hidden_layers": 3, "num_attention_heads": 6,
             "intermediate_size": 200, "hidden_act": "gelu", "hidden_dropout_prob": 0.2,
             "attention_probs_dropout_prob": 0.0, "vocab_size": 99, "max_position_embeddings": 50},
    "llama": {"model_type": "llama", "hidden_size": 96, "num_hidden_layers": 3, "num_attention_heads": 6,
              "intermediate_size": 200, "hidden_act": "silu", "vocab_size": 99, "max_position_embeddings": 50},
    "gpt2": {"model_type": "gpt2", "n_embd": 96, "n_layer": 3, "n_head": 6, "n_inner": None, "resid_pdrop": 0.1,
             "activation_function": "gelu_new", "attn_pdrop": 0.3, "vocab_size": 99, "n_positions": 50},
}  # fmt: skip


@pytest.mark.parametrize(
    ("family", "expected"),
    [
        ("bert", {"kind": "encoder", "placement": "post", "activation": "gelu", "dropout": 0.2, "num_heads": 6}),
        ("llama", {"kind": "decoder", "norm": "rmsnorm", "activation": "swiglu", "positions": "rope", "dropout": 0}),
        ("gpt2", {"kind": "decoder", "placement": "pre", "intermediate_size": 384, "attention_dropout": 0.3}),
    ],
)
def test_a_shape_is_read_from_a_transformers_config(family: str, expected: dict[str, Any], tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps(CONFIGS[family]))
    found = model_shape(tmp_path, {"seq_len": 40}).model_dump()
    assert {key: found[key] for key in expected} == expected
    assert (found["num_layers"], found["hidden_size"], found["seq_len"]) == (3, 96, 40)


def test_a_config_that_does_not_say_enough_is_refused_with_the_options_that_would(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text('{"model_type": "mystery", "hidden_size": 64, "num_hidden_layers": 2}')
    with pytest.raises(ValueError, match=r"does not say kind, .*: add --kind, --placement.*--heads"):
        model_shape(tmp_path, {})
    (tmp_path / "config.json").write_text("no json")
    with pytest.raises(ValueError, match=r"config.json: not JSON"):
        model_shape(tmp_path, {})
    with pytest.raises(ValueError, match=r"No such file.*expected a transformers config.json"):
        model_shape(tmp_path / "none", {})


def views(num_layers: int) -> tuple[Profile, Profile]:
    shape = shaped(num_layers, placement="post")
    return profile(shape, built(num_layers, "xavier", 0)), profile(shape, built(num_layers, "dslm", 1))


def test_the_table_thins_deep_models_out_and_keeps_both_ends() -> None:
    made = table(views(100)[0], title="deep", rows=12)
    assert made.row_count == 12
    cells = list(made.columns[0].cells)
    assert (cells[0], cells[-1]) == ("embeddings", "100")


def test_the_figure_is_an_svg_with_a_line_for_each_profile_in_four_panels() -> None:
    drawn = profile_figure(dict(zip(("xavier", "dslm"), views(100), strict=True)))
    tree = ET.fromstring(drawn.standalone())
    space = "{http://www.w3.org/2000/svg}"
    assert len(tree.findall(f".//{space}path")) == 8
    assert "log10 of variance of the gradient" in drawn.svg
    assert "nan" not in drawn.svg.lower()


METHODS = importlib.util.find_spec("retrace.papers.deepscalelm.methods")


@pytest.mark.skipif(METHODS is None, reason="needs methods.py")
def test_the_command_shows_a_table_and_writes_a_figure_without_torch(tmp_path: Path) -> None:
    program = (
        "import sys, pathlib\n"
        "from retrace.papers.deepscalelm.moments_command import moments\n"
        "moments(layers=24, hidden_size=64, method=['vanilla_xavier', 'dslm'], option=None, rows=5,\n"
        "        figure=pathlib.Path(sys.argv[1]))\n"
        "assert 'torch' not in sys.modules and 'transformers' not in sys.modules\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", program, str(tmp_path / "m.svg")], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("embeddings") == 2
    assert "encoder, post-layernorm, relu, 24 layers x 64, 1 heads" in " ".join(done.stdout.split())
    assert (tmp_path / "m.svg").read_text().startswith("<svg")


def test_gradients_refuse_a_correlation_that_is_none() -> None:
    with pytest.raises(ValueError, match="gradient corr=2"):
        profile(shaped(1), model([xavier()]), top_corr=2.0)
    assert GradMoments(1.0, 1.0).cov == 1

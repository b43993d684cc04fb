"""Methods of initialisation: each makes a `ModelInit` of a shape, one for each row of Section 4. No torch.

    METHODS["dslm"](shape, k=2.0)          or, with messages for users,          initialise(shape, "dslm", k=2.0)

d: hidden_size, f: intermediate_size, N: layers of a stack. Xavier means Glorot's variance 2 / (fan_in + fan_out) of the
whole matrix. Where a rule says nothing of embeddings and heads, they are 1/sqrt(d), so tied logits have variance one.
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Mapping
from dataclasses import replace
from functools import lru_cache
from typing import Any, Literal

from retrace.core.config import suggest
from retrace.papers.deepscalelm import dslm as dslm_rule
from retrace.papers.deepscalelm.assemble import Part, assemble, gained, joined_by, parts, with_attentions, xavier
from retrace.papers.deepscalelm.embedding_moments import zipf_collision
from retrace.papers.deepscalelm.gains import gain_of
from retrace.papers.deepscalelm.scheme import AttentionInit, FeedForwardInit, LayerInit, ModelInit, Residual
from retrace.papers.deepscalelm.shape import ModelShape

Method = Callable[..., ModelInit]


def initialise(shape: ModelShape, method: str, **options: Any) -> ModelInit:
    """METHODS[method](shape, **options); raises ValueError for an unknown method or option, and for what it refuses."""
    if method not in METHODS:
        raise ValueError(f"method='{method}': no such method{suggest(method, list(METHODS), what='methods')}")
    known = [name for name in inspect.signature(METHODS[method]).parameters if name != "shape"]
    for name in options:
        if name not in known:
            choices = suggest(name, known, what="options") if known else "; it has none"
            raise ValueError(f"method='{method}': no option '{name}'{choices}")
    return _made(shape, method, tuple(options.items()))


@lru_cache(maxsize=256)
def _made(shape: ModelShape, method: str, options: tuple[tuple[str, Any], ...]) -> ModelInit:
    """A deep model's takes milliseconds, and every seed of an arm asks for the same."""
    return METHODS[method](shape, **dict(options))


def vanilla_xavier(shape: ModelShape) -> ModelInit:
    """Xavier everywhere: what "vanilla" means at small width, where 0.02 is nearly the identity (Section 7.1)."""
    return assemble(shape, "vanilla_xavier", lambda part, _: xavier(shape, cross=part == "beside"))


def official_xavier(shape: ModelShape) -> ModelInit:
    """The "Xavier" of the official figures: the head size as fan-out of queries, keys and values (Section 4, tag A)."""
    into = math.sqrt(2 / (shape.hidden_size + shape.head_size))

    def layer(part: Part, _: int) -> LayerInit:
        plain = xavier(shape, cross=part == "beside")
        return with_attentions(plain, lambda a: replace(a, query=into, key=into, value=into))

    return assemble(shape, "official_xavier", layer)


def vanilla_bert(shape: ModelShape, *, std: float = 0.02) -> ModelInit:
    """Every matrix N(0, 0.02^2) (tag A)."""
    return _fixed(shape, "vanilla_bert", std, std)


def vanilla_gpt2(shape: ModelShape, *, std: float = 0.02) -> ModelInit:
    """N(0, 0.02^2), and 0.02 / sqrt(2N) for the last matrix of each branch: GPT-2, Megatron."""
    return _fixed(shape, "vanilla_gpt2", std, std / math.sqrt(2 * shape.num_layers))


def dslm(
    shape: ModelShape,
    *,
    k: float | dslm_rule.Reading = "layers2",
    alpha: float = 1.0,
    beta_sq: float | None = None,
    corr0: float | None = None,
    finite: bool | None = None,
) -> ModelInit:
    """DeepScaleLM: every branch of unit variance, joined by lambda^2 + beta^2 = 1, beta^2 = k / N^alpha (Section 3).

    `k`: a number, or one of two readings of the paper, "code" (1) and "layers2" (2). `beta_sq` replaces k / N^alpha.
    `corr0`: correlation of the summed embeddings before dropout; None: what Zipf's tokens give the tables of `shape`.
    It is 0.221 in the official code, whose encoder also adds a table of segments. `finite`: attention's gain counts
    what the softmax leaves of single values (dslm.plan); None: unless `corr0` is given to an encoder, as official.
    Decoders and other activations than ReLU follow Section 3.6 (tag S); a layer of three branches has 2/3 of the
    beta^2, so that the sum over the stack is that of a stack of two. Raises ValueError for k >= N, and for any beta^2
    outside of (0, 1).
    """
    if finite is None:
        finite = corr0 is None
    return _dslm(shape, "dslm", k=k, alpha=alpha, beta_sq=beta_sq, corr0=corr0, finite=finite)


def dslm_simplified(
    shape: ModelShape, *, k: float | dslm_rule.Reading = "layers2", alpha: float = 1.0, beta_sq: float | None = None
) -> ModelInit:
    """DSLM whose value and output matrices have the feed-forward's variance in every layer (Section 3.5, tag C)."""
    made = _dslm(shape, "dslm_simplified", k=k, alpha=alpha, beta_sq=beta_sq, corr0=None, finite=False)
    std = math.sqrt(math.sqrt((1 - shape.dropout) / 2) / shape.hidden_size)

    def simple(layer: LayerInit) -> LayerInit:
        return with_attentions(layer, lambda a: replace(a, value=std, output=std))

    return replace(made, layers=tuple(map(simple, made.layers)), decoder_layers=tuple(map(simple, made.decoder_layers)))


def deepnorm(shape: ModelShape) -> ModelInit:
    """LN(alpha x + f(x)), Xavier, with gain b for all but queries and keys (DeepNet; torchscale). Post-LN only."""
    _needs(shape, "deepnorm", "post")
    n = m = shape.num_layers
    alpha_b = {
        "encoder": ((2 * n) ** 0.25, (8 * n) ** -0.25),
        "decoder": ((2 * m) ** 0.25, (8 * m) ** -0.25),
        "beside": ((3 * m) ** 0.25, (12 * m) ** -0.25),
    }
    if shape.kind == "encoder_decoder":
        alpha_b["encoder"] = (0.81 * (n**4 * m) ** 0.0625, 0.87 * (n**4 * m) ** -0.0625)

    def layer(part: Part, _: int) -> LayerInit:
        alpha, gain = alpha_b[part]
        return joined_by(gained(xavier(shape, cross=part == "beside"), gain), Residual(skip=alpha))

    return assemble(shape, "deepnorm", layer)


def sub_ln(shape: ModelShape) -> ModelInit:
    """A norm more in front of each branch's last matrix; V, O and FFN with gain sqrt(ln 2N) (Magneto; torchscale).

    Pre-LN only. Cross-attention keeps gain 1, as in torchscale.
    """
    _needs(shape, "sub_ln", "pre")
    n = m = shape.num_layers
    gain = {"encoder": math.log(2 * n), "decoder": math.log(2 * m), "beside": math.log(3 * m)}
    if shape.kind == "encoder_decoder":
        gain["encoder"] = math.log(3 * m) * math.log(2 * n) / 3

    def layer(part: Part, _: int) -> LayerInit:
        plain = xavier(shape, cross=part == "beside")
        return replace(gained(plain, math.sqrt(gain[part])), cross=plain.cross)

    return replace(assemble(shape, "sub_ln", layer), inner_norms=True)


def ds_init(shape: ModelShape, *, reading: Literal["paper", "code"] = "paper") -> ModelInit:
    """Layer l's matrices are Xavier-uniform over sqrt(l) in the "paper", over l^(1/4) in its authors' "code"."""
    if reading not in ("paper", "code"):
        raise ValueError(f"reading={reading!r}: expected 'paper' (1/sqrt(l)) or 'code' (l^-1/4)")
    power = {"paper": -0.5, "code": -0.25}[reading]

    def layer(part: Part, number: int) -> LayerInit:
        return gained(xavier(shape, cross=part == "beside"), number**power, scores=number**power)

    return replace(assemble(shape, "ds_init", layer), distribution="uniform")


def admin(shape: ModelShape) -> ModelInit:
    """LN(w * x + f(x)): w, a trained vector, is measured when the model is built (Transformer-Clinic). Post-LN only."""
    _needs(shape, "admin", "post")
    residual = Residual(trained="skip_vector", profiled=True)
    return assemble(shape, "admin", lambda part, _: joined_by(xavier(shape, cross=part == "beside"), residual))


def t_fixup(shape: ModelShape) -> ModelInit:
    """No norm and no warm-up: Xavier, V, O and FFN with gain 0.67 N^(-1/4) in an encoder, (9N)^(-1/4) in a decoder.

    Embeddings are N(0, 1/d) (9N)^(-1/4), times the sqrt(d) of the model that the rule was made for; `logit_scale` takes
    that off again for the logits. Queries and keys have that model's default gain, 1/sqrt(2).
    """
    n = shape.num_layers
    gain = {"encoder": 0.67 * n**-0.25, "decoder": (9 * n) ** -0.25, "beside": (9 * n) ** -0.25}

    def layer(part: Part, _: int) -> LayerInit:
        return gained(xavier(shape, cross=part == "beside"), gain[part], scores=math.sqrt(0.5))

    std = (9 * n) ** -0.25
    made = assemble(shape, "t_fixup", layer)
    return replace(made, token_std=std, position_std=std, logit_scale=shape.hidden_size**-0.5, norms=False)


def skip_init(shape: ModelShape, *, initial: float = 0.0) -> ModelInit:
    """Each branch times a trained scalar that starts at 0 (or at `initial`: 1/sqrt(N) is the other usual start)."""
    return _scaled(shape, "skip_init", Residual(scale=initial, trained="scale"))


def rezero(shape: ModelShape) -> ModelInit:
    """SkipInit's scalar from 0, and no norm."""
    return replace(_scaled(shape, "rezero", Residual(scale=0.0, trained="scale")), norms=False)


def layerscale(shape: ModelShape, *, initial: float | None = None) -> ModelInit:
    """Each branch times a trained vector; None: 0.1 up to 18 layers, 1e-5 up to 24, 1e-6 beyond (CaiT)."""
    n = shape.num_layers
    by_depth = 0.1 if n <= 18 else 1e-5 if n <= 24 else 1e-6
    scale = by_depth if initial is None else initial
    return _scaled(shape, "layerscale", Residual(scale=scale, trained="scale_vector"))


def one_over_sqrt_n(shape: ModelShape) -> ModelInit:
    """Each branch times 1/sqrt(N), fixed (Noci et al. 2022, without their temperature)."""
    return _scaled(shape, "one_over_sqrt_n", Residual(scale=shape.num_layers**-0.5))


METHODS: Mapping[str, Method] = {
    rule.__name__: rule
    for rule in (
        vanilla_xavier, official_xavier, vanilla_bert, vanilla_gpt2, dslm, dslm_simplified, deepnorm, sub_ln, ds_init,
        admin, t_fixup, skip_init, rezero, layerscale, one_over_sqrt_n,
    )
}  # fmt: skip


def _fixed(shape: ModelShape, method: str, std: float, last: float) -> ModelInit:
    def layer(part: Part, _: int) -> LayerInit:
        attention = AttentionInit(std, std, std, last)
        return LayerInit(attention, FeedForwardInit(std, last), attention if part == "beside" else None)

    return replace(assemble(shape, method, layer), token_std=std, position_std=std, head_std=std)


def _dslm(
    shape: ModelShape,
    method: str,
    *,
    k: float | dslm_rule.Reading,
    alpha: float,
    beta_sq: float | None,
    corr0: float | None,
    finite: bool,
) -> ModelInit:
    gain, size = gain_of(shape.activation), shape.hidden_size
    own_corr = zipf_collision(shape.vocab_size) / shape.num_tables

    def plan(part: Part, memory_corr: float | None) -> dslm_rule.Plan:
        share = 2 / 3 if part == "beside" and beta_sq is None else 1.0
        return dslm_rule.plan(
            shape.num_layers,
            gain=gain,
            beta_sq=dslm_rule.beta_squared(shape.num_layers, k=k, alpha=alpha, beta_sq=beta_sq) * share,
            corr0=own_corr if corr0 is None else corr0,
            dropout=shape.dropout,
            attention_dropout=shape.attention_dropout,
            seq_len=shape.seq_len,
            causal=part != "encoder",
            finite=finite,
            memory_corr=memory_corr,
        )

    first, second = parts(shape)
    plans = {first: plan(first, None)}
    if second is not None:
        plans[second] = plan(second, plans[first].final_corr)

    def layer(part: Part, number: int) -> LayerInit:
        made = plans[part]
        joined = dslm_rule.residual(made.beta_sq)

        def attention(passed: float) -> AttentionInit:
            return dslm_rule.attention(size, passed=passed, dropout=shape.dropout, joined=joined)

        return LayerInit(
            attention(float(made.own[number - 1])),
            dslm_rule.feed_forward(size, shape.intermediate_size, gain=gain, dropout=shape.dropout, joined=joined),
            None if made.memory is None else attention(made.memory),
        )

    std = dslm_rule.embedding_std(shape.dropout, num_tables=shape.num_tables)
    scale = dslm_rule.logit_scale(size, token_std=std)
    return replace(assemble(shape, method, layer), token_std=std, position_std=std, logit_scale=scale)


def _scaled(shape: ModelShape, method: str, residual: Residual) -> ModelInit:
    return assemble(shape, method, lambda part, _: xavier(shape, cross=part == "beside", residual=residual))


def _needs(shape: ModelShape, method: str, placement: str) -> None:
    if shape.placement != placement:
        raise ValueError(
            f"method='{method}' is made for placement={placement}, not {shape.placement}: change one of them"
        )

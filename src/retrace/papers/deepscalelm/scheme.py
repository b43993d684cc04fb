"""What a method decides before training: standard deviations of the weights, and how a branch joins the residual.

A method (methods.py) makes a `ModelInit` of a shape; the model (model.py) is built from it, and the theory
(recursion.py) predicts the moments of it, so both speak of the same network. No torch.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True)
class Residual:
    """u = skip * x + dropout(scale * f(x)), before the norm that "post" placement puts behind it.

    `trained` names what of the two is a parameter: a scalar (SkipInit, ReZero) or a vector over features (LayerScale,
    Admin). A profiled skip (Admin) is measured in one forward pass when the model is built; `skip` is then 1.
    """

    skip: float = 1.0
    scale: float = 1.0
    trained: Literal["none", "scale", "scale_vector", "skip_vector"] = "none"
    profiled: bool = False


@dataclass(frozen=True)
class AttentionInit:
    """Standard deviations of a block's four matrices, and its residual."""

    query: float
    key: float
    value: float
    output: float
    residual: Residual = Residual()


@dataclass(frozen=True)
class FeedForwardInit:
    """Standard deviations of the matrices into (a gate too) and out of the hidden layer, and its residual."""

    inner: float
    outer: float
    residual: Residual = Residual()


@dataclass(frozen=True)
class LayerInit:
    """One layer. `cross` is the attention of a decoder to an encoder, between the other two."""

    attention: AttentionInit
    feed_forward: FeedForwardInit
    cross: AttentionInit | None = None


@dataclass(frozen=True)
class ModelInit:
    """A whole model. Biases start at 0, gains of norms at 1; matrices are drawn from N(0, std^2) or uniformly.

    `layers` are those of the encoder, or of a decoder that stands alone; `decoder_layers` those of a decoder beside an
    encoder. `logit_scale` multiplies the normed hidden states before the (tied) embedding matrix.
    """

    method: str
    token_std: float
    position_std: float
    layers: tuple[LayerInit, ...]
    decoder_layers: tuple[LayerInit, ...] = ()
    head_std: float = 0.02  # of the dense layer in front of masked-token prediction
    logit_scale: float = 1.0
    norms: bool = True  # False: no norm at all (T-Fixup, ReZero)
    inner_norms: bool = False  # one more in front of each branch's last matrix (Sub-LN)
    distribution: Literal["normal", "uniform"] = "normal"  # of the same standard deviations

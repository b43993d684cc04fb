"""What is put through a fresh model to measure its moments: Gaussian input, tokens, patches of images, frames of sound.

B sequences, T positions, D hidden_size, P numbers in a patch or frame.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from retrace.core.data import generator
from retrace.papers.deepscalelm.config import (
    NUM_SPECIAL,
    CorrelatedInput,
    ImageInput,
    Input,
    SpectrogramInput,
    ZipfInput,
)
from retrace.papers.deepscalelm.layers import Context
from retrace.papers.deepscalelm.model import Transformer
from retrace.papers.deepscalelm.sentences import zipf
from retrace.papers.deepscalelm.shape import ModelShape

BLOBS, HARMONICS = 6, 12


@dataclass(frozen=True)
class Features:
    """Patches or frames (B, T, P) of mean square 1, and their uncentred correlation (Section 1.4, tag S)."""

    values_BTP: Tensor
    corr: float


def features(given: ImageInput | SpectrogramInput, *, num_sequences: int, length: int, seed: int) -> Features:
    """Procedural images or spectrograms of one seed, cut into positions of a model.

    They are standardised over all of them, as images are by a dataset's mean and deviation.
    """
    rng = generator(seed, given.kind)
    if isinstance(given, ImageInput):
        side = math.isqrt(length)
        pixels = images(num_sequences, size=side * given.patch_size, rng=rng)
        cut = pixels.unfold(1, given.patch_size, given.patch_size).unfold(2, given.patch_size, given.patch_size)
        raw = cut.reshape(num_sequences, length, -1)
    else:
        frames = spectrograms(num_sequences, bands=given.num_bands, frames=length * given.frames_per_step, rng=rng)
        raw = frames.reshape(num_sequences, length, -1)
    values = (raw - raw.mean()) / raw.std(correction=0)
    return Features(values, uncentred_correlation(values))


def uncentred_correlation(values_BTP: Tensor) -> float:
    """Mean over pairs of different positions of x_i . x_j, over the mean of |x|^2: r0 of Section 1.4."""
    length = values_BTP.shape[1]
    square = values_BTP.square().sum()
    pairs = values_BTP.sum(1).square().sum() - square
    return float(pairs / (length - 1) / square)


def images(count: int, *, size: int, rng: torch.Generator) -> Tensor:
    """Grey images (count, size, size): soft blobs of random place, width and brightness on a slope, with noise."""
    at = torch.linspace(0, 1, size)
    y, x = at[:, None], at[None, :]
    place = torch.rand(count, BLOBS, 2, 1, 1, generator=rng)
    width = 0.05 + 0.2 * torch.rand(count, BLOBS, 1, 1, generator=rng)
    bright = torch.randn(count, BLOBS, 1, 1, generator=rng)
    blobs = bright * torch.exp(-((y - place[:, :, 0]) ** 2 + (x - place[:, :, 1]) ** 2) / (2 * width**2))
    slope = torch.randn(count, 2, 1, 1, generator=rng)
    noise = 0.1 * torch.randn(count, size, size, generator=rng)
    return blobs.sum(1) + slope[:, 0] * (y - 0.5) + slope[:, 1] * (x - 0.5) + noise


def spectrograms(count: int, *, bands: int, frames: int, rng: torch.Generator) -> Tensor:
    """Log spectrograms (count, frames, bands): harmonics of a gliding pitch that swells and fades, over noise."""
    time, band = torch.linspace(0, 1, frames)[:, None, None], torch.linspace(0, 1, bands)[None, :, None]
    start, glide, phase, speed = torch.rand(4, count, 1, 1, 1, generator=rng)
    pitch = 0.06 + 0.06 * start + 0.04 * (glide - 0.5) * time
    number = torch.arange(1, HARMONICS + 1)
    loud = (0.5 + 0.5 * torch.sin(2 * math.pi * (phase + (1 + 4 * speed) * time))) / number
    tones = (loud * torch.exp(-(((band - pitch * number) / 0.015) ** 2))).sum(-1)
    floor = 0.02 * torch.exp(-3 * band[..., 0]) * (1 + 0.3 * torch.rand(count, frames, bands, generator=rng))
    return (tones + floor).log()


def zipf_tokens(given: ZipfInput, shape: ModelShape, *, num_sequences: int, seed: int) -> Tensor:
    """Token ids (B, T) whose ranks are Zipf-distributed over the vocabulary without its special tokens."""
    rng = generator(seed, "zipf")
    size = (num_sequences, shape.seq_len)
    return NUM_SPECIAL + zipf(shape.vocab_size - NUM_SPECIAL, size, rng, exponent=given.exponent)


def correlated(corr: float, *, shape: ModelShape, num_sequences: int, seed: int) -> Tensor:
    """Gaussian (B, T, D) of variance 1 and correlation `corr` between positions of a sequence."""
    rng = generator(seed, "correlated")
    shared = torch.randn(num_sequences, 1, shape.hidden_size, generator=rng)
    own = torch.randn(num_sequences, shape.seq_len, shape.hidden_size, generator=rng)
    return math.sqrt(corr) * shared + math.sqrt(1 - corr) * own


def forward(model: Transformer, given: Input, *, num_sequences: int, seed: int, found: Features | None) -> Tensor:
    """Final hidden states (B, T, D) of the input. `found`: patches or frames, for those kinds.

    Gaussian input stands in for the embeddings after their dropout. A front end is a linear layer that gives each
    position the variance of a row of the token table.
    """
    shape, device = model.shape, model.tokens.weight.device
    if isinstance(given, CorrelatedInput):
        x_BTD = correlated(given.corr, shape=shape, num_sequences=num_sequences, seed=seed)
        hidden: Tensor = model.stack(
            x_BTD.to(device).requires_grad_(), Context()
        )  # so that its gradient is measured too
        return hidden
    if isinstance(given, ZipfInput):
        ids_BT = zipf_tokens(given, shape, num_sequences=num_sequences, seed=seed).to(device)
        beside = ids_BT.roll(1, 0) if shape.kind == "encoder_decoder" else None
        output: Tensor = model(ids_BT, decoder_input_ids_BT=beside)
        return output
    assert found is not None
    width = found.values_BTP.shape[-1]
    weight_PD = torch.randn(width, shape.hidden_size, generator=generator(seed, "front end")) / math.sqrt(width)
    projected: Tensor = model(inputs_embeds_BTD=(model.init.token_std * found.values_BTP @ weight_PD).to(device))
    return projected

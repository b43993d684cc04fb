"""Images of scenes: drawn at 96 pixels a side and averaged down to the size that the encoder gets (Section 5).

Shapes: M images, N native pixels a side, R pixels a side, P = 3 planes.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor
from torch.nn import functional as F

from retrace.papers.mm1.world import COLORS, NATIVE, SHAPES, Scene

Array = npt.NDArray[np.float32]

FONT_PIXEL = 4  # native pixels a side of one of the 3 x 5 that make a digit
LEFT, TOP, APART = 3, 4, 64  # of the first digit; patches of grids of 3, 6, 9 and 12 cut all four alike
RADIUS, JITTER = 26.0, 5.0  # of the shape; jitter of its center in native pixels
NOISE = 0.25  # half the width of the brightness noise of a native pixel
DRAWN_AT_ONCE = 32  # so that the planes stay in the processor's cache
GLYPHS = (
    "111101101101111", "010110010010111", "111001111100111", "111001111001111", "101101111001001",
    "111100111001111", "111100111101111", "111001010010010", "111101111101111", "111101111001111",
)  # fmt: skip

# whether a point (u to the right, v down, in units of the radius) belongs to a shape
INSIDE: dict[str, Callable[[Array, Array], npt.NDArray[np.bool_]]] = {
    "circle": lambda u, v: u * u + v * v < 0.9,
    "square": lambda u, v: np.maximum(abs(u), abs(v)) < 0.8,
    "triangle": lambda u, v: (v < 0.8) & (abs(u) * 1.8 < v + 1),
    "diamond": lambda u, v: abs(u) + abs(v) < 1,
    "cross": lambda u, v: (np.minimum(abs(u), abs(v)) < 0.27) & (np.maximum(abs(u), abs(v)) < 0.95),
    "ring": lambda u, v: abs(u * u + v * v - 0.62) < 0.33,
    "bar": lambda u, v: (abs(v) < 0.4) & (abs(u) < 1),
    "pillar": lambda u, v: (abs(u) < 0.4) & (abs(v) < 1),
}
assert INSIDE.keys() == set(SHAPES)


def _glyph(bits: str) -> Array:
    small = np.array(list(bits), np.float32).reshape(5, 3)
    return np.kron(small, np.ones((FONT_PIXEL, FONT_PIXEL), np.float32))


DIGIT_PIXELS = [_glyph(bits) for bits in GLYPHS]


def draw(scenes: Sequence[Scene], *, image_size: int) -> Tensor:
    """Images (M, 3, R, R) in 0..1. The same scene is the same image at every size, averaged over other areas.

    Raises ValueError where `image_size` is above the 96 pixels that are drawn.
    """
    if image_size > NATIVE:
        raise ValueError(f"image_size={image_size}: procedural images have {NATIVE} pixels a side: choose at most that")
    parts = [_draw(scenes[first : first + DRAWN_AT_ONCE], image_size) for first in range(0, len(scenes), DRAWN_AT_ONCE)]
    return torch.cat(parts) if parts else torch.zeros(0, 3, image_size, image_size)


def _draw(scenes: Sequence[Scene], image_size: int) -> Tensor:
    """The image is linear in three planes (shape, digits, noise), so they are averaged and colors come afterwards."""
    planes_MPNN = np.zeros((len(scenes), 3, NATIVE, NATIVE), np.float32)
    random_MK = np.empty((len(scenes), 15), np.float32)
    for index, scene in enumerate(scenes):
        rng = np.random.default_rng(scene.seed)
        random_MK[index] = rng.random(15, np.float32)
        noise = np.frombuffer(rng.bytes(NATIVE * NATIVE), np.uint8).reshape(NATIVE, NATIVE)
        np.multiply(noise, 2 * NOISE / 255, out=planes_MPNN[index, 2], casting="same_kind")
        _put_digits(planes_MPNN[index, 1], scene.digits, random_MK[index, 7:])
    _put_shapes(planes_MPNN[:, 0], [scene.shape for scene in scenes], random_MK)
    planes_MPNN[:, 0] *= 1 - planes_MPNN[:, 1]
    shape, digit, noise = F.interpolate(
        torch.from_numpy(planes_MPNN), size=(image_size, image_size), mode="area"
    ).split(1, dim=1)  # each (M, 1, R, R)
    jitter = torch.from_numpy(random_MK)
    back = 0.3 + 0.2 * jitter[:, 3, None, None, None]
    color = torch.tensor([COLORS[scene.color] for scene in scenes]) + 0.1 * (jitter[:, 4:7] - 0.5)
    images = back * (1 - shape - digit) + color[:, :, None, None] * shape + digit + noise - NOISE
    return images.clamp(0, 1)


def _put_shapes(planes_MNN: Array, shapes: Sequence[str], random_MK: Array) -> None:
    """Set the pixels of each image's shape to 1."""
    axis = np.arange(NATIVE, dtype=np.float32) + 0.5
    center = NATIVE / 2 + JITTER * (2 * random_MK[:, :2] - 1)
    radius = RADIUS * (0.85 + 0.3 * random_MK[:, 2])
    for name in set(shapes):
        chosen = [index for index, shape in enumerate(shapes) if shape == name]
        u = (axis[None, None, :] - center[chosen, 0, None, None]) / radius[chosen, None, None]
        v = (axis[None, :, None] - center[chosen, 1, None, None]) / radius[chosen, None, None]
        planes_MNN[chosen] = INSIDE[name](u, v)


def _put_digits(plane_NN: Array, digits: Sequence[str], random_K: Array) -> None:
    """Set the pixels of four digits to 1, each up to three pixels off its place."""
    height, width = DIGIT_PIXELS[0].shape
    for corner, digit in enumerate(digits):
        x = LEFT + int(4 * random_K[2 * corner]) + APART * (corner % 2)
        y = TOP + int(4 * random_K[2 * corner + 1]) + APART * (corner // 2)
        plane_NN[y : y + height, x : x + width] = DIGIT_PIXELS[int(digit)]

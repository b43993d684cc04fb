"""Images of scenes: drawn at 96 pixels a side and averaged down to the size that the encoder gets (Section 5).

Shapes: M images, N native pixels a side, R pixels a side, P = 2 planes, C = 3 colors.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import lru_cache

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
STEP = 2 * NOISE / 255  # between two brightnesses of it
MARGIN = int(NATIVE / 2 - JITTER - 1.15 * RADIUS)  # native pixels that no shape reaches
DRAWN_AT_ONCE = 32  # so that few planes are alive at a time
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


DIGIT_PIXELS = np.stack([_glyph(bits) for bits in GLYPHS])
AROUND_DIGITS = 1 - DIGIT_PIXELS


def draw(scenes: Sequence[Scene], *, image_size: int) -> Tensor:
    """Images (M, 3, R, R) in 0..1. The same scene is the same image at every size, averaged over other areas.

    Raises ValueError where `image_size` is above the 96 pixels that are drawn.
    """
    if image_size > NATIVE:
        raise ValueError(f"image_size={image_size}: procedural images have {NATIVE} pixels a side: choose at most that")
    parts = [_draw(scenes[first : first + DRAWN_AT_ONCE], image_size) for first in range(0, len(scenes), DRAWN_AT_ONCE)]
    return torch.cat(parts) if parts else torch.zeros(0, 3, image_size, image_size)


def _draw(scenes: Sequence[Scene], image_size: int) -> Tensor:
    """The image is linear in two planes, the shape and what all colors share: they are averaged, and then colored."""
    planes_PMNN = np.zeros((2, len(scenes), NATIVE, NATIVE), np.float32)
    shape_MNN, shared_MNN = planes_PMNN
    random_MK = np.empty((len(scenes), 15), np.float32)
    for index, scene in enumerate(scenes):
        rng = np.random.default_rng(scene.seed)
        random_MK[index] = rng.random(15, np.float32)
        noise = rng.bit_generator.random_raw(NATIVE * NATIVE // 8).view(np.uint8)
        shared_MNN[index] = noise.reshape(NATIVE, NATIVE)  # in units of STEP
    back_M = 0.3 + 0.2 * random_MK[:, 3]
    bright_M = (1 - back_M) / STEP
    offsets = (4 * random_MK[:, 7:]).astype(int).tolist()  # up to three pixels
    _put_shapes(shape_MNN, [scene.shape for scene in scenes], random_MK)
    for index, scene in enumerate(scenes):
        _put_digits(shape_MNN[index], shared_MNN[index], scene.digits, offsets[index], bright_M[index])
    means_PMNR = _means(image_size).expand(2, len(scenes), -1, -1)  # so that no image rounds another
    shape_MRR, shared_MRR = means_PMNR.mT @ (torch.from_numpy(planes_PMNN) @ means_PMNR)
    jitter_MC = torch.from_numpy(random_MK[:, 4:7])
    color_MC = torch.tensor([COLORS[scene.color] for scene in scenes]) + 0.1 * (jitter_MC - 0.5)
    back_M1 = torch.from_numpy(back_M)[:, None]
    plain_MRR = shared_MRR * STEP + (back_M1[..., None] - NOISE)
    images = (color_MC - back_M1)[..., None, None] * shape_MRR[:, None] + plain_MRR[:, None]
    return images.clamp(0, 1)


@lru_cache(maxsize=8)
def _means(image_size: int) -> Tensor:
    """Native pixels to means over windows [floor(i N / R), ceil((i + 1) N / R)), (N, R)."""
    return F.adaptive_avg_pool1d(torch.eye(NATIVE), image_size)


def _put_shapes(plane_MNN: Array, shapes: Sequence[str], random_MK: Array) -> None:
    """Set the pixels of each image's shape to 1."""
    axis = np.arange(MARGIN, NATIVE - MARGIN, dtype=np.float32) + 0.5
    center = NATIVE / 2 + JITTER * (2 * random_MK[:, :2] - 1)
    radius = RADIUS * (0.85 + 0.3 * random_MK[:, 2])
    for name in set(shapes):
        chosen = [index for index, shape in enumerate(shapes) if shape == name]
        u = (axis[None, None, :] - center[chosen, 0, None, None]) / radius[chosen, None, None]
        v = (axis[None, :, None] - center[chosen, 1, None, None]) / radius[chosen, None, None]
        plane_MNN[chosen, MARGIN : NATIVE - MARGIN, MARGIN : NATIVE - MARGIN] = INSIDE[name](u, v)


def _put_digits(
    shape_NN: Array, shared_NN: Array, digits: Sequence[str], offsets: Sequence[int], bright: float
) -> None:
    """Four digits, each some pixels off its place: brighter by so much, and before the shape."""
    _, height, width = DIGIT_PIXELS.shape
    pixels_DHW = bright * DIGIT_PIXELS
    for corner, digit in enumerate(map(int, digits)):
        x = LEFT + offsets[2 * corner] + APART * (corner % 2)
        y = TOP + offsets[2 * corner + 1] + APART * (corner // 2)
        shared_NN[y : y + height, x : x + width] += pixels_DHW[digit]
        shape_NN[y : y + height, x : x + width] *= AROUND_DIGITS[digit]

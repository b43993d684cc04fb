"""Image files as tensors: one that can't be read is counted, and too many are refused."""

from __future__ import annotations

import io
import logging
import os
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image, ImageOps
from torch import Tensor

from retrace.papers.mm1.packing import Picture

LEAST_SEEN = 100  # images that `max_bad_share` is a share of at the least: one broken one of three is not a third
UNREADABLE = (OSError, SyntaxError, ValueError, EOFError, TypeError, Image.DecompressionBombError)
log = logging.getLogger(__name__)


class Photos:
    """Reads pictures whose `what` is (path, bytes or a row's {"bytes", "path"}; folder of a relative path)."""

    def __init__(self, *, max_bad_share: float) -> None:
        self.max_bad_share = max_bad_share
        self.counts = {"images": 0, "unreadable": 0}
        self._pool = ThreadPoolExecutor(max_workers=os.cpu_count())

    def load(self, pictures: Sequence[Picture], *, image_size: int) -> list[Tensor | None]:
        """Images (3, R, R), resized to a square; None for one that can't be read.

        Raises ValueError where more than `max_bad_share` of all images so far, and of a hundred, can't be.
        """
        loaded: list[Tensor | None] = []
        for picture, result in zip(pictures, self._pool.map(lambda p: _try(p, image_size), pictures), strict=True):
            self.counts["images"] += 1
            if isinstance(result, Exception):
                self._refuse(picture, result)
            loaded.append(None if isinstance(result, Exception) else result)
        return loaded

    def _refuse(self, picture: Picture, error: Exception) -> None:
        self.counts["unreadable"] += 1
        bad, seen = self.counts["unreadable"], self.counts["images"]
        said = f"{_name(picture)}: {' '.join(str(error).split()) or type(error).__name__}"
        if bad > self.max_bad_share * max(seen, LEAST_SEEN):
            raise ValueError(
                f"{bad} of {seen} images can't be read, more than max_bad_share={self.max_bad_share:g}; "
                f"the last is {said}: mend the data, or allow for more"
            ) from error
        if bad == 1:
            log.warning("%s: can't be read, so its document is left out; others are only counted", said)


def load_image(file: Any, *, image_size: int) -> Tensor:
    """An image file (path, bytes, or a row's {"bytes", "path"}) as (3, R, R) in 0..1.

    Upright as its EXIF data says, in RGB, resized to a square without regard to its sides (Section 2.1; the policy is
    not published), antialiased. Raises one of `UNREADABLE`.
    """
    if isinstance(file, dict):
        file = file["bytes"] if file.get("bytes") is not None else file["path"]
    if isinstance(file, str) and file.startswith(("http:", "https:")):
        raise ValueError("a link and no image: fetch the images first")
    with Image.open(io.BytesIO(file) if isinstance(file, bytes) else file) as opened:
        upright = ImageOps.exif_transpose(opened).convert("RGB")
    resized = upright.resize((image_size, image_size), Image.Resampling.BICUBIC)
    return torch.from_numpy(np.asarray(resized).copy()).permute(2, 0, 1).float() / 255


def _try(picture: Picture, image_size: int) -> Tensor | Exception:
    file, folder = picture.what
    try:
        return load_image(
            Path(folder) / file if isinstance(file, str) and "://" not in file else file, image_size=image_size
        )
    except UNREADABLE as error:
        return error


def _name(picture: Picture) -> str:
    file, _ = picture.what
    return str(file.get("path")) if isinstance(file, dict) else str(file)[:200]

"""Image files as tensors: one that can't be read is counted, and too many are refused."""

from __future__ import annotations

import io
import logging
import math
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

MOST_KNOWN = 200_000  # files that are known again; of more the share is known by then
log = logging.getLogger(__name__)


class Photos:
    """Reads pictures whose `what` is (path, bytes or a row's {"bytes", "path"}; folder of a relative path)."""

    def __init__(self, *, max_bad_share: float) -> None:
        self.max_bad_share = max_bad_share
        self.counts = {"images": 0, "unreadable": 0}
        self._known: set[Any] = set()  # so that a file counts once towards the share, and not in every epoch
        self._bad = self._seen = 0  # files
        self._pool = ThreadPoolExecutor(max_workers=os.cpu_count())

    def load(self, pictures: Sequence[Picture], *, image_size: int) -> list[Tensor | None]:
        """Images (3, R, R), resized to a square; None for one that can't be read.

        Raises ValueError where more than `max_bad_share` of the files so far can't be, beyond what chance explains.
        """
        loaded: list[Tensor | None] = []
        for picture, result in zip(pictures, self._pool.map(lambda p: _try(p, image_size), pictures), strict=True):
            self.counts["images"] += 1
            new = self._is_new(picture)
            self._seen += new
            if isinstance(result, Exception):
                self._bad += new
                self._refuse(picture, result)
            loaded.append(None if isinstance(result, Exception) else result)
        return loaded

    def _refuse(self, picture: Picture, error: Exception) -> None:
        self.counts["unreadable"] += 1
        bad, seen = self._bad, self._seen
        said = f"{_name(picture)}: {' '.join(str(error).split()) or type(error).__name__}"
        if bad > most_bad(seen, share=self.max_bad_share):
            raise ValueError(
                f"{bad} of {seen} images can't be read, more than max_bad_share={self.max_bad_share:g}; "
                f"the last is {said}: mend the data, or allow for more"
            ) from error
        if self.counts["unreadable"] == 1:
            log.warning("%s: can't be read, so its document is left out; others are only counted", said)

    def _is_new(self, picture: Picture) -> bool:
        """Whether a file was not seen before; without a name or bytes it can't be known again."""
        file, folder = picture.what
        if isinstance(file, dict):
            file = file.get("bytes") or file.get("path")
        if file is None or len(self._known) >= MOST_KNOWN:
            return True
        before = len(self._known)
        self._known.add(hash((str(folder), file if isinstance(file, str | bytes) else repr(file))))
        return len(self._known) > before


def most_bad(seen: int, *, share: float) -> float:
    """Bad ones among `seen` files that a true share of `share` explains: three standard deviations, and one file."""
    return share * seen + 3 * math.sqrt(share * seen) + (share > 0)


def load_image(file: Any, *, image_size: int) -> Tensor:
    """An image file (path, bytes, or a row's {"bytes", "path"}) as (3, R, R) in 0..1.

    Upright as its EXIF data says, in RGB, resized to a square without regard to its sides (Section 2.1; the policy is
    not published), antialiased. Raises ValueError where there is no file or no known white, else whatever its decoder
    does.
    """
    if isinstance(file, dict):
        file = file["bytes"] if file.get("bytes") is not None else file.get("path")
    if file is None:
        raise ValueError("no image")
    if isinstance(file, str) and file.startswith(("http:", "https:")):
        raise ValueError("a link and no image: fetch the images first")
    with Image.open(io.BytesIO(file) if isinstance(file, bytes) else file) as opened:
        upright = ImageOps.exif_transpose(opened)
    white = _white(upright)
    plain = upright.convert("RGB" if white == 255 else "F")  # to RGB, 16 bits would be clipped at 255
    resized = plain.resize((image_size, image_size), Image.Resampling.BICUBIC)
    pixels = torch.from_numpy(np.asarray(resized).copy()).view(image_size, image_size, -1).permute(2, 0, 1)
    return (pixels.float() / white).clamp(0, 1).expand(3, -1, -1)


def _white(image: Image.Image) -> int:
    """The value of white: 255, or 65535 in gray of 16 bits. Raises ValueError where none is known."""
    if not image.mode.startswith(("I", "F")):
        return 255
    values = np.asarray(image.convert("F"))
    if image.mode == "F" or values.min() < 0 or values.max() > 65535:
        raise ValueError("its pixels are no numbers of 8 or 16 bits: save it as RGB")
    return 65535


def _try(picture: Picture, image_size: int) -> Tensor | Exception:
    file, folder = picture.what
    if isinstance(file, dict) and file.get("bytes") is None:
        file = file.get("path")
    try:
        return load_image(
            Path(folder) / file if isinstance(file, str) and "://" not in file else file, image_size=image_size
        )
    except Exception as error:  # decoders of damaged files raise of all kinds
        return error


def _name(picture: Picture) -> str:
    file, _ = picture.what
    return str(file.get("path")) if isinstance(file, dict) else str(file)[:200]

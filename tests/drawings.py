"""Reading drawings back: the points of their lines."""

from __future__ import annotations

import re
import xml.etree.ElementTree as ElementTree
from itertools import accumulate

SVG = "{http://www.w3.org/2000/svg}"


def steps(path: ElementTree.Element) -> list[tuple[float, float]]:
    """The points of a path, whose numbers are steps from each to the next."""
    numbers = [float(number) for number in re.findall(r"-?(?:\d*\.\d+|\d+)", str(path.get("d")))]
    return list(zip(accumulate(numbers[0::2]), accumulate(numbers[1::2]), strict=False))


def lines(drawing: str, kind: str) -> list[list[tuple[float, float]]]:
    """Those of each line of a kind, which is a class of the style sheet."""
    found = [line for line in ElementTree.fromstring(drawing).iter(f"{SVG}path") if kind in str(line.get("class"))]
    return [steps(line) for line in found]

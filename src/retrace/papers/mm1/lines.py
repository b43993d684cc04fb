"""Rows of a JSON lines file, whole or torn."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

Row = Mapping[str, Any]


class EndsEarly(Exception):
    """A shard is damaged behind the rows that it has given."""


def json_lines(file: Path, start: int) -> Iterator[Row]:
    """Rows from number `start` on, blank lines not counted, each with its file's folder as `__folder__`.

    Raises EndsEarly where the last line is torn, ValueError for any other that is no JSON object in UTF-8.
    """
    with open(file, "rb") as lines:
        found = 0
        for number, line in enumerate(lines, start=1):
            found += bool(line.strip())
            if found <= start or not line.strip():
                continue
            whole = line.endswith(b"\n")
            try:
                text = line.decode("utf-8-sig" if number == 1 else "utf-8")
                row = json.loads(text)
            except UnicodeDecodeError as error:
                if not whole and error.end == len(error.object):  # within a character
                    raise EndsEarly(f"line {number} is torn") from None
                raise ValueError(
                    f"{file}: line {number} is no text in UTF-8 ({error.reason}): save it as that"
                ) from None
            except json.JSONDecodeError as error:
                if not whole:
                    raise EndsEarly(f"line {number} is torn") from None
                raise ValueError(f"{file}: line {number} is not JSON: {error}") from None
            if not isinstance(row, dict):
                raise ValueError(f"{file}: line {number} is no object with fields: {text[:40].strip()}")
            yield {**row, "__folder__": str(file.parent)}

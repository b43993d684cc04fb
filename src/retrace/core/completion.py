"""What the shell offers for a half-typed word: papers, ablations, arms, scales and hardware.

A file that can't be read offers nothing here: the command itself says what is wrong with it.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator

import typer

from retrace.core.config import CONFIGS, SCALES, read_yaml
from retrace.core.discovery import configs_of, papers


def complete_papers(incomplete: str) -> list[str]:
    """Slugs."""
    return _starting(_papers(), incomplete)


def complete_scales(incomplete: str) -> list[str]:
    """Of any paper."""
    return _starting(SCALES, incomplete)


def complete_words(ctx: typer.Context, incomplete: str) -> list[str]:
    """Targets, and the overrides that choose a file: scale=..., hardware=... and tracking=...

    Bash takes words apart at `=`: there the words before a value are `scale` and `=`.
    """
    before = [""] * 2 + list(ctx.params.get("words") or ())
    name = before[-1] if before[-1] != "=" else before[-2]
    if _values(name):  # of `scale=` with nothing behind it, bash hands over the key alone
        return _starting(_values(name), incomplete)
    key, equals, _ = incomplete.partition("=")
    if equals:
        return _starting([f"{key}={value}" for value in _values(key)], incomplete)
    if "/" in incomplete:
        return _starting(_targets(incomplete), incomplete)
    offered = [name for slug in _papers() for name in (slug, f"{slug}/")]  # two of them, or bash would add a space
    return _starting(
        [*offered, *(f"{key}={value}" for key in ("scale", "hardware", "tracking") for value in _values(key))],
        incomplete,
    )


def _papers() -> list[str]:
    try:
        return papers()
    except ValueError:  # two packages bring one paper
        return []


def _values(key: str) -> list[str]:
    if key in ("hardware", "tracking"):
        return sorted(path.stem for path in (CONFIGS / key).glob("*.yaml"))
    return list(SCALES) if key == "scale" else []


def _targets(incomplete: str) -> Iterator[str]:
    """`paper/ablation`, and `paper/ablation/arm` once the ablation is there."""
    slug, name, *arm = incomplete.split("/")
    if slug not in _papers():
        return
    folder = configs_of(slug) / "ablations"
    if not arm:
        yield from (f"{slug}/{stem}" for stem in ["main", *sorted(path.stem for path in folder.glob("*.yaml"))])
        return
    try:
        yield from (f"{slug}/{name}/{one}" for one in read_yaml(folder / f"{name}.yaml").get("arms") or {})
    except (ValueError, OSError):
        return


def _starting(words: Iterable[str], incomplete: str) -> list[str]:
    return [word for word in words if word.startswith(incomplete)]

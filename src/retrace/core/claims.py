"""Claims of a paper: the schema of claims.yaml.

A claim compares two arms, `compare: [a, b]` (a against b), or orders several, `trend: [a, b, c]`. With `beyond: [c, d]`
the difference a - b is held against the difference c - d. That something makes no difference is claimed with
`expect: {direction: none, margin: m}`.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Literal

from pydantic import Field, model_validator

from retrace.core.config import Frozen, Scale, parse_yaml, validate


class Expect(Frozen):
    """What the paper says of the difference a - b, or of the slope from arm to arm."""

    direction: Literal["up", "down", "none"]
    margin: float | None = Field(None, gt=0)  # of "none": differences up to it do not matter
    value: float | None = None  # the difference as the paper prints it; null: the paper prints none
    # of `value`: points are hundredths of the metric, as in "+5.0 points"; of `margin`: a share of the mean of arm b
    unit: Literal["metric", "points", "share"] = "metric"

    @model_validator(mode="after")
    def _margin_of_no_difference(self) -> Expect:
        if (self.direction == "none") != (self.margin is not None):
            raise ValueError(
                f"direction={self.direction} with margin={self.margin}: direction none needs a margin, others have none"
            )
        if self.direction == "none" and self.value is not None:
            raise ValueError(f"direction=none with value={self.value}: no difference has no value; use null")
        if self.unit == ("points" if self.direction == "none" else "share"):
            raise ValueError(
                f"direction={self.direction} with unit={self.unit}: a margin may be a share, and a value points"
            )
        if self.value is not None and (self.value > 0) != (self.direction == "up"):
            raise ValueError(
                f"direction={self.direction} with value={self.value}: expected values above 0 with up, else below"
            )
        return self


class Claim(Frozen):
    """One entry of claims.yaml. With two metrics, the first is read in arm a and the second in arm b."""

    id: str = Field(pattern=r"^[a-z][a-z0-9_]*$")
    says: str = Field(min_length=1)  # in our words
    locus: str = Field(min_length=1)
    ablation: str
    metric: str | tuple[str, str]
    compare: tuple[str, str] | None = None
    beyond: tuple[str, str] | None = None
    trend: tuple[str, ...] | None = None
    expect: Expect
    testable_at: tuple[Scale, ...] = Field(min_length=1)
    paper: str | None = None  # values as the paper prints them, and how sure we are of them
    note: str | None = None

    @model_validator(mode="after")
    def _one_question(self) -> Claim:
        if (self.compare is None) == (self.trend is None):
            raise ValueError("give either compare: [arm, against] or trend: [arm, arm, ...], and not both")
        if self.trend is not None:
            if len(self.trend) < 3 or len(set(self.trend)) < len(self.trend):
                raise ValueError(f"trend={list(self.trend)}: expected three or more different arms; two are a compare")
            if self.expect.value is not None or not isinstance(self.metric, str):
                raise ValueError("a trend has one metric and expect.value: null; the paper prints values of arms")
        if self.beyond is not None and (self.compare is None or not isinstance(self.metric, str)):
            raise ValueError(f"beyond={list(self.beyond)}: give it beside compare: [arm, against], with one metric")
        if self.compare is not None and len(set(self.cells)) == 1:
            raise ValueError(f"compare={list(self.compare)}: an arm against itself; give two arms or two metrics")
        if "smoke" in self.testable_at:
            raise ValueError("testable_at: scale smoke shows that the code runs and judges nothing; remove it")
        return self

    @property
    def cells(self) -> tuple[tuple[str, str], ...]:
        """(arm, metric) of every sample that the claim needs, in its order."""
        arms = (*(self.compare or ()), *(self.beyond or ()), *(self.trend or ()))
        metrics = (self.metric,) * len(arms) if isinstance(self.metric, str) else self.metric
        return tuple(zip(arms, metrics, strict=True))

    @property
    def sign(self) -> int:
        """-1 where the claim expects a negative difference, else +1."""
        return -1 if self.expect.direction == "down" else 1

    @property
    def expected(self) -> str:
        """What is expected of the difference, in words."""
        if self.expect.margin is not None and self.expect.unit == "share":
            return f"no difference above {100 * self.expect.margin:g} % of {self.cells[1][0]}"
        if self.expect.margin is not None:
            return f"no difference above {self.expect.margin:g}"
        value = "" if self.expect.value is None else f" by {abs(self.expect.value):g}"
        return self.expect.direction + value + (" points" if value and self.expect.unit == "points" else "")

    @property
    def value(self) -> float | None:
        """The printed difference in units of the metric."""
        value = self.expect.value
        return value / 100 if value is not None and self.expect.unit == "points" else value


def load_claims(path: Path, *, arms: Mapping[str, Collection[str]] | None = None) -> tuple[Claim, ...]:
    """The claims of a claims.yaml, in its order; `arms` (ablation -> its arms) lets names be checked.

    Raises ValueError of one sentence for a wrong key, value, a second claim of one id, an unknown ablation or arm.
    """
    entries = parse_yaml(path)
    if not isinstance(entries, list) or not all(isinstance(entry, dict) for entry in entries):
        raise ValueError(f"{path}: expected a list of claims, each beginning with '- id: ...'")
    claims: dict[str, Claim] = {}
    for number, entry in enumerate(entries, start=1):
        source = f"{path.name}: claim {entry.get('id', f'number {number}')}"
        claim = validate(Claim, entry, source=source)
        if claim.id in claims:
            raise ValueError(f"{source}: a second claim of this id; every claim needs its own")
        if arms is not None:
            _check_names(claim, arms, source)
        claims[claim.id] = claim
    return tuple(claims.values())


def load_words(path: Path) -> dict[str, str]:
    """What metrics and curves are, in words, from a metrics.yaml; without one they go by their names.

    Raises ValueError where the file is no such list.
    """
    if not path.is_file():
        return {}
    words = parse_yaml(path)
    if not isinstance(words, dict) or not all(isinstance(word, str) for pair in words.items() for word in pair):
        raise ValueError(f"{path}: expected lines of a metric and what it is, as in 'test/loss: loss (nats a token)'")
    return words


def _check_names(claim: Claim, arms: Mapping[str, Collection[str]], source: str) -> None:
    if claim.ablation not in arms:
        raise ValueError(f"{source}: ablation={claim.ablation!r}: no such ablation; there are: {', '.join(arms)}")
    for arm, _ in claim.cells:
        if arm not in arms[claim.ablation]:
            known = ", ".join(arms[claim.ablation])
            raise ValueError(f"{source}: arm {arm!r} is not in ablation {claim.ablation}; its arms are: {known}")

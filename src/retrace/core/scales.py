"""The same claims at several scales: does the verdict of a small one predict that of a larger one?"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations

from retrace.core.verdicts import JUDGED, Outcome, Verdict

CALLS: dict[Outcome, int] = {"reproduced": 1, "direction only": 1, "contradicted": -1, "inconclusive": 0}


@dataclass(frozen=True)
class Pair:
    """How the calls of a smaller scale fared at a larger one, over the claims that both judged."""

    small: str
    large: str
    both: int
    same: int  # outcome for outcome, "inconclusive" too
    called: int  # the smaller scale named a side
    kept: int  # of those, the larger one named the same side
    turned: int  # of those, the larger one named the other side
    found: int  # the smaller scale left it open and the larger one named a side

    def told(self) -> str:
        """One or two sentences."""
        claims = f"{self.both} claim{'s' * (self.both != 1)}"
        open_ = self.called - self.kept - self.turned
        return (
            f"{claims} were judged at both {self.small} and {self.large}, {self.same} of them with the same outcome. "
            f"Of {self.called} that {self.small} called, {self.large} called {self.kept} the same way, {self.turned} "
            f"the other way, and left {open_} open; of {self.both - self.called} that {self.small} left open, "
            f"{self.large} called {self.found}."
        )


@dataclass(frozen=True)
class Comparison:
    """Verdicts by scale, a row for every claim that two scales or more have judged."""

    scales: tuple[str, ...]
    rows: tuple[tuple[Verdict | None, ...], ...]  # one cell for each scale; None: not judged there
    pairs: tuple[Pair, ...]


def compare_scales(verdicts: Mapping[str, Sequence[Verdict]]) -> Comparison | None:
    """None where no claim has been judged at two scales. `verdicts`: by scale, smaller ones first."""
    judged = {scale: {v.claim.id: v for v in found if v.outcome in JUDGED} for scale, found in verdicts.items()}
    scales = tuple(scale for scale in verdicts if judged[scale])
    ids = dict.fromkeys(verdict.claim.id for found in verdicts.values() for verdict in found)
    rows = [tuple(judged[scale].get(claim) for scale in scales) for claim in ids]
    rows = [row for row in rows if sum(cell is not None for cell in row) > 1]
    if not rows:
        return None
    pairs = [_pair(small, large, judged[small], judged[large]) for small, large in combinations(scales, 2)]
    return Comparison(scales, tuple(rows), tuple(pair for pair in pairs if pair.both))


def _pair(small: str, large: str, one: Mapping[str, Verdict], two: Mapping[str, Verdict]) -> Pair:
    both = [(one[claim].outcome, two[claim].outcome) for claim in one if claim in two]
    calls = [(CALLS[a], CALLS[b]) for a, b in both]
    return Pair(
        small,
        large,
        both=len(both),
        same=sum(a == b for a, b in both),
        called=sum(a != 0 for a, _ in calls),
        kept=sum(a != 0 and a == b for a, b in calls),
        turned=sum(a * b < 0 for a, b in calls),
        found=sum(a == 0 and b != 0 for a, b in calls),
    )

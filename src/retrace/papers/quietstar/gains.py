"""What a text gains from thoughts, token by token: frozen values, with their JSON. `inspection.py` computes them."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Literal

from pydantic import Field

from retrace.core.config import Frozen

NOTABLE = 0.05  # nats; a smaller gain or loss, 5 % of the probability, counts as no difference


class Decoding(Frozen):
    """How thoughts are chosen: greedily, or `num_samples` of them sampled at every position."""

    num_samples: int | None = Field(None, ge=1)  # None: the greedy thought alone
    seed: int = Field(0, ge=0)
    temperature: float | None = Field(None, gt=0)  # None: the model's own `sample_temperature`

    def __str__(self) -> str:
        if self.num_samples is None:
            return "greedy"
        heat = "" if self.temperature is None else f", temperature {self.temperature:g}"
        return f"{self.num_samples} sampled at every token, seed {self.seed}{heat}"


GREEDY = Decoding(num_samples=None)


class Thought(Frozen):
    """A thought and what the prediction of the next token gains from it alone, in nats; `weight`: the mixing weight."""

    text: str
    token_ids: tuple[int, ...]
    gain: float
    weight: float


class TokenGain(Frozen):
    """A token of the text, how likely it was without and with thoughts before it, and those thoughts.

    Log-probabilities are in nats over the whole vocabulary; `log_prob` is that of the mixed prediction, averaged over
    the thoughts as probabilities; `gain` is the second minus the first. `text` is the piece of the document that the
    token stands for: all pieces together are the document. A first token that nothing comes before has no prediction,
    and None everywhere.
    """

    text: str
    id: int
    log_prob_base: float | None
    log_prob: float | None
    gain: float | None
    weight: float | None
    thoughts: tuple[Thought, ...]


class Summary(Frozen):
    """Gains in nats a token. Helped and harmed: the shares of tokens with a gain or loss of at least `NOTABLE`."""

    num_tokens: int  # with a prediction
    mean_gain: float
    helped: float
    harmed: float
    hardest_gain: float  # of the tenth of the tokens that are least likely without thoughts


class Inspection(Frozen):
    """A document, token by token."""

    decoding: Decoding
    tokens: tuple[TokenGain, ...]

    @property
    def text(self) -> str:
        """The document."""
        return "".join(token.text for token in self.tokens)

    def summary(self) -> Summary:
        """The gains in a few numbers."""
        gains = [token.gain for token in self.tokens if token.gain is not None]
        ease = [token.log_prob_base for token in self.tokens if token.log_prob_base is not None]
        hardest = sorted(range(len(gains)), key=ease.__getitem__)[: max(1, len(gains) // 10)]
        return Summary(
            num_tokens=len(gains),
            mean_gain=math.fsum(gains) / len(gains),
            helped=sum(gain >= NOTABLE for gain in gains) / len(gains),
            harmed=sum(gain <= -NOTABLE for gain in gains) / len(gains),
            hardest_gain=math.fsum(gains[i] for i in hardest) / len(hardest),
        )


class Export(Frozen):
    """What `retrace think --json` writes; `origin` names the model, its run and how its thoughts were chosen."""

    schema_version: Literal[1] = Field(1, alias="schema")
    origin: dict[str, str]
    text: str
    summary: Summary
    decoding: Decoding
    tokens: tuple[TokenGain, ...]

    @classmethod
    def of(cls, found: Inspection, *, origin: Mapping[str, str]) -> Export:
        """An inspection with where it comes from."""
        return cls(
            schema=1,
            origin=dict(origin),
            text=found.text,
            summary=found.summary(),
            decoding=found.decoding,
            tokens=found.tokens,
        )

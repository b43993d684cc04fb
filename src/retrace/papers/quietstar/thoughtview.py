"""How gains and thoughts look: the steps of the colour scale, tokens made visible, and the lines of `retrace think`."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping

from rich.text import Text

from retrace.papers.quietstar.gains import NOTABLE, Inspection, TokenGain

STEPS = (NOTABLE, 0.25, 1.0)  # nats; where the colour changes
COLOURS = {-3: "bold underline dark_orange3", -2: "dark_orange3", -1: "orange3", 0: "",
           1: "sky_blue3", 2: "dodger_blue2", 3: "bold underline dodger_blue2"}  # fmt: skip
NEWLINE = "\u21b5"
LONGEST_TOKEN = 18  # columns


def step_of(gain: float) -> int:
    """-3 to 3: how many of STEPS the gain reaches, with its sign."""
    reached = sum(abs(gain) >= step for step in STEPS)
    return reached if gain > 0 else -reached


def visible(text: str) -> str:
    """Text in one line in which nothing is hidden: newlines as a sign, controls escaped."""
    return printable(text.replace("\n", NEWLINE))


def printable(text: str) -> str:
    """Text that moves a terminal's cursor to the next line at most."""
    return "".join(c if c.isprintable() or c == "\n" else c.encode("unicode_escape").decode() for c in text)


def probability(log_prob: float) -> str:
    """A probability with three digits after the point, fewer than that in scientific notation."""
    value = math.exp(log_prob)
    return f"{value:.3f}" if value >= 0.0005 else f"{value:.0e}"


def signed(gain: float) -> str:
    """A gain in nats as a program reads it back; never a negative zero."""
    shown = f"{gain:+.3f}"
    return "0.000" if float(shown) == 0 else shown


def lines(found: Inspection, origin: Mapping[str, str], *, rich: bool) -> Iterator[Text]:
    """What `retrace think` prints: `rich` adds the document in colour."""
    yield Text(visible(", ".join(f"{key} {value}" for key, value in origin.items())), "dim")
    if rich:
        yield Text.assemble("\n", *((printable(token.text), _colour(token)) for token in found.tokens), "\n")
    width = min(LONGEST_TOKEN, max(len(visible(token.text.strip(" "))) for token in found.tokens))
    yield Text(f"{'gain':>7}  {'without':>7}  {'with':>7}  {'token':<{width}}  thought before it", "bold")
    for token in found.tokens:
        yield from _token_lines(token, width)
    yield Text(f"\n{summary(found)}")


def _colour(token: TokenGain) -> str:
    return "dim" if token.gain is None else COLOURS[step_of(token.gain)]


def _token_lines(token: TokenGain, width: int) -> Iterator[Text]:
    """One line, and one more for each further thought; several thoughts stand with their own gains."""
    shown = visible(token.text.strip(" ") or token.text) or "\u00b7"
    if token.gain is None or token.log_prob is None or token.log_prob_base is None:
        yield Text(f"{'-':>7}  {'-':>7}  {'-':>7}  {shown}", "dim")
        return
    several = len(token.thoughts) > 1
    head = Text.assemble(
        (f"{signed(token.gain):>7}", _colour(token)),
        f"  {probability(token.log_prob_base):>7}  {probability(token.log_prob):>7}  ",
        (f"{shown:<{width}}", _colour(token)),
        "  ",
    )
    for thought in token.thoughts:
        own = f"{signed(thought.gain):>7}  " if several else ""
        yield Text.assemble(head, own, visible(thought.text.strip()))
        head = Text(" " * head.cell_len)


def summary(found: Inspection) -> str:
    """The gains of a document in one sentence."""
    s = found.summary()
    return (
        f"{s.num_tokens} tokens: mean gain {signed(s.mean_gain)} nats; helped {100 * s.helped:.0f} %, "
        f"harmed {100 * s.harmed:.0f} % (by {NOTABLE} nats or more); "
        f"the hardest tenth gains {signed(s.hardest_gain)}"
    )

"""The page of thoughts: one HTML file that fetches nothing, a document coloured by what its tokens gain.

A pure function of its values. It is read without colour (lines under tokens), with a keyboard, on a phone and on paper.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from html import escape
from pathlib import Path
from typing import Any

from retrace.core.svg import number
from retrace.papers.quietstar.gains import NOTABLE, Inspection, TokenGain
from retrace.papers.quietstar.thoughtview import NEWLINE, STEPS, probability, step_of, visible

TEMPLATES = Path(__file__).parent / "templates"
KINDS = {-3: "m3", -2: "m2", -1: "m1", 0: "", 1: "p1", 2: "p2", 3: "p3"}
MOST_EXTREMES = 5  # tokens in a table
BEFORE = 32  # characters before a token there


@dataclass(frozen=True)
class Part:
    """A document on the page; the only one needs no name."""

    name: str
    found: Inspection


@dataclass(frozen=True)
class Extreme:
    """A token in one of the two tables."""

    index: int
    before: str
    token: str
    without: str
    with_thought: str
    gain: str
    thought: str


def page(parts: Sequence[Part], *, title: str, origin: Mapping[str, str]) -> str:
    """The HTML. `origin` says what is seen: model, run, seed, how thoughts were chosen."""
    import jinja2
    from markupsafe import Markup

    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(TEMPLATES),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )
    tokens = [token for part in parts for token in part.found.tokens]
    gains, losses = extremes(tokens)
    linked = {row.index for row in (*gains, *losses)}
    starts = [sum(len(part.found.tokens) for part in parts[:i]) for i in range(len(parts))]
    return environment.get_template("thoughts.html.j2").render(
        title=title,
        origin=origin,
        style=(TEMPLATES / "thoughts.css").read_text(),
        script=(TEMPLATES / "thoughts.js").read_text(),
        numbers=_numbers(parts),
        legend=_legend(),
        parts=[
            {"name": part.name, "tokens": Markup(_spans(part.found.tokens, start=start, linked=linked))}
            for part, start in zip(parts, starts, strict=True)
        ],
        gains=gains,
        losses=losses,
        notable=NOTABLE,
        data=Markup(_data(tokens)),
    )


def _numbers(parts: Sequence[Part]) -> list[tuple[str, str]]:
    """The summary of all documents together: (value, what it is)."""
    whole = Inspection(decoding=parts[0].found.decoding, tokens=tuple(t for part in parts for t in part.found.tokens))
    s = whole.summary()
    return [
        (number(s.mean_gain, 3, sign=True), f"mean gain, nats a token, over {s.num_tokens} tokens"),
        (f"{100 * s.helped:.0f} %", f"helped, by {NOTABLE} nats or more"),
        (f"{100 * s.harmed:.0f} %", f"harmed, by {NOTABLE} nats or more"),
        (number(s.hardest_gain, 3, sign=True), "mean gain on the hardest tenth"),
    ]


def _legend() -> list[dict[str, str]]:
    """The steps of the scale, from the largest loss to the largest gain."""
    small, middle, large = (f"{step:g}" for step in STEPS)
    gained = ((1, f"{small} to {middle}"), (2, f"{middle} to {large}"), (3, f"{large} or more"))
    lost = [{"kind": KINDS[-step], "sign": "\u2212", "says": f"lost {says}"} for step, says in reversed(gained)]
    none = {"kind": "zero", "sign": "\u00b1", "says": f"less than {small}"}
    return [*lost, none, *({"kind": KINDS[step], "sign": "+", "says": f"gained {says}"} for step, says in gained)]


def _spans(tokens: Sequence[TokenGain], *, start: int, linked: set[int]) -> str:
    """The document: its own characters, each token in a span that can be focused; spaces before a word stay outside."""
    parts = []
    for index, token in enumerate(tokens, start):
        inner = token.text.lstrip(" ") or token.text
        mark = NEWLINE if inner and not inner.strip() and "\n" in inner else "" if inner else "\u00b7"
        kind = "first" if token.gain is None else KINDS[step_of(token.gain)]
        classes = " ".join(filter(None, ("t", kind, "mark" if mark else "")))
        more = (f' data-mark="{mark}"' if mark else "") + (f' id="t{index}"' if index in linked else "")
        space = token.text[: len(token.text) - len(inner)]
        parts.append(f'{space}<span class="{classes}" tabindex="0" role="button"{more}>{_text(inner)}</span>')
    return "".join(parts)


def _text(content: str) -> str:
    """Escaped text that a browser reads back as it was, but for characters that HTML can't hold."""
    held = "".join(c if c in "\t\n\r" or c.isprintable() or ord(c) > 0x9F else "\ufffd" for c in content)
    return escape(held).replace("\r", "&#13;")


def _data(tokens: Sequence[TokenGain]) -> str:
    """What the script shows of each token, as JSON inside of HTML."""
    rows: list[list[Any]] = []
    for token in tokens:
        if token.gain is None or token.log_prob is None or token.log_prob_base is None or token.weight is None:
            rows.append([])
            continue
        thoughts = [
            [thought.text.strip(" "), _short(thought.gain), _short(thought.weight)] for thought in token.thoughts
        ]
        pair = [float(f"{math.exp(x):.4g}") for x in (token.log_prob_base, token.log_prob)]
        rows.append([*pair, _short(token.gain), _short(token.weight), thoughts])
    compact = json.dumps(rows, separators=(",", ":"), allow_nan=False)
    return compact.replace("&", "\\u0026").replace("<", "\\u003c").replace(">", "\\u003e")


def _short(value: float) -> float:
    return round(value, 4) or 0.0


def extremes(tokens: Sequence[TokenGain]) -> tuple[list[Extreme], list[Extreme]]:
    """The tokens with the largest gains, and those with the largest losses, of at least `NOTABLE`."""
    order = sorted((token.gain, i) for i, token in enumerate(tokens) if token.gain is not None)
    gains = [_extreme(tokens, i) for gain, i in reversed(order[-MOST_EXTREMES:]) if gain >= NOTABLE]
    return gains, [_extreme(tokens, i) for gain, i in order[:MOST_EXTREMES] if gain <= -NOTABLE]


def _extreme(tokens: Sequence[TokenGain], index: int) -> Extreme:
    token = tokens[index]
    assert token.gain is not None
    assert token.log_prob is not None
    assert token.log_prob_base is not None
    before = "".join(token.text for token in tokens[max(0, index - BEFORE) : index])
    before = before if len(before) <= BEFORE else "\u2026" + before[-BEFORE:]
    inner = token.text.lstrip(" ") or token.text
    best = max(token.thoughts, key=lambda thought: thought.gain * math.copysign(1, token.gain or 0.0))
    return Extreme(
        index=index,
        before=visible(before + token.text[: len(token.text) - len(inner)]),
        token=visible(inner) or "\u00b7",
        without=probability(token.log_prob_base).replace("-", "\u2212"),
        with_thought=probability(token.log_prob).replace("-", "\u2212"),
        gain=number(token.gain, 3, sign=True),
        thought=visible(best.text.strip()),
    )

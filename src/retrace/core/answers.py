"""What counts as an answer: the tokens that a softmax is restricted to, and the number in a generated text."""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

INTEGER = re.compile(r"-?\d+")
NO_ANSWER = "[none]"  # of a text without a number; a candidate in a vote like any other


def answer_ids(tokenizer: PreTrainedTokenizerBase, answers: Sequence[str]) -> list[int]:
    """The token id of each answer as it stands in a text. Raises ValueError for one that is not a single token.

    An id is read off behind "A:", where answers stand; where the tokenizer merges the two, off the answer by itself.
    Not the other way round: at the start of a text, many tokenizers put a space before a digit.
    """

    def find(answer: str) -> int:
        for before in ("A:", ""):
            head, whole = encode(tokenizer, before), encode(tokenizer, before + answer)
            if len(whole) == len(head) + 1 and whole[:-1] == head and whole[-1] != tokenizer.unk_token_id:
                return whole[-1]
        tokens = tokenizer.convert_ids_to_tokens(encode(tokenizer, answer))
        raise ValueError(
            f"allowed={answer!r} is {tokens} in this tokenizer: the answer metric needs it to be one token"
        )

    return [find(answer) for answer in answers]


def check_answer(tokenizer: PreTrainedTokenizerBase, tokens: Iterable[int], *, allowed: Mapping[int, str]) -> None:
    """Raise ValueError for a token that hides an answer, such as a number of several digits: no metric would see it."""
    for token in set(tokens) - set(allowed):
        text = tokenizer.decode([token])
        if any((answer.strip() or answer) in text for answer in allowed.values()):
            raise ValueError(
                f"{text!r} is one token in this tokenizer: the answer metric needs {list(allowed.values())} apart"
            )


def answer_metrics(doc: Mapping[str, Any], results: Sequence[tuple[float, bool]]) -> dict[str, float]:  # noqa: ARG001
    """`prob` and `acc` of one item, from its one log-probability and whether all of its tokens were the likeliest."""
    ((loglikelihood, is_greedy),) = results
    return {"prob": math.exp(loglikelihood), "acc": float(is_greedy)}


def encode(tokenizer: PreTrainedTokenizerBase, text: str) -> list[int]:
    """Token ids of a text, without BOS and EOS."""
    return list(tokenizer.encode(text, add_special_tokens=False))


class FirstInteger:
    """A filter of lm-eval: the first integer in each response, without its commas; with `after`, the first behind it.

    In a task's YAML: `- {function: first_integer, after: "the answer is"}`. A response without one becomes "[none]".
    """

    def __init__(self, *, after: str = "") -> None:
        self.after = after

    def apply(self, resps: Iterable[Sequence[str]], docs: Sequence[Any]) -> list[list[str]]:  # noqa: ARG002
        return [[self._find(response) for response in responses] for responses in resps]

    def _find(self, response: str) -> str:
        behind = response.partition(self.after)[2] if self.after else response
        found = INTEGER.search(behind.replace(",", ""))
        return found.group() if found else NO_ANSWER

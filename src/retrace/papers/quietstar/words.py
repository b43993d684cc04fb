"""The words of the procedural corpus. Lists are longer than any one config uses; the tokenizer knows them all."""

from __future__ import annotations

from collections.abc import Callable

ENTITIES: tuple[str, ...] = (
    "Anna", "Boris", "Clara", "David", "Elena", "Felix", "Greta", "Henry", "Irene", "Jacob", "Karin", "Lucas",
    "Maria", "Nils", "Olga", "Peter", "Rosa", "Simon", "Tanya", "Ulrich", "Vera", "Walter", "Xenia", "Yusuf",
    "Zelda", "Arthur", "Bella", "Carlos", "Diana", "Edgar", "Frida", "Gustav", "Hilda", "Ivan", "Julia", "Konrad",
    "Laura", "Martin", "Nora", "Oscar",
)  # fmt: skip

RELATIONS: tuple[str, ...] = (
    "friend", "boss", "neighbor", "teacher", "doctor", "cousin", "rival", "lawyer", "partner", "coach",
    "tailor", "guide",
)  # fmt: skip

COLORS: tuple[str, ...] = ("red", "blue", "white", "black", "yellow")

NUMBERS: tuple[str, ...] = (
    "zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten", "eleven", "twelve",
    "thirteen", "fourteen", "fifteen", "sixteen", "seventeen", "eighteen", "nineteen", "twenty",
)  # fmt: skip

PERSONS: tuple[str, ...] = ("Tom", "Sue", "Max", "Ida", "Ben", "Eve", "Leo", "Amy")  # of the stories
THINGS: tuple[str, ...] = ("apples", "coins", "books", "cards", "eggs", "stamps", "pens", "plums")

NOUNS: tuple[str, ...] = (
    "mill", "garden", "bridge", "market", "tower", "school", "harbor", "forest", "station", "library", "castle", "farm",
)  # fmt: skip
PLACES: tuple[str, ...] = (
    "river", "road", "hill", "lake", "village", "square", "coast", "valley", "railway", "church", "border", "field",
)  # fmt: skip
VERBS: tuple[str, ...] = (
    "sleeps", "wakes", "shines", "waits", "closes", "opens", "changes", "rests", "grows", "fades", "stands", "hums",
)  # fmt: skip
ADJECTIVES: tuple[str, ...] = (
    "old", "quiet", "small", "bright", "cold", "famous", "empty", "green", "busy", "strange", "lovely", "plain",
)  # fmt: skip
TIMES: tuple[str, ...] = ("morning", "evening", "night", "spring", "summer", "autumn", "winter", "rain")

# Each noun has a verb, a place and an adjective of its own in a given world, so that most of the prose can be learned.
PROSE: tuple[str, ...] = (
    "The {adjective} {noun} {verb} by the {place}.",
    "In the {time} the {noun} {verb} again.",
    "People say that the {noun} is {adjective} in the {time}.",
    "Nobody at the {place} talks about the {noun}.",
    "It was a cold {time}, and the {adjective} {noun} was far from the {place}.",
    "{person} saw the {noun} by the {place} and went home.",
)


def _plus(amount: int) -> Callable[[int], int | None]:
    return lambda number: number + amount


def _minus(amount: int) -> Callable[[int], int | None]:
    return lambda number: number - amount


def _double(number: int) -> int | None:
    return 2 * number if number > 0 else None


def _halve(number: int) -> int | None:
    return number // 2 if number > 0 and number % 2 == 0 else None


# Steps come in words of order, so that which step is the third can be seen from the text alone.
ORDER: tuple[str, ...] = ("first", "then", "next", "later", "soon", "last")

# How an aside ends, and how often: people do not stop at once. A model that has read this can answer after a thought
# that goes on behind the last step, as thoughts of one length do wherever a question has fewer steps.
ENDINGS: dict[str, float] = {"": 0.2, " clearly": 0.3, " clearly so": 0.5}

# What happens in a number story and what it does to the number; None: it makes no sense of that number.
OPERATIONS: dict[str, Callable[[int], int | None]] = {
    "doubles them": _double,
    "loses half": _halve,
} | {
    f"{verb} {amount}": change(amount)
    for amount in range(1, 4)
    for verb, change in (("gets", _plus), ("gives", _minus))
}

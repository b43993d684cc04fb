"""Scores of captions and short answers: CIDEr-D (Vedantam et al. 2015) and VQA accuracy (Antol et al. 2015). No torch.

Of the published libraries for CIDEr one installs, pycocoevalcap, of 100 MB and last released in 2020; its scorer needs
no Java but its tokenizer does. The formula is short, so it is here; on the same words it gives the library's numbers.
"""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from statistics import fmean

LONGEST = 4  # words of an n-gram
SIGMA = 6.0  # of the penalty on captions that are longer or shorter than the reference

Ngram = tuple[str, ...]


def tokenize(caption: str) -> list[str]:
    """Words in lower case without punctuation; n't and 's are words of their own, as in the Penn treebank.

    The official scorer takes the Stanford tokenizer, which needs Java: numbers with points may differ.
    """
    return re.findall(r"n't|'(?:s|re|ve|ll|d|m)\b|\w+(?=n't)|\w+(?:-\w+)*", caption.lower())


def cider(captions: Sequence[str], references: Sequence[Sequence[str]]) -> list[float]:
    """CIDEr-D of each caption in points (100 is what the official scorer calls 1.0), at least two of them.

    How rare an n-gram is, is counted over the images' references: scores compare on the same set of images alone.
    Raises ValueError for fewer than two images, where every n-gram is in all of them and counts nothing.
    """
    if len(captions) < 2 or len(captions) != len(references) or not all(references):
        raise ValueError(
            f"CIDEr of {len(captions)} captions and {len(references)} sets of references: expected as many, two or "
            "more, and a reference for each"
        )
    found = [[_ngrams(text) for text in texts] for texts in references]
    seen = Counter(ngram for texts in found for ngram in {ngram for text in texts for ngram in text})
    rarity = {ngram: math.log(len(captions)) - math.log(count) for ngram, count in seen.items()}
    default = math.log(len(captions))  # of what no reference says
    return [
        1000 * fmean(_similarity(_ngrams(caption), text, rarity, default) for text in texts)
        for caption, texts in zip(captions, found, strict=True)
    ]


def _ngrams(caption: str) -> Counter[Ngram]:
    words = tokenize(caption)
    return Counter(tuple(words[i : i + n]) for n in range(1, LONGEST + 1) for i in range(len(words) - n + 1))


def _similarity(said: Counter[Ngram], wanted: Counter[Ngram], rarity: Mapping[Ngram, float], default: float) -> float:
    """Clipped cosine of the n-grams' weights, a mean over n = 1 to 4, times the penalty on the length."""
    bigrams = [sum(count for ngram, count in text.items() if len(ngram) == 2) for text in (said, wanted)]
    penalty = math.exp(-((bigrams[0] - bigrams[1]) ** 2) / (2 * SIGMA**2))

    def of_length(n: int) -> float:
        a, b = (
            {ngram: count * rarity.get(ngram, default) for ngram, count in text.items() if len(ngram) == n}
            for text in (said, wanted)
        )
        norm = math.hypot(*a.values()) * math.hypot(*b.values())
        product = sum(min(weight, b[ngram]) * b[ngram] for ngram, weight in a.items() if ngram in b)
        return product / norm if norm else 0.0

    return penalty * fmean(of_length(n) for n in range(1, LONGEST + 1))


def vqa_accuracy(answer: str, answers: Sequence[str]) -> float:
    """In percent: the mean over all ways to leave one annotator out of min(agreeing others / 3, 1).

    Both sides are normalised first (`normalize`). With a single annotator it is whether they agree.
    """
    own = normalize(answer)
    agreeing = [normalize(other) == own for other in answers]
    if len(answers) == 1:
        return 100.0 * agreeing[0]
    return 100 * fmean(min((sum(agreeing) - left_out) / 3, 1) for left_out in agreeing)


COUNTED = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten")
NUMBERS = {"none": "0"} | {word: str(number) for number, word in enumerate(COUNTED)}
ARTICLES = ("a", "an", "the")
NEGATED = "ai are ca could did does do had has have is might must need sha should was were wo would"
SHORT = {
    "'s": "he she that there here what when where who how why somebody someone something everyone let",
    "'re": "they you what",
    "'ve": "i you we they could should would might what who",
    "'ll": "they you it that what who",
    "'d": "he they you it who there",
    "'m": "i",
}  # without words that are others once the apostrophe is gone: its, were, well, hell, shell, ill, wed, shed, id
CONTRACTIONS = {f"{verb}nt": f"{verb}n't" for verb in NEGATED.split()} | {
    word + ending[1:]: word + ending for ending, words in SHORT.items() for word in words.split()
}


def normalize(answer: str) -> str:
    """As the VQA evaluation describes it: lower case, numbers as digits, no articles, contractions with apostrophes.

    Points stay in decimals alone (3.5, .5); commas inside of numbers go; other marks but apostrophe and colon are
    spaces.
    """
    text = re.sub(r"(?<=\d),(?=\d)", "", answer.lower())
    text = re.sub(r"(?<=[^\W\d]|\.)\.|\.(?!\d)", "", text)  # behind a letter or a point, or before no digit
    text = re.sub(r"[^\w\s':.]|_", " ", text)
    words = (NUMBERS.get(word, word) for word in text.split() if word not in ARTICLES)
    return " ".join(CONTRACTIONS.get(word, word) for word in words)

"""lm-eval's requests, which are texts, as token ids for a `Scorer`: batch by batch, each answer kept on disk at once.

Batches depend on the requests alone and noise on what is read, so that an evaluation that was killed ends with the same
numbers, bit for bit, as one that was not.
"""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from retrace.core.answers import answer_ids, check_answer, encode
from retrace.core.data import derive_seed
from retrace.core.files import write_atomic

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

MAX_NEW_TOKENS = 256  # lm-eval's own, for tasks that do not say

Request = tuple[list[int], list[int]]  # token ids of a context, never empty, and of its continuation, never empty
OnProgress = Callable[[float], None]  # told the share that is done after each batch; may raise to stop


@dataclass(frozen=True)
class Sampling:
    """How texts are written: to a stop string, or so many tokens. Temperature 0 takes the likeliest ones."""

    stop: tuple[str, ...]
    max_new_tokens: int
    temperature: float

    def cut(self, text: str) -> str:
        """The text before its first stop string."""
        return min((text.partition(end)[0] for end in self.stop), key=len, default=text)


class Scorer(Protocol):
    """What a model must answer to be evaluated. Each call but `batches` gets the requests of one batch."""

    tokenizer: PreTrainedTokenizerBase
    max_length: int  # tokens that fit into the model; longer contexts lose their beginning before they get here

    def batches(self, requests: Sequence[Request], *, room: int) -> list[list[int]]:
        """Indices of requests that are read together, batch after batch; `room` tokens are to be generated for each."""
        ...

    def loglikelihood(self, requests: Sequence[Request], *, allowed: Sequence[int] | None) -> list[tuple[float, bool]]:
        """Of each continuation its summed log-probability (nats), and whether each of its tokens is the likeliest.

        `allowed` restricts the softmax to these token ids, renormalised; a continuation's other tokens are read but not
        scored.
        """
        ...

    def generate(self, contexts: Sequence[list[int]], settings: Sampling, *, seeds: Sequence[int]) -> list[str]:
        """Continuations; each may run on behind a stop string, where the caller cuts it.

        All noise of a context comes from its seed, so that it does not depend on the others.
        """
        ...


@dataclass(frozen=True)
class GenerationSettings(Sampling):
    """A task's `generation_kwargs`: lm-eval's, and `then`, a text to go on with after the first continuation."""

    then: tuple[str, int] | None  # the text, and how many tokens may follow it

    @classmethod
    def of(cls, given: Mapping[str, Any]) -> GenerationSettings:
        """Raises ValueError for a setting that would be ignored."""
        known = ("until", "max_gen_toks", "do_sample", "temperature", "then")
        for key in sorted(given.keys() - set(known)):
            raise ValueError(f"generation_kwargs.{key}={given[key]!r}: no such setting; there are: {', '.join(known)}")
        until, then = given.get("until") or [], given.get("then")
        if then is not None and (not isinstance(then, Mapping) or then.keys() != {"text", "max_gen_toks"}):
            raise ValueError(f"generation_kwargs.then={then!r}: expected {{text: ..., max_gen_toks: ...}}")
        temperature = float(given.get("temperature", 1.0 if given.get("do_sample") else 0.0))
        if temperature < 0:
            raise ValueError(f"generation_kwargs.temperature={temperature}: expected 0, for the likeliest, or more")
        return cls(
            stop=(until,) if isinstance(until, str) else tuple(text for text in until if text),
            max_new_tokens=int(given.get("max_gen_toks", MAX_NEW_TOKENS)),
            temperature=temperature if given.get("do_sample", True) else 0.0,
            then=None if then is None else (str(then["text"]), int(then["max_gen_toks"])),
        )


class Responses(dict[str, Any]):
    """A scorer's answers by request, a line of a file each; without a path they are kept in memory alone."""

    def __init__(self, path: Path | None = None) -> None:
        super().__init__()
        self._path = path
        if path is not None and path.is_file():
            text = path.read_text(encoding="utf-8")
            whole = text[: text.rfind("\n") + 1]  # a killed run may have torn the last line
            if whole != text:
                write_atomic(path, whole)
            self.update(json.loads(line) for line in whole.split("\n")[:-1])

    def add(self, answers: Iterable[tuple[str, Any]]) -> None:
        """Keep the answers of a batch: all of them, or after a kill in between some, which are then asked again."""
        answers = list(answers)
        self.update(answers)
        if self._path is not None:
            self._path.parent.mkdir(parents=True, exist_ok=True)
            with open(self._path, "a", encoding="utf-8") as file:
                file.write("".join(json.dumps(answer) + "\n" for answer in answers))


class ScorerRequests:
    """lm-eval's requests, answered by a Scorer.

    `answers_of` gives the answer strings that a task restricts its log-probabilities to, or None. `seed` is that of
    sampled texts; it is split by prompt and repetition, so neither batches nor other tasks nor a limit move a number.
    """

    def __init__(
        self,
        scorer: Scorer,
        *,
        seed: int,
        answers_of: Callable[[str], Sequence[str] | None],
        responses: Responses,
        on_progress: OnProgress,
    ) -> None:
        super().__init__()
        self.scorer, self.seed, self.answers_of = scorer, seed, answers_of
        self.responses, self.on_progress = responses, on_progress
        self.num_shortened = 0

    def loglikelihood(self, requests: Sequence[Any]) -> list[tuple[float, bool]]:
        results: list[Any] = [None] * len(requests)
        for task, places in _by(requests, lambda request: request.task_name).items():
            pairs = [encode_pair(self.scorer.tokenizer, *requests[i].args) for i in places]
            found = self.score(pairs, answers=self.answers_of(task))
            for i, result in zip(places, found, strict=True):
                results[i] = result
        return results

    def score(self, pairs: Sequence[Request], *, answers: Sequence[str] | None) -> list[tuple[float, bool]]:
        """`Scorer.loglikelihood` of all pairs, restricted to these answers; contexts that don't fit are shortened."""
        tokenizer, allowed = self.scorer.tokenizer, None
        if answers is not None:
            allowed = dict(zip(answer_ids(tokenizer, answers), answers, strict=True))
            for _, continuation in pairs:
                check_answer(tokenizer, continuation, allowed=allowed)
        ids = None if allowed is None else list(allowed)
        fitting = [(self._fit(c, room=len(target) - 1), target) for c, target in pairs]  # the last one is not read
        self.num_shortened += sum(len(a) < len(b) for (a, _), (b, _) in zip(fitting, pairs, strict=True))
        pairs = fitting
        found = self._ask(
            [_digest("loglikelihood", pair, ids) for pair in pairs],
            self.scorer.batches(pairs, room=0),
            lambda batch: self.scorer.loglikelihood([pairs[i] for i in batch], allowed=ids),
        )
        return [(loglikelihood, is_greedy) for loglikelihood, is_greedy in found]

    def generate_until(self, requests: Sequence[Any]) -> list[str]:
        results: list[Any] = [None] * len(requests)
        for settings, places in _by(requests, lambda request: GenerationSettings.of(request.args[1])).items():
            for i, text in zip(places, self._texts([requests[i].args[0] for i in places], settings), strict=True):
                results[i] = text
        return results

    def _texts(self, prompts: Sequence[str], settings: GenerationSettings) -> list[str]:
        whole = [self._encode(prompt) for prompt in prompts]
        contexts = [self._fit(ids, room=settings.max_new_tokens) for ids in whole]
        self.num_shortened += sum(len(a) < len(b) for a, b in zip(contexts, whole, strict=True))
        seen: Counter[str] = Counter()
        seeds = []
        for prompt in prompts:  # the same prompt again is the next repetition
            seeds.append(derive_seed(self.seed, "text", seen[prompt], hashlib.sha256(prompt.encode()).hexdigest()))
            seen[prompt] += 1

        def run(batch: list[int]) -> list[str]:
            chosen = [seeds[i] for i in batch]
            texts = self._generate([contexts[i] for i in batch], settings, chosen)
            if settings.then is None:
                return texts
            link, room = settings.then
            whole = [prompts[i] + text + link for i, text in zip(batch, texts, strict=True)]
            longer = [self._fit(self._encode(text), room=room) for text in whole]
            further = replace(settings, max_new_tokens=room)
            rest = self._generate(longer, further, [derive_seed(seed, "then") for seed in chosen])
            return [text + link + more for text, more in zip(texts, rest, strict=True)]

        keys = [_digest("text", c, s, repr(settings)) for c, s in zip(contexts, seeds, strict=True)]
        batches = self.scorer.batches([(context, []) for context in contexts], room=settings.max_new_tokens)
        return self._ask(keys, batches, run)

    def _generate(self, contexts: Sequence[list[int]], settings: Sampling, seeds: Sequence[int]) -> list[str]:
        return [settings.cut(text) for text in self.scorer.generate(contexts, settings, seeds=seeds)]

    def _encode(self, prompt: str) -> list[int]:
        ids = encode(self.scorer.tokenizer, prompt)
        return start(self.scorer.tokenizer, ids) + ids

    def _ask(
        self, keys: Sequence[str], batches: Sequence[list[int]], run: Callable[[list[int]], Sequence[Any]]
    ) -> list[Any]:
        """The answers to all requests; a batch is asked whole or, where all of its answers are here, not at all."""
        done = 0
        for batch in batches:
            if not all(keys[i] in self.responses for i in batch):
                self.responses.add(zip((keys[i] for i in batch), run(batch), strict=True))
            done += len(batch)
            self.on_progress(done / len(keys))
        return [self.responses[key] for key in keys]

    def _fit(self, context: list[int], *, room: int) -> list[int]:
        """The end of a context, so that `room` more tokens fit into the model. Raises ValueError where none would."""
        kept = self.scorer.max_length - room
        if kept < 1:
            raise ValueError(f"{room} tokens to be scored or generated leave no room for a context in {kept + room}")
        return context[-kept:]


def encode_pair(tokenizer: PreTrainedTokenizerBase, context: str, continuation: str) -> Request:
    """Token ids of both, split as lm-eval does: spaces at the end of the context belong to the continuation.

    The context starts with BOS if the tokenizer has one; an empty context is BOS, or else EOS.
    """
    head = encode(tokenizer, context.rstrip())
    whole = encode(tokenizer, context + continuation)
    if len(whole) <= len(head):
        raise ValueError(f"{continuation!r} is no token of its own behind {context[-20:]!r}: it can't be scored")
    return start(tokenizer, head) + head, whole[len(head) :]


def start(tokenizer: PreTrainedTokenizerBase, ids: Sequence[int]) -> list[int]:
    """What stands before a text: BOS, or, where a tokenizer has none, EOS before an empty one."""
    if tokenizer.bos_token_id is not None:
        return [tokenizer.bos_token_id]
    return [] if ids else [tokenizer.eos_token_id]


def _by(requests: Sequence[Any], key: Callable[[Any], Any]) -> dict[Any, list[int]]:
    """Places of the requests by what `key` says of them."""
    groups: dict[Any, list[int]] = {}
    for place, request in enumerate(requests):
        groups.setdefault(key(request), []).append(place)
    return groups


def _digest(*parts: Any) -> str:
    return hashlib.sha256(json.dumps(parts).encode()).hexdigest()[:24]

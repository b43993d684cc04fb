"""The paper's text-only tasks through lm-eval (Section 1.1): a multimodal model as a `Scorer` of texts."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from transformers import PreTrainedTokenizerBase

from retrace.core.requests import Request, Sampling
from retrace.papers.mm1.fewshot import Answerer, stop_tokens
from retrace.papers.mm1.rows import Piece


@dataclass
class TextScorer:
    """What `core.evaluate` asks; requests that are read together are of nearly the same length."""

    answerer: Answerer
    tokenizer: PreTrainedTokenizerBase
    max_length: int
    batch_size: int

    def batches(self, requests: Sequence[Request], *, room: int) -> list[list[int]]:  # noqa: ARG002
        order = sorted(range(len(requests)), key=lambda i: (-len(requests[i][0]) - len(requests[i][1]), i))
        return [order[start : start + self.batch_size] for start in range(0, len(order), self.batch_size)]

    def loglikelihood(self, requests: Sequence[Request], *, allowed: Sequence[int] | None) -> list[tuple[float, bool]]:
        """Whether a continuation is the likeliest is read off what would be written in its place."""
        assert allowed is None, "none of the tasks restricts its answers"
        prompts = [[Piece(tuple(context))] for context, _ in requests]
        scores = self.answerer.log_likelihoods(prompts, [[continuation] for _, continuation in requests])
        longest = max(len(continuation) for _, continuation in requests)
        written = self.answerer.generate(prompts, max_new_tokens=longest, stop=())
        return [
            (score, ids[: len(continuation)] == list(continuation))
            for (score,), ids, (_, continuation) in zip(scores, written, requests, strict=True)
        ]

    def generate(self, contexts: Sequence[list[int]], settings: Sampling, *, seeds: Sequence[int]) -> list[str]:  # noqa: ARG002
        """Greedy texts, to the end of the document or a stop that is one token; the caller cuts at the others."""
        assert settings.temperature == 0, "none of the tasks samples"
        ends = stop_tokens(self.tokenizer, settings.stop)
        prompts = [[Piece(tuple(context))] for context in contexts]
        found = self.answerer.generate(prompts, max_new_tokens=settings.max_new_tokens, stop=ends)
        return [str(self.tokenizer.decode(ids, skip_special_tokens=True)) for ids in found]

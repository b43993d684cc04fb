"""Scorers without thoughts, in the plainest way: what lm-eval's own models and ours are held against.

Shapes: B rows, T tokens, N scored positions of a row, V vocabulary, L new tokens.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase
from transformers.generation import LogitsProcessor, LogitsProcessorList, StoppingCriteria, StoppingCriteriaList

from retrace.core.data import derive_seed, generator
from retrace.core.requests import Sampling
from retrace.papers.quietstar.losses import draw
from retrace.papers.quietstar.scorer import ThoughtScorer


class PlainScorer(ThoughtScorer):
    """ThoughtScorer's rows and batches on any `logits`; its `generate` reads the whole row again for every token."""

    def __init__(
        self, tokenizer: PreTrainedTokenizerBase, *, max_length: int, batch_tokens: int, device: torch.device | str
    ) -> None:
        self.tokenizer, self.max_length, self.device = tokenizer, max_length, device
        self.batch_tokens, self.batch_size = batch_tokens, None

    @torch.inference_mode()
    def generate(self, contexts: Sequence[list[int]], settings: Sampling, *, seeds: Sequence[int]) -> list[str]:
        """See `requests.Scorer`."""
        new: list[list[int]] = [[] for _ in contexts]
        noise_BL = token_noise(seeds, settings.max_new_tokens)
        live = list(range(len(contexts)))
        for step in range(settings.max_new_tokens):
            ids_BT, mask_BT = self._pad([contexts[i] + new[i] for i in live])
            last_B1 = mask_BT.sum(-1, keepdim=True) - 1
            steps = [derive_seed(seeds[i], "step", step) for i in live]
            logits_BV = self.logits(ids_BT, mask_BT, last_B1, seeds=steps)[:, 0]
            tokens = choose(logits_BV, temperature=settings.temperature, noise_B=noise_BL[live, step]).tolist()
            for i, token in zip(live, tokens, strict=True):
                new[i].append(token)
            live = [i for i in live if not self._has_ended(new[i], settings.stop)]
            if not live:
                break
        return self.tokenizer.batch_decode(new, skip_special_tokens=True)


def token_noise(seeds: Sequence[int], num_tokens: int) -> Tensor:
    """Uniform noise (B, L) for the tokens of each row, from its seed alone."""
    return torch.stack([torch.rand(num_tokens, generator=generator(seed, "tokens")) for seed in seeds])


def choose(logits_BV: Tensor, *, temperature: float, noise_B: Tensor) -> Tensor:
    """The token (B) that the noise draws; the likeliest at temperature 0."""
    if temperature == 0:
        return logits_BV.argmax(-1)
    return draw(logits_BV / temperature, noise_B.to(logits_BV.device)[:, None])[:, 0]


class CausalLMScorer(PlainScorer):
    """Any transformers causal LM as it is; switches it to evaluation mode."""

    def __init__(self, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, *, batch_tokens: int) -> None:
        max_length = model.config.max_position_embeddings
        super().__init__(tokenizer, max_length=max_length, batch_tokens=batch_tokens, device=model.device)
        self.model = model.eval()

    def logits(
        self,
        input_ids_BT: Tensor,
        attention_mask_BT: Tensor,
        positions_BN: Tensor,
        *,
        seeds: Sequence[int],  # noqa: ARG002
    ) -> Tensor:
        """Next-token logits after the given positions, the head applied to no others' columns (B, N, V)."""
        columns_C, inverse = positions_BN.unique(return_inverse=True)
        output = self.model(
            input_ids=input_ids_BT, attention_mask=attention_mask_BT, logits_to_keep=columns_C, use_cache=False
        )
        rows_B1 = torch.arange(len(positions_BN), device=positions_BN.device)[:, None]
        return output.logits[rows_B1, inverse]

    @torch.inference_mode()
    def generate(self, contexts: Sequence[list[int]], settings: Sampling, *, seeds: Sequence[int]) -> list[str]:
        """See `requests.Scorer`; with the model's key-value cache."""
        ids_BT, mask_BT = self._pad(contexts, side="left")
        start = ids_BT.shape[1]
        drawn = _Drawn(token_noise(seeds, settings.max_new_tokens), temperature=settings.temperature, start=start)
        output_BT = self.model.generate(
            input_ids=ids_BT,
            attention_mask=mask_BT,
            max_new_tokens=settings.max_new_tokens,
            do_sample=False,  # its sampling shares one stream of noise among the rows: ours is in `drawn`
            eos_token_id=self.tokenizer.eos_token_id,
            pad_token_id=self.tokenizer.eos_token_id or 0,
            logits_processor=LogitsProcessorList([drawn] if settings.temperature else []),
            stopping_criteria=StoppingCriteriaList([_Ended(self, settings.stop, start=start)]),
        )
        return self.tokenizer.batch_decode(output_BT[:, start:], skip_special_tokens=True)


class _Drawn(LogitsProcessor):
    """Leaves of each row the one token that its noise draws."""

    def __init__(self, noise_BL: Tensor, *, temperature: float, start: int) -> None:
        self.noise_BL, self.temperature, self.start = noise_BL, temperature, start

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        noise_B = self.noise_BL[:, input_ids.shape[1] - self.start]
        tokens_B = choose(scores, temperature=self.temperature, noise_B=noise_B)
        return torch.full_like(scores, -torch.inf).scatter_(1, tokens_B[:, None], 0.0)


class _Ended(StoppingCriteria):
    """Ends each row at its first stop string; transformers' own criterion assumes that tokens carry their spaces."""

    def __init__(self, scorer: PlainScorer, stop: Sequence[str], *, start: int) -> None:
        self.scorer, self.stop, self.start = scorer, stop, start

    def __call__(self, input_ids: Tensor, scores: Any, **kwargs: Any) -> Tensor:  # noqa: ARG002
        ended = [self.scorer._has_ended(row, self.stop) for row in input_ids[:, self.start :].tolist()]
        return torch.tensor(ended, device=input_ids.device)

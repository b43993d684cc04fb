"""Text from a model that thinks before every token, with cached keys and values (specification 6.5).

The text's keys and values never depend on thoughts: each new token is read once and kept. Before it is predicted comes
a thought, whose keys and values lie in a few slots that the next thought overwrites. So a token costs one pass for
itself and START, and one for each sampled token, the last with END, whatever the length of the text.

Shapes: B sequences, T tokens of the prompts, L new tokens, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from retrace.papers.quietstar.losses import Generators, draw, uniform
from retrace.papers.quietstar.model import ThoughtModel
from retrace.papers.quietstar.passes import Passes


@torch.inference_mode()
def generate(
    model: ThoughtModel,
    input_ids_BT: Tensor,
    attention_mask_BT: Tensor | None = None,
    *,
    max_new_tokens: int,
    eos_token_id: int | None,
    temperature: float = 0.0,
    generator: Generators | None = None,
    think: bool = True,
    num_thoughts: int = 1,
    thought_generator: Generators | None = None,
    stop: Callable[[Tensor], Tensor] | None = None,
) -> Tensor:
    """New tokens (B, L), L <= `max_new_tokens`; behind the end of a sequence stands `eos_token_id`.

    Prompts may be padded on either side. Temperature 0 takes the likeliest token; above it `generator` gives the noise.
    Thoughts are greedy without `thought_generator`; a prediction is the mean over `num_thoughts` of them. A generator
    for each sequence makes its text independent of the batch. No hidden token is ever written. `stop` is asked after
    each token which sequences (B,) end, given those so far (B, L). Raises ValueError where positions do not suffice.
    """
    if (temperature > 0) != (generator is not None):
        raise ValueError(
            f"temperature={temperature} {'without' if generator is None else 'with'} a generator: "
            "sampling needs a temperature above 0 and a generator, greedy decoding neither"
        )
    ids_BT, mask_BT = _pad_left(input_ids_BT, attention_mask_BT)
    num_text, thinks = ids_BT.shape[1], think and model.config.num_sampled > 0
    passes = Passes.over(
        model,
        ids_BT,
        mask_BT,
        positions=range(num_text - 1, num_text),
        num_thoughts=num_thoughts if thinks else 0,
        capacity=num_text + max_new_tokens,
    )
    tokens_BL = ids_BT.new_empty(len(ids_BT), 0)
    ended_B = torch.zeros(len(ids_BT), dtype=torch.bool, device=ids_BT.device)
    while tokens_BL.shape[1] < max_new_tokens and not bool(ended_B.all()):
        found = _next(model, passes, thought_generator) if thinks else model.head.log_probs(passes.read()[:, -1:])
        scores_BV = found[:, 0].index_fill(-1, model.blocked, -torch.inf)
        token_B = _choose(scores_BV, temperature, generator)
        if eos_token_id is not None:
            token_B = token_B.masked_fill(ended_B, eos_token_id)
            ended_B = ended_B | (token_B == eos_token_id)
        tokens_BL = torch.cat([tokens_BL, token_B[:, None]], 1)
        if stop is not None:
            ended_B = ended_B | stop(tokens_BL)
        passes.append(token_B)
    return tokens_BL


def _next(model: ThoughtModel, passes: Passes, thought_generator: Generators | None) -> Tensor:
    """Log-probabilities (B, 1, V) of the next token, after a thought."""
    if passes.state.is_tail:
        base_B1C, opened_B1C = passes.read_and_open()
    else:
        base_B1C, opened_B1C = passes.read()[:, -1:], None
    return model.predict_next(passes, base_B1C, thought_generator, opened_BNC=opened_B1C).mixed_BNV


def _choose(scores_BV: Tensor, temperature: float, generator: Generators | None) -> Tensor:
    if generator is None:
        return scores_BV.argmax(-1)
    noise_B1 = uniform((len(scores_BV), 1), generator, scores_BV.device)
    return draw(scores_BV / temperature, noise_B1)[:, 0]


def _pad_left(input_ids_BT: Tensor, attention_mask_BT: Tensor | None) -> tuple[Tensor, Tensor | None]:
    """Prompts that end in the last column."""
    if attention_mask_BT is None or bool(attention_mask_BT[:, -1].all()):
        return input_ids_BT, attention_mask_BT
    if not bool(attention_mask_BT.any(1).all()):
        raise ValueError("a prompt is empty: give each at least one token, such as the beginning of sequence")
    order_BT = attention_mask_BT.bool().to(torch.uint8).argsort(dim=1, stable=True)
    return input_ids_BT.gather(1, order_BT), attention_mask_BT.gather(1, order_BT)

"""Generation with cached keys and values equals predicting each token from the whole text anew."""

from __future__ import annotations

import pytest
import torch
from thinkers import HIDDEN_IDS, build, seeded
from torch import Tensor

from retrace.papers.quietstar.generation import generate
from retrace.papers.quietstar.losses import Generators, draw, uniform
from retrace.papers.quietstar.model import ThoughtModel

NUM_NEW = 7


def recompute(
    model: ThoughtModel,
    ids_1T: Tensor,
    *,
    temperature: float = 0.0,
    generator: Generators | None = None,
    num_thoughts: int = 1,
    thought_generator: Generators | None = None,
    think: bool = True,
) -> Tensor:
    """The same text for one prompt without padding, in the plainest way: all of it is read for every token."""
    for _ in range(NUM_NEW):
        last = torch.tensor([[ids_1T.shape[1] - 1]])
        if think:
            found = model.predict(ids_1T, None, last, generator=thought_generator, num_thoughts=num_thoughts).mixed_BNV
        else:
            found = model.predict_base(ids_1T, None, last)
        scores = found[:, 0].index_fill(-1, model.blocked, -torch.inf)
        token = scores.argmax(-1, keepdim=True)
        if generator is not None:
            token = draw(scores / temperature, uniform((1, 1), generator, ids_1T.device))
        ids_1T = torch.cat([ids_1T, token], 1)
    return ids_1T[:, -NUM_NEW:]


def prompts(padding: str) -> tuple[Tensor, Tensor, list[Tensor]]:
    """Three prompts of different length as a padded batch, and one by one."""
    rows = [torch.randint(2, 37, (1, length), generator=seeded(length)) for length in (4, 9, 6)]
    ids, mask = torch.zeros(3, 9, dtype=torch.long), torch.zeros(3, 9, dtype=torch.long)
    for index, row in enumerate(rows):
        at = slice(9 - row.shape[1], 9) if padding == "left" else slice(0, row.shape[1])
        ids[index, at], mask[index, at] = row[0], 1
    return ids, mask, rows


@pytest.mark.parametrize("padding", ["left", "right"])
@pytest.mark.parametrize("family", ["llama", "mistral_small_window", "gpt_neox", "opt", "gemma2_small_window"])
def test_cached_greedy_text_equals_full_recomputation(family: str, padding: str) -> None:
    model = build(family)
    ids_BT, mask_BT, rows = prompts(padding)
    cached = generate(model, ids_BT, mask_BT, max_new_tokens=NUM_NEW, eos_token_id=None)
    assert torch.equal(cached, torch.cat([recompute(model, row) for row in rows]))


@pytest.mark.parametrize("num_thoughts", [1, 3])
def test_sampled_text_and_thoughts_equal_full_recomputation_given_the_same_noise(num_thoughts: int) -> None:
    model = build()
    ids_BT, mask_BT, rows = prompts("left")
    settings = {"max_new_tokens": NUM_NEW, "eos_token_id": None, "temperature": 1.3, "num_thoughts": num_thoughts}
    noise = {"generator": [seeded(i) for i in range(3)], "thought_generator": [seeded(9 + i) for i in range(3)]}
    cached = generate(model, ids_BT, mask_BT, **settings, **noise)
    for index, row in enumerate(rows):
        own = {"generator": seeded(index), "thought_generator": seeded(9 + index)}
        plain = recompute(model, row, temperature=1.3, num_thoughts=num_thoughts, **own)
        assert torch.equal(cached[index], plain[0])
    other = generate(model, ids_BT, mask_BT, **settings, **{**noise, "generator": [seeded(50 + i) for i in range(3)]})
    assert not torch.equal(cached, other)


def test_without_thinking_it_is_the_trunk_and_thinking_changes_the_text() -> None:
    model = build()
    ids_BT, mask_BT, rows = prompts("left")
    plain = generate(model, ids_BT, mask_BT, max_new_tokens=NUM_NEW, eos_token_id=None, think=False)
    assert torch.equal(plain, torch.cat([recompute(model, row, think=False) for row in rows]))
    assert not torch.equal(plain, generate(model, ids_BT, mask_BT, max_new_tokens=NUM_NEW, eos_token_id=None))


def test_hidden_tokens_are_never_written() -> None:
    model = build()
    with torch.no_grad():
        model.trunk.lm_head.weight[list(HIDDEN_IDS)] *= 30  # the likeliest or the least likely everywhere
    ids_BT, mask_BT, _ = prompts("left")
    tokens = generate(model, ids_BT, mask_BT, max_new_tokens=40, eos_token_id=None, temperature=2.0, generator=seeded())
    assert not torch.isin(tokens, torch.tensor(HIDDEN_IDS)).any()


def test_a_sequence_ends_at_eos_or_where_it_is_told_to_and_all_stop_when_the_last_has_ended() -> None:
    model = build()
    ids_BT, mask_BT, _ = prompts("left")
    free = generate(model, ids_BT, mask_BT, max_new_tokens=NUM_NEW, eos_token_id=None)
    eos = int(free[1, 2])
    ended = generate(model, ids_BT, mask_BT, max_new_tokens=NUM_NEW, eos_token_id=eos)
    for row, whole in zip(ended, free, strict=True):
        end = (whole == eos).nonzero()
        length = int(end[0]) + 1 if len(end) else NUM_NEW
        assert torch.equal(row[:length], whole[:length])
        assert bool((row[length:] == eos).all())
    stopped = generate(
        model,
        ids_BT,
        mask_BT,
        max_new_tokens=NUM_NEW,
        eos_token_id=None,
        stop=lambda t: torch.full((3,), t.shape[1] == 4),
    )
    assert torch.equal(stopped, free[:, :4])


def test_wrong_use_is_refused_in_one_sentence() -> None:
    model = build()
    ids_BT, mask_BT, _ = prompts("left")
    with pytest.raises(ValueError, match="temperature=1.0 without a generator"):
        generate(model, ids_BT, mask_BT, max_new_tokens=2, eos_token_id=None, temperature=1.0)
    with pytest.raises(ValueError, match="texts of 209 tokens and thoughts of 6 positions do not fit into the 128"):
        generate(model, ids_BT, mask_BT, max_new_tokens=200, eos_token_id=None)
    with pytest.raises(ValueError, match="a prompt is empty"):
        generate(model, ids_BT, torch.zeros_like(mask_BT), max_new_tokens=2, eos_token_id=None)
    with pytest.raises(ValueError, match="2 generators for 3 sequences"):
        generate(model, ids_BT, mask_BT, max_new_tokens=2, eos_token_id=None, thought_generator=[seeded(), seeded()])

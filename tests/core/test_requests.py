"""Texts to tokens to answers: what is refused, what survives a kill, and whose noise is whose."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch
from scorers import CausalLMScorer, choose
from test_evaluate import DIGITS, TEXT, Bigram, byte_pair_tokenizer, requests_of, tiny_model, write_task

from retrace.core.answers import FirstInteger
from retrace.core.evaluate import evaluate_task, scorer_model
from retrace.core.requests import GenerationSettings, Responses, ScorerRequests


@pytest.mark.parametrize(
    ("text", "found"),
    [
        ("17. Therefore, the answer is 12.", "12"),
        ("the answer is $1,234,000.50", "1234000"),
        ("the answer is\n -3 and 4", "-3"),
        ("12. the answer is unclear", "[none]"),
        ("12", "[none]"),
        ("the answer is 5. No, the answer is 6", "5"),
    ],
)
def test_the_first_integer_behind_a_phrase(text, found):
    assert FirstInteger(after="the answer is").apply([[text, text]], [{}]) == [[found, found]]


def test_generation_settings_are_kept_or_refused():
    settings = GenerationSettings.of({"until": ["\n", ""], "do_sample": False, "temperature": 0.7})
    assert (settings.stop, settings.temperature, settings.max_new_tokens, settings.then) == (("\n",), 0.0, 256, None)
    assert settings.cut("one\ntwo") == "one"
    assert GenerationSettings.of({"do_sample": True}).temperature == 1.0
    assert GenerationSettings.of({"until": "a", "temperature": 0.7}).temperature == 0.7
    for given, message in (
        ({"top_p": 0.9}, "generation_kwargs.top_p=0.9: no such setting; there are: until, max_gen_toks"),
        ({"then": "so"}, "generation_kwargs.then='so': expected {text: ..., max_gen_toks: ...}"),
        ({"temperature": -1}, "generation_kwargs.temperature=-1.0: expected 0"),
    ):
        with pytest.raises(ValueError) as error:
            GenerationSettings.of(given)
        assert message in str(error.value)


def test_drawn_tokens_follow_the_softmax_at_their_temperature():
    logits_V = torch.tensor([0.0, 1.0, -torch.inf, 2.0])
    noise_B = torch.rand(20_000, generator=torch.Generator().manual_seed(0))
    for temperature in (0.5, 1.0, 2.0):
        tokens = choose(logits_V.expand(len(noise_B), -1), temperature=temperature, noise_B=noise_B)
        shares = torch.bincount(tokens, minlength=4) / len(noise_B)
        torch.testing.assert_close(shares, (logits_V / temperature).softmax(-1), atol=0.01, rtol=0)
    ends = choose(logits_V.expand(2, -1), temperature=1.0, noise_B=torch.tensor([0.0, 1.0]))
    assert ends.tolist() == [0, 3]  # never the token of probability 0
    assert choose(logits_V[None], temperature=0.0, noise_B=torch.zeros(1)).tolist() == [3]


@pytest.fixture(scope="module")
def scorer() -> CausalLMScorer:
    tokenizer = byte_pair_tokenizer()
    return CausalLMScorer(tiny_model(tokenizer), tokenizer, batch_tokens=200)


def model(scorer: Any, *, seed: int = 0, path: Path | None = None, on_progress: Any = lambda _: None) -> ScorerRequests:
    return scorer_model()(
        scorer, seed=seed, answers_of=lambda _: None, responses=Responses(path), on_progress=on_progress
    )


SAMPLING = {"until": ["Q"], "max_gen_toks": 12, "do_sample": True, "temperature": 0.9}
PROMPTS = [TEXT[:n] for n in (10, 25, 40, 55)]


def repeated(prompts: list[str], repeats: int = 3) -> list[Any]:
    return requests_of(*[(prompt, SAMPLING) for prompt in prompts for _ in range(repeats)])


def test_a_sampled_text_depends_on_its_prompt_repetition_and_seed_alone(scorer):
    every = model(scorer).generate_until(repeated(PROMPTS))
    assert model(scorer).generate_until(repeated(PROMPTS[:2])) == every[:6]  # a limit
    assert model(scorer).generate_until(repeated(PROMPTS, 2)) == [every[i] for i in (0, 1, 3, 4, 6, 7, 9, 10)]
    other = requests_of((PROMPTS[0], SAMPLING | {"until": ["e"]}))
    assert model(scorer).generate_until([*other, *repeated(PROMPTS)])[1:] == every  # another task beside it
    small = CausalLMScorer(scorer.model, scorer.tokenizer, batch_tokens=1)
    assert model(small).generate_until(repeated(PROMPTS)) == every
    assert model(scorer, seed=1).generate_until(repeated(PROMPTS)) != every
    assert all(count == 1 for count in Counter(every).values())  # repetitions differ


def test_batches_hold_what_fits_and_read_shared_rows_once(scorer):
    tokens = list(range(5, 65))
    options = [(tokens[:20], [7]), (tokens[:30], [8]), (tokens[:20], [9]), (tokens[:60], [3]), (tokens[:59], [3])]
    assert scorer.batches(options, room=0) == [[3, 4, 1], [0, 2]]
    assert scorer.batches([(tokens[:20], []), (tokens[:20], []), (tokens[:60], [])], room=50) == [[2], [0, 1]]
    one = CausalLMScorer(scorer.model, scorer.tokenizer, batch_tokens=200)
    one.batch_size = 1
    assert one.batches(options, room=0) == [[3], [4], [1], [0, 2]]
    assert scorer.batches([], room=0) == []


class Killed(Exception):
    pass


class Counting(Bigram):
    """Counts the batches that it is asked for."""

    asked = 0

    def loglikelihood(self, requests: Any, *, allowed: Any) -> Any:
        self.asked += 1
        return super().loglikelihood(requests, allowed=allowed)


def test_a_killed_task_goes_on_behind_its_last_batch_with_the_same_numbers(tmp_path):
    write_task(tmp_path, "sums", metadata={"allowed": DIGITS})
    rows = [{"question": "?" * (i % 7), "answer": str(i)} for i in range(40)]
    options = {"seed": 0, "tasks_dir": tmp_path, "data_dir": None, "generated": {"sums": rows}}
    weights = {" ": {"7": 30.0, "1": 5.0}, "1": {"3": 4.0}}
    whole = Counting(weights)
    expected = evaluate_task("sums", scorers={"": whole, "base": Bigram({})}, **options)
    shares: list[float] = []

    def kill(share: float) -> None:
        shares.append(share)
        if share > 0.25:
            raise Killed

    folder = tmp_path / "responses"
    with pytest.raises(Killed):
        evaluate_task("sums", scorers={"": Counting(weights)}, responses_dir=folder, on_progress=kill, **options)
    (file,) = folder.iterdir()
    before = file.read_text()
    file.write_text(before + '["torn li')
    again = Counting(weights)
    found = evaluate_task("sums", scorers={"": again, "base": Bigram({})}, responses_dir=folder, **options)
    assert found == expected
    assert 0 < len(shares) < whole.asked
    assert again.asked == whole.asked - len(shares)
    assert file.read_text().startswith(before)


def test_what_was_kept_of_half_a_batch_is_asked_again(scorer, tmp_path):
    path = tmp_path / "responses.jsonl"
    expected = model(scorer, path=path).generate_until(repeated(PROMPTS))
    lines = path.read_text().splitlines(keepends=True)
    path.write_text("".join(lines[:1]))
    assert model(scorer, path=path).generate_until(repeated(PROMPTS)) == expected
    assert Counter(path.read_text().splitlines(keepends=True)).keys() == Counter(lines).keys()

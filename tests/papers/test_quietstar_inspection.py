"""What is said of a token is what the model predicts there, in any chunks, and the document stays as it was written."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import MistralConfig, MistralForCausalLM, PreTrainedTokenizerBase

from retrace.core.data import generator
from retrace.papers.quietstar import inspection
from retrace.papers.quietstar.config import ThoughtConfig
from retrace.papers.quietstar.documents import from_ids, from_text
from retrace.papers.quietstar.gains import Decoding, Export, Inspection
from retrace.papers.quietstar.inspection import inspect, inspect_document
from retrace.papers.quietstar.model import ThoughtModel
from retrace.papers.quietstar.tokenizer import build_tokenizer, train_tokenizer
from retrace.papers.quietstar.trunks import build_thinker

TEXT = "Q: Ada has 3 plums, first gets 2, then doubles them.\n\n  How many now?\nA: 10\n"
WORDS = build_tokenizer()
BYTES = train_tokenizer([TEXT, "naive \u00e9\u00e9 text"] * 9, vocab_size=290)
BARE = train_tokenizer([TEXT] * 9, vocab_size=290)
BARE.backend_tokenizer.post_processor = None  # puts no <bos> before a text
THOUGHTS = ThoughtConfig(num_sampled=3, num_true=2, num_thoughts=2, policy_weight=1.0, start_init="(", end_init=")")


@torch.no_grad()
def thinker(tokenizer: PreTrainedTokenizerBase, *, positions: int = 96, vocab_size: int | None = None) -> ThoughtModel:
    torch.manual_seed(0)
    config = MistralConfig(
        vocab_size=vocab_size or len(tokenizer), hidden_size=16, intermediate_size=24, num_hidden_layers=2,
        num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=positions, pad_token_id=None,
    )  # fmt: skip
    model = build_thinker(MistralForCausalLM(config), THOUGHTS, tokenizer, seed=0)
    for parameter in model.parameters():  # a fresh head mixes nothing in, and a fresh trunk is nearly uniform
        parameter.copy_(torch.randn_like(parameter) * 0.3)
    return model.eval()


def expected(model: ThoughtModel, ids: list[int], position: int, noise: torch.Generator | None = None) -> Any:
    """Of the token after one position of a whole sequence: log-probabilities without and with, weight, thought."""
    found = model.predict(torch.tensor([ids]), None, torch.tensor([[position]]), generator=noise)
    target = ids[position + 1]
    numbers = (found.base_BNV[0, 0, target], found.mixed_BNV[0, 0, target], found.weight_BN[0, 0])
    return [x.item() for x in numbers], found.thoughts_BPNM[0, 0, 0].tolist()


def columns(found: Inspection) -> torch.Tensor:
    rows = [(t.log_prob_base, t.log_prob, t.weight) for t in found.tokens]
    return torch.tensor([[math.nan if x is None else x for x in row] for row in rows])


@pytest.mark.parametrize("tokenizer", [WORDS, BYTES], ids=["words", "bytes"])
def test_every_number_is_the_models_own_prediction_at_that_token(tokenizer: PreTrainedTokenizerBase) -> None:
    model = thinker(tokenizer)
    ids = tokenizer(TEXT)["input_ids"]
    found = inspect(model, tokenizer, TEXT)
    assert [token.id for token in found.tokens] == ids[1:]  # <bos> is context, and predicts the first token
    for position, token in enumerate(found.tokens):
        numbers, thought = expected(model, ids, position)
        assert (token.log_prob_base, token.log_prob, token.weight) == pytest.approx(numbers, abs=2e-5)
        assert token.gain == pytest.approx(numbers[1] - numbers[0], abs=4e-5)
        assert list(token.thoughts[0].token_ids) == thought
        assert token.thoughts[0].text == tokenizer.decode(thought)
    assert max(abs(token.gain) for token in found.tokens) > 0.05  # type: ignore[arg-type]  # or it would show nothing


def test_chunks_of_any_size_give_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    model = thinker(WORDS)
    whole = inspect(model, WORDS, TEXT)
    monkeypatch.setattr(inspection, "CHUNK_POSITIONS", (3, 3))
    chunked = inspect(model, WORDS, TEXT)
    torch.testing.assert_close(columns(chunked), columns(whole), atol=2e-5, rtol=0)
    assert [t.thoughts[0].token_ids for t in chunked.tokens] == [t.thoughts[0].token_ids for t in whole.tokens]


def test_samples_are_mixed_as_probabilities_and_each_has_its_own_gain() -> None:
    model = thinker(WORDS)
    ids = WORDS(TEXT)["input_ids"]
    found = inspect(model, WORDS, TEXT, decoding=Decoding(num_samples=3, seed=5, temperature=2.0))
    hot = thinker(WORDS)
    hot.config = THOUGHTS.model_copy(update={"sample_temperature": 2.0})
    every = torch.arange(len(ids) - 1)[None]
    for sample in range(3):
        noise = generator(5, "think", sample)
        direct = hot.predict(torch.tensor([ids[:-1]]), None, every, generator=noise)
        assert [list(t.thoughts[sample].token_ids) for t in found.tokens] == direct.thoughts_BPNM[0, 0].tolist()
    for token in found.tokens:
        assert token.log_prob is not None
        assert token.log_prob_base is not None
        mixed = [math.exp(token.log_prob_base + thought.gain) for thought in token.thoughts]
        assert math.exp(token.log_prob) == pytest.approx(sum(mixed) / 3, rel=1e-5)
        assert token.weight == pytest.approx(sum(thought.weight for thought in token.thoughts) / 3, rel=1e-4, abs=1e-6)
    assert any(t.thoughts[0].token_ids != t.thoughts[1].token_ids for t in found.tokens)
    assert model.config.sample_temperature == 1.0  # inspecting changes no model
    assert found.decoding.temperature == 2.0


def test_samples_follow_from_the_seed_and_more_of_them_change_none_of_the_first() -> None:
    model = thinker(WORDS)

    def sampled(num: int, seed: int) -> list[tuple[int, ...]]:
        found = inspect(model, WORDS, TEXT, decoding=Decoding(num_samples=num, seed=seed))
        return [token.thoughts[0].token_ids for token in found.tokens]

    assert sampled(1, 0) == sampled(3, 0)
    assert sampled(1, 0) != sampled(1, 1)


def test_a_long_text_is_read_in_windows_with_half_of_each_as_context() -> None:
    model = thinker(WORDS)
    bos, *ids = WORDS(TEXT)["input_ids"]
    seen: list[tuple[int, int]] = []
    found = inspect(model, WORDS, TEXT, window=10, on_progress=lambda done, total: seen.append((done, total)))
    assert found.text == TEXT
    assert [token.id for token in found.tokens] == ids
    for index in (0, 9, 10, 14, 15, len(ids) - 1):
        start = 0 if index < 10 else 5 * ((index - 10) // 5 + 1)
        numbers, thought = expected(model, [bos, *ids[start : index + 1]], index - start)
        token = found.tokens[index]
        assert (token.log_prob_base, token.log_prob, token.weight) == pytest.approx(numbers, abs=2e-5)
        assert list(token.thoughts[0].token_ids) == thought
    assert seen == [(min(done, len(ids)), len(ids)) for done in range(10, len(ids) + 5, 5)]


def test_the_first_token_of_a_text_that_nothing_opens_has_no_prediction() -> None:
    model = thinker(BARE)
    found = inspect(model, BARE, TEXT)
    first, *rest = found.tokens
    assert (first.log_prob_base, first.log_prob, first.gain, first.weight, first.thoughts) == (None,) * 4 + ((),)
    assert all(token.gain is not None for token in rest)
    assert found.summary().num_tokens == len(rest)
    numbers, _ = expected(model, [token.id for token in found.tokens], 0)
    assert rest[0].log_prob_base == pytest.approx(numbers[0], abs=2e-5)


class Largest(TorchDispatchMode):
    """The most elements of any floating-point result whose last axis is the vocabulary."""

    def __init__(self, vocab_size: int) -> None:
        super().__init__()
        self.vocab_size, self.elements = vocab_size, 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        for x in result if isinstance(result, tuple | list) else (result,):
            if isinstance(x, torch.Tensor) and x.is_floating_point() and x.dim() and x.shape[-1] == self.vocab_size:
                self.elements = max(self.elements, x.numel())
        return result


def test_logits_exist_for_a_chunk_of_a_long_text_at_a_time(monkeypatch: pytest.MonkeyPatch) -> None:
    vocab_size, text = 4096, TEXT * 8
    monkeypatch.setattr(inspection, "CHUNK_LOGITS", 20 * vocab_size)
    model = thinker(WORDS, positions=512, vocab_size=vocab_size)
    assert len(WORDS(text)["input_ids"]) > 200
    with Largest(vocab_size) as largest:
        inspect(model, WORDS, text)
    assert largest.elements == 20 * vocab_size


def test_the_summary_is_what_its_names_say() -> None:
    found = inspect(thinker(WORDS), WORDS, TEXT)
    gains = [token.gain for token in found.tokens if token.gain is not None]
    summary = found.summary()
    assert summary.mean_gain == pytest.approx(sum(gains) / len(gains))
    assert summary.helped == sum(gain >= 0.05 for gain in gains) / len(gains)
    assert summary.harmed == sum(gain <= -0.05 for gain in gains) / len(gains)
    hardest = sorted(found.tokens, key=lambda token: token.log_prob_base or 0.0)[: len(gains) // 10]
    assert summary.hardest_gain == pytest.approx(sum(t.gain or 0.0 for t in hardest) / len(hardest))


def test_what_is_written_as_json_is_read_back_as_it_was() -> None:
    found = inspect(thinker(WORDS), WORDS, TEXT, decoding=Decoding(num_samples=2))
    export = Export.of(found, origin={"model": "here"})
    text = export.model_dump_json(by_alias=True)
    assert Export.model_validate_json(text) == export
    assert export.text == TEXT
    schema = Export.model_json_schema()
    assert set(schema["required"]) >= {"origin", "text", "summary", "decoding", "tokens"}


@pytest.mark.parametrize("tokenizer", [WORDS, BYTES, BARE], ids=["words", "bytes", "bare"])
@settings(max_examples=60, deadline=None)
@given(text=st.text(st.characters(exclude_categories=["Cs"]), min_size=1))
def test_the_pieces_of_a_text_are_the_text(tokenizer: PreTrainedTokenizerBase, text: str) -> None:
    if not text.strip() or not len(tokenizer(text, add_special_tokens=False)["input_ids"]):
        return
    document = from_text(tokenizer, text)
    assert "".join(document.pieces) == text
    assert len(document.pieces) == len(document.ids)
    assert [*document.context, *document.ids] == tokenizer(text)["input_ids"]


@pytest.mark.parametrize("tokenizer", [WORDS, BYTES], ids=["words", "bytes"])
def test_the_pieces_of_token_ids_are_what_the_decoder_makes_of_them(tokenizer: PreTrainedTokenizerBase) -> None:
    ids = [*tokenizer(TEXT)["input_ids"], tokenizer.eos_token_id, *tokenizer("(A) caf\u00e9 12%")["input_ids"]]
    document = from_ids(tokenizer, ids)
    assert (document.context, list(document.ids)) == ((ids[0],), ids[1:])
    assert "".join(document.pieces) == tokenizer.decode(ids[1:])
    assert "<eos>" in "".join(document.pieces)


def test_what_cannot_be_looked_at_is_refused_with_what_would_do() -> None:
    model = thinker(WORDS)
    for text in ("", " \n"):
        with pytest.raises(ValueError, match="the text is empty"):
            inspect(model, WORDS, text)
    with pytest.raises(ValueError, match=r"the text has 2\d\d tokens, and the model has 96 .* with --window 89"):
        inspect(model, WORDS, TEXT * 8)
    inspect(model, WORDS, TEXT * 8, window=89)
    for window in (1, 90):
        with pytest.raises(ValueError, match=f"window={window}: expected 2 to 89 tokens"):
            inspect(model, WORDS, TEXT, window=window)
    with pytest.raises(ValueError, match="the model has 7 positions, and a thought takes 7"):
        inspect(thinker(WORDS, positions=7), WORDS, TEXT)
    with pytest.raises(ValueError, match="one token and nothing before it"):
        inspect_document(thinker(BARE), BARE, from_text(BARE, "Q"))
    model.config = THOUGHTS.model_copy(update={"num_sampled": 0})
    with pytest.raises(ValueError, match="never thinks"):
        inspect(model, WORDS, TEXT)
    broken = thinker(WORDS)
    broken.trunk.get_output_embeddings().weight.data[7] = math.nan
    with pytest.raises(ValueError, match="not finite"):
        inspect(broken, WORDS, TEXT)

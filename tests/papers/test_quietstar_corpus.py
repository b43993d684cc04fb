"""The procedural corpus: what it says is true, what is held out stays out, the tokenizer loses only spaces."""

from __future__ import annotations

import re
import string
from collections import Counter
from collections.abc import Iterator

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from retrace.papers.quietstar import words
from retrace.papers.quietstar.corpus import LETTERS, document, questions, windows
from retrace.papers.quietstar.tokenizer import build_tokenizer
from retrace.papers.quietstar.world import COLOR, Composition, CorpusConfig, Mixture, is_held_out, is_trainable, world

CONFIG = CorpusConfig(
    kind="procedural",
    world_seed=0,
    num_entities=16,
    num_relations=3,
    min_hops=2,
    max_hops=4,
    max_number=9,
    mixture=Mixture(prose=0.2, arithmetic=0.4, facts=0.4),
    single_share=0.3,
    aside_share=0.5,
    holdout_share=0.25,
    seq_len=64,
)
QUESTION = re.compile(r"Q: (.*)\n((?:\([A-E]\) .*\n)*)A:(?: \((.*)\))? (.*)\n")
FACT = re.compile(r"From (\w+), (.*)\. What is it\?")
STORY = re.compile(r"\w+ has (\d+) \w+, (.*)\. How many now\?")
ORDER = re.compile(rf"^(?:{'|'.join(words.ORDER)}) (?:the )?")
TOKENIZER = build_tokenizer()


def read_steps(question: str) -> Composition:
    """The composition that a question asks for, read from its words alone; values are worked out here."""
    family, start, told = "facts", "", ""
    if found := FACT.fullmatch(question):
        start, told = found[1], found[2]
    elif found := STORY.fullmatch(question):
        family, start, told = "arithmetic", words.NUMBERS[int(found[1])], found[2]
    steps = tuple(ORDER.sub("", step) for step in told.split(", "))
    values, value = [], start
    for step in steps:
        value = after(family, value, step)
        values.append(value)
    return Composition(family, start, steps, tuple(values))  # type: ignore[arg-type]


def after(family: str, value: str, step: str) -> str:
    """One step: arithmetic is done anew, facts are looked up."""
    if family == "facts":
        return world(CONFIG).steps["facts"][value][step]
    number = words.NUMBERS.index(value)
    verb, _, amount = step.partition(" ")
    changed = {"doubles": lambda: 2 * number, "loses": lambda: number / 2}.get(verb)
    result = changed() if changed else number + (int(amount) if verb == "gets" else -int(amount))
    assert result == int(result)
    return words.NUMBERS[int(result)]


def texts(split: str, count: int = 3000) -> Iterator[str]:
    for index in range(count):
        yield document(CONFIG, split=split, seed=0, index=index).text  # type: ignore[arg-type]


@pytest.mark.parametrize("split", ["base", "continued", "heldout"])
def test_every_answer_and_aside_is_right(split: str) -> None:
    num_questions = 0
    for text in texts(split):
        if not (found := QUESTION.fullmatch(text)):
            continue
        num_questions += 1
        composition = read_steps(found[1])
        assert found[3] is None or found[3] in {" ".join(composition.values) + ending for ending in words.ENDINGS}
        if composition.family == "arithmetic":
            assert words.NUMBERS[int(found[4])] == composition.answer
        else:
            assert f"({found[4]}) {composition.answer}\n" in found[2]
            assert found[2].count("\n") == len(LETTERS)
    assert num_questions > 1000


def test_single_steps_are_right() -> None:
    num_facts = num_sums = 0
    for text in texts("base"):
        for entity, relation, other in re.findall(r"(\w+)'s (\w+) is (\w+)\.", text):
            assert world(CONFIG).steps["facts"][entity][relation] == other
            num_facts += 1
        for start, step, end in re.findall(r"has (\d+) \w+, first ([^.]*)\. Now it is (\w+)\.", text):
            assert after("arithmetic", words.NUMBERS[int(start)], step) == end
            num_sums += 1
    assert min(num_facts, num_sums) > 500


@pytest.mark.parametrize("split", ["base", "continued"])
@pytest.mark.parametrize("seed", [0, 7])
def test_held_out_compositions_never_occur_in_training_text(split: str, seed: int) -> None:
    for index in range(3000):
        text = document(CONFIG, split=split, seed=seed, index=index).text  # type: ignore[arg-type]
        if found := QUESTION.fullmatch(text):
            composition = read_steps(found[1])
            assert not is_held_out(CONFIG, composition)
            assert is_trainable(CONFIG, composition)  # nor is it the beginning of a longer one
        else:
            assert "then" not in text  # what is no question has single steps only


def test_evaluation_asks_only_what_is_held_out() -> None:
    for family in ("arithmetic", "facts"):
        asked = [read_steps(item["question"]) for item in questions(CONFIG, family=family, count=100)]  # type: ignore[arg-type]
        assert all(is_held_out(CONFIG, composition) for composition in asked)
        assert len(set(asked)) == 100
        assert {len(composition.steps) for composition in asked} == {2, 3, 4}
    for text in texts("heldout", 500):
        if found := QUESTION.fullmatch(text):
            assert is_held_out(CONFIG, read_steps(found[1]))


def test_questions_have_the_form_of_the_real_data_sets() -> None:
    fact = questions(CONFIG, family="facts", count=1)[0]
    assert fact["choices"]["label"] == list(LETTERS)
    answer = fact["choices"]["text"][LETTERS.index(fact["answerKey"])]
    assert answer == read_steps(fact["question"]).answer
    story = questions(CONFIG, family="arithmetic", count=1)[0]
    assert words.NUMBERS[int(story["answer"].split("#### ")[1])] == read_steps(story["question"]).answer


def test_about_a_quarter_is_held_out_and_colors_are_equally_common() -> None:
    known = world(CONFIG).steps["facts"]
    relations = words.RELATIONS[: CONFIG.num_relations]
    chains = [
        Composition("facts", entity, (first, second, COLOR), ("", "", ""))
        for entity in known
        for first in relations
        for second in relations
    ]
    assert sum(is_held_out(CONFIG, chain) for chain in chains) / len(chains) == pytest.approx(0.25, abs=0.08)
    counts = Counter(facts[COLOR] for facts in known.values())
    assert max(counts.values()) - min(counts.values()) <= 1


def test_only_base_text_has_asides_and_shares_are_those_of_the_config() -> None:
    assert not any("(" in QUESTION.sub("", text) or "A: (" in text for text in texts("continued"))
    assert not any("A: (" in text for text in texts("heldout"))
    documents = [document(CONFIG, split="base", seed=0, index=index) for index in range(4000)]
    shares = Counter(item.family for item in documents)
    for family in ("prose", "arithmetic", "facts"):
        assert shares[family] / len(documents) == pytest.approx(getattr(CONFIG.mixture, family), abs=0.03)
    asked = [item for item in documents if QUESTION.fullmatch(item.text)]
    assert sum(item.has_aside for item in asked) / len(asked) == pytest.approx(0.5, abs=0.04)
    assert 1 - len(asked) / (0.8 * len(documents)) == pytest.approx(0.3, abs=0.04)


def test_documents_and_windows_are_pure_functions() -> None:
    first = document(CONFIG, split="base", seed=3, index=41)
    document(CONFIG, split="base", seed=3, index=42)
    assert document(CONFIG, split="base", seed=3, index=41) == first
    assert document(CONFIG, split="base", seed=4, index=41) != first
    assert document(CONFIG, split="continued", seed=3, index=41) != first
    few = windows(CONFIG, TOKENIZER, split="base", seed=3, count=20)
    assert windows(CONFIG, TOKENIZER, split="base", seed=3, count=60)[:20] == few


def test_windows_hold_whole_documents() -> None:
    rows = windows(CONFIG, TOKENIZER, split="base", seed=0, count=200)
    filled = 0
    for ids in rows:
        assert len(ids) <= CONFIG.seq_len
        assert TOKENIZER.pad_token_id not in ids
        assert ids[0] == TOKENIZER.bos_token_id
        assert ids[-1] == TOKENIZER.eos_token_id
        assert ids.count(TOKENIZER.bos_token_id) == ids.count(TOKENIZER.eos_token_id)
        filled += len(ids)
    assert filled / (len(rows) * CONFIG.seq_len) > 0.75


def test_settings_that_make_no_corpus_are_refused() -> None:
    with pytest.raises(ValueError, match=r"must sum to 1, but sum to 0\.9"):
        Mixture(prose=0.3, arithmetic=0.3, facts=0.3)
    with pytest.raises(ValueError, match="max_hops=2 is below min_hops=3"):
        CorpusConfig.model_validate(CONFIG.model_dump() | {"min_hops": 3, "max_hops": 2})
    short = CONFIG.model_copy(update={"seq_len": 32})
    with pytest.raises(ValueError, match="seq_len=32 is too short"):
        windows(short, TOKENIZER, split="base", seed=0, count=100)
    with pytest.raises(ValueError, match="ask for fewer"):
        questions(CONFIG, family="facts", count=10_000)


def test_the_tokenizer_returns_the_corpus_as_it_was() -> None:
    for text in [*texts("base", 500), *texts("heldout", 200)]:
        ids = TOKENIZER(text)["input_ids"]
        assert ids[0] == TOKENIZER.bos_token_id
        assert TOKENIZER.decode(ids, skip_special_tokens=True) == text
        assert not any(token.startswith("##") for token in TOKENIZER.convert_ids_to_tokens(ids))  # words are whole


@settings(max_examples=200, deadline=None)
@given(st.text(alphabet=string.printable, max_size=80))
def test_any_ascii_text_keeps_all_but_its_spaces(text: str) -> None:
    ids = TOKENIZER(text, add_special_tokens=False)["input_ids"]
    assert TOKENIZER.unk_token_id not in ids
    decoded = TOKENIZER.decode(ids)
    blank = re.compile(r"[ \t\r\x0b\x0c]")
    assert blank.sub("", decoded) == blank.sub("", text)
    assert TOKENIZER(decoded, add_special_tokens=False)["input_ids"] == ids


@given(st.text(max_size=40))
def test_no_text_has_an_unknown_token(text: str) -> None:
    assert TOKENIZER.unk_token_id not in TOKENIZER(text)["input_ids"]


def test_tokens_that_scoring_relies_on_are_single() -> None:
    for text in [*string.digits, *(f" {letter}" for letter in LETTERS), "\n", "(", ")", "---"[0]]:
        assert len(TOKENIZER(text, add_special_tokens=False)["input_ids"]) == 1
    assert TOKENIZER.tokenize("A: 42\n") == ["A", ":", "4", "2", "\n"]
    for token in ("<|startthought|>", "<|endthought|>"):
        assert TOKENIZER.convert_tokens_to_ids(token) != TOKENIZER.unk_token_id

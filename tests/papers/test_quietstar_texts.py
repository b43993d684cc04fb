"""Corpora of real text: which documents are read, how they become windows, and what is refused."""

from __future__ import annotations

import gzip
import itertools
import json
import random
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from retrace.core.config import validate
from retrace.core.plan import plan
from retrace.core.texts import HubText, LocalText, fingerprints
from retrace.papers.quietstar.texts import TextCorpusConfig, windows
from retrace.papers.quietstar.tokenizer import train_tokenizer
from retrace.papers.quietstar.windows import Windows

TOKENIZER = train_tokenizer(["a b c d e f g"], vocab_size=262)  # bytes: every text is one id a byte, after <bos>
LENGTHS = st.lists(st.integers(1, 90), min_size=1, max_size=12)


@pytest.fixture
def root(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The folder that RETRACE_DATA names, with 20 numbered documents in every kind of file."""
    monkeypatch.setenv("RETRACE_DATA", str(tmp_path))
    rows = [json.dumps({"number": i, "text": f"Document {i}\nends."}) + "\n" for i in range(20)]
    (tmp_path / "rows.jsonl").write_text("".join(rows))
    with gzip.open(tmp_path / "rows.jsonl.gz", "wt") as file:
        file.writelines(rows)
    (tmp_path / "rows.txt").write_text("\n\n" + " \n\n".join(f"Document {i}\nends.\n" for i in range(20)))
    return tmp_path


def corpus(root: Path, texts: list[str], *, kind: str, seq_len: int) -> TextCorpusConfig:
    """A corpus whose three splits are one file made of `texts`."""
    name = f"{random.getrandbits(64):x}.jsonl"
    (root / name).write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    source = LocalText(kind="local", path=name)
    options: dict[str, Any] = {"base": (source,), "continued": (source,), "heldout": (source,)}
    return TextCorpusConfig(kind="text", seq_len=seq_len, windows=kind, vocab_size=262, **options)  # type: ignore[arg-type]


def own_letter(lengths: list[int]) -> list[str]:
    """Documents of the given lengths, each of a letter of its own."""
    return [chr(ord("a") + i) * length for i, length in enumerate(lengths)]


def letters(window: list[int]) -> set[str]:
    return set(TOKENIZER.decode(window, skip_special_tokens=True))


@pytest.mark.parametrize("name", ["rows.jsonl", "rows.jsonl.gz", "rows.txt"])
@pytest.mark.parametrize(("start", "stop"), [(0, None), (0, 1), (3, 11), (19, None), (5, 900), (20, None)])
def test_start_and_stop_choose_documents_as_a_slice_does(root: Path, name: str, start: int, stop: int | None) -> None:
    found = [text.strip() for text in LocalText(kind="local", path=name, start=start, stop=stop).documents()]
    assert root.is_dir()
    assert found == [f"Document {i}\nends." for i in range(20)][start:stop]


@pytest.mark.parametrize(("start", "stop"), [(0, None), (3, 11), (19, None)])
def test_a_streamed_dataset_is_cut_as_a_file_is(root: Path, start: int, stop: int | None) -> None:
    """A folder of files is a dataset too, so `datasets` streams it here as it would from the hub."""
    folder = root / "dataset"
    folder.mkdir()
    (folder / "train.jsonl").write_text((root / "rows.jsonl").read_text())
    options: dict[str, Any] = {"template": "{number}. {text}", "start": start, "stop": stop}
    hub = HubText(kind="hub", dataset=str(folder), revision="main", **options)
    assert list(hub.documents()) == list(LocalText(kind="local", path="rows.jsonl", **options).documents())
    hub.check()
    with pytest.raises(ValueError, match="no document from number 20 on: choose another range"):
        HubText(kind="hub", dataset=str(folder), revision="main", start=20).check()


@settings(max_examples=60, deadline=None)
@given(LENGTHS, st.integers(16, 40), st.integers(0, 5))
def test_packed_windows_lose_only_the_rest_and_overlap_nowhere(
    tmp_path_factory: pytest.TempPathFactory, lengths: list[int], seq_len: int, seed: int
) -> None:
    with pytest.MonkeyPatch.context() as patch:
        root = tmp_path_factory.mktemp("packed")
        patch.setenv("RETRACE_DATA", str(root))
        config = corpus(root, own_letter(lengths), kind="packed", seq_len=seq_len)
        total = sum(length + 2 for length in lengths)  # <bos> and <eos>
        rows = (
            windows(config, TOKENIZER, split="continued", seed=seed, count=total // seq_len) if total >= seq_len else []
        )
        with pytest.raises(ValueError, match=f"it gives {total // seq_len} of {seq_len} tokens"):
            windows(config, TOKENIZER, split="continued", seed=seed, count=total // seq_len + 1)
    assert all(len(row) == seq_len for row in rows)
    bos, eos = TOKENIZER.bos_token_id, TOKENIZER.eos_token_id
    whole = Counter({bos: len(lengths), eos: len(lengths)})
    for text in own_letter(lengths):
        whole.update(TOKENIZER(text, add_special_tokens=False).input_ids)
    used = Counter(token for row in rows for token in row)
    assert used <= whole  # no token twice
    assert (whole - used).total() == total % seq_len
    for row in rows:  # a document ends where the next begins, and nowhere else
        for here, after in itertools.pairwise(row):
            assert (here == eos) == (after == bos)
            assert here in (bos, eos) or after in (eos, here)


@settings(max_examples=60, deadline=None)
@given(LENGTHS, st.integers(16, 40), st.integers(0, 5))
def test_spans_are_one_piece_of_one_document_each(
    tmp_path_factory: pytest.TempPathFactory, lengths: list[int], seq_len: int, seed: int
) -> None:
    with pytest.MonkeyPatch.context() as patch:
        root = tmp_path_factory.mktemp("spans")
        patch.setenv("RETRACE_DATA", str(root))
        config = corpus(root, own_letter(lengths), kind="spans", seq_len=seq_len)
        rows = windows(config, TOKENIZER, split="continued", seed=seed, count=len(lengths))
    found = {}
    for row in rows:
        (letter,) = letters(row)
        found[letter] = row
    assert len(found) == len(lengths)  # every document once
    for text in own_letter(lengths):
        ids, row = TOKENIZER(text).input_ids, found[text[0]]
        assert len(row) == min(len(ids), seq_len)
        assert any(ids[at : at + len(row)] == row for at in range(len(ids)))


def test_spans_begin_everywhere_in_a_document(root: Path) -> None:
    text = "".join(chr(ord("a") + i) for i in range(26))
    config = corpus(root, [text] * 400, kind="spans", seq_len=16)
    firsts = Counter(row[0] for row in windows(config, TOKENIZER, split="continued", seed=0, count=400))
    assert firsts.keys() == set(TOKENIZER(text).input_ids[: 27 - 16 + 1])
    assert max(firsts.values()) < 3 * 400 / 12


@pytest.mark.parametrize("kind", ["packed", "spans"])
def test_windows_follow_from_seed_and_split_alone(root: Path, kind: str) -> None:
    config = corpus(root, own_letter([40] * 26), kind=kind, seq_len=16)
    rows = windows(config, TOKENIZER, split="continued", seed=3, count=26)
    assert windows(config, TOKENIZER, split="continued", seed=3, count=26) == rows
    assert windows(config, TOKENIZER, split="continued", seed=3, count=9) == rows[:9]
    assert windows(config, TOKENIZER, split="continued", seed=4, count=26) != rows
    assert windows(config, TOKENIZER, split="base", seed=3, count=26) != rows


def test_rows_are_every_window_once_an_epoch_and_padding_is_masked(root: Path) -> None:
    config = corpus(root, own_letter([5, 30, 12, 40, 8]), kind="spans", seq_len=16)
    rows = Windows(config, TOKENIZER, split="continued", seed=1, count=5)
    every = rows.every()
    expected = windows(config, TOKENIZER, split="continued", seed=1, count=5)
    for ids, mask, plain in zip(every["input_ids"], every["attention_mask"], expected, strict=True):
        assert ids[mask.bool()].tolist() == plain
        assert mask.tolist() == [1] * len(plain) + [0] * (16 - len(plain))
        assert set(ids[len(plain) :].tolist()) <= {TOKENIZER.pad_token_id}
    epochs = [[tuple(row) for row in rows(range(start, start + 5))["input_ids"].tolist()] for start in (0, 5, 10)]
    assert all(sorted(epoch) == sorted(map(tuple, every["input_ids"].tolist())) for epoch in epochs)
    assert len({tuple(epoch) for epoch in epochs}) > 1
    assert rows(range(3, 8))["input_ids"].tolist() == [list(row) for row in (epochs[0] + epochs[1])[3:8]]


def test_a_file_that_changes_is_another_run(root: Path) -> None:
    file = root / "rows.jsonl"
    source = "[{kind: local, path: %s}]"
    ids, prints = [], []
    for number, text in enumerate([file.read_text(), file.read_text(), file.read_text().replace("17", "71")]):
        copy = root / f"copy{number}.jsonl"
        copy.write_text(text)
        config = corpus(root, ["x"], kind="packed", seq_len=16)
        found = fingerprints([*config.base, *config.continued, LocalText(kind="local", path=copy.name)])
        prints.append(found[copy.name])
    assert prints[0] == prints[1] != prints[2]
    for text in ("one", "two"):
        folder = root / text
        folder.mkdir()
        (folder / "rows.jsonl").write_text(json.dumps({"text": text}))
        with pytest.MonkeyPatch.context() as patch:
            patch.setenv("RETRACE_DATA", str(folder))
            overrides = [f"corpus.{split}={source % 'rows.jsonl'}" for split in ("base", "continued", "heldout")]
            ids.append({spec.id for spec in plan(["quietstar/main"], ["scale=gpu", *overrides])})
    assert len(ids[0]) == 3
    assert not ids[0] & ids[1]


@pytest.mark.parametrize("scale", ["gpu", "paper"])
def test_what_is_held_out_is_in_no_text_that_is_trained_on(scale: str) -> None:
    for spec in plan(["quietstar"], [f"scale={scale}", "seed=0"]):
        config: TextCorpusConfig = spec.config.corpus  # type: ignore[attr-defined]
        for ours in config.heldout:
            for other in (*config.base, *config.continued):
                place = [
                    (s.path,) if isinstance(s, LocalText) else (s.dataset, s.subset, s.split) for s in (ours, other)
                ]
                ends = [s.stop or float("inf") for s in (ours, other)]
                assert place[0] != place[1] or ours.start >= ends[1] or other.start >= ends[0]
        files = {s.path for s in (*config.base, *config.continued, *config.heldout) if isinstance(s, LocalText)}
        assert not any("gsm8k/test" in file or "commonsense" in file for file in files)


def test_a_template_makes_text_of_fields_and_leaves_braces_in_the_fields_alone(root: Path) -> None:
    (root / "asked.jsonl").write_text(json.dumps({"question": "Is {x} in {1, 2}?", "answer": "No. {}"}) + "\n")
    source = LocalText(kind="local", path="asked.jsonl", template="Q: {question}\nA: {answer} {{end}}")
    assert list(source.documents()) == ["Q: Is {x} in {1, 2}?\nA: No. {} {end}"]
    with pytest.raises(
        ValueError, match=r"asked.jsonl: template '\{text\}' names 'text'; the fields are: answer, question"
    ):
        list(LocalText(kind="local", path="asked.jsonl").documents())


@pytest.mark.parametrize("template", ["no field", "{}", "{0}", "{text.__class__}", "{text[0]}"])
def test_a_template_without_plain_fields_is_refused(template: str) -> None:
    with pytest.raises(ValueError, match="template=.*: expected names of fields in braces"):
        validate(LocalText, {"kind": "local", "path": "x.txt", "template": template}, source="x")


def test_text_that_is_not_there_or_not_text_is_refused(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ValueError, match=r"none.jsonl is missing: put it there, or set RETRACE_DATA"):
        LocalText(kind="local", path="none.jsonl").check()
    with pytest.raises(ValueError, match=r"rows.csv: not a text source: expected a file that ends in .jsonl"):
        LocalText(kind="local", path="rows.csv").check()
    (root / "bad.jsonl").write_text('{"text": "fine"}\nnot json\n')
    with pytest.raises(ValueError, match=r"bad.jsonl: line 2 is not JSON"):
        list(LocalText(kind="local", path="bad.jsonl").documents())
    with pytest.raises(ValueError, match="stop=3 is not above start=3"):
        LocalText(kind="local", path="rows.txt", start=3, stop=3)
    monkeypatch.delenv("RETRACE_DATA")
    with pytest.raises(ValueError, match="rows.txt: RETRACE_DATA is not set"):
        LocalText(kind="local", path="rows.txt").check()

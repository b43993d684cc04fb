"""Rows: how documents share them, which source each comes from, and that a stream can be taken up anywhere."""

from __future__ import annotations

import logging
import random
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from retrace.papers.mm1.documents import ProceduralSource, build_tokenizer, draft
from retrace.papers.mm1.images import draw
from retrace.papers.mm1.mixture import Draws, Mixture
from retrace.papers.mm1.packing import Draft, Picture, Window, collate, fill
from retrace.papers.mm1.pairs import Pairs
from retrace.papers.mm1.rows import IGNORED, Document, PackedBatch, Piece
from retrace.papers.mm1.stream import Ahead, Stream, together
from retrace.papers.mm1.world import IMAGE, PAD, WorldConfig, vocabulary

torch.set_num_threads(1)
WORLD = WorldConfig(kind="procedural", world_seed=0, held_out_shapes=2, noisy_share=0.3, min_images=3, max_images=6)
WEIGHTS = {"caption": 0.45, "interleaved": 0.45, "text": 0.10}
WINDOW = Window(seq_len=96, image_tokens=4, max_images=16, pad_id=vocabulary()[PAD], image_id=vocabulary()[IMAGE])
BLACK = torch.zeros(3, 2, 2)


def window(seq_len: int, image_tokens: int = 4, max_images: int = 3) -> Window:
    return Window(seq_len, image_tokens, max_images, pad_id=0, image_id=9)


def stream(*, marks: Path | None = None, write: bool = True, seed: int = 0) -> Stream:
    sources = {kind: ProceduralSource(WORLD, kind, seed) for kind in WEIGHTS}  # type: ignore[arg-type]
    files: dict[str, Any] = {"marks": marks, "write": write}
    return Stream(Mixture(weights=WEIGHTS), sources, window=WINDOW, image_size=8, seed=seed, **files)


def same(a: dict[str, Tensor], b: dict[str, Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def test_labels_are_the_text_behind_a_position_of_the_same_document() -> None:
    first = Document([Piece((1,), learned=False), Piece(image=BLACK), Piece((2, 3)), Piece((4,), learned=False)], "a")
    second = Document([Piece((5, 6, 7))], "b")
    batch = collate([[first, second], []], window(12), image_size=2)
    assert batch.input_ids_BL[0].tolist() == [1, 9, 9, 9, 9, 2, 3, 4, 5, 6, 7, 0]
    no = IGNORED
    assert batch.labels_BL[0].tolist() == [no, no, no, no, 2, 3, no, no, 6, 7, no, no]
    assert batch.position_ids_BL[0].tolist() == [0, 1, 2, 3, 4, 5, 6, 7, 0, 1, 2, 0]
    assert batch.document_ids_BL[0].tolist() == [1] * 8 + [2] * 3 + [0]
    assert batch.document_ids_BL[1].tolist() == [0] * 12
    assert batch.images_M3RR.shape == (1, 3, 2, 2)
    assert PackedBatch(**vars(batch)).labels_BL.dtype == torch.long


@settings(max_examples=80, deadline=None)
@given(st.lists(st.tuples(st.integers(1, 30), st.integers(0, 3)), max_size=40))
def test_every_document_gets_one_row_and_no_row_holds_too_much(sizes: list[tuple[int, int]]) -> None:
    rows = fill(sizes, window(30))
    assert sorted(index for row in rows for index in row) == list(range(len(sizes)))
    for row in rows:
        assert sum(sizes[i][0] for i in row) <= 30
        assert sum(sizes[i][1] for i in row) <= 3


@settings(max_examples=80, deadline=None)
@given(st.lists(st.integers(0, 40), min_size=1, max_size=12), st.integers(6, 30))
def test_what_is_cut_loses_nothing_and_no_image_is_cut_in_two(parts: list[int], seq_len: int) -> None:
    """A part of length 0 stands for an image."""
    token = iter(range(10**6))
    pieces = [Piece(tuple(next(token) for _ in range(n)), learned=n % 2 == 0) if n else Picture("x") for n in parts]
    whole = window(seq_len)
    cut = whole.cut(Draft(pieces, "a"))
    assert all(whole.fits(whole.size(piece)) and whole.size(piece)[0] for piece in cut)

    def flat(drafts: Sequence[Draft]) -> list[object]:
        return [
            token
            for draft in drafts
            for part in draft.parts
            for token in (["x"] if isinstance(part, Picture) else [(t, part.learned) for t in part.token_ids])
        ]

    assert flat(cut) == flat([Draft(pieces, "a")])


def test_rows_without_room_for_an_image_and_a_token_are_refused() -> None:
    with pytest.raises(
        ValueError, match="image_tokens=9 of 1 sub-images with seq_len=9 .* choose longer rows or fewer image tokens"
    ):
        window(9, image_tokens=9)


@pytest.mark.parametrize(("weights", "said"), [
    ({"a": 0.5, "b": 0.4}, "a=0.5, b=0.4: expected probabilities that sum to 1, and these sum to 0.9"),
    ({"a": 1.2, "b": -0.2}, "these sum to 1, with b below 0: change one of them"),
])  # fmt: skip
def test_weights_that_are_no_probabilities_are_refused_in_one_sentence(weights: dict[str, float], said: str) -> None:
    with pytest.raises(ValueError, match=said) as refused:
        Mixture(weights=weights)
    assert str(refused.value).count("expected") == 1


def test_the_mixture_is_exact_in_expectation_and_numbers_the_rows_of_each_source() -> None:
    num_rows = 20_000
    draws = Draws(Mixture(weights={**WEIGHTS, "synthetic": 0.0}), seed=1)
    places = [draws.place(row) for row in range(num_rows)]
    counts = Counter(name for name, _ in places)
    for name, weight in WEIGHTS.items():
        spread = (num_rows * weight * (1 - weight)) ** 0.5
        assert abs(counts[name] - num_rows * weight) < 4 * spread
        assert [number for own, number in places if own == name] == list(range(counts[name]))
    assert draws.counts(num_rows) == counts
    rows = random.Random(0).sample(range(num_rows), 30)
    fresh = Draws(Mixture(weights=WEIGHTS), seed=1)
    assert [fresh.place(row) for row in rows] == [places[row] for row in rows]
    assert [Draws(Mixture(weights=WEIGHTS), seed=2).place(row) for row in range(50)] != places[:50]


def test_a_row_holds_one_source_and_is_nearly_full() -> None:
    rows = stream()
    batch = rows(range(1000))
    assert (batch["document_ids_BL"] > 0).float().mean() >= 0.95
    assert len(batch["images_M3RR"]) * 4 == (batch["input_ids_BL"] == WINDOW.image_id).sum()
    for documents in rows.documents(range(1000)):
        assert len({document.source for document in documents}) == 1


def test_images_stand_in_the_order_of_their_positions() -> None:
    rows = stream()
    images = rows(range(5, 9))["images_M3RR"]
    alone = [piece.image for row in rows.documents(range(5, 9)) for d in row for piece in d.pieces]
    assert torch.equal(images, torch.stack([image for image in alone if image is not None]))


def test_rows_are_the_same_however_they_are_asked_for(tmp_path: Path) -> None:
    """Forwards, backwards, alone, in another process, with and without marks, and with a torn file of marks."""
    kept = stream(marks=tmp_path)
    whole = kept(range(400))
    for start in (390, 3, 300):
        part = range(start, start + 4)
        wanted = {name: whole[name][start : start + 4] for name in whole if name != "images_M3RR"}
        for other in (kept, stream(), stream(marks=tmp_path)):
            found = other(part)
            assert same({name: found[name] for name in wanted}, wanted)
    file = tmp_path / "caption.jsonl"
    file.write_text(file.read_text() + "[9999, [1")
    assert same(stream(marks=tmp_path)(range(500, 504)), stream()(range(500, 504)))
    assert not same(stream(seed=1)(range(4)), stream()(range(4)))


def test_marks_spare_reading_from_the_start(tmp_path: Path) -> None:
    stream(marks=tmp_path)(range(1000))
    resumed = stream(marks=tmp_path)
    read: list[int] = []
    source = resumed.readers["caption"].source

    class Counting:
        def drafts(self, mark: tuple[int, ...] = ()) -> Iterator[tuple[tuple[int, ...], Draft]]:
            for item in source.drafts(mark):
                read.append(item[0][0])
                yield item

        load = source.load

    resumed.readers["caption"].source = Counting()  # type: ignore[assignment]
    resumed(range(990, 1000))
    assert min(read) > 500
    assert len(read) == max(read) - min(read) + 1


def test_of_several_processes_one_writes_the_marks_and_all_resume_by_them(tmp_path: Path) -> None:
    stream(marks=tmp_path / "marks", write=False)(range(1000))
    assert not (tmp_path / "marks").exists()
    stream(marks=tmp_path / "marks")(range(1000))
    written = {file.name: file.read_text() for file in (tmp_path / "marks").iterdir()}
    other = stream(marks=tmp_path / "marks", write=False)
    assert max(other.readers["caption"]._starts) > 100
    other(range(1000, 1600))
    assert written == {file.name: file.read_text() for file in (tmp_path / "marks").iterdir()}


def test_the_notes_of_several_processes_are_those_of_one() -> None:
    own = {"data/a/rows": 9, "data/a/too_long": 2, "data/a/images": 5, "data/a/left_out": 1, "data/from_row": 0}
    other = own | {"data/a/images": 7, "data/a/left_out": 0, "data/from_row": 4}
    assert together([own, other]) == own | {"data/a/images": 12}


def test_a_document_that_is_too_long_is_cut_counted_and_warned_of_once(caplog: pytest.LogCaptureFixture) -> None:
    class Long:
        def drafts(self, mark: tuple[int, ...] = ()) -> Iterator[tuple[tuple[int, ...], Draft]]:
            index = mark[0] if mark else 0
            while True:
                yield (index,), Draft([Piece(tuple(range(7 if index % 5 else 25)))], "text")
                index += 1

        def load(self, pictures: Sequence[Picture], *, image_size: int) -> list[Tensor | None]:
            assert image_size
            return [None for _ in pictures]

        def notes(self) -> dict[str, int]:
            return {"odd": 3}

    rows = Stream(Mixture(weights={"text": 1.0}), {"text": Long()}, window=window(10), image_size=2, seed=0)
    with caplog.at_level(logging.WARNING):
        rows(range(50))
    assert [record.message.split(":")[0] for record in caplog.records] == ["text"]
    assert "is cut into several" in caplog.text
    notes = rows.notes(50)
    assert notes["data/text/too_long"] > 10
    assert (notes["data/text/rows"], notes["data/text/odd"]) == (50, 3)
    with pytest.raises(ValueError, match="weights name text, but the sources are a: add it, or weigh it 0"):
        Stream(Mixture(weights={"text": 1.0}), {"a": Long()}, window=window(10), image_size=2, seed=0)


def test_sub_images_take_the_positions_that_the_window_gave_them() -> None:
    whole = Window(200, 4, 8, pad_id=vocabulary()[PAD], image_id=vocabulary()[IMAGE], sub_images=5)

    def five(pieces: Sequence[Piece]) -> list[Piece]:
        return [own for piece in pieces for own in ([piece] if piece.image is None else [piece] * 5)]

    sources = {"interleaved": ProceduralSource(WORLD, "interleaved", 0)}
    rows = Stream(Mixture(weights={"interleaved": 1.0}), sources, window=whole, image_size=8, seed=0, split=five)
    batch = rows(range(100))
    assert (batch["input_ids_BL"] == whole.image_id).sum() == 4 * len(batch["images_M3RR"])
    for row in rows.documents(range(100)):
        assert sum(whole.size(document)[0] for document in row) <= 200


def test_a_pair_is_an_image_and_its_caption_trimmed_and_padded(caplog: pytest.LogCaptureFixture) -> None:
    ids = vocabulary()
    options: dict[str, int] = {"image_size": 8, "pad_id": ids[PAD], "image_id": ids[IMAGE], "seed": 0}
    whole = Pairs(ProceduralSource(WORLD, "synthetic", 0), max_tokens=12, **options)
    batch = whole(range(200))
    assert batch["images_B3RR"].shape == (200, 3, 8, 8)
    assert batch["input_ids_BT"].shape == batch["attention_mask_BT"].shape == (200, 12)
    assert (batch["attention_mask_BT"].sum(1) == 11).all()  # <bos> a photo of, six words, <eos>
    shown = {
        scene.caption: image
        for scene in (draft.what for draft in pictures(200))
        for image in draw([scene], image_size=8)
    }
    for tokens, image in zip(batch["input_ids_BT"], batch["images_B3RR"], strict=True):
        caption = build_tokenizer().decode(tokens[4:10])
        assert caption not in shown or torch.equal(shown[caption], image)
    assert same(whole(range(190, 194)), {name: value[190:194] for name, value in batch.items()})
    short = Pairs(ProceduralSource(WORLD, "synthetic", 0), max_tokens=6, **options)
    assert torch.equal(short(range(8))["input_ids_BT"][:, :4], batch["input_ids_BT"][:8, :4])
    assert "is trimmed; others are only counted" in caplog.text
    assert short.stream.notes(8)["data/pairs/too_long"] > 8
    with pytest.raises(ValueError, match="a document with 0 images is no pair"):
        Pairs(ProceduralSource(WORLD, "text", 0), max_tokens=40, **options)(range(2))


def pictures(count: int) -> list[Picture]:
    drafts = [draft(WORLD, kind="synthetic", seed=0, index=index) for index in range(count)]
    return [part for own in drafts for part in own.parts if isinstance(part, Picture)]


def test_computing_ahead_changes_no_batch() -> None:
    asked: list[range] = []

    def rows(chosen: range) -> dict[str, Tensor]:
        asked.append(chosen)
        return {"x": torch.tensor(list(chosen))}

    ahead = Ahead(rows, between=4, end=46)  # of two processes, the first
    for start in (8, 12, 16, 20, 40, 44, 0):
        assert ahead(range(start, start + 2))["x"].tolist() == [start, start + 1]
    assert asked[:4] == [range(8, 10), range(12, 14), range(16, 18), range(20, 22)]
    assert ahead._pool._work_queue.qsize() <= 1
    ahead._pool.shutdown()
    assert max(chosen.stop for chosen in asked) == 46  # nothing beyond the end is read, or counted

    def broken(chosen: range) -> dict[str, Tensor]:
        raise ValueError(f"no row {chosen.start}")

    with pytest.raises(ValueError, match="no row 3"):
        Ahead(broken, between=1, end=4)(range(3, 4))

"""Real data: folders of photos, shards and datasets, whole and broken, as a user would bring them."""

from __future__ import annotations

import io
import itertools
import json
import logging
import os
import random
import re
import tarfile
import time
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow
import pyarrow.parquet
import pytest
import torch
from PIL import Image
from transformers import PreTrainedTokenizerFast

from retrace.core.compose import compose
from retrace.core.config import validate
from retrace.papers.mm1.choices import Corpora
from retrace.papers.mm1.corpora import HubDataset, ImageFolder, LocalShards, check, fingerprint
from retrace.papers.mm1.corpus_source import CorpusSource
from retrace.papers.mm1.documents import build_tokenizer
from retrace.papers.mm1.mixture import Mixture
from retrace.papers.mm1.packing import Draft, Picture, Window
from retrace.papers.mm1.photos import load_image
from retrace.papers.mm1.rows import Piece
from retrace.papers.mm1.sources import train_tokenizer
from retrace.papers.mm1.stream import Stream
from retrace.papers.mm1.world import DIGITS, IMAGE, PAD, vocabulary

torch.set_num_threads(1)
TOKENIZER: PreTrainedTokenizerFast = build_tokenizer()
Corpus = ImageFolder | LocalShards | HubDataset


@pytest.fixture
def root(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("RETRACE_DATA", str(tmp_path))
    return tmp_path


def photo(number: int, *, format: str = "JPEG") -> bytes:
    """A photo of 40 x 30 pixels whose red tells its number."""
    data = io.BytesIO()
    Image.new("RGB", (40, 30), (8 * number, 100, 30)).save(data, format, quality=95)
    return data.getvalue()


def words(number: int) -> str:
    return " ".join(str(number))


def write_tar(file: Path, numbers: range, *, length: int | None = None) -> None:
    file.parent.mkdir(exist_ok=True, parents=True)
    with tarfile.open(file, "w") as tar:
        for number in numbers:
            for suffix, data in (("jpg", photo(number)), ("txt", words(number).encode())):
                entry = tarfile.TarInfo(f"{number:04}.{suffix}")
                entry.size = len(data)
                tar.addfile(entry, io.BytesIO(data))
    if length is not None:
        file.write_bytes(file.read_bytes()[:length])


def write_parquet(file: Path, numbers: range) -> None:
    file.parent.mkdir(exist_ok=True, parents=True)
    images = [{"bytes": photo(number), "path": None} for number in numbers]
    pyarrow.parquet.write_table(pyarrow.table({"image": images, "text": [words(n) for n in numbers]}), file)


def write_folder(folder: Path, numbers: range) -> None:
    folder.mkdir(exist_ok=True)
    for number in numbers:
        (folder / f"{number:03}.jpg").write_bytes(photo(number))
        (folder / f"{number:03}.txt").write_text(words(number) + "\n")


def write_jsonl(file: Path, rows: list[dict[str, Any]]) -> None:
    file.parent.mkdir(exist_ok=True, parents=True)
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))


def source(config: Corpus, seed: int = 0) -> CorpusSource:
    return CorpusSource(config, TOKENIZER, seed=seed)


def folder(**options: Any) -> ImageFolder:
    return ImageFolder(kind="folder", path="photos", document="caption", **options)


def shards(pattern: str, **options: Any) -> LocalShards:
    return LocalShards(kind="shards", pattern=pattern, **{"document": "caption", **options})


def said(draft: Draft) -> str:
    return " ".join(TOKENIZER.decode(p.token_ids) for p in draft.parts[1:-1] if isinstance(p, Piece))


def numbers(config: Corpus, count: int, seed: int = 0) -> list[int]:
    """The captions of the first documents, checked against what their images show."""
    own = source(config, seed)
    drafts = [draft for _, draft in itertools.islice(own.drafts(), count)]
    pictures = [part for draft in drafts for part in draft.parts if isinstance(part, Picture)]
    found = [int(said(draft).replace(" ", "")) for draft in drafts]
    for number, image in zip(found, own.load(pictures, image_size=6), strict=True):
        assert image is not None
        assert image.shape == (3, 6, 6)
        assert image[0].mean() * 255 == pytest.approx(8 * number, abs=3)
    return found


def make(root: Path, kind: str) -> Corpus:
    """The numbers 0 to 11 as a corpus of each kind."""
    if kind == "folder":
        write_folder(root / "photos", range(9))
        write_folder(root / "photos" / "more", range(9, 12))
        return folder()
    if kind == "captions":
        write_folder(root / "photos", range(12))
        rows = [{"image": f"{number:03}.jpg", "text": words(number)} for number in range(12)]
        write_jsonl(root / "photos" / "captions.jsonl", rows)
        return folder()
    for start in (0, 4, 8):
        part = range(start, start + 4)
        write_tar(root / "tars" / f"{start}.tar", part)
        write_parquet(root / "tables" / f"{start}.parquet", part)
        write_folder(root / "photos", part)
        rows = [{"image": f"../photos/{number:03}.jpg", "text": words(number)} for number in part]
        write_jsonl(root / "lines" / f"{start}.jsonl", rows)
    if kind == "hub":
        return HubDataset(kind="hub", dataset=str(root / "tables"), revision="main", document="caption")
    if kind == "tar":
        return shards("tars/*.tar", image_field="jpg", text_field="txt")
    return shards("tables/*.parquet") if kind == "parquet" else shards("lines/*.jsonl")


KINDS = ["folder", "captions", "tar", "parquet", "jsonl", "hub"]


@pytest.mark.parametrize("kind", KINDS)
def test_every_epoch_has_every_document_once_with_its_image(root: Path, kind: str) -> None:
    config = make(root, kind)
    check(config)
    found = numbers(config, 24)
    assert sorted(found[:12]) == sorted(found[12:]) == list(range(12))
    assert found == numbers(config, 24)
    assert found != numbers(config, 24, seed=1)
    assert validate(type(config), config.model_dump(), source="test") == config


@pytest.mark.parametrize("kind", KINDS)
def test_a_stream_goes_on_from_any_mark(root: Path, kind: str) -> None:
    own = source(make(root, kind))
    items = list(itertools.islice(own.drafts(), 30))
    for place in random.Random(0).sample(range(30), 6):
        assert list(itertools.islice(own.drafts(items[place][0]), 30 - place)) == items[place:]


@pytest.mark.parametrize("kind", ["folder", "tar"])
def test_a_mixed_stream_of_files_is_the_same_when_it_is_taken_up(root: Path, kind: str, tmp_path: Path) -> None:
    config = make(root, kind)
    write_jsonl(root / "texts.jsonl", [{"text": " ".join(random.Random(i).choices(DIGITS, k=20))} for i in range(9)])
    window = Window(32, 4, 8, pad_id=vocabulary()[PAD], image_id=vocabulary()[IMAGE])

    def stream(marks: Path | None) -> Stream:
        sources = {"caption": source(config), "text": source(shards("texts.jsonl", document="text"))}
        mixture = Mixture(weights={"caption": 0.6, "text": 0.4})
        return Stream(mixture, sources, window=window, image_size=6, seed=0, marks=marks)

    whole = stream(tmp_path / "marks")(range(150))
    for marks in (None, tmp_path / "marks"):
        again = stream(marks)(range(146, 150))
        assert torch.equal(again["input_ids_BL"], whole["input_ids_BL"][146:])
        assert torch.equal(again["images_M3RR"], whole["images_M3RR"][-len(again["images_M3RR"]) :])


def test_interleaved_documents_keep_their_order_and_find_their_images(root: Path) -> None:
    write_folder(root / "docs", range(4))
    row = {"images": [None, "001.jpg", "003.jpg", None], "texts": ["7 <image> 7", None, None, "8"]}
    write_jsonl(root / "docs" / "a.jsonl", [row])
    config = shards("docs/a.jsonl", document="interleaved", image_field="images", text_field="texts")
    own = source(config)
    _, draft = next(own.drafts())
    assert [isinstance(part, Picture) for part in draft.parts] == [False, False, True, True, False, False]
    assert said(draft) == "7 7 8"  # the image token in a text stands for no image
    images = own.load([part for part in draft.parts if isinstance(part, Picture)], image_size=4)
    assert [round(float(image[0].mean()) * 255 / 8) for image in images if image is not None] == [1, 3]
    write_jsonl(root / "docs" / "b.jsonl", [{"images": ["001.jpg"], "texts": []}])
    with pytest.raises(ValueError, match="expected lists of one length in images and texts"):
        next(source(config.model_copy(update={"pattern": "docs/b.jsonl"})).drafts())


def test_what_a_text_says_of_special_tokens_is_none(root: Path) -> None:
    write_jsonl(root / "a.jsonl", [{"text": "<bos> 1 <image> 2 <eos> <pad> 3 unheard"}, {"text": "<eos>"}])
    own = source(shards("a.jsonl", document="text"))
    drafts = [draft for _, draft in itertools.islice(own.drafts(), 2)]
    assert [said(draft) for draft in drafts] == ["1 2 3 <unk>"] * 2
    assert own.notes()["without_text"] == 1


def test_only_the_answers_of_instructions_are_learned(root: Path) -> None:
    write_folder(root / "docs", range(2))
    write_jsonl(root / "docs" / "a.jsonl", [{"image": "001.jpg", "question": "what color ?", "text": "red"}])
    _, draft = next(source(shards("docs/a.jsonl", document="instruction")).drafts())
    assert [part.learned for part in draft.parts if isinstance(part, Piece)] == [False, False, True, True]
    write_jsonl(root / "docs" / "a.jsonl", [{"image": "001.jpg", "question": None, "text": "red"}])
    assert said(next(source(shards("docs/a.jsonl", document="instruction")).drafts())[1]) == "red"  # not "None red"


def test_a_broken_image_leaves_out_its_document_and_is_counted_once_warned(
    root: Path, caplog: pytest.LogCaptureFixture
) -> None:
    write_folder(root / "photos", range(20))
    (root / "photos" / "003.jpg").write_bytes(photo(3)[:300])  # truncated
    (root / "photos" / "007.jpg").write_text("no image")
    (root / "photos" / "020.jpg").write_bytes(photo(20))  # without a caption
    (root / "photos" / ".DS_Store").write_text("hidden")
    own = source(folder(max_bad_share=0.2))
    assert "uncaptioned: 1 files are left out" in caplog.text
    caplog.clear()
    window = Window(40, 4, 8, pad_id=vocabulary()[PAD], image_id=vocabulary()[IMAGE])
    stream = Stream(Mixture(weights={"caption": 1.0}), {"caption": own}, window=window, image_size=6, seed=0)
    with caplog.at_level(logging.WARNING):
        rows = stream.documents(range(60))
    seen = Counter("".join(str(p.token_ids) for p in document.pieces) for row in rows for document in row)
    assert len(seen) == 18
    notes = stream.notes(60)
    assert notes["data/caption/images"] - notes["data/caption/unreadable"] == seen.total()
    assert notes["data/caption/unreadable"] == pytest.approx(notes["data/caption/images"] / 10, rel=0.5)
    assert notes["data/caption/uncaptioned"] == 1
    assert len(caplog.records) == 1
    assert "can't be read, so its document is left out" in caplog.text


def test_more_broken_images_than_the_stated_share_are_refused(root: Path) -> None:
    write_folder(root / "photos", range(20))
    for number in range(10):
        (root / "photos" / f"{number:03}.jpg").write_bytes(b"")
    own = source(folder(max_bad_share=0.05))
    pictures = [
        part for _, draft in itertools.islice(own.drafts(), 60) for part in draft.parts if isinstance(part, Picture)
    ]
    with pytest.raises(ValueError, match=r"4 of \d+ images can't be read, more than max_bad_share=0.05; the last is "):
        own.load(pictures, image_size=6)


def test_a_missing_photo_and_a_link_count_as_broken(root: Path) -> None:
    rows = [{"image": name, "text": "1"} for name in ("gone.jpg", "https://example.org/a.jpg")]
    write_jsonl(root / "a.jsonl", rows)
    own = source(shards("a.jsonl", max_bad_share=0.5))
    pictures = [
        part for _, draft in itertools.islice(own.drafts(), 2) for part in draft.parts if isinstance(part, Picture)
    ]
    assert own.load(pictures, image_size=6) == [None, None]
    assert own.notes()["unreadable"] == 2


@pytest.mark.parametrize("kind", ["tar", "parquet", "jsonl"])
def test_a_shard_that_ends_early_gives_what_it_has_with_one_warning(
    root: Path, kind: str, caplog: pytest.LogCaptureFixture
) -> None:
    config = make(root, kind)
    assert isinstance(config, LocalShards)
    damaged = config.files()[1]
    if kind == "tar":  # of which `datasets` reads five rows to learn their fields
        write_tar(damaged, range(4, 12))
    cut = damaged.read_bytes().index(b"0010.jpg") + 700 if kind == "tar" else damaged.stat().st_size * 6 // 10
    damaged.write_bytes(damaged.read_bytes()[:cut])
    own = source(config)
    with caplog.at_level(logging.WARNING, logger="retrace"):
        found = {int(said(draft).replace(" ", "")) for _, draft in itertools.islice(own.drafts(), 40)}
    whole, rest = {0, 1, 2, 3, 8, 9, 10, 11}, {"tar": range(4, 10), "parquet": (), "jsonl": (4, 5)}[kind]
    assert found == whole | set(rest)
    assert len([record for record in caplog.records if record.name.startswith("retrace")]) == 1
    assert f"{damaged}: ends early, behind {len(rest)} rows" in caplog.text
    assert own.notes()["short_shards"] == 1
    for file in config.files():
        file.write_bytes(b"x" * 40)
    with pytest.raises(ValueError, match="no document in 3 shards: .|no row that can be read"):
        next(source(config).drafts())
    with pytest.raises(ValueError, match="no row that can be read"):
        check(config)


def test_rows_that_lack_a_field_or_say_nothing_of_their_images_are_counted(root: Path) -> None:
    write_folder(root / "docs", range(3))
    rows = [{"image": "000.jpg", "text": "0"}, {"image": "001.jpg"}, {}, {"image": "002.jpg", "text": "2"}]
    write_jsonl(root / "docs" / "a.jsonl", rows)
    own = source(shards("docs/a.jsonl"))
    assert [said(draft) for _, draft in itertools.islice(own.drafts(), 3)] == ["0", "2", "0"]
    assert own.notes()["without_text"] == 2
    write_jsonl(
        root / "docs" / "b.jsonl", [{"images": ["000.jpg"], "texts": [None]}, {"images": [None], "texts": ["1"]}]
    )
    pages = shards("docs/b.jsonl", document="interleaved", image_field="images", text_field="texts")
    own = source(pages)
    assert said(next(own.drafts())[1]) == "1"
    assert own.notes()["without_text"] == 1


def test_lines_are_counted_without_the_blank_ones(root: Path) -> None:
    (root / "a.jsonl").write_text('{"text": "1"}\n\n{"text": "2"}\n{"text": "3"}\n\n')
    own = source(shards("a.jsonl", document="text"))
    items = list(itertools.islice(own.drafts(), 6))
    assert [said(draft) for _, draft in items] == ["1", "2", "3"] * 2
    for place, (mark, _) in enumerate(items):
        assert said(next(own.drafts(mark))[1]) == said(items[place][1])


def test_lines_end_early_where_the_last_is_torn_within_a_character_and_may_begin_with_a_mark(
    root: Path, caplog: pytest.LogCaptureFixture
) -> None:
    whole = b'\xef\xbb\xbf{"text": "1"}\r\n' + '{"text": "2 \u00e9'.encode()
    (root / "a.jsonl").write_bytes(whole[:-1])
    own = source(shards("a.jsonl", document="text"))
    assert [said(draft) for _, draft in itertools.islice(own.drafts(), 2)] == ["1", "1"]
    assert "a.jsonl: ends early, behind 1 rows (line 2 is torn)" in caplog.text
    for end in (b"\n", b""):
        (root / "a.jsonl").write_bytes('{"text": "1"}\n{"text": "caf\u00e9"}'.encode("latin-1") + end)
        with pytest.raises(ValueError, match=r"a.jsonl: line 2 is no text in UTF-8 \(.*\): save it as that"):
            list(itertools.islice(source(shards("a.jsonl", document="text")).drafts(), 2))


@pytest.mark.parametrize("kind", ["folder", "tar", "parquet", "jsonl"])
def test_a_path_with_brackets_is_read(root: Path, kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    own = root / "data [2025] *"
    own.mkdir()
    monkeypatch.setenv("RETRACE_DATA", str(own))
    config = make(own, kind)
    check(config)
    assert sorted(numbers(config, 12)) == list(range(12))


def texts(root: Path, content: str, vocab_size: int) -> Corpora:
    (root / "texts.jsonl").write_text(content)
    sources: dict[Any, Any] = {"text": shards("texts.jsonl", document="text")}
    return Corpora(
        kind="corpora", vocab_size=vocab_size, num_bpe_documents=4, sources=sources, instruction=None, tasks={}
    )


def test_the_tokenizer_is_trained_on_the_rows_that_training_reads(root: Path, caplog: pytest.LogCaptureFixture) -> None:
    good = ['{"text": "a red ball"}', '{"text": "a red bench"}']
    bad = ['{"text": null}', '{"other": "None None None"}', '{"text": "  "}', '{"text": ["None"]}']
    wanted, left_out = train_tokenizer(texts(root, "\n".join(good) + "\n", 266))
    assert not caplog.text
    assert not any(left_out.values())
    found, left_out = train_tokenizer(texts(root, "\n".join([*bad, *good, '{"text": "a red b']), 266))
    assert found.get_vocab() == wanted.get_vocab()
    assert left_out == {"data/text/without_text": 4, "data/text/short_shards": 1}
    assert "texts.jsonl: row 0 has no text: left out" in caplog.text
    assert "texts.jsonl: ends early, behind 6 rows (line 7 is torn): the run goes on without the rest" in caplog.text


def test_a_vocabulary_that_is_too_large_for_the_text_is_refused_by_keys_that_exist(root: Path) -> None:
    data = texts(root, '{"text": "a red ball"}\n', 1000)
    with pytest.raises(ValueError, match=r"=1000: the base text gives only \d+ tokens; ask for fewer") as refused:
        train_tokenizer(data)
    photos, other = re.findall(r"\w+\.vocab_size", str(refused.value))
    assert compose("mm1", ["data=${photos}", f"{photos}=300"])["data"]["vocab_size"] == 300
    assert compose("mm1", ["scale=gpu", f"{other}=300"])["data"]["vocab_size"] == 300


def test_a_tar_whose_samples_lack_files_at_its_beginning_is_refused_by_name(root: Path) -> None:
    write_tar(root / "tars" / "0.tar", range(1))
    with tarfile.open(root / "tars" / "0.tar", "a") as tar:
        tar.addfile(tarfile.TarInfo("0001.txt"), io.BytesIO(b""))
    with pytest.raises(ValueError, match="0.tar: its first samples do not all have the same files: each needs"):
        check(shards("tars/*.tar", image_field="jpg", text_field="txt"))


def test_what_is_not_there_is_refused_in_one_sentence(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (root / "photos").mkdir()
    (root / "photos" / "a.png").write_bytes(photo(1, format="PNG"))
    with pytest.raises(
        ValueError, match=r"1 photos and no caption: put PHOTO.txt beside each photo, or a captions.jsonl"
    ):
        check(folder())
    with pytest.raises(ValueError, match=r"no file: expected files that all end in one of .tar, .parquet, .jsonl"):
        check(shards("cc3m/*.tar"))
    (root / "photos" / "a.txt").write_bytes(b"caf\xe9")
    with pytest.raises(ValueError, match="a.txt: no text in UTF-8 .*: save it as that"):
        check(folder())
    (root / "photos" / "captions.jsonl").write_text('{"image": "a.png", "te')
    with pytest.raises(ValueError, match="captions.jsonl: line 1 is torn: write it anew"):
        check(folder())
    write_tar(root / "tars" / "0.tar", range(2))
    with pytest.raises(ValueError, match="no field 'image' in a row of a caption; its fields are: jpg, txt"):
        check(shards("tars/*.tar"))
    write_jsonl(root / "a.jsonl", [{"text": "1"}])
    (root / "a.jsonl").write_text('{"text": "1"}\nnonsense\n{"text": "2"}\n')
    with pytest.raises(ValueError, match=r"a.jsonl: line 2 is not JSON"):
        list(itertools.islice(source(shards("a.jsonl", document="text")).drafts(), 3))
    write_jsonl(root / "b.jsonl", [{"text": " "}, {"text": None}])
    with pytest.raises(ValueError, match="text: no document in 1 shards: they are empty"):
        next(source(shards("b.jsonl", document="text")).drafts())
    monkeypatch.delenv("RETRACE_DATA")
    with pytest.raises(ValueError, match="photos: RETRACE_DATA is not set: set it to the folder that holds it"):
        check(folder())


def test_a_hub_that_does_not_answer_is_refused_within_seconds(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "0")
    monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:9")
    config = HubDataset(kind="hub", dataset="HuggingFaceM4/OBELICS", revision="main", document="interleaved")
    start = time.monotonic()
    with pytest.raises(ValueError, match=r"can't be reached; .* name them instead: {kind: shards, pattern: FOLDER"):
        check(config)
    assert time.monotonic() - start < 8


def test_an_image_stands_upright_in_rgb_and_is_averaged_when_it_shrinks() -> None:
    """EXIF orientation 6 asks for a quarter turn, as telephones write it; stripes of a pixel must not alias."""
    data = io.BytesIO()
    turned = Image.new("L", (40, 20), 0)
    turned.paste(255, (0, 0, 20, 20))
    exif = Image.Exif()
    exif[0x0112] = 6
    turned.save(data, "JPEG", exif=exif)
    image = load_image(data.getvalue(), image_size=4)
    assert image.shape == (3, 4, 4)
    assert image[:, 0].min() > 0.9
    assert image[:, 3].max() < 0.1
    stripes = io.BytesIO()
    Image.fromarray((torch.arange(64 * 64).view(64, 64) % 2 * 255).byte().numpy()).save(stripes, "PNG")
    assert load_image(stripes.getvalue(), image_size=8) == pytest.approx(0.5, abs=0.05)


@pytest.mark.parametrize(("value", "seen"), [(0, 0.0), (3000, 0.0458), (32768, 0.5), (65535, 1.0)])
@pytest.mark.parametrize("format", ["PNG", "TIFF"])
def test_gray_of_16_bits_keeps_its_values(value: int, seen: float, format: str) -> None:
    data = io.BytesIO()
    Image.fromarray(np.full((9, 12), value, dtype=np.uint16)).save(data, format)
    image = load_image(data.getvalue(), image_size=4)
    assert image.shape == (3, 4, 4)
    assert image.numpy() == pytest.approx(seen, abs=1e-4)
    wide = io.BytesIO()
    Image.fromarray(np.full((9, 12), value, dtype=np.int32)).save(wide, "TIFF")
    assert torch.equal(load_image(wide.getvalue(), image_size=4), image)


@pytest.mark.parametrize("pixels", [np.full((4, 4), 0.5, np.float32), np.full((4, 4), 1 << 20, np.int32)])
def test_pixels_of_which_white_is_not_known_can_not_be_read(root: Path, pixels: Any) -> None:
    Image.fromarray(pixels).save(root / "a.tiff")
    write_jsonl(root / "a.jsonl", [{"image": "a.tiff", "text": "1"}])
    own = source(shards("a.jsonl", max_bad_share=0.5))
    assert own.load([Picture((str(root / "a.tiff"), ""))], image_size=4) == [None]
    assert own.notes()["unreadable"] == 1


@pytest.mark.parametrize("name", ["captions.jsonl", "long.txt", "movie.bin"])
def test_the_fingerprint_follows_what_stands_behind_the_beginning_of_a_file(root: Path, name: str) -> None:
    write_folder(root / "photos", range(2))
    place = -3 if name == "movie.bin" else 200_000
    content = bytearray(b"x" * 400_000)
    found = set()
    for last in b"abc":
        content[place] = last
        (root / "photos" / name).write_bytes(content)
        if last != ord("c"):  # changed long ago, and just now
            os.utime(root / "photos" / name, (last, last))
        found.add(fingerprint(folder()))
    assert len(found) == 3


def test_the_fingerprint_follows_the_files(root: Path) -> None:
    write_folder(root / "photos", range(3))
    before = fingerprint(folder())
    assert before == fingerprint(folder(max_bad_share=0.5))
    (root / "photos" / "001.jpg").write_bytes(photo(9))
    assert fingerprint(folder()) != before

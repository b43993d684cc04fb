"""Images that can't be read: what counts as one, how many are too many, and what a batch of them alone does."""

from __future__ import annotations

import io
import itertools
import random
import tarfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pyarrow
import pyarrow.parquet
import pytest
import torch
from multimodal import EXPERTS, SIDE, TOKENS, VISION, tiny_model
from multimodal import IMAGE as IMAGE_ID
from PIL import Image
from test_mm1_corpora import Corpus, folder, photo, shards, source, words, write_folder, write_jsonl, write_tar

from retrace.core import train
from retrace.core.train import WEIGHT
from retrace.papers.mm1 import programs
from retrace.papers.mm1.choices import TextTower
from retrace.papers.mm1.contrastive import ContrastiveModel
from retrace.papers.mm1.encoder import build_encoder
from retrace.papers.mm1.mixture import Mixture
from retrace.papers.mm1.packing import Picture, Window
from retrace.papers.mm1.pairs import Pairs
from retrace.papers.mm1.photos import most_bad
from retrace.papers.mm1.reconstruction import ReconstructiveModel
from retrace.papers.mm1.stream import Stream
from retrace.papers.mm1.world import IMAGE, PAD, vocabulary

torch.set_num_threads(1)


@pytest.fixture
def root(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("RETRACE_DATA", str(tmp_path))
    return tmp_path


def write_holes(root: Path) -> list[Corpus]:
    """A tar whose eighth sample has no photo, and a table whose third image is null in either way."""
    write_tar(root / "tars" / "0.tar", range(12))
    with tarfile.open(root / "tars" / "0.tar") as tar:
        kept = [(m, tar.extractfile(m).read()) for m in tar if m.name != "0007.jpg"]  # type: ignore[union-attr]
    with tarfile.open(root / "tars" / "0.tar", "w") as tar:
        for entry, data in kept:
            tar.addfile(entry, io.BytesIO(data))
    nothing: list[dict[str, Any] | None] = [None, {"bytes": None, "path": None}]
    images = [nothing[n - 2] if n in (2, 3) else {"bytes": photo(n), "path": None} for n in range(12)]
    (root / "tables").mkdir()
    table = pyarrow.table({"image": images, "text": [words(n) for n in range(12)]})
    pyarrow.parquet.write_table(table, root / "tables" / "0.parquet")
    return [shards("tars/*.tar", image_field="jpg", text_field="txt"), shards("tables/*.parquet")]


def test_a_row_without_its_image_counts_as_unreadable(root: Path) -> None:
    for config, holes in zip(write_holes(root), (1, 2), strict=True):
        own = source(config.model_copy(update={"max_bad_share": 0.5}))
        drafts = [draft for _, draft in itertools.islice(own.drafts(), 12)]
        loaded = own.load([part for draft in drafts for part in draft.parts if isinstance(part, Picture)], image_size=4)
        assert sum(image is None for image in loaded) == own.notes()["unreadable"] == holes


def test_a_photo_with_damaged_exif_data_counts_as_unreadable(root: Path) -> None:
    data, exif = io.BytesIO(), Image.Exif()
    exif[0x010E], exif[0x0112] = "hello", 6
    Image.new("RGB", (8, 8)).save(data, "JPEG", exif=exif)
    damaged = bytearray(data.getvalue())
    damaged[damaged.index(b"Exif") + 17] = 2  # on which the decoder raises struct.error
    write_folder(root / "photos", range(1))
    own = source(folder(max_bad_share=0.5))
    assert own.load([Picture((bytes(damaged), ""))], image_size=4) == [None]


def test_the_share_of_bad_photos_is_that_of_files_and_chance_alone_refuses_nothing(root: Path) -> None:
    write_folder(root / "photos", range(150 // 8))
    (root / "photos" / "003.jpg").write_bytes(b"")
    own = source(folder(max_bad_share=0.06))
    pictures = [Picture((str(root / "photos" / f"{n:03}.jpg"), "")) for n in range(18)]
    for _ in range(30):  # epochs, each of them with the broken one first
        own.load(pictures[3:] + pictures[:3], image_size=2)
    assert own.notes()["unreadable"] == 30
    rng, refused = random.Random(0), 0
    for _ in range(200):  # streams of files of which half of the allowed share is bad
        bad = itertools.accumulate(rng.random() < 0.005 for _ in range(3000))
        refused += any(count > most_bad(seen, share=0.01) for seen, count in enumerate(bad, start=1))
    assert refused <= 2
    assert most_bad(10_000, share=0.01) < 140
    assert most_bad(10_000, share=0.0) == 0


@pytest.mark.parametrize("objective", ["contrastive", "reconstructive", "rows"])
def test_a_batch_of_which_nothing_can_be_read_has_no_loss_and_no_gradient(root: Path, objective: str) -> None:
    write_folder(root / "photos", range(12))
    for file in (root / "photos").glob("*.jpg"):
        file.write_bytes(b"")
    own, ids = source(folder(max_bad_share=0.99)), vocabulary()
    if objective == "rows":
        window = Window(40, TOKENS, 8, pad_id=ids[PAD], image_id=IMAGE_ID)
        stream = Stream(Mixture(weights={"caption": 1.0}), {"caption": own}, window=window, image_size=SIDE, seed=0)
        model: torch.nn.Module = tiny_model(experts=EXPERTS).train()
        batch: Mapping[str, torch.Tensor] = stream(range(2))
        assert stream.notes(2)["data/caption/left_out"] == own.notes()["unreadable"] > 0
        value, seen = programs._loss(model, batch, torch.Generator())
    else:
        options = {"max_tokens": 8, "image_size": SIDE, "pad_id": ids[PAD], "image_id": ids[IMAGE], "seed": 0}
        batch = Pairs(own, **options)(range(3))  # type: ignore[arg-type]
        encoder = build_encoder(VISION.model_copy(update={"conv_stem": True}), seed=0)
        tower = TextTower(
            hidden_size=8, num_layers=1, num_heads=2, intermediate_size=8, max_tokens=8, joint_size=4,
            image_pooling="mean_and_patches",
        )  # fmt: skip
        if objective == "contrastive":
            model = ContrastiveModel(encoder, tower, vocab_size=len(ids), seed=0)
        else:
            model = ReconstructiveModel(encoder, seed=0)
        loss = programs._encoder_loss(objective, num_patches=encoder.grid**2)
        value, seen = loss(model, batch, torch.Generator().manual_seed(0))
    assert seen[WEIGHT] == 0
    train._weighed(value, seen, alone=True).backward()
    trained = [p for p in model.parameters() if p.requires_grad]
    assert all(p.grad is not None and not p.grad.any() for p in trained)  # which other processes wait for
    assert train._means([{"loss/total": 7.0, "other": 2.0, WEIGHT: 0.0}]) == {"loss/total": 0.0}


@pytest.mark.parametrize("kind", ["jsonl", "jsonl of dicts", "parquet", "parquet of dicts"])
def test_images_that_rows_name_by_path_lie_relative_to_their_file(root: Path, kind: str) -> None:
    (root / "own" / "img").mkdir(parents=True)
    (root / "own" / "img" / "5.jpg").write_bytes(photo(5))
    named: Any = {"bytes": None, "path": "img/5.jpg"} if "dicts" in kind else "img/5.jpg"
    rows = [{"image": named, "text": words(5)}, {"image": ["img/5.jpg"], "text": words(6)}]  # the second is none
    if kind.startswith("jsonl"):
        write_jsonl(root / "own" / "rows.jsonl", rows)
    else:
        table = pyarrow.table({"image": [named], "text": [words(5)]})
        pyarrow.parquet.write_table(table, root / "own" / "rows.parquet")
    own = source(shards(f"own/rows.{kind.partition(' ')[0]}", max_bad_share=0.9))
    drafts = [draft for _, draft in itertools.islice(own.drafts(), 2)]
    pictures = [part for draft in drafts for part in draft.parts if isinstance(part, Picture)]
    loaded = own.load(pictures, image_size=4)
    assert loaded[0] is not None
    assert (loaded[1] is None) == kind.startswith("jsonl")


def test_a_list_of_texts_where_training_takes_one_is_refused(root: Path) -> None:
    write_jsonl(root / "rows.jsonl", [{"image": "0.jpg", "text": [words(0), words(1)]}])
    with pytest.raises(ValueError, match=r"rows.jsonl: text is a list of texts, and a caption that is trained on has"):
        next(source(shards("rows.jsonl")).drafts())

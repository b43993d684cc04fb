"""A folder of photos with captions, as a user brings it, from the command of docs/mm1.md to scores of new photos."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

import pytest
import torch
from multimodal import carry_out
from PIL import Image, ImageDraw

from retrace.core.plan import plan
from retrace.papers.mm1 import cost
from retrace.papers.mm1.corpora import ImageFolder, check

torch.set_num_threads(1)
COLORS = {"red": (200, 30, 30), "green": (30, 160, 40), "blue": (40, 60, 200)}
PLACES = ("table", "beach", "wooden bench", "street in winter", "meadow", "window")


def write_photos(folder: Path, numbers: range) -> None:
    """Photos as phones and cameras leave them: of several sizes, formats and folders; one is damaged."""
    for number in numbers:
        color, place = list(COLORS)[number % 3], PLACES[number % len(PLACES)]
        kind = ("JPG", "jpeg", "png")[number % 3]
        file = folder / ("holiday" if number % 4 else "") / f"IMG_{number:04}.{kind}"
        file.parent.mkdir(parents=True, exist_ok=True)
        image = Image.new("RGB", (60 + number, 45), COLORS[color])
        ImageDraw.Draw(image).ellipse((5, 5, 25, 25), fill=(250, 240, 90))
        image.save(file)
        file.with_suffix(".txt").write_text(f"a {color} ball on a {place}, number {number}\n")
    (folder / ".thumbnails").mkdir()
    (folder / ".thumbnails" / "IMG_0000.JPG").write_text("no photo of yours")


def command() -> list[str]:
    """The overrides of the page's command."""
    text = (Path(__file__).parents[2] / "docs" / "mm1.md").read_text().partition("## Your own photos")[2]
    (block,) = re.findall(r"```sh\n(retrace run .*?)```", text.partition("\n## ")[0], re.DOTALL)
    words = shlex.split(block)
    assert words[:4] == ["retrace", "run", "mm1/main", "scale=laptop"]
    return words[4:]


def test_a_model_is_trained_on_a_folder_of_photos_and_asked_about_new_ones(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("RETRACE_DATA", str(tmp_path))
    write_photos(tmp_path / "photos" / "train", range(24))
    write_photos(tmp_path / "photos" / "test", range(24, 30))
    (tmp_path / "photos" / "train" / "holiday" / "IMG_0001.jpeg").write_bytes(b"damaged")
    small = ["scale=smoke", "seed=0", "tracking.wandb=off", "photos.vocab_size=300"]
    specs = plan(["mm1/main"], [*small, *command(), "eval.shots=[0,2]"])
    records = carry_out(specs, tmp_path / "home")
    assert list(records) == ["prepare", "pretrain_encoder", "pretrain_decoder", "pretrain", "evaluate"]
    assert {"photos_0/cider", "photos_2/cider", "mmcore_2/mean"} <= records["evaluate"].metrics.keys()
    episodes = 6 * 2  # of photos and numbers of shots
    images = sum(6 * (shots + 1) * records["evaluate"].config["connector"]["num_tokens"] for shots in (0, 2))
    assert 0 < (records["evaluate"].cost.tokens or 0) - images < episodes * 100  # words of the prompts, not of 5000
    assert 0 < (records["evaluate"].cost.flops or 0) < cost.evaluate(specs[-1].config).flops / 100
    read = records["pretrain"].provenance["data"]
    assert read["data/caption/rows"] + read["data/text/rows"] == 8
    assert read["data/caption/uncaptioned"] == 0  # the thumbnails are hidden


def test_captions_may_stand_in_the_file_that_datasets_reads(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RETRACE_DATA", str(tmp_path))
    folder = tmp_path / "photos"
    folder.mkdir()
    Image.new("RGB", (8, 8)).save(folder / "a.png")
    (folder / "metadata.jsonl").write_text('{"file_name": "a.png", "text": "black"}\n\n')  # a blank line at the end
    config = ImageFolder(kind="folder", document="caption", path="photos")
    check(config)
    (shard,) = config.shards()
    assert [(row["image"], row["text"]) for row in shard.rows(0)] == [(str(folder / "a.png"), "black")]

"""The procedural world: what is drawn, what is said of it, and what is held out."""

from __future__ import annotations

import itertools
import random
import re

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from retrace.papers.mm1.choices import PARTS_BLOCK
from retrace.papers.mm1.documents import CAPTION, TEXT_FAMILIES, build_tokenizer, draft, encode
from retrace.papers.mm1.images import DIGIT_PIXELS, NATIVE, _put_digits, draw
from retrace.papers.mm1.packing import Draft, Picture
from retrace.papers.mm1.pairs import Pairs
from retrace.papers.mm1.parts import DIGIT_BLOCKS, DIGIT_PAIRS, SCENE, PartsSource
from retrace.papers.mm1.rows import Piece
from retrace.papers.mm1.world import (
    ATTRIBUTES,
    CHAIN,
    COLORS,
    DIGITS,
    KEYS,
    NAMES,
    SHAPES,
    Scene,
    WorldConfig,
    colors_of,
    draw_scene,
    draw_text,
    draw_turns,
    vocabulary,
)

torch.set_num_threads(1)
WORLD = WorldConfig(kind="procedural", world_seed=3, held_out_shapes=2, noisy_share=0.3, min_images=3, max_images=6)
KINDS = ("caption", "synthetic", "interleaved", "text", "instruction")


def scenes(count: int, seed: int = 0, *, unseen: bool = False) -> list[Scene]:
    rng = random.Random(seed)
    return [draw_scene(WORLD, rng, unseen=unseen) for _ in range(count)]


def words(document: Draft) -> str:
    tokenizer = build_tokenizer()
    texts = ["<image>" if isinstance(p, Picture) else tokenizer.decode(p.token_ids) for p in document.parts]
    return " ".join(texts[1:-1])


def shown(document: Draft) -> list[Scene]:
    return [part.what for part in document.parts if isinstance(part, Picture)]


def nearest(train: Tensor, labels: list[str], test: Tensor) -> list[str]:
    """Each test image's label by the nearest mean of the training images' labels."""
    names = sorted(set(labels))
    own = torch.tensor([names.index(label) for label in labels])
    means = torch.stack([train[own == i].flatten(1).mean(0) for i in range(len(names))])
    return [names[i] for i in torch.cdist(test.flatten(1), means).argmin(1).tolist()]


def test_an_image_does_not_depend_on_what_is_drawn_beside_it() -> None:
    some = scenes(70)
    together = draw(some, image_size=24)
    assert torch.equal(together[65], draw([some[65]], image_size=24)[0])
    assert together.shape == (70, 3, 24, 24)
    assert 0 <= together.min() < together.max() <= 1
    assert draw([], image_size=24).shape == (0, 3, 24, 24)


def test_a_smaller_image_is_the_area_average_of_the_larger() -> None:
    """Wherever noise does not take the brightness over the edge, which the smaller image sees less of."""
    some = scenes(8)
    small, large = draw(some, image_size=16), draw(some, image_size=48)
    inner = torch.nn.functional.avg_pool2d(((large > 0) & (large < 1)).float(), 3) == 1
    assert inner.float().mean() > 0.7
    assert (torch.nn.functional.avg_pool2d(large, 3) - small)[inner].abs().max() < 1e-5
    with pytest.raises(ValueError, match="image_size=97: procedural images have 96 pixels a side"):
        draw(some, image_size=97)


@pytest.mark.parametrize("grid", [3, 6, 9, 12])
def test_the_patches_of_a_grid_cut_a_digit_alike_in_all_four_corners(grid: int) -> None:
    """Or an encoder that reads it in one learns nothing for the others."""
    plane_NN, height = np.zeros((NATIVE, NATIVE), np.float32), DIGIT_PIXELS[0].shape[0]
    _put_digits(np.zeros_like(plane_NN), plane_NN, ("7", "7", "7", "7"), [3] * 8, 1.0)
    assert plane_NN.sum() == 4 * DIGIT_PIXELS[7].sum(), "one lies over the edge, or over another"
    small = F.interpolate(torch.from_numpy(plane_NN)[None, None], size=4 * grid, mode="area")[0, 0]
    patches = small.unfold(0, 4, 4).unfold(1, 4, 4)  # (grid, grid, 4, 4)
    apart, reach = 2 * grid // 3, grid // 3  # a digit lies within a third of the image
    assert height < NATIVE / 3
    first = patches[:reach, :reach]
    for down, right in ((0, apart), (apart, 0), (apart, apart)):
        torch.testing.assert_close(patches[down : down + reach, right : right + reach], first)


def test_digits_are_legible_only_at_higher_resolution_and_colors_at_any() -> None:
    train, test = scenes(2500, 1), scenes(300, 2)
    read: dict[tuple[str, int], float] = {}
    for size in (8, 16, 32):
        a, b = draw(train, image_size=size), draw(test, image_size=size)
        corner, center = slice(0, size * 5 // 16), slice(size // 3, size - size // 3)
        first = nearest(a[:, :, corner, corner], [s.digits[0] for s in train], b[:, :, corner, corner])
        read["digit", size] = sum(x == s.digits[0] for x, s in zip(first, test, strict=True)) / len(test)
        means_a, means_b = (x[:, :, center, center].mean((2, 3), keepdim=True) for x in (a, b))
        color = nearest(means_a, [s.color for s in train], means_b)
        read["color", size] = sum(x == s.color for x, s in zip(color, test, strict=True)) / len(test)
    assert read["digit", 8] < read["digit", 16] < read["digit", 32]
    assert max(read["color", size] for size in (8, 16, 32)) - min(read["color", size] for size in (8, 16, 32)) < 0.05


@pytest.mark.parametrize("kind", KINDS)
def test_a_document_follows_from_seed_kind_and_index_alone(kind: str) -> None:
    again = [draft(WORLD, kind=kind, seed=1, index=i) for i in range(40)]  # type: ignore[arg-type]
    assert again == [draft(WORLD, kind=kind, seed=1, index=i) for i in range(40)]  # type: ignore[arg-type]
    assert again[7] != draft(WORLD, kind=kind, seed=2, index=7)  # type: ignore[arg-type]
    bos, eos = vocabulary()["<bos>"], vocabulary()["<eos>"]
    for document in again:
        first, last = document.parts[0], document.parts[-1]
        assert (first, last) == (Piece((bos,), learned=False), Piece((eos,)))


@pytest.mark.parametrize("kind", KINDS)
def test_no_training_document_shows_a_pair_that_is_held_out(kind: str) -> None:
    drawn = {(s.color, s.shape) for i in range(1500) for s in shown(draft(WORLD, kind=kind, seed=0, index=i))}  # type: ignore[arg-type]
    unseen = {(s.color, s.shape) for s in scenes(3000, unseen=True)}
    assert not drawn & unseen
    assert len(unseen) == len(COLORS) * WORLD.held_out_shapes
    if kind != "text":
        assert len(drawn) == len(COLORS) * (len(SHAPES) - WORLD.held_out_shapes)


def test_every_color_and_every_shape_loses_as_many_pairs() -> None:
    unseen = {(s.color, s.shape) for s in scenes(3000, unseen=True)}
    for things, place in ((COLORS, 0), (SHAPES, 1)):
        assert {sum(pair[place] == thing for pair in unseen) for thing in things} == {WORLD.held_out_shapes}


def test_captions_are_noisy_as_often_as_asked_and_synthetic_ones_never() -> None:
    def true_share(kind: str) -> float:
        documents = [draft(WORLD, kind=kind, seed=0, index=i) for i in range(2000)]  # type: ignore[arg-type]
        whole = [words(d) == f"<image> {CAPTION} {shown(d)[0].caption}" for d in documents]
        return sum(whole) / len(whole)

    assert true_share("synthetic") == 1
    assert true_share("caption") == pytest.approx(0.7, abs=0.04)


def blocks_in_parts(first: int, count: int) -> list[list[tuple[Scene, str]]]:
    documents = itertools.islice(PartsSource(WORLD, "synthetic", 0).drafts((first * PARTS_BLOCK,)), count * PARTS_BLOCK)
    said = [(shown(d)[0], words(d).removeprefix("<image> ")) for _, d in documents]
    return [said[start : start + PARTS_BLOCK] for start in range(0, len(said), PARTS_BLOCK)]


def test_the_first_blocks_of_captions_in_parts_name_digits_alone() -> None:
    (first,), (last,) = blocks_in_parts(0, 1), blocks_in_parts(DIGIT_BLOCKS - 1, 1)
    for scene, text in first + last:
        assert text == " ".join(scene.digits)


def test_later_blocks_name_all_of_images_that_differ_in_one_part() -> None:
    seen = colors_of(WORLD.world_seed, WORLD.held_out_shapes, unseen=False)
    found = set()
    for block in blocks_in_parts(DIGIT_BLOCKS, 40):
        assert all(text == scene.caption for scene, text in block)
        assert all(scene.color in seen[scene.shape] for scene, _ in block), "held-out pairs stay held out"
        values = zip(*((scene.color, scene.shape, *scene.digits) for scene, _ in block), strict=True)
        found.add(tuple(place for place, column in enumerate(values) if len(set(column)) > 1))
    assert found == {SCENE, *DIGIT_PAIRS}


@pytest.mark.parametrize("size", [PARTS_BLOCK, PARTS_BLOCK // 4])
def test_a_batch_of_captions_in_parts_holds_images_of_one_block_alone(size: int) -> None:
    tokenizer = build_tokenizer()
    pairs = Pairs(
        PartsSource(WORLD, "synthetic", 0), max_tokens=12, image_size=12, pad_id=0, image_id=4, seed=0, marks=None
    )
    for batch in range(DIGIT_BLOCKS * PARTS_BLOCK // size, DIGIT_BLOCKS * PARTS_BLOCK // size + 6):
        ids = pairs(range(batch * size, (batch + 1) * size))["input_ids_BT"].tolist()
        captions = [tokenizer.decode(row[1:7]).split(" ") for row in ids]
        varied = tuple(place for place, column in enumerate(zip(*captions, strict=True)) if len(set(column)) > 1)
        assert varied in (SCENE, *DIGIT_PAIRS)


@pytest.mark.parametrize("attribute", ATTRIBUTES)
def test_the_last_answer_follows_from_the_earlier_turns(attribute: str) -> None:
    rng = random.Random(5)
    for _ in range(200):
        turns = draw_turns(WORLD, rng, attribute=attribute, count=4)  # type: ignore[arg-type]
        scene, said = turns[-1]
        if attribute == "name":
            meant = {shape.shape: name for shape, name in turns[:-1]}
            assert meant[scene.shape] == said
            assert said in NAMES
        elif attribute == "corner":
            fitting = [c for c in range(4) if all(s.digits[c] == a for s, a in turns[:-1])]
            assert said in {scene.digits[c] for c in fitting}
        else:
            read = {"color": scene.color, "shape": scene.shape, "first": scene.digits[0], "last": scene.digits[3]}
            assert said == read[attribute]


def test_more_turns_leave_fewer_corners() -> None:
    def open_corners(count: int) -> float:
        rng = random.Random(1)
        many = [draw_turns(WORLD, rng, attribute="corner", count=count + 1) for _ in range(300)]
        return sum(sum(all(s.digits[c] == a for s, a in t[:-1]) for c in range(4)) for t in many) / len(many)

    found = [open_corners(count) for count in (1, 2, 4, 8)]
    assert found == sorted(found, reverse=True)
    assert found[0] > 2.2
    assert found[-1] < 1.1


def test_texts_can_be_answered_from_what_they_say() -> None:
    rng = random.Random(2)
    followers: dict[str, set[str]] = {}
    for _ in range(300):
        said, answer = draw_text(WORLD, rng, family="keys")
        pairs, asked = said.removesuffix(" ?").split(" ; ")
        assert dict(pair.split(" = ") for pair in pairs.split(" , "))[asked] == answer
        assert asked in KEYS
        said, answer = draw_text(WORLD, rng, family="sums")
        assert sum(map(int, re.findall(r"\d+", said))) == int(answer.replace(" ", ""))
        assert set(answer.split(" ")) <= set(DIGITS)
        said, answer = draw_text(WORLD, rng, family="chain")
        followers.setdefault(said.split(" ")[-1], set()).add(answer)
    assert all(len(answers) == 1 for answers in followers.values())
    assert {answer for answers in followers.values() for answer in answers} == set(CHAIN)


def test_only_answers_of_instructions_are_learned() -> None:
    for index in range(50):
        document = draft(WORLD, kind="instruction", seed=0, index=index)
        scene = shown(document)[0]
        for piece in document.parts[2:-1]:
            assert isinstance(piece, Piece)
            text = build_tokenizer().decode(piece.token_ids)
            assert piece.learned == (text in (scene.color, scene.shape, *scene.digits))
            assert piece.learned != text.endswith("short answer :")


def test_the_tokenizer_knows_every_word_and_agrees_with_encode() -> None:
    tokenizer = build_tokenizer()
    assert len(tokenizer) == len(vocabulary())
    for text in (f"{CAPTION} red ring 1 2 3 4 \n", "door = 3 ; door ? 3", "we walk then \n they"):
        assert tokenizer(text)["input_ids"] == list(encode(text).token_ids)
        assert tokenizer.decode(encode(text).token_ids) == text
    assert tokenizer.unk_token_id not in {
        token
        for kind in KINDS
        for index in range(200)
        for part in draft(WORLD, kind=kind, seed=0, index=index).parts  # type: ignore[arg-type]
        if isinstance(part, Piece)
        for token in part.token_ids
    }
    assert TEXT_FAMILIES == ("keys", "sums", "chain")
    with pytest.raises(ValueError, match="max_images=2 is below min_images=3: give a range"):
        WorldConfig(kind="procedural", world_seed=3, held_out_shapes=2, noisy_share=0.3, min_images=3, max_images=2)

"""What vision encoders promise: transformers' features at any resolution, and both ways to pre-train one."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from transformers import (
    Aimv2VisionConfig,
    Aimv2VisionModel,
    CLIPConfig,
    CLIPModel,
    CLIPVisionConfig,
    CLIPVisionModel,
    SiglipVisionConfig,
    SiglipVisionModel,
)

from retrace.papers.mm1.choices import PretrainedEncoder, TextTower
from retrace.papers.mm1.contrastive import ContrastiveModel, contrastive_loss, same_captions
from retrace.papers.mm1.encoder import PIXELS, build_encoder, load_encoder, resized
from retrace.papers.mm1.reconstruction import ReconstructiveModel, normalised_patches, prefix_mask, sample_prefixes
from retrace.papers.mm1.shape import ImagePooling, VisionShape

torch.set_num_threads(1)
SIZES = {
    "image_size": 12, "patch_size": 4, "hidden_size": 16, "num_hidden_layers": 3, "num_attention_heads": 2,
    "intermediate_size": 20,
}  # fmt: skip
FAMILIES = {
    "clip_vision_model": (CLIPVisionModel, CLIPVisionConfig),
    "siglip_vision_model": (SiglipVisionModel, SiglipVisionConfig),
    "aimv2_vision_model": (Aimv2VisionModel, Aimv2VisionConfig),
}
SHAPE = VisionShape(image_size=16, patch_size=4, hidden_size=16, num_layers=2, num_heads=2, intermediate_size=32)


def saved(family: str, folder: Path) -> torch.nn.Module:
    torch.manual_seed(0)
    model, config = FAMILIES[family]
    trunk = model(config(**SIZES)).eval()
    trunk.save_pretrained(folder)
    return trunk


def normal(images: torch.Tensor, family: str) -> torch.Tensor:
    mean, std = (torch.tensor(values).view(3, 1, 1) for values in PIXELS[family])
    return (images - mean) / std


@pytest.mark.parametrize("side", [12, 8, 16, 28])
@pytest.mark.parametrize("family", ["clip_vision_model", "siglip_vision_model"])
def test_features_at_any_resolution_are_those_of_transformers_interpolation(
    family: str, side: int, tmp_path: Path
) -> None:
    trunk, images = saved(family, tmp_path), torch.rand(2, 3, side, side)
    expected = trunk(normal(images, family), interpolate_pos_encoding=True).last_hidden_state
    expected = expected[:, 1:] if family == "clip_vision_model" else expected
    on_the_fly = load_encoder(str(tmp_path))
    for_good = load_encoder(str(tmp_path), image_size=side)
    assert (on_the_fly.grid, for_good.grid) == (3, side // 4)
    torch.testing.assert_close(on_the_fly(images), expected, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(for_good(images), expected, atol=1e-5, rtol=1e-5)
    assert len(for_good.trunk.embeddings.position_embedding.weight) == for_good.grid**2 + int(for_good.has_class_token)


@pytest.mark.parametrize("family", FAMILIES)
def test_features_are_transformers_last_hidden_states_and_what_does_not_reach_them_is_not_trained(
    family: str, tmp_path: Path
) -> None:
    trunk, images = saved(family, tmp_path), torch.rand(2, 3, 12, 12)
    encoder = load_encoder(str(tmp_path))
    expected = trunk(normal(images, family)).last_hidden_state[:, int(encoder.has_class_token) :]
    torch.testing.assert_close(encoder(images), expected, atol=1e-5, rtol=1e-5)
    encoder(images).square().sum().backward()
    assert not [name for name, p in encoder.named_parameters() if p.requires_grad != (p.grad is not None)]


@pytest.mark.parametrize("side", [8, 16, 28])
def test_aimv2_at_another_resolution_has_the_positions_that_siglip_would_have_there(side: int, tmp_path: Path) -> None:
    saved("aimv2_vision_model", tmp_path)
    encoder = load_encoder(str(tmp_path), image_size=side)
    positions = load_encoder(str(tmp_path)).trunk.embeddings.position_embedding
    siglip = SiglipVisionModel(SiglipVisionConfig(**SIZES, vision_use_head=False)).embeddings
    siglip.position_embedding = positions
    expected = siglip.interpolate_pos_encoding(torch.zeros(1, (side // 4) ** 2, 16), side, side)[0]
    torch.testing.assert_close(encoder.trunk.embeddings.position_embedding.weight, expected, atol=1e-6, rtol=1e-5)
    assert encoder(torch.rand(2, 3, side, side)).shape == (2, (side // 4) ** 2, 16)


def test_a_whole_clip_gives_its_image_tower_and_the_pixels_of_its_processor(tmp_path: Path) -> None:
    torch.manual_seed(0)
    text = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 16}
    whole = CLIPModel(CLIPConfig(text_config={**text, "vocab_size": 30}, vision_config=SIZES)).eval()
    whole.save_pretrained(tmp_path)
    (tmp_path / "preprocessor_config.json").write_text('{"image_mean": [0.1, 0.2, 0.3], "image_std": [1.0, 2.0, 4.0]}')
    images = torch.rand(1, 3, 12, 12)
    pixels = (images - torch.tensor([0.1, 0.2, 0.3]).view(3, 1, 1)) / torch.tensor([1.0, 2.0, 4.0]).view(3, 1, 1)
    expected = whole.vision_model(pixels).last_hidden_state[:, 1:]
    torch.testing.assert_close(load_encoder(str(tmp_path))(images), expected, atol=1e-5, rtol=1e-5)
    told = {"patch_size": 4, "hidden_size": 16, "num_layers": 3, "num_heads": 2, "intermediate_size": 20}
    PretrainedEncoder(kind="pretrained", name="it", revision="main", **told).check_sizes(whole.config)


@pytest.mark.parametrize("family", FAMILIES)
def test_the_sizes_that_a_config_tells_are_compared_in_every_family(family: str, tmp_path: Path) -> None:
    saved(family, tmp_path)
    real = load_encoder(str(tmp_path)).trunk.config
    mlp = 30 if family == "aimv2_vision_model" else 20  # three matrices of 20 are as much as two of 30
    told = {"patch_size": 4, "hidden_size": 16, "num_layers": 3, "num_heads": 2, "intermediate_size": mlp}
    encoder = PretrainedEncoder(kind="pretrained", name="it", revision="main", **told)
    encoder.check_sizes(real)
    for size in told.keys() - {"num_heads"}:  # of which no cost depends
        with pytest.raises(ValueError, match=rf"encoder\.{size}=64: it has {told[size]}: correct the sizes beside its"):
            encoder.model_copy(update={size: 64}).check_sizes(real)


def test_sizes_and_models_that_cannot_be_are_refused(tmp_path: Path) -> None:
    saved("siglip_vision_model", tmp_path)
    with pytest.raises(ValueError, match="image_size=18 is no multiple of patch_size=4: use 16"):
        load_encoder(str(tmp_path), image_size=18)
    with pytest.raises(ValueError, match="images of 12x16 pixels: expected squares, sides a multiple of 4"):
        load_encoder(str(tmp_path))(torch.rand(1, 3, 12, 16))
    saved("aimv2_vision_model", tmp_path / "aim")
    with pytest.raises(ValueError, match="images of 16 pixels: AIMv2 takes its own 12: see `resized`"):
        load_encoder(str(tmp_path / "aim"))(torch.rand(1, 3, 16, 16))
    Aimv2VisionConfig(**SIZES, is_native=True).save_pretrained(tmp_path / "native")
    with pytest.raises(ValueError, match="native: it computes its positions from an image's sides: take the AIMv2 of"):
        load_encoder(str(tmp_path / "native"))
    CLIPConfig().text_config.save_pretrained(tmp_path / "text")
    with pytest.raises(ValueError, match="a model of type clip_text_model: expected one of clip, siglip"):
        load_encoder(str(tmp_path / "text"))


@pytest.mark.parametrize("conv_stem", [False, True])
def test_a_fresh_encoder_follows_from_its_seed_and_is_trained_whole(conv_stem: bool) -> None:
    shape = SHAPE.model_copy(update={"conv_stem": conv_stem})
    first, second, other = (build_encoder(shape, seed=seed) for seed in (0, 0, 1))
    images = torch.rand(2, 3, 16, 16)
    assert first(images).shape == (2, 16, 16)
    assert torch.equal(first(images), second(images))
    assert not torch.equal(first(images), other(images))
    first(images).square().sum().backward()
    assert not [name for name, p in first.named_parameters() if p.grad is None]
    assert resized(first, 24)(torch.rand(1, 3, 24, 24)).shape == (1, 36, 16)


@pytest.mark.parametrize("conv_stem", [False, True])
def test_a_reconstruction_sees_the_prefix_and_earlier_patches_and_no_later_one(conv_stem: bool) -> None:
    model = ReconstructiveModel(build_encoder(SHAPE.model_copy(update={"conv_stem": conv_stem}), seed=0), seed=0)
    images, prefix = torch.rand(1, 3, 16, 16), torch.tensor([6])

    def features(x: torch.Tensor) -> torch.Tensor:
        return model.encoder(x, mask_PP=prefix_mask(prefix, 16))[0]

    before = features(images)
    for patch in range(16):
        changed = images.clone()
        row, column = 4 * (patch // 4), 4 * (patch % 4)
        changed[..., row : row + 4, column : column + 4] = 0.5
        moved = (features(changed) != before).any(-1)
        assert moved.tolist() == [patch < 6 or at >= patch for at in range(16)]


def test_the_loss_is_on_patches_behind_the_prefix_and_1_for_their_mean() -> None:
    model, images = ReconstructiveModel(build_encoder(SHAPE, seed=0), seed=0), torch.rand(3, 3, 16, 16)
    prefix = torch.tensor([1, 5, 15])
    with torch.no_grad():
        predicted = model.head(model.encoder(images, mask_PP=prefix_mask(prefix, 16)))
    target = normalised_patches(images, 4)
    errors = [((predicted[m, p - 1] - target[m, p]) ** 2).mean() for m in range(3) for p in range(int(prefix[m]), 16)]
    torch.testing.assert_close(model(images, prefix).loss, torch.stack(errors).mean())
    for parameter in model.head[2].parameters():
        torch.nn.init.zeros_(parameter)
    assert model(images, prefix).loss.item() == pytest.approx(1.0, abs=1e-3)
    drawn = sample_prefixes(500, 16, generator=torch.Generator().manual_seed(0))
    assert (int(drawn.min()), int(drawn.max())) == (1, 15)


def test_patches_of_the_target_stand_in_raster_order() -> None:
    images = torch.rand(1, 3, 16, 16)
    patch = images[0, :, 4:8, 8:12].flatten()
    expected = (patch - patch.mean()) / patch.std(correction=0)
    torch.testing.assert_close(normalised_patches(images, 4)[0, 6], expected, atol=1e-3, rtol=1e-3)


def test_an_encoder_with_a_class_token_cannot_reconstruct_in_order(tmp_path: Path) -> None:
    saved("clip_vision_model", tmp_path)
    with pytest.raises(ValueError, match="an encoder with a class token cannot predict patches in order"):
        ReconstructiveModel(load_encoder(str(tmp_path)), seed=0)


def test_the_contrastive_loss_is_clips_where_captions_differ_and_knows_those_that_do_not() -> None:
    scores, labels = torch.randn(4, 4), torch.arange(4)
    clip = (F.cross_entropy(scores, labels) + F.cross_entropy(scores.mT, labels)) / 2
    torch.testing.assert_close(contrastive_loss(scores, torch.eye(4, dtype=torch.bool)), clip)
    ids, mask = torch.tensor([[5, 6, 0], [5, 7, 0], [5, 6, 9]]), torch.tensor([[1, 1, 0], [1, 1, 0], [1, 1, 0]])
    alike = same_captions(ids, mask)
    assert alike.tolist() == [[True, False, True], [False, True, False], [True, False, True]]
    perfect = torch.where(alike, 20.0, -20.0)
    assert float(contrastive_loss(perfect, alike)) == pytest.approx(0.6931 * 2 / 3, abs=1e-3)  # which twin, is unknown


@pytest.mark.parametrize("pooling", ["mean", "mean_and_patches"])
def test_contrastive_training_brings_images_and_their_captions_together(pooling: ImagePooling) -> None:
    sizes = {"hidden_size": 16, "num_layers": 1, "num_heads": 2, "intermediate_size": 32, "max_tokens": 4}
    tower = TextTower(**sizes, joint_size=16, image_pooling=pooling)
    model = ContrastiveModel(build_encoder(SHAPE, seed=0), tower, vocab_size=12, seed=0)
    images = torch.rand(8, 3, 1, 1).expand(-1, -1, 16, 16)  # eight colours
    ids, mask = torch.tensor([[number + 2, 1, 0] for number in range(8)]), torch.tensor([[1, 1, 0]] * 8)
    optimizer = torch.optim.Adam([p for p in model.parameters() if p.requires_grad], lr=3e-3)
    for _ in range(60):
        output = model(images, ids, mask)
        optimizer.zero_grad()
        output.loss.backward()
        optimizer.step()
    assert float(output.metrics["accuracy/image_to_text"]) == 1.0
    assert not [name for name, p in model.named_parameters() if p.requires_grad != (p.grad is not None)]
    padded = model(images, torch.tensor([[number + 2, 1, 7] for number in range(8)]), mask)
    torch.testing.assert_close(padded.loss, model(images, ids, mask).loss)

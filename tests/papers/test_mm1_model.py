"""What the multimodal model promises: documents that do not see each other, images anywhere, and what it answers."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from multimodal import EXPERTS, IMAGE, SIDE, TOKENS, VOCAB, pack, place, tiny_decoder, tiny_model
from torch import Tensor
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    CLIPVisionConfig,
    CLIPVisionModel,
    LlavaConfig,
    LlavaForConditionalGeneration,
)

from retrace.papers.mm1 import decoder as decoder_module
from retrace.papers.mm1.decoder import FAMILIES, Decoder, decoder_of, load_decoder
from retrace.papers.mm1.encoder import PIXELS, VisionEncoder
from retrace.papers.mm1.inference import generate, log_likelihoods
from retrace.papers.mm1.model import MultimodalModel
from retrace.papers.mm1.pretrained import SETTINGS, from_pretrained, load_model, save_pretrained
from retrace.papers.mm1.rows import IGNORED, Piece
from retrace.papers.mm1.shape import ConnectorShape
from retrace.papers.mm1.subimages import split_images, sub_images

torch.set_num_threads(1)
ROWS = [[[1, "image", 7, 8, 9, "image", 10], ["image", 11, 12]], [[1, 13, 14, 15], [20, 21, 22, "image", 23], [1, 24]]]


def grads(model: torch.nn.Module, loss: Tensor) -> dict[str, Tensor]:
    model.zero_grad()
    loss.backward()
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("experts", [None, EXPERTS], ids=["dense", "experts"])
def test_changing_one_document_changes_no_logit_of_another(experts: object) -> None:
    model = tiny_model(experts=experts)  # type: ignore[arg-type]
    batch = pack(ROWS)
    before = model.logits(batch)
    images = batch.images_M3RR.clone()
    images[2] = 1 - images[2]  # the second document of the first row, and its text
    ids = batch.input_ids_BL.clone()
    changed = (torch.arange(len(batch.document_ids_BL)) == 0)[:, None] & (batch.document_ids_BL == 2)
    ids[changed & (ids != IMAGE)] = 33
    after = model.logits(replace(batch, input_ids_BL=ids, images_M3RR=images))
    assert not torch.equal(after[changed], before[changed])
    torch.testing.assert_close(after[~changed], before[~changed], atol=1e-6, rtol=0)


@pytest.mark.parametrize("rows", [ROWS, [[ROWS[0][0]], [ROWS[1][1]]]], ids=["several a row", "one a row"])
def test_a_packed_document_has_the_logits_it_has_alone(rows: list[list[list[int | str]]]) -> None:
    model = tiny_model()
    batch = pack(rows)
    packed, used = model.logits(batch), 0
    for row, documents in enumerate(rows):
        start = 0
        for document in documents:
            count, length = document.count("image"), len(place(document))
            alone = model.logits(pack([[document]], images=batch.images_M3RR[used : used + count]))
            torch.testing.assert_close(packed[row, start : start + length], alone[0], atol=1e-5, rtol=1e-5)
            used, start = used + count, start + length


@pytest.mark.parametrize("lengths", [[5, 5, 5], [40, 3, 1, 22, 39, 2], [1]])
def test_attention_within_documents_is_that_of_a_block_diagonal_mask(lengths: list[int]) -> None:
    decoder = tiny_decoder()
    batch = pack([[[*range(5, 5 + n)] for n in lengths]])
    owner = batch.document_ids_BL[0]
    mask = (owner[:, None] == owner) & torch.ones(len(owner), len(owner)).tril().bool()
    decoder.trunk.set_attn_implementation("eager")
    bias = torch.zeros(mask.shape).masked_fill(~mask, torch.finfo(torch.float32).min)
    expected = decoder.trunk(
        input_ids=batch.input_ids_BL, position_ids=batch.position_ids_BL, attention_mask=bias[None, None]
    ).logits
    decoder = Decoder(decoder.trunk)
    tokens = decoder_module.Tokens.of(batch)
    found = decoder.logits(decoder.hidden(tokens, decoder.embed(tokens.input_ids_T)))
    torch.testing.assert_close(found, expected[0], atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("family", FAMILIES)
def test_every_family_of_decoders_keeps_documents_apart(family: str, tmp_path: Path) -> None:
    sizes = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2}
    special = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
    config = AutoConfig.for_model(family, vocab_size=VOCAB, intermediate_size=48, **sizes, **special)
    torch.manual_seed(0)
    trunk = AutoModelForCausalLM.from_config(config, attn_implementation="eager").eval()
    trunk.save_pretrained(tmp_path)
    documents = [[5, 6, 7, 8, 9, 10], [11, 12, 13]]
    tokens = decoder_module.Tokens.of(pack([documents]))
    decoder = load_decoder(str(tmp_path)).eval()
    with torch.no_grad():
        found = decoder.logits(decoder.hidden(tokens, decoder.embed(tokens.input_ids_T)))
        expected = torch.cat([trunk(torch.tensor([document])).logits[0] for document in documents])
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)


def test_a_document_longer_than_a_sliding_window_is_refused(tmp_path: Path) -> None:
    config = AutoConfig.for_model(
        "mistral", vocab_size=VOCAB, hidden_size=16, num_hidden_layers=1, num_attention_heads=2, num_key_value_heads=2,
        intermediate_size=16, sliding_window=4,
    )  # fmt: skip
    decoder = Decoder(AutoModelForCausalLM.from_config(config))
    assert torch.isfinite(decoder(pack([[[5, 6, 7, 8], [9, 10]]])).loss)
    with pytest.raises(ValueError, match="a document of 5 tokens in a decoder with a window of 4: cut it shorter"):
        decoder(pack([[[5, 6, 7, 8, 9]]]))
    config.architectures = ["GPT2LMHeadModel"]
    AutoConfig.for_model("gpt2").save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="a model of type gpt2: expected one of llama"):
        load_decoder(str(tmp_path))


def test_a_loaded_decoder_gets_room_for_new_tokens_and_copies_of_its_mlps(tmp_path: Path) -> None:
    dense = tiny_decoder()
    dense.trunk.save_pretrained(tmp_path)
    larger = load_decoder(str(tmp_path), vocab_size=VOCAB + 3, experts=EXPERTS)
    tokens = decoder_module.Tokens.of(pack([[[5, 6, 7, 8]]]))
    expected = dense.logits(dense.hidden(tokens, dense.embed(tokens.input_ids_T)))
    found = larger.logits(larger.hidden(tokens, larger.embed(tokens.input_ids_T)))
    assert found.shape[1] == larger.vocab_size == VOCAB + 3
    torch.testing.assert_close(found[:, :VOCAB], expected, atol=1e-5, rtol=1e-5)
    with pytest.raises(ValueError, match="vocab_size=10: .* has 50 tokens already"):
        load_decoder(str(tmp_path), vocab_size=10)


def test_what_a_loaded_decoder_gets_anew_follows_from_the_seed_alone(tmp_path: Path) -> None:
    dense = tiny_decoder()
    dense.trunk.config.tie_word_embeddings = False
    dense.trunk.save_pretrained(tmp_path)

    def tensors(seed: int, before: int) -> dict[str, Tensor]:
        torch.manual_seed(before)  # what else has drawn in this process
        return load_decoder(str(tmp_path), vocab_size=VOCAB + 3, experts=EXPERTS, seed=seed).state_dict()

    first, again, other = tensors(0, before=0), tensors(0, before=1), tensors(1, before=0)
    assert all(torch.equal(first[name], again[name]) for name in first)
    differ = {name for name in first if not torch.equal(first[name], other[name])}
    assert any("router" in name for name in differ)
    assert any("embed_tokens" in name for name in differ)


def test_logits_equal_those_of_transformers_llava_with_the_same_weights() -> None:
    model = llava_shaped()
    llava = as_llava(model)
    images = torch.rand(2, 3, SIDE, SIDE)
    batch = pack([[[1, 7]]], images=images[:0])
    ids = [1, *[IMAGE] * 16, 7, 8, *[IMAGE] * 16, 9]
    column = torch.tensor([ids])
    batch = replace(
        batch,
        input_ids_BL=column,
        position_ids_BL=torch.arange(len(ids))[None],
        document_ids_BL=torch.ones_like(column),
        labels_BL=torch.full_like(column, IGNORED),
        images_M3RR=images,
    )
    with torch.no_grad():
        expected = llava(input_ids=column, pixel_values=(images - model.encoder.mean) / model.encoder.std).logits
    torch.testing.assert_close(model.logits(batch), expected, atol=1e-5, rtol=1e-5)


def llava_shaped() -> MultimodalModel:
    config = CLIPVisionConfig(
        image_size=SIDE, patch_size=4, hidden_size=24, num_hidden_layers=2, num_attention_heads=4, intermediate_size=40
    )
    encoder = VisionEncoder(CLIPVisionModel(config), pixels=PIXELS["clip_vision_model"])
    connector = ConnectorShape(kind="c_abstractor", num_tokens=16, hidden_size=16, depth=0)
    return MultimodalModel(encoder, connector, tiny_decoder(), image_token_id=IMAGE)


def as_llava(model: MultimodalModel) -> LlavaForConditionalGeneration:
    """transformers' model of the same function: every patch is a token, through a two-layer projector."""
    config = LlavaConfig(
        vision_config=model.encoder.trunk.config.to_dict(),
        text_config=model.decoder.trunk.config.to_dict(),
        image_token_index=IMAGE,
        projector_hidden_act="silu",
        vision_feature_select_strategy="default",  # without the class token
        vision_feature_layer=-1,
        tie_word_embeddings=True,
    )
    llava = LlavaForConditionalGeneration(config)
    llava.model.vision_tower.load_state_dict(model.encoder.trunk.state_dict())
    llava.model.language_model.load_state_dict(model.decoder.trunk.model.state_dict())
    first, second = model.connector.read_out[0], model.connector.read_out[2]
    llava.model.multi_modal_projector.linear_1.load_state_dict(first.state_dict())
    llava.model.multi_modal_projector.linear_2.load_state_dict(second.state_dict())
    llava.lm_head.weight = llava.model.language_model.embed_tokens.weight
    return llava.eval()


def test_the_loss_is_the_mean_over_labelled_text_positions() -> None:
    model, batch = tiny_model(), pack(ROWS)
    expected = F.cross_entropy(model.logits(batch).flatten(0, 1), batch.labels_BL.flatten(), ignore_index=IGNORED)
    torch.testing.assert_close(model(batch).metrics["loss/text"], expected, atol=1e-5, rtol=1e-5)
    assert not bool(((batch.labels_BL == IMAGE) | (batch.labels_BL == 0)).any())


def test_chunks_of_logits_change_neither_loss_nor_gradients(monkeypatch: pytest.MonkeyPatch) -> None:
    model, batch = tiny_model(), pack(ROWS)
    whole = model(batch).loss
    expected = grads(model, whole)
    monkeypatch.setitem(decoder_module.LOGITS, "cpu", 3 * VOCAB)
    chunked = model(batch).loss
    torch.testing.assert_close(chunked, whole)
    torch.testing.assert_close(grads(model, chunked), expected, atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize("experts", [None, EXPERTS], ids=["dense", "experts"])
def test_activation_checkpointing_changes_no_gradient(experts: object) -> None:
    model, batch = tiny_model(experts=experts), pack(ROWS)  # type: ignore[arg-type]
    model.train()
    expected = grads(model, model(batch).loss)
    model.activation_checkpointing_enable()
    torch.testing.assert_close(grads(model, model(batch).loss), expected, atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize("rows", [[[[1, 7, 8, 9]]], ROWS, [[["image"]]]], ids=["text", "mixed", "no label"])
def test_every_trained_parameter_has_a_gradient_whatever_the_batch_holds(rows: list[list[list[int | str]]]) -> None:
    """Processes that train together wait for the same gradients."""
    model = tiny_model(experts=EXPERTS, conv_stem=True).train()
    output = model(pack(rows))
    output.loss.backward()
    assert torch.isfinite(output.loss)
    assert not [name for name, p in model.named_parameters() if p.requires_grad and p.grad is None]
    if rows == [[[1, 7, 8, 9]]]:
        assert all(bool((p.grad == 0).all()) for p in model.encoder.parameters() if p.grad is not None)


def test_an_image_reaches_the_text_behind_it_and_none_before_it() -> None:
    model, batch = tiny_model(), pack([[[1, 7, "image", 8, 9]]])
    moved = model.logits(replace(batch, images_M3RR=1 - batch.images_M3RR)) != model.logits(batch)
    assert moved.any(-1)[0].tolist() == [False] * 2 + [True] * (TOKENS + 2)


def test_images_and_positions_that_do_not_match_are_refused() -> None:
    model, batch = tiny_model(), pack(ROWS)
    with pytest.raises(
        ValueError, match="3 images of 4 tokens each, but 16 positions hold the image token 3: expected 12"
    ):
        model(replace(batch, images_M3RR=batch.images_M3RR[:3]))
    with pytest.raises(ValueError, match="image_token_id=50: expected one of the vocabulary's 50"):
        MultimodalModel(model.encoder, model.connector_shape, model.decoder, image_token_id=VOCAB)


def test_parts_that_are_frozen_get_no_gradient() -> None:
    model = tiny_model()
    model.train_only(["connector"])
    model(pack(ROWS)).loss.backward()
    assert {name.split(".")[0] for name, p in model.named_parameters() if p.grad is not None} == {"connector"}
    assert list(model.parameter_groups()) == ["connector"]
    with pytest.raises(ValueError, match=r"parts=\['eyes'\]: expected some of encoder, connector, decoder"):
        model.train_only(["eyes"])  # type: ignore[list-item]


def prompts() -> list[list[Piece]]:
    images = torch.rand(3, 3, SIDE, SIDE, generator=torch.Generator().manual_seed(2))
    return [
        [Piece((1, 7)), Piece(image=images[0]), Piece((8,)), Piece(image=images[1])],
        [Piece((9, 10, 11, 12, 13))],
        [Piece(image=images[2]), Piece((14,))],
    ]


def follow(model: MultimodalModel, prompt: list[Piece], tokens: list[int]) -> Tensor:
    """Logits (len(tokens) + 1, V) behind a prompt, without a cache or neighbours."""
    document = [item for p in prompt for item in (["image"] if p.image is not None else p.token_ids)] + tokens
    images = [p.image for p in prompt if p.image is not None]
    batch = pack([[document]], images=torch.stack(images) if images else torch.zeros(0, 3, SIDE, SIDE))
    return model.logits(batch)[0, -len(tokens) - 1 :]


def test_a_batch_of_prompts_is_continued_as_each_would_be_without_cache_and_alone() -> None:
    model = tiny_model(experts=EXPERTS)
    for prompt, tokens in zip(prompts(), generate(model, prompts(), max_new_tokens=6), strict=True):
        logits = follow(model, prompt, tokens).index_fill(1, torch.tensor([IMAGE]), -torch.inf)
        assert logits.argmax(-1).tolist()[:6] == tokens
        assert len(tokens) == 6


def test_generation_ends_at_a_stop_token_which_is_left_out() -> None:
    model = tiny_model()
    free = generate(model, prompts(), max_new_tokens=6)
    stop = free[0][2]
    ended = generate(model, prompts(), max_new_tokens=6, stop=[stop, VOCAB - 1])
    for whole, cut in zip(free, ended, strict=True):
        expected = whole[: min((whole.index(token) for token in (stop, VOCAB - 1) if token in whole), default=6)]
        assert cut == expected


def test_an_image_token_is_never_written() -> None:
    model = tiny_model()
    with torch.no_grad():
        model.decoder.trunk.get_output_embeddings().weight[IMAGE] *= 1000
    assert IMAGE not in {token for tokens in generate(model, prompts(), max_new_tokens=6) for token in tokens}


def test_likelihoods_of_candidates_are_those_of_each_alone_behind_its_prompt() -> None:
    model = tiny_model(experts=EXPERTS)
    candidates = [[[5, 6], [7], [5, 8, 9]], [[10]], [[11, 12, 13, 14], [15, 16]]]
    found = log_likelihoods(model, prompts(), candidates)
    for prompt, choices, values in zip(prompts(), candidates, found, strict=True):
        for choice, value in zip(choices, values, strict=True):
            log_probs = follow(model, prompt, choice)[:-1].log_softmax(-1)
            assert value == pytest.approx(float(log_probs.gather(1, torch.tensor(choice)[:, None]).sum()), abs=1e-4)


def test_empty_prompts_and_candidates_are_refused() -> None:
    model = tiny_model()
    with pytest.raises(ValueError, match="prompt 1 is empty: give it at least one token"):
        generate(model, [[Piece((1,))], [Piece(())]], max_new_tokens=1)
    with pytest.raises(ValueError, match="prompt 0: candidates="):
        log_likelihoods(model, [[Piece((1,))]], [[[]]])


def test_a_large_image_becomes_its_overview_and_then_its_quarters_in_raster_order() -> None:
    corners = torch.tensor([[0.1, 0.2], [0.3, 0.4]]).repeat_interleave(8, 0).repeat_interleave(8, 1)
    overview, *quarters = sub_images(corners.expand(3, 16, 16), side=8)
    assert [float(q.mean()) for q in quarters] == pytest.approx([0.1, 0.2, 0.3, 0.4])
    assert float(overview.mean()) == pytest.approx(0.25, abs=0.01)
    assert {image.shape for image in (overview, *quarters)} == {(3, 8, 8)}


def test_only_the_last_images_of_a_prompt_are_split_where_it_is_asked() -> None:
    pieces = [
        Piece((1,)),
        Piece(image=torch.rand(3, 32, 32)),
        Piece((2,), learned=False),
        Piece(image=torch.rand(3, 9, 9)),
    ]
    assert [p.image is not None for p in split_images(pieces, side=16)] == [False, *[True] * 5, False, *[True] * 5]
    mixed = split_images(pieces, side=16, last=1)
    assert [p.image is not None for p in mixed] == [False, True, False, *[True] * 5]
    assert {p.image.shape for p in mixed if p.image is not None} == {(3, 16, 16)}
    assert mixed[2] == pieces[2]


@pytest.mark.parametrize("kind", ["average_pool", "attention_pool", "c_abstractor"])
def test_a_saved_model_comes_back_bit_for_bit(kind: str, tmp_path: Path) -> None:
    model, batch = tiny_model(kind, experts=EXPERTS, conv_stem=True), pack(ROWS)  # type: ignore[arg-type]
    save_pretrained(model, tmp_path)
    again = load_model(tmp_path)
    assert torch.equal(again.logits(batch), model.logits(batch))
    assert not again.training
    half = load_model(tmp_path, dtype=torch.bfloat16)
    assert {p.dtype for p in half.parameters()} == {torch.bfloat16}
    assert torch.isfinite(half(batch).loss)


def test_a_model_goes_on_at_another_resolution_with_the_tokens_it_had(tmp_path: Path) -> None:
    model, images = tiny_model(), torch.rand(2, 3, 24, 24)
    expected = model.image_tokens(images)  # interpolated on the fly
    model.resize_images(24)
    torch.testing.assert_close(model.image_tokens(images), expected, atol=1e-5, rtol=1e-5)
    save_pretrained(model, tmp_path)
    assert torch.equal(load_model(tmp_path).image_tokens(images), model.image_tokens(images))
    assert model.encoder.grid == 6


@pytest.mark.parametrize("first", ["freeze", "resize"])
def test_what_is_frozen_stays_so_at_another_resolution_in_either_order(first: str) -> None:
    model = tiny_model()
    if first == "resize":
        model.resize_images(24)
    model.train_only(["decoder"])
    model.resize_images(32)
    assert list(model.parameter_groups()) == ["decoder"]
    assert not [n for n, p in model.named_parameters() if p.requires_grad != n.startswith("decoder.")]


def test_parts_are_saved_alone_too_and_a_part_is_no_whole(tmp_path: Path) -> None:
    model = tiny_model(experts=EXPERTS, conv_stem=True)
    for name in ("encoder", "decoder"):
        part = getattr(model, name)
        save_pretrained(part, tmp_path / name)
        again = from_pretrained(tmp_path / name)
        assert type(again) is type(part)
        assert all(torch.equal(a, b) for a, b in zip(again.parameters(), part.parameters(), strict=True))
    with pytest.raises(ValueError, match="holds a VisionEncoder alone: expected a whole MultimodalModel"):
        load_model(tmp_path / "encoder")
    with pytest.raises(ValueError, match=f"no model of MM1, {SETTINGS} is missing"):
        from_pretrained(tmp_path)


def test_a_head_of_its_own_has_a_gradient_without_a_label() -> None:
    settings = tiny_model().decoder.settings()
    settings["config"]["tie_word_embeddings"] = False
    decoder = decoder_of(settings).train()
    decoder(pack([[["image"]]])).loss.backward()
    assert not [name for name, p in decoder.named_parameters() if p.grad is None]

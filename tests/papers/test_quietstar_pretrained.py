"""A thinking model on disk: nothing is lost on the way, and what is missing is said."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoModelForCausalLM, MistralConfig, MistralForCausalLM, PreTrainedTokenizerBase

from retrace.core.checkpoint import model_tensors
from retrace.papers.quietstar.config import ThoughtConfig
from retrace.papers.quietstar.model import ThoughtModel
from retrace.papers.quietstar.pretrained import from_pretrained, save_pretrained
from retrace.papers.quietstar.tokenizer import build_tokenizer, train_tokenizer
from retrace.papers.quietstar.trunks import build_thinker

THOUGHTS = ThoughtConfig(num_sampled=2, num_true=2, num_thoughts=2, policy_weight=1.0, start_init="(", end_init=")")


def trunk(vocab_size: int, *, tied: bool = False, dtype: torch.dtype = torch.float32) -> MistralForCausalLM:
    torch.manual_seed(0)
    config = MistralConfig(
        vocab_size=vocab_size,
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=64,
        tie_word_embeddings=tied,
        pad_token_id=None,
    )
    return AutoModelForCausalLM.from_config(config, dtype=dtype)


@torch.no_grad()
def thinker(tokenizer: PreTrainedTokenizerBase, **options: bool | torch.dtype) -> ThoughtModel:
    model = build_thinker(trunk(len(tokenizer), **options), THOUGHTS, tokenizer, seed=0)  # type: ignore[arg-type]
    for parameter in model.parameters():  # a head at zero would hide a head that was lost
        parameter.copy_(torch.randn_like(parameter, dtype=torch.float32) * 0.1)
    return model.eval()


def outputs(model: ThoughtModel) -> tuple[Tensor, Tensor]:
    ids = torch.arange(6, 26).view(2, 10)
    found = model.predict(ids, None, torch.tensor([[3, 9], [0, 5]]), generator=torch.Generator().manual_seed(1))
    return found.mixed_BNV, found.thoughts_BPNM


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_what_is_loaded_is_what_was_saved_bit_for_bit(tmp_path: Path, tied: bool, dtype: torch.dtype) -> None:
    tokenizer = build_tokenizer()
    model = thinker(tokenizer, tied=tied, dtype=dtype)
    save_pretrained(model, tmp_path, tokenizer)
    random_state = torch.get_rng_state()
    loaded, words = from_pretrained(tmp_path)
    assert torch.equal(torch.get_rng_state(), random_state)
    before, after = model_tensors(model), model_tensors(loaded)
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)
    assert loaded.config == model.config
    assert loaded.blocked.tolist() == model.blocked.tolist()
    assert all(torch.equal(a, b) for a, b in zip(outputs(model), outputs(loaded), strict=True))
    assert words("From Ada, first the color.").input_ids == tokenizer("From Ada, first the color.").input_ids


def test_without_its_thoughts_the_folder_is_a_plain_model_of_transformers(tmp_path: Path) -> None:
    tokenizer = build_tokenizer()
    model = thinker(tokenizer)
    save_pretrained(model, tmp_path, tokenizer)
    plain = AutoModelForCausalLM.from_pretrained(tmp_path)
    ids = torch.arange(6, 16).view(1, 10)
    found = model.predict_base(ids, None, torch.tensor([[9]]))[0, 0]
    torch.testing.assert_close(plain(ids).logits[0, -1].log_softmax(-1), found)


def test_what_is_no_thinking_model_is_refused_with_what_to_do(tmp_path: Path) -> None:
    tokenizer = build_tokenizer()
    with pytest.raises(ValueError, match="nowhere: no such folder"):
        from_pretrained(tmp_path / "nowhere")
    plain = tmp_path / "plain"
    trunk(len(tokenizer)).save_pretrained(plain)
    with pytest.raises(ValueError, match="a plain language model without the two thought tokens"):
        from_pretrained(plain)
    whole = tmp_path / "whole"
    save_pretrained(thinker(tokenizer), whole, tokenizer)
    tensors = load_file(whole / "thoughts.safetensors")
    save_file({name: t for name, t in tensors.items() if "linears.2" not in name}, whole / "thoughts.safetensors")
    with pytest.raises(ValueError, match=r"mixing_head\.linears\.2\.weight and 0 more are missing"):
        from_pretrained(whole)
    save_file(tensors | {"start_embedding": torch.zeros(3)}, whole / "thoughts.safetensors")
    with pytest.raises(ValueError, match=r"start_embedding has shape \(3,\): expected \(16,\)"):
        from_pretrained(whole)
    (whole / "thoughts.safetensors").unlink()
    with pytest.raises(ValueError, match="and 6 more are missing"):
        from_pretrained(whole)


def published(folder: Path, tokenizer: PreTrainedTokenizerBase, *, shards: int) -> ThoughtModel:
    """A checkpoint laid out as `quietstar-8-ahead` is, and the model that it describes."""
    model = thinker(tokenizer, dtype=torch.bfloat16)
    model.trunk.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    tensors = load_file(folder / "model.safetensors")
    for name in ("start_embedding", "end_embedding"):
        mean = getattr(model, name).detach() / 100
        tensors[name] = torch.stack([mean, torch.full_like(mean, -4.0)])
        getattr(model, name).data.copy_((mean.float() * 100).bfloat16())
    for theirs, linear in zip((0, 2, 4), model.mixing_head.linears, strict=True):  # type: ignore[union-attr]
        for kind, value in linear.named_parameters():
            tensors[f"talk_head.0.{theirs}.{kind}"] = value.detach()
    (folder / "model.safetensors").unlink()
    names = sorted(tensors)
    places = {name: f"model-{i % shards + 1:05d}-of-{shards:05d}.safetensors" for i, name in enumerate(names)}
    for file in set(places.values()):
        save_file({n: tensors[n].contiguous() for n in names if places[n] == file}, folder / file)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": places}))
    settings = json.loads((folder / "config.json").read_text())
    settings |= {"architectures": ["QuietForCausalLM"], "model_type": "quiet", "auto_map": {"AutoConfig": "x.Y"}}
    (folder / "config.json").write_text(json.dumps(settings))
    return model


def convert(*arguments: Path | str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "retrace.papers.quietstar.convert", *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True)


@pytest.mark.parametrize("shards", [2, 3])
def test_a_published_checkpoint_converts_to_the_same_model(tmp_path: Path, shards: int) -> None:
    tokenizer = build_tokenizer()
    source, target = tmp_path / "published", tmp_path / "new"
    model = published(source, tokenizer, shards=shards)
    with pytest.raises(ValueError, match=r"convert it first|convert it with python -m"):
        from_pretrained(source)
    done = convert(source, target, "--num-sampled", "2", "--num-true", "2")
    assert done.returncode == 0, done.stderr
    loaded, _ = from_pretrained(target)
    after = model_tensors(loaded)
    assert all(torch.equal(value, after[name]) for name, value in model_tensors(model).items())
    assert loaded.config.num_sampled == 2
    assert loaded.blocked.tolist() == [len(tokenizer) - 2, len(tokenizer) - 1]
    again = convert(source, target)
    assert again.returncode == 2
    assert "exists already" in again.stderr


def test_a_checkpoint_of_another_layout_is_not_converted(tmp_path: Path) -> None:
    source = tmp_path / "plain"
    trunk(40).save_pretrained(source)
    done = convert(source, tmp_path / "new")
    assert done.returncode == 2
    assert "end_embedding and 6 more are missing" in done.stderr
    assert not (tmp_path / "new").exists()


def test_a_trained_tokenizer_has_one_token_for_each_digit_and_gives_text_back() -> None:
    texts = ["In 2024 there were 12 apples.\nA: 42", "Let $x^2 = 4$; then x is 2 or -2.", "naive cafe (B)"] * 20
    tokenizer = train_tokenizer(texts, vocab_size=290)
    for text in [*texts, "an unseen one: 7\t\u00e9"]:
        ids = tokenizer(text).input_ids
        assert ids[0] == tokenizer.bos_token_id
        assert tokenizer.decode(ids[1:]) == text
    digits = [tokenizer.convert_tokens_to_ids(str(digit)) for digit in range(10)]
    assert len(set(digits)) == 10
    with pytest.raises(ValueError, match=r"vocab_size=9000: the base text gives only \d+ tokens"):
        train_tokenizer(texts, vocab_size=9000)

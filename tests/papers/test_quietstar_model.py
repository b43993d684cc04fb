"""What ThoughtModel promises: the acceptance tests 1-7 of specification section 8, and the bounds of its design."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path
from types import ModuleType

import pytest
import torch
from torch import Tensor
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    BloomConfig,
    BloomForCausalLM,
    Gemma2Config,
    Gemma2ForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    PreTrainedModel,
    Qwen2Config,
    Qwen2ForCausalLM,
)

from retrace.core.checkpoint import load_model, save_model
from retrace.papers.quietstar.config import MixingHead, ThoughtConfig
from retrace.papers.quietstar.model import ThoughtModel

SIZES = {
    "vocab_size": 37,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
    "initializer_range": 0.3,  # large, so that attention is far from uniform
}
HIDDEN_IDS = (0, 1)
FAMILIES = {
    "llama": lambda: LlamaForCausalLM(LlamaConfig(**SIZES)),
    "llama_tied": lambda: LlamaForCausalLM(LlamaConfig(**SIZES, tie_word_embeddings=True)),
    "mistral": lambda: MistralForCausalLM(MistralConfig(**SIZES, sliding_window=64)),
    "mistral_small_window": lambda: MistralForCausalLM(MistralConfig(**SIZES, sliding_window=5)),
    "qwen2": lambda: Qwen2ForCausalLM(Qwen2Config(**SIZES)),
}
OTHERS = {  # what each family needs beside SIZES to be tiny
    "gemma": {"head_dim": 8},
    "gemma3_text": {"head_dim": 8, "query_pre_attn_scalar": 8},
    "gpt2": {"n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 128},
    "gpt_neox": {},
    "mixtral": {},
    "olmo2": {},
    "opt": {"ffn_dim": 48, "word_embed_proj_dim": 32},
    "phi3": {"pad_token_id": 0},
    "qwen3": {"head_dim": 8},
}
PADDINGS = ["none", "left", "right"]


def _reference() -> ModuleType:
    path = Path(__file__).parents[2] / "benchmarks" / "growing_mask.py"
    spec = importlib.util.spec_from_file_location("growing_mask", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules["growing_mask"] = module
    spec.loader.exec_module(module)
    return module


reference = _reference()


def _double_norms(trunk: PreTrainedModel) -> None:
    """transformers' RMSNorm rounds to fp32 inside, which would hide what fp64 tests look for."""
    for module in list(trunk.modules()):
        for name, child in list(module.named_children()):
            if type(child).__name__.endswith("RMSNorm"):
                norm = torch.nn.RMSNorm(SIZES["hidden_size"], eps=child.variance_epsilon, dtype=torch.float64)
                setattr(module, name, norm)


def other(family: str) -> PreTrainedModel:
    """A tiny random model of any family of transformers."""
    return AutoModelForCausalLM.from_config(AutoConfig.for_model(family, **{**SIZES, **OTHERS[family]})).eval()


def build(
    family: str = "llama", *, dtype: torch.dtype = torch.float64, zero_init: bool = False, **changes: object
) -> ThoughtModel:
    torch.manual_seed(0)
    values = {"num_sampled": 3, "num_true": 2, "num_thoughts": 2, "policy_weight": 10.0, **changes}
    values.setdefault("mixing_head", MixingHead(zero_init=zero_init))
    trunk = (FAMILIES[family]() if family in FAMILIES else other(family)).to(dtype)
    if dtype == torch.float64:
        _double_norms(trunk)
    model = ThoughtModel(trunk, ThoughtConfig(**values), start_init_id=5, end_init_id=6, hidden_token_ids=HIDDEN_IDS)
    return model.to(dtype)


def batch(padding: str = "none", *, num_text: int = 11) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(1)
    ids_BT = torch.randint(2, SIZES["vocab_size"], (2, num_text), generator=generator)
    mask_BT = torch.ones_like(ids_BT)
    if padding == "left":
        mask_BT[0, :3] = 0
    if padding == "right":
        mask_BT[1, -4:] = 0
    return ids_BT * mask_BT, mask_BT


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def gradients(model: ThoughtModel, loss: Tensor) -> dict[str, Tensor]:
    model.zero_grad()
    loss.backward()
    return {n: torch.zeros_like(p) if p.grad is None else p.grad.clone() for n, p in model.named_parameters()}


def thread_embeddings(model: ThoughtModel, ids_BT: Tensor, thoughts_BPTM: Tensor) -> Tensor:
    """[START, sampled, END, the true tokens after the position] of every thread, (B, T, P, K, C)."""
    embed, num_true = model.trunk.get_input_embeddings(), model.config.num_true
    sampled = embed(thoughts_BPTM.transpose(1, 2))
    padded = torch.cat([ids_BT, ids_BT.new_zeros(len(ids_BT), num_true)], 1)
    true = torch.stack([padded[:, s : s + ids_BT.shape[1]] for s in range(1, num_true)], 2)
    parts = [sampled, embed(true)[:, :, None].expand(-1, -1, sampled.shape[2], -1, -1)]
    if model.end_embedding is not None:
        parts.insert(1, model.end_embedding.expand_as(sampled[:, :, :, :1]))
    if model.start_embedding is not None:
        parts.insert(0, model.start_embedding.expand_as(sampled[:, :, :, :1]))
    return torch.cat(parts, 3)


def thread_hidden(
    model: ThoughtModel, ids_BT: Tensor, mask_BT: Tensor, thoughts_BPTM: Tensor, *, at_once: bool = False
) -> Tensor:
    """Final hidden states (B, T, P, K, C) of all thread tokens, in the passes of a step or all in one."""
    text = model._text(ids_BT, mask_BT, num_thoughts=thoughts_BPTM.shape[1])
    if at_once:
        model._read(text)
        return model._continue(text, thread_embeddings(model, ids_BT, thoughts_BPTM))
    thinking = model._think(text, None, thoughts_BPTM.transpose(1, 2))
    end = model._speak(text, thinking, model.config.num_true)
    before = thinking.before if model.config.use_start else thinking.before[1:]
    return torch.cat([*(h.expand_as(end[:, :, :, 0])[:, :, :, None] for h in before), end], 3)


@pytest.mark.parametrize("family", FAMILIES)
def test_before_training_the_mixed_prediction_is_the_base_prediction(family: str) -> None:
    model = build(family, dtype=torch.float32, zero_init=True)
    ids_BT, mask_BT = batch("left")
    prediction = model.predict(ids_BT, mask_BT, torch.tensor([[4, 10], [0, 7]]), generator=seeded(), num_thoughts=3)
    torch.testing.assert_close(prediction.mixed_BNV, prediction.base_BNV, atol=1e-6, rtol=0)
    assert bool((model(ids_BT, mask_BT, generator=seeded()).metrics["reward/mean"]).abs() < 1e-5)


@pytest.mark.parametrize("padding", PADDINGS)
@pytest.mark.parametrize("family", [*FAMILIES, *OTHERS])
def test_parallel_threads_equal_one_plain_run_per_position(family: str, padding: str) -> None:
    model = build(family, dtype=torch.float32)
    ids_BT, mask_BT = batch(padding)
    thoughts_BPTM = model.sample(ids_BT, mask_BT, generator=seeded())
    with torch.no_grad():
        parallel = thread_hidden(model, ids_BT, mask_BT, thoughts_BPTM)
        threads = thread_embeddings(model, ids_BT, thoughts_BPTM)
        for b, i, p in [(0, 3, 0), (0, 6, 1), (0, 10, 0), (1, 0, 1), (1, 4, 0), (1, 6, 1)]:
            real_ids = ids_BT[b][mask_BT[b].bool()]
            position = i - int((mask_BT[b, : i + 1] == 0).sum())
            plain = reference.naive_hidden(model.trunk, real_ids, threads[b, i, p], position=position)
            torch.testing.assert_close(parallel[b, i, p], plain, atol=1e-5, rtol=1e-5)


VARIANTS = [
    {},
    {"baseline": "loo", "num_thoughts": 3},
    {"baseline": "base_loss", "num_thoughts": 1},
    {"positive_only": False, "num_true": 1},
    {"reward": "thought", "num_sampled": 1},
    {"use_start": False},
    {"use_end": False, "base_loss_weight": 0.0},
    {"mixing_head": None, "num_true": 3},
    {"mixing_head": MixingHead(bounded="sigmoid", zero_init=False, num_layers=2), "policy_temperature": 1.0},
]


@pytest.mark.parametrize("changes", VARIANTS, ids=str)
@pytest.mark.parametrize("padding", PADDINGS)
def test_loss_and_gradient_equal_those_of_the_sequential_growing_mask(padding: str, changes: dict[str, object]) -> None:
    model = build(**changes)
    ids_BT, mask_BT = batch(padding)
    thoughts_BPTM = model.sample(ids_BT, mask_BT, generator=seeded())
    output = model.loss(ids_BT, mask_BT, thoughts_BPTM)
    step = reference.reference_step(model, ids_BT, mask_BT, thoughts_BPTM=thoughts_BPTM)
    assert abs(output.loss - step.loss) < 1e-10
    for name, value in {"base": step.base_loss, "talk": step.talk_loss, "policy": step.policy_loss}.items():
        assert abs(output.metrics[f"loss/{name}"] - value) < 1e-10
    ours, theirs = gradients(model, output.loss), gradients(model, step.loss)
    for name, gradient in theirs.items():
        torch.testing.assert_close(
            ours[name], gradient, atol=1e-10, rtol=1e-8, msg=lambda text, name=name: f"{name}: {text}"
        )


@pytest.mark.parametrize("family", ["llama_tied", "mistral", "qwen2"])
def test_every_family_has_the_gradient_of_the_growing_mask(family: str) -> None:
    model = build(family)
    ids_BT, mask_BT = batch("left")
    output = model(ids_BT, mask_BT, generator=seeded())
    thoughts_BPTM = model.sample(ids_BT, mask_BT, generator=seeded())
    step = reference.reference_step(model, ids_BT, mask_BT, thoughts_BPTM=thoughts_BPTM)
    assert abs(output.loss - step.loss) < 1e-10
    ours, theirs = gradients(model, output.loss), gradients(model, step.loss)
    for name, gradient in theirs.items():
        torch.testing.assert_close(
            ours[name], gradient, atol=1e-10, rtol=1e-8, msg=lambda text, name=name: f"{name}: {text}"
        )


def test_small_sliding_window_has_the_gradient_of_plain_runs() -> None:
    model = build("mistral_small_window", num_thoughts=1, baseline="base_loss")
    ids_BT, mask_BT = batch(num_text=9)
    thoughts_BPTM = model.sample(ids_BT, mask_BT, generator=seeded())
    parallel = thread_hidden(model, ids_BT, mask_BT, thoughts_BPTM)[:, :, 0]
    threads = thread_embeddings(model, ids_BT, thoughts_BPTM)[:, :, 0]
    plain = torch.stack(
        [
            torch.stack([reference.naive_hidden(model.trunk, ids_BT[b], threads[b, i], position=i) for i in range(9)])
            for b in range(2)
        ]
    )
    probe = torch.randn(parallel.shape, generator=seeded(), dtype=parallel.dtype)
    ours, theirs = gradients(model, (parallel * probe).sum()), gradients(model, (plain * probe).sum())
    for name, gradient in theirs.items():
        torch.testing.assert_close(
            ours[name], gradient, atol=1e-9, rtol=1e-8, msg=lambda text, name=name: f"{name}: {text}"
        )


def test_policy_gradient_reaches_start_but_neither_end_nor_mixing_head() -> None:
    ids_BT, mask_BT = batch()
    with_policy, without = build(policy_weight=1000.0), build(policy_weight=0.0)
    thoughts_BPTM = with_policy.sample(ids_BT, mask_BT, generator=seeded())
    strong = gradients(with_policy, with_policy.loss(ids_BT, mask_BT, thoughts_BPTM).loss)
    weak = gradients(without, without.loss(ids_BT, mask_BT, thoughts_BPTM).loss)
    for name, gradient in weak.items():
        same = torch.allclose(strong[name], gradient, atol=1e-12, rtol=1e-9)
        assert same == (name == "end_embedding" or name.startswith("mixing_head")), name


@pytest.mark.parametrize("family", FAMILIES)
def test_thoughts_do_not_see_later_text(family: str) -> None:
    model = build(family)
    ids_BT, mask_BT = batch()
    thoughts_BPTM = model.sample(ids_BT, mask_BT, generator=seeded())
    changed_BT = ids_BT.clone()
    changed_BT[:, 6:] = (changed_BT[:, 6:] + 1) % 35 + 2
    before = thread_hidden(model, ids_BT, mask_BT, thoughts_BPTM)
    after = thread_hidden(model, changed_BT, mask_BT, thoughts_BPTM)
    num_thinking = 4  # START and three sampled tokens; the true tokens that follow END may differ
    assert torch.equal(before[:, :6, :, :num_thinking], after[:, :6, :, :num_thinking])
    assert not torch.allclose(before[:, 6:, :, :num_thinking], after[:, 6:, :, :num_thinking])


def test_a_thought_changes_no_other_position_and_no_other_thought() -> None:
    model = build()
    ids_BT, mask_BT = batch()
    thoughts_BPTM = model.sample(ids_BT, mask_BT, generator=seeded())
    changed = thoughts_BPTM.clone()
    changed[1, 0, 5] = (changed[1, 0, 5] + 1) % 35 + 2
    same = thread_hidden(model, ids_BT, mask_BT, thoughts_BPTM) == thread_hidden(model, ids_BT, mask_BT, changed)
    untouched = same.all(-1).all(-1)
    assert not untouched[1, 5, 0]
    untouched[1, 5, 0] = True
    assert bool(untouched.all())


@pytest.mark.parametrize("family", ["llama", "llama_tied"])
def test_saved_and_loaded_model_is_bit_identical(family: str, tmp_path: Path) -> None:
    model = build(family, dtype=torch.bfloat16 if family == "llama" else torch.float32)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.01)
    save_model(model, tmp_path / "model.safetensors")
    torch.manual_seed(9)
    other = build(family, dtype=next(model.parameters()).dtype)
    load_model(other, tmp_path / "model.safetensors")
    ids_BT, mask_BT = batch("right")
    assert all(torch.equal(a, b) for a, b in zip(model.state_dict().values(), other.state_dict().values(), strict=True))
    assert torch.equal(model(ids_BT, mask_BT, generator=seeded()).loss, other(ids_BT, mask_BT, generator=seeded()).loss)


def test_weights_of_another_model_are_refused(tmp_path: Path) -> None:
    save_model(build(num_sampled=0), tmp_path / "model.safetensors")
    with pytest.raises(ValueError, match="a checkpoint of another model"):
        load_model(build(), tmp_path / "model.safetensors")


@pytest.mark.parametrize("use_start", [True, False])
def test_sampling_step_by_step_sees_what_the_one_pass_sees(use_start: bool) -> None:
    model = build(use_start=use_start)
    ids_BT, mask_BT = batch("left")
    thoughts_BPTM = model.sample(ids_BT, mask_BT, generator=None)
    hidden = thread_hidden(model, ids_BT, mask_BT, thoughts_BPTM, at_once=True)
    first = 0 if use_start else 1  # without START the first token comes from the text
    logits = model.trunk.lm_head(hidden[:, :, :, : 2 + use_start]).index_fill(-1, model.blocked, -torch.inf)
    assert torch.equal(logits.argmax(-1), thoughts_BPTM.transpose(1, 2)[..., first:])


def test_a_step_is_the_loss_of_the_thoughts_that_sampling_gives() -> None:
    model = build()
    ids_BT, mask_BT = batch("left")
    thoughts_BPTM = model.sample(ids_BT, mask_BT, generator=seeded())
    step, loss = model(ids_BT, mask_BT, generator=seeded()), model.loss(ids_BT, mask_BT, thoughts_BPTM)
    assert torch.equal(step.loss, loss.loss)


def test_sampled_tokens_follow_the_softmax_and_the_generator_alone() -> None:
    model = build(num_sampled=1, sample_temperature=2.0)
    ids_BT, mask_BT = batch(num_text=4)
    model.config = model.config.model_copy(update={"num_thoughts": 4000})
    thoughts = model.sample(ids_BT, mask_BT, generator=seeded())
    assert torch.equal(thoughts, model.sample(ids_BT, mask_BT, generator=seeded()))
    assert not torch.equal(thoughts, model.sample(ids_BT, mask_BT, generator=seeded(1)))
    start = thread_hidden(model, ids_BT, mask_BT, thoughts[:, :1])[0, 2, 0, 0]
    expected = (model.trunk.lm_head(start).index_fill(-1, model.blocked, -torch.inf) / 2.0).softmax(-1)
    counts = torch.bincount(thoughts[0, :, 2, 0], minlength=SIZES["vocab_size"]) / 4000
    assert counts[list(HIDDEN_IDS)].sum() == 0
    assert (counts - expected).abs().max() < 0.03  # four standard deviations


def test_predictions_at_chosen_positions_equal_those_at_all_positions() -> None:
    model = build()
    ids_BT, mask_BT = batch("left")
    everywhere = model.predict(ids_BT, mask_BT, torch.arange(11).expand(2, -1), generator=None)
    chosen_BN = torch.tensor([[9, 4, 10], [0, 5, 5]])
    chosen = model.predict(ids_BT, mask_BT, chosen_BN, generator=None)
    rows = torch.arange(2)[:, None]
    torch.testing.assert_close(chosen.mixed_BNV, everywhere.mixed_BNV[rows, chosen_BN])
    torch.testing.assert_close(chosen.weight_BN, everywhere.weight_BN[rows, chosen_BN])
    assert torch.equal(chosen.thoughts_BPNM[:, 0], everywhere.thoughts_BPNM[:, 0][rows, chosen_BN])
    assert not torch.allclose(chosen.mixed_BNV, chosen.base_BNV)


def test_prediction_is_the_mixed_distribution_that_training_scores() -> None:
    model = build(num_true=1)
    ids_BT, mask_BT = batch()
    positions_BN = torch.arange(10).expand(2, -1)
    prediction = model.predict(ids_BT, mask_BT, positions_BN, generator=None)
    nll = -prediction.mixed_BNV.gather(-1, ids_BT[:, 1:, None]).mean()
    thoughts_BPTM = model.sample(ids_BT, mask_BT, generator=None)
    assert abs(model.loss(ids_BT, mask_BT, thoughts_BPTM).metrics["loss/talk"] - nll) < 1e-10


def test_without_thoughts_it_is_the_plain_language_model() -> None:
    model = build(num_sampled=0)
    ids_BT, mask_BT = batch("right")
    output = model(ids_BT, mask_BT, generator=seeded())
    with reference.own_attention(model.trunk) as trunk:
        plain = trunk(input_ids=ids_BT, labels=ids_BT.masked_fill(mask_BT == 0, -100))
    assert abs(output.loss - plain.loss) < 1e-6  # transformers computes its loss in fp32
    prediction = model.predict(ids_BT, mask_BT, torch.tensor([[3], [4]]), generator=None)
    assert torch.equal(prediction.mixed_BNV, prediction.base_BNV)
    assert set(model.parameter_groups()) == {"trunk"}


def test_parameter_groups_hold_every_parameter_once() -> None:
    model = build("llama_tied")
    groups = model.parameter_groups()
    assert set(groups) == {"trunk", "mixing_head", "meta"}
    listed = [id(p) for group in groups.values() for p in group]
    assert sorted(listed) == sorted(id(p) for p in model.parameters())


def saved_bytes(num_sampled: int) -> int:
    """Bytes kept for the backward pass, every storage once."""
    model = build(dtype=torch.float32, num_sampled=num_sampled)
    ids_BT, mask_BT = batch(num_text=64)
    thoughts_BPTM = model.sample(ids_BT, mask_BT, generator=seeded())
    storages: dict[int, int] = {}

    def note(tensor: Tensor) -> Tensor:
        storages[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    text = model._text(ids_BT, mask_BT)
    with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
        model._loss(text, thoughts_BPTM.transpose(1, 2), None)
    for memory in text.state.memories.values():  # kept beside autograd, for all passes
        for tensor in (*memory.text_BGTD, *memory.own_BGNPJD):
            note(tensor)
    return sum(storages.values())


def test_memory_kept_for_the_backward_pass_is_linear_in_the_thought() -> None:
    at_8, at_16, at_32 = (saved_bytes(n) for n in (8, 16, 32))
    assert at_32 - at_16 == pytest.approx(2 * (at_16 - at_8), rel=0.02)


def test_gradient_checkpointing_changes_nothing() -> None:
    model = build()
    ids_BT, mask_BT = batch()
    plain = gradients(model, model(ids_BT, mask_BT, generator=seeded()).loss)
    model.trunk.activation_checkpointing_enable()
    model.train()
    checkpointed = gradients(model, model(ids_BT, mask_BT, generator=seeded()).loss)
    for name, gradient in plain.items():
        torch.testing.assert_close(checkpointed[name], gradient, msg=lambda text, name=name: f"{name}: {text}")


def test_bfloat16_loss_is_close_to_that_of_the_same_weights_in_float32() -> None:
    ids_BT, mask_BT = batch("left")
    low = build(dtype=torch.bfloat16)
    high = build(dtype=torch.bfloat16).float()
    thoughts_BPTM = low.sample(ids_BT, mask_BT, generator=seeded())
    losses = [m.loss(ids_BT, mask_BT, thoughts_BPTM).metrics["loss/talk"].float() for m in (low, high)]
    assert losses[0] == pytest.approx(losses[1].item(), rel=0.05)


def test_families_that_cannot_be_served_are_refused_by_name() -> None:
    config = ThoughtConfig(num_sampled=2, num_true=1, num_thoughts=2, policy_weight=1.0)
    bloom = BloomForCausalLM(BloomConfig(vocab_size=37, hidden_size=32, n_layer=2, n_head=4))
    with pytest.raises(ValueError, match="'bloom' has attention of its own"):
        ThoughtModel(bloom, config, start_init_id=2, end_init_id=2)
    gemma2 = Gemma2ForCausalLM(Gemma2Config(**SIZES, head_dim=8))
    with pytest.raises(ValueError, match="'gemma2' sets final_logit_softcapping"):
        ThoughtModel(gemma2, config, start_init_id=2, end_init_id=2)


def test_a_layer_that_goes_around_our_attention_is_refused_by_name() -> None:
    model = build()
    model.trunk.model.layers[1].self_attn.forward = lambda hidden_states, **_: (hidden_states, None)
    ids_BT, mask_BT = batch()
    with pytest.raises(ValueError, match=r"'llama' sent 1 of 2 layers"):
        model(ids_BT, mask_BT, generator=seeded())


def test_short_sequences_and_stray_trunk_calls_are_explained() -> None:
    model: ThoughtModel = build(num_true=4)
    trunk: PreTrainedModel = model.trunk
    ids_BT, mask_BT = batch(num_text=5)
    with pytest.raises(ValueError, match="needs at least 6"):
        model(ids_BT, mask_BT, generator=seeded())
    with pytest.raises(ValueError, match="outside of ThoughtModel"):
        trunk(input_ids=ids_BT)

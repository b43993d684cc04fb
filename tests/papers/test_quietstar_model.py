"""What ThoughtModel promises: the acceptance tests 1-7 of specification section 8, and the bounds of its design."""

from __future__ import annotations

import pytest
import torch
from thinkers import (
    FAMILIES,
    HIDDEN_IDS,
    PADDINGS,
    SIZES,
    assert_gradients_equal,
    batch,
    build,
    gradients,
    reference,
    seeded,
    thread_embeddings,
    thread_hidden,
)
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

from retrace.papers.quietstar.attention import compile_layers
from retrace.papers.quietstar.config import MixingHead, ThoughtConfig
from retrace.papers.quietstar.model import ThoughtModel
from retrace.papers.quietstar.passes import Passes


@pytest.mark.parametrize("family", FAMILIES)
def test_before_training_the_mixed_prediction_is_the_base_prediction(family: str) -> None:
    model = build(family, dtype=torch.float32, zero_init=True)
    ids_BT, mask_BT = batch("left")
    prediction = model.predict(ids_BT, mask_BT, torch.tensor([[4, 10], [0, 7]]), generator=seeded(), num_thoughts=3)
    torch.testing.assert_close(prediction.mixed_BNV, prediction.base_BNV, atol=1e-6, rtol=0)
    assert bool((model(ids_BT, mask_BT, generator=seeded()).metrics["reward/mean"]).abs() < 1e-5)


@pytest.mark.parametrize("padding", PADDINGS)
@pytest.mark.parametrize("family", FAMILIES)
def test_parallel_threads_equal_one_plain_run_per_position(family: str, padding: str) -> None:
    model = build(family, dtype=torch.float32)
    ids_BT, mask_BT = batch(padding)
    thoughts_BPTM = model.sample(ids_BT, mask_BT, generator=seeded())
    with torch.no_grad():
        parallel = thread_hidden(model, ids_BT, mask_BT, thoughts_BPTM)
        threads = thread_embeddings(model, ids_BT, thoughts_BPTM)
        for b, i, p in [(0, 3, 0), (0, 6, 1), (0, 9, 0), (1, 0, 1), (1, 4, 0), (1, 6, 1)]:
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
    {"prefix": "forced"},
    {"prefix": "forced", "use_start": False},
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
    assert_gradients_equal(ours, theirs)


@pytest.mark.parametrize(
    ("family", "atol"),  # transformers rounds to fp32 within Gemma 2's attention and Cohere's norm
    [
        *((family, 1e-10) for family in ("llama_tied", "mistral", "qwen2", "phi", "gpt_neox")),
        *(("gemma2", 1e-5), ("cohere", 1e-7)),
    ],
)
def test_every_family_has_the_gradient_of_the_growing_mask(family: str, atol: float) -> None:
    model = build(family)
    ids_BT, mask_BT = batch("left")
    output = model(ids_BT, mask_BT, generator=seeded())
    thoughts_BPTM = model.sample(ids_BT, mask_BT, generator=seeded())
    step = reference.reference_step(model, ids_BT, mask_BT, thoughts_BPTM=thoughts_BPTM)
    assert abs(output.loss - step.loss) < atol
    assert_gradients_equal(gradients(model, output.loss), gradients(model, step.loss), atol=atol)


def test_small_sliding_window_has_the_gradient_of_plain_runs() -> None:
    model = build("mistral_small_window", num_thoughts=1, baseline="base_loss")
    ids_BT, mask_BT = batch(num_text=9)
    thoughts_BPTM = model.sample(ids_BT, mask_BT, generator=seeded())
    parallel = thread_hidden(model, ids_BT, mask_BT, thoughts_BPTM)[:, :, 0]
    threads = thread_embeddings(model, ids_BT, thoughts_BPTM)[:, :, 0]
    plain = torch.stack(
        [
            torch.stack([reference.naive_hidden(model.trunk, ids_BT[b], threads[b, i], position=i) for i in range(8)])
            for b in range(2)
        ]
    )
    probe = torch.randn(parallel.shape, generator=seeded(), dtype=parallel.dtype)
    ours, theirs = gradients(model, (parallel * probe).sum()), gradients(model, (plain * probe).sum())
    assert_gradients_equal(ours, theirs, atol=1e-9)


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
    model = build(family, dtype=torch.float32)
    ids_BT, mask_BT = batch()
    thoughts_BPTM = model.sample(ids_BT, mask_BT, generator=seeded())
    changed_BT = ids_BT.clone()
    changed_BT[:, 6:] = (changed_BT[:, 6:] + 1) % 35 + 2
    before = thread_hidden(model, ids_BT, mask_BT, thoughts_BPTM)
    after = thread_hidden(model, changed_BT, mask_BT, thoughts_BPTM)
    num_thinking = 4  # START and three sampled tokens; the true tokens that follow END may differ
    torch.testing.assert_close(before[:, :6, :, :num_thinking], after[:, :6, :, :num_thinking], atol=5e-6, rtol=1e-5)
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

    kept: list[Passes] = []
    make = model._passes
    model._passes = lambda *given: kept.append(make(*given)) or kept[0]  # type: ignore[method-assign]
    with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
        model.loss(ids_BT, mask_BT, thoughts_BPTM)
    for memory in kept[0].state.memories.values():  # kept beside autograd, for all passes
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


@pytest.mark.parametrize(
    ("family", "reason"),
    [
        ("bloom", "'bloom' .* ignores transformers' attention interface"),
        ("stablelm", "'stablelm' .* does not hand its keyword arguments on to attention"),
        ("codegen", "'codegen' .* ignores transformers' attention interface"),
        ("gpt_oss", "'gpt_oss' .* sinks"),
    ],
)
def test_families_that_cannot_be_served_are_refused_by_name(family: str, reason: str) -> None:
    config = ThoughtConfig(num_sampled=2, num_true=1, num_thoughts=2, policy_weight=1.0)
    trunk = AutoModelForCausalLM.from_config(AutoConfig.for_model(family, **SIZES, n_head=4, n_layer=2, rotary_dim=8))
    with pytest.raises(ValueError, match=reason):
        ThoughtModel(trunk, config, start_init_id=2, end_init_id=2)


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


def test_positions_are_every_kth_or_the_ones_that_the_base_finds_hardest() -> None:
    ids_BT, mask_BT = batch("right")
    every = build(positions="every", position_step=3)
    assert every.sample(ids_BT, mask_BT, generator=None).shape == (2, 2, 3, 3)
    hardest = build(positions="hardest", position_share=0.3)
    passes = hardest._passes(ids_BT, mask_BT)
    log_probs = hardest.head.log_probs(hardest._read_and_choose(passes))
    entropy = -(log_probs.exp() * log_probs).sum(-1)
    chosen = passes.state.reach.positions
    assert isinstance(chosen, Tensor)
    for row, (kept, real) in enumerate(zip(chosen, mask_BT.bool(), strict=True)):
        inside = [i for i in range(10) if real[i] and real[i + 1]]
        assert kept.tolist() == sorted(sorted(inside, key=lambda i: -entropy[row, i].item())[:3])


@pytest.mark.parametrize("padding", PADDINGS)
@pytest.mark.parametrize("changes", [{"positions": "every", "position_step": 2}, {"positions": "hardest"}], ids=str)
def test_thoughts_at_chosen_positions_have_the_gradient_of_thoughts_elsewhere_left_out(
    padding: str, changes: dict[str, object]
) -> None:
    """The reference thinks everywhere and gives no weight to what was not chosen."""
    changes = changes if "position_step" in changes else {**changes, "position_share": 0.4}
    model, everywhere = build(**changes), build()
    ids_BT, mask_BT = batch(padding)
    passes = model._passes(ids_BT, mask_BT)
    model._read_and_choose(passes)
    chosen_BN = passes.state.reach.positions
    assert isinstance(chosen_BN, Tensor)
    thoughts_BPNM = everywhere.sample(ids_BT, mask_BT, generator=seeded())
    at = (torch.arange(2)[:, None], slice(None), chosen_BN)
    output = model.loss(ids_BT, mask_BT, thoughts_BPNM[at].transpose(1, 2))
    step = reference.reference_step(model, ids_BT, mask_BT, thoughts_BPTM=thoughts_BPNM, chosen_BN=chosen_BN)
    assert abs(output.loss - step.loss) < 1e-10
    assert_gradients_equal(gradients(model, output.loss), gradients(model, step.loss))


def test_settings_of_positions_that_do_not_fit_are_explained() -> None:
    for changes, words in (
        ({"positions": "every"}, "position_step=None with positions=every: expected a value"),
        ({"position_share": 0.5}, "position_share=0.5 with positions=all: expected null"),
    ):
        with pytest.raises(ValueError, match=words):
            build(**changes)


def test_texts_that_leave_no_room_for_a_thought_are_refused() -> None:
    model = build()
    ids_BT, mask_BT = batch(num_text=125)
    with pytest.raises(ValueError, match="texts of 125 tokens and thoughts of 6 positions do not fit into the 128"):
        model(ids_BT, mask_BT, generator=seeded())


@pytest.mark.slow  # a minute: the compiler's
def test_compiled_layers_have_the_loss_and_gradient_of_plain_ones() -> None:
    ids_BT, mask_BT = batch("left")
    plain, compiled = build(dtype=torch.float32), build(dtype=torch.float32)
    compile_layers(compiled.trunk)
    losses = [model(ids_BT, mask_BT, generator=seeded()).loss for model in (plain, compiled)]
    assert abs(losses[0] - losses[1]) < 1e-4
    ours, theirs = gradients(compiled, losses[1]), gradients(plain, losses[0])
    for name, gradient in theirs.items():
        torch.testing.assert_close(ours[name], gradient, atol=1e-3, rtol=1e-3)

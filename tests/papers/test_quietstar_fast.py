"""The follow-up: thoughts that shrink from stage to stage, and a student that never thinks."""

from __future__ import annotations

import pytest
import torch
from thinkers import SIZES, batch, build, seeded, tiny
from transformers import AutoConfig, AutoModelForCausalLM

from retrace.core.compose import compose
from retrace.core.config import validate
from retrace.core.paper import Stage
from retrace.papers.quietstar.config import DistillConfig, QuietStarConfig, TrainConfig
from retrace.papers.quietstar.stages import stages
from retrace.papers.quietstar.student import student_loss
from retrace.papers.quietstar.tokenizer import build_tokenizer
from retrace.papers.quietstar.trunks import build_thinker, next_stage

STAGES = "curriculum.stages=[{}]".format(
    "{num_sampled:4,num_true:2,learning_rate:1.0e-4},{num_sampled:3,num_true:1,learning_rate:2.0e-5}"
)
STUDENT = "student={{objective:{},start:base,steps:7,learning_rate:1.0e-4}}"


def experiment(*overrides: str) -> QuietStarConfig:
    return validate(QuietStarConfig, compose("quietstar", ["scale=smoke", *overrides]), source="test")


def distill_config(objective: str) -> DistillConfig:
    config = stages(experiment(STUDENT.format(objective))).parents["model"].config
    assert isinstance(config, DistillConfig)
    return config


def train_of(stage: Stage) -> TrainConfig:
    assert isinstance(stage.config, TrainConfig)
    return stage.config


def test_a_curriculum_is_a_chain_of_trainings_each_from_the_one_before() -> None:
    last = stages(experiment(STAGES, "thoughts.num_sampled=2")).parents["model"]
    chain = [last]
    while "before" in chain[-1].parents:
        chain.append(chain[-1].parents["before"])
    found = [train_of(stage) for stage in reversed(chain)]
    assert [(c.thoughts.num_sampled, c.thoughts.num_true) for c in found] == [(4, 2), (3, 1), (2, 2)]
    assert [c.train.optim.learning_rate for c in found] == [1e-4, 2e-5, 5e-5]
    assert [c.keeps for c in found] == [None, "everything", "everything"]
    assert all(set(stage.parents) >= {"base"} for stage in chain)


def test_the_first_stage_is_the_run_that_trains_at_that_length_alone() -> None:
    staged = stages(experiment(STAGES, "thoughts.num_sampled=2")).parents["model"].parents["before"].parents["before"]
    alone = stages(experiment("thoughts.num_sampled=4", "train.optim.learning_rate=1.0e-4")).parents["model"]
    assert staged.config == alone.config


def test_a_stage_keeps_everything_or_loses_head_and_thought_tokens_as_the_published_code_does() -> None:
    tokenizer, thoughts = build_tokenizer(), experiment().thoughts
    trunk = AutoModelForCausalLM.from_config(AutoConfig.for_model("llama", **{**SIZES, "vocab_size": len(tokenizer)}))
    fresh = build_thinker(trunk, thoughts, tokenizer, seed=0).state_dict()
    before = build_thinker(trunk, thoughts, tokenizer, seed=0)
    with torch.no_grad():
        for parameter in before.parameters():
            parameter.add_(1.0)
    shorter = thoughts.model_copy(update={"num_sampled": 1})
    kept = next_stage(before, shorter, tokenizer, keeps="everything", seed=0).state_dict()
    assert all(torch.equal(kept[name], tensor) for name, tensor in before.state_dict().items())
    restarted = next_stage(before, shorter, tokenizer, keeps="trunk", seed=0)
    for name, tensor in restarted.state_dict().items():
        if name.startswith("mixing_head"):
            assert torch.equal(tensor, fresh[name])
        elif name.startswith("trunk"):
            assert torch.equal(tensor, before.state_dict()[name])
    dash = tokenizer("(", add_special_tokens=False)["input_ids"][0]
    assert restarted.start_embedding is not None
    assert torch.equal(restarted.start_embedding, restarted.embed(torch.tensor(dash)))


def test_a_student_is_evaluated_without_thoughts() -> None:
    last = stages(experiment(STUDENT.format("reinforce")))
    assert last.config.thoughts.num_sampled == 0  # type: ignore[attr-defined]
    assert last.parents["model"].program == "distill"
    assert last.parents["model"].parents["teacher"].config == stages(experiment()).parents["model"].config
    with pytest.raises(ValueError, match="both need a last stage that thinks"):
        experiment(STUDENT.format("reinforce"), "thoughts.num_sampled=0")


def test_the_students_cross_entropy_is_the_divergence_from_the_teacher_and_its_entropy() -> None:
    teacher, student = build(dtype=torch.float32), tiny("qwen2")
    ids_BT, mask_BT = batch("right")
    rows = {"input_ids": ids_BT, "attention_mask": mask_BT}
    loss, metrics = student_loss(student, teacher, rows, seeded(), config=distill_config("cross_entropy"))
    positions_BU = torch.arange(10).expand(2, -1)
    taught = teacher.predict(ids_BT, mask_BT, positions_BU, generator=None).mixed_BNV
    logits = student(input_ids=ids_BT, attention_mask=mask_BT).logits[:, :-1]
    real = mask_BT[:, 1:].bool()
    divergence = torch.nn.functional.kl_div(
        logits.log_softmax(-1)[real], taught[real], log_target=True, reduction="batchmean"
    )
    entropy = -(taught.exp() * taught).sum(-1)[real].mean()
    assert loss.item() == pytest.approx((divergence + entropy).item(), rel=1e-5)
    nll = torch.nn.functional.cross_entropy(logits[real], ids_BT[:, 1:][real])
    assert metrics["loss/base"].item() == pytest.approx(nll.item(), rel=1e-5)


def test_the_published_reward_pays_only_where_the_student_beats_the_teacher() -> None:
    """A student that is the teacher's own prediction earns nothing, and gets no gradient."""
    teacher, config = build(dtype=torch.float32, zero_init=True), distill_config("reinforce")
    ids_BT, mask_BT = batch("right")
    rows = {"input_ids": ids_BT, "attention_mask": mask_BT}
    same = tiny("llama")
    same.load_state_dict(teacher.trunk.state_dict())
    loss, _ = student_loss(same, teacher, rows, seeded(), config=config)
    assert abs(loss.item()) < 1e-5  # a head at zero mixes nothing in
    torch.manual_seed(1)
    other = tiny("llama")
    with torch.no_grad():
        for parameter in other.parameters():
            parameter.add_(0.01 * torch.randn_like(parameter))
    loss, _ = student_loss(other, teacher, rows, seeded(), config=config)
    loss.backward()
    assert loss.item() > 0  # the log-probability of any token is negative
    assert other.lm_head.weight.grad is not None
    assert float(other.lm_head.weight.grad.abs().sum()) > 0

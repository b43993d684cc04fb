"""DeepScaleLM's runs: which an experiment needs, what they cost, what they hand on, and what a diverged one does."""

from __future__ import annotations

import threading
from collections.abc import Sequence
from pathlib import Path

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from retrace.core.claims import load_claims
from retrace.core.compose import compose
from retrace.core.config import CONFIGS, validate
from retrace.core.plan import RunSpec, load_ablations, plan
from retrace.core.record import Record
from retrace.core.store import Store
from retrace.papers.deepscalelm import cost
from retrace.papers.deepscalelm.answering import Answerer
from retrace.papers.deepscalelm.config import DeepScaleLMConfig, MeasureConfig, TrainConfig
from retrace.papers.deepscalelm.initial import moments_at_start
from retrace.papers.deepscalelm.methods import initialise
from retrace.papers.deepscalelm.model import Transformer
from retrace.papers.deepscalelm.objective import Predictor, examples
from retrace.papers.deepscalelm.variants import Variant, make
from retrace.worker import execute

torch.set_num_threads(1)
QUIET = ["scale=smoke", "seed=0", "tracking.wandb=off"]


def composed(*overrides: str, name: str = "main") -> DeepScaleLMConfig:
    return validate(DeepScaleLMConfig, compose("deepscalelm", ["scale=smoke", *overrides], name=name), source="test")


def carry_out(specs: Sequence[RunSpec], home: Path) -> dict[str, Record]:
    """Every run in this process, parents first; the records by program, those of `train` by learning rate."""
    store, found = Store(home), {}
    for spec in specs:
        run = store.run(spec.id)
        run.freeze(spec, command="test")
        outcome = execute(run.path, store=store, stop=threading.Event())
        assert outcome.status in ("DONE", "DIVERGED"), outcome.reason
        record = Record.load(run.path / "record.json")
        rate = record.config["optim"]["learning_rate"] if spec.program == "train" else None
        found[spec.program if rate is None else f"train {rate:g}"] = record
    return found


def test_a_training_is_one_run_for_each_learning_rate_and_a_choice_among_them() -> None:
    specs = plan(["deepscalelm/main"], [*QUIET, "training.learning_rates=[1.0e-4,1.0e-3,1.0e-2]"])
    assert [spec.program for spec in specs] == ["train"] * 3 + ["select"]
    rates = [spec.config.optim.learning_rate for spec in specs[:3]]  # type: ignore[attr-defined]
    assert rates == [1e-4, 1e-3, 1e-2]
    assert list(specs[-1].parents.values()) == [spec.id for spec in specs[:3]]
    assert specs[-1].accepts_diverged
    assert not any(spec.accepts_diverged for spec in specs[:3])


def test_a_wider_sweep_and_a_transfer_train_nothing_again() -> None:
    narrow = {s.id for s in plan(["deepscalelm/main"], QUIET) if s.program == "train"}
    wide = {s.id for s in plan(["deepscalelm/main"], [*QUIET, "training.learning_rates=[5.0e-4,1.0e-3,3.0e-3]"])}
    assert narrow < wide
    trained = {s.id for s in plan(["deepscalelm/trainability"], QUIET)}
    more = [s for s in plan(["deepscalelm/transfer"], QUIET) if s.id not in trained]
    assert {s.program for s in more} == {"finetune"}


def test_real_text_is_prepared_once_for_all_arms_seeds_and_rates() -> None:
    specs = plan(["deepscalelm/trainability", "deepscalelm/thousand_layers"], ["scale=gpu"])
    (prepared,) = (spec for spec in specs if spec.program == "prepare")
    others = [spec for spec in specs if spec.program != "prepare"]
    assert all(spec.parents["text"] == prepared.id for spec in others)


def test_the_choice_is_by_validation_and_speaks_of_test_text(tmp_path: Path) -> None:
    specs = plan(["deepscalelm/main"], [*QUIET, "training.learning_rates=[1.0e-4,1.0e-2]"])
    found = carry_out(specs, tmp_path)
    by_rate = {rate: found[f"train {rate:g}"].metrics["valid/loss"] for rate in (1e-4, 1e-2)}
    best = min(by_rate, key=lambda rate: by_rate[rate])
    chosen = found["select"].metrics
    assert chosen["select/learning_rate"] == best
    assert chosen["valid/loss"] == by_rate[best]
    assert chosen["select/diverged_rates"] == 0
    assert chosen["select/at_lowest_rate"] + chosen["select/at_highest_rate"] == 1
    assert "test/loss" not in found[f"train {best:g}"].metrics
    assert chosen["test/perplexity"] == pytest.approx(torch.tensor(chosen["test/loss"]).exp().item())
    assert found["select"].series["loss/total"] == found[f"train {best:g}"].series["loss/total"]


def test_a_diverged_rate_is_left_out_and_counted(tmp_path: Path) -> None:
    specs = plan(["deepscalelm/main"], [*QUIET, "training.learning_rates=[1.0e-3,1.0e+38]"])
    found = carry_out(specs, tmp_path)
    assert found["train 1e+38"].status == "DIVERGED"
    assert found["select"].status == "DONE"
    assert found["select"].metrics["select/learning_rate"] == 1e-3
    assert found["select"].metrics["select/diverged_rates"] == 1


def test_where_every_rate_diverges_the_arm_has_diverged(tmp_path: Path) -> None:
    specs = plan(["deepscalelm/main"], [*QUIET, "training.learning_rates=[1.0e+37,1.0e+38]"])
    assert carry_out(specs, tmp_path)["select"].status == "DIVERGED"


def test_every_metric_that_a_claim_reads_is_made(tmp_path: Path) -> None:
    metrics = {metric for record in carry_out(transfer_chain(), tmp_path).values() for metric in record.metrics}
    config = composed("model.num_layers=4", name="moments")
    made, _ = moments_at_start(MeasureConfig(model=config.model, method=config.method, moments=config.moments, seed=0))
    metrics |= set(made)
    claims = load_claims(CONFIGS / "deepscalelm" / "claims.yaml")
    assert {metric for claim in claims for _, metric in claim.cells} <= metrics


def transfer_chain() -> list[RunSpec]:
    """The runs of one arm, parents first."""
    specs = plan(["deepscalelm/transfer"], QUIET)
    last = next(s for s in specs if s.program == "finetune")
    selected = next(s for s in specs if s.id == last.parents["model"])
    return [*(s for s in specs if s.id in selected.parents.values()), selected, last]


@pytest.mark.parametrize("placement", ["pre", "post"])
@pytest.mark.parametrize("given", [["input=correlated"], ["input=zipf", "method.corr0=assumed"]])
def test_theory_and_measurement_speak_of_the_same_places(placement: str, given: list[str]) -> None:
    """Vanilla, whose sub-blocks differ: a shift by one place would be off by a third in Post-LN."""
    wide = ["model.hidden_size=96", "model.num_heads=4", "model.intermediate_size=384", "model.seq_len=32"]
    vanilla = ["method.name=vanilla_xavier", f"model.placement={placement}", "moments.num_sequences=8"]
    config = composed(*wide, *given, *vanilla, name="moments")
    metrics, profiles = moments_at_start(
        MeasureConfig(model=config.model, method=config.method, moments=config.moments, seed=0)
    )
    assert metrics["theory/var_error"] < 0.15
    assert metrics["theory/corr_error"] < 0.1
    assert metrics["theory/log10_grad_bottom_error"] < 0.3
    for profile in profiles.values():
        assert profile["measured"][0][0] == 0.0
        assert profile["measured"][-1][0] == 1.0
        assert len(profile["measured"]) <= 40


def test_measuring_keeps_no_gradients_and_is_the_same_again() -> None:
    config = composed("method.name=vanilla_xavier", name="moments")
    asked = MeasureConfig(model=config.model, method=config.method, moments=config.moments, seed=3)
    one, two = moments_at_start(asked)[0], moments_at_start(asked)[0]
    assert one == two
    assert one != moments_at_start(asked.model_copy(update={"seed": 4}))[0]


def test_an_arm_can_take_the_embeddings_of_one_method_and_the_layers_of_another() -> None:
    shape = composed().model
    mixed = make(shape, Variant(name="vanilla_xavier", options=None, embeddings_of="dslm"))
    assert mixed.layers == initialise(shape, "vanilla_xavier").layers
    ours = initialise(shape, "dslm")
    assert (mixed.token_std, mixed.logit_scale) == (ours.token_std, ours.logit_scale)


def test_score_variance_is_that_of_scores_at_unit_input() -> None:
    shape = composed("model.hidden_size=256", "model.num_heads=2").model
    made = make(shape, Variant(name="dslm", options=None, score_variance=9.0)).layers[3].attention
    x = torch.randn(400, 256, generator=torch.Generator().manual_seed(0))
    query, key = (torch.randn(256, 256, generator=torch.Generator().manual_seed(s)) for s in (1, 2))
    scores = (x[:200] @ query * made.query)[:, :128] @ (x[200:] @ key * made.key)[:, :128].T / 128**0.5
    assert float(scores.var()) == pytest.approx(9.0, rel=0.1)


@pytest.mark.parametrize("kind", ["encoder", "decoder", "encoder_decoder"])
def test_counted_flops_are_those_of_a_step(kind: str) -> None:
    sizes = ["model.num_layers=3", "model.hidden_size=32", "model.intermediate_size=96", "corpus.num_common=260"]
    config = composed(
        *sizes, "model.vocab_size=303", "model.dropout=0.0", "model.attention_dropout=0.0", f"model.kind={kind}"
    )
    optim = config.training.optim.model_copy(update={"steps": 1, "batch_size": 64, "micro_batch_size": 64})
    training = TrainConfig(
        model=config.model, method=Variant(name="vanilla_xavier", options=None), corpus=config.corpus,
        objective=config.training.objective, num_windows=1, num_heldout=1, optim=optim, seed=0,
    )  # fmt: skip
    model = Transformer(config.model, make(config.model, training.method))
    ids = torch.randint(3, 303, (64, config.model.seq_len), generator=torch.Generator().manual_seed(0))
    example = examples(ids, config.model, mask_share=0.4, noise=torch.Generator().manual_seed(0))
    with FlopCounterMode(display=False) as counter:
        Predictor(model)(example).backward()
    assert cost.train(training).flops == pytest.approx(counter.get_total_flops(), rel=0.12)
    matrices = sum(p.numel() for p in model.parameters() if p.dim() > 1)
    assert cost.parameters(config.model) == matrices


def test_equal_parameters_are_equal_in_the_depth_and_width_ablations() -> None:
    for name, scale in (("depth_width", "gpu"), ("depth_width_published", "paper")):
        bodies = set()
        for arm, overrides in load_ablations("deepscalelm")[name].arms.items():
            shape = validate(
                DeepScaleLMConfig, compose("deepscalelm", [f"scale={scale}", *overrides]), source=arm
            ).model
            bodies.add((arm.endswith("large"), cost.trunk_parameters(shape)))
        assert len(bodies) == len({large for large, _ in bodies}), name


def test_padding_says_nothing_to_the_score() -> None:
    config = composed("model.num_layers=3")
    answerer = Answerer(Transformer(config.model, make(config.model, config.method)), seed=0).eval()
    ids = torch.randint(3, 47, (2, 4, 9), generator=torch.Generator().manual_seed(0))
    mask = torch.ones_like(ids)
    mask[..., 6:] = 0
    other = torch.where(mask == 1, ids, 5)
    with torch.inference_mode():
        assert torch.allclose(answerer(ids, mask), answerer(other, mask), atol=1e-6)
        assert torch.allclose(answerer(ids, mask), answerer(ids[..., :6], mask[..., :6]), atol=1e-5)

"""What is measured of a thinking model: thoughts where they count, whose noise is whose, and every token's gain."""

from __future__ import annotations

import threading
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM

from retrace.core.compose import compose
from retrace.core.config import Hardware, validate
from retrace.core.context import Context, Stopped
from retrace.core.evaluate import evaluate_task
from retrace.core.plan import plan
from retrace.core.requests import Request, Sampling
from retrace.core.store import RunDir
from retrace.core.tracking import Tracker
from retrace.papers.quietstar import difficulty, evaluation
from retrace.papers.quietstar.config import TASKS, EvaluateConfig, MixingHead, ThoughtConfig
from retrace.papers.quietstar.corpus import questions
from retrace.papers.quietstar.model import Prediction, ThoughtModel
from retrace.papers.quietstar.scorer import ThoughtScorer, thought_noise
from retrace.papers.quietstar.tokenizer import build_tokenizer
from retrace.papers.quietstar.windows import Windows

TOKENIZER = build_tokenizer()
GREEDY = Sampling(stop=(".",), max_new_tokens=6, temperature=0.0)
SMOKE = ["scale=smoke", "seed=0", "tracking.wandb=off", "eval.num_questions=7"]


def thinker(*, seed: int = 0) -> ThoughtModel:
    """Random weights, large enough for predictions that differ, with a head that listens."""
    torch.manual_seed(seed)
    trunk = LlamaConfig(
        vocab_size=len(TOKENIZER),
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=2,
        num_attention_heads=2,
        max_position_embeddings=256,
        initializer_range=0.3,
        eos_token_id=TOKENIZER.eos_token_id,
    )
    config = ThoughtConfig(
        num_sampled=3, num_true=2, num_thoughts=2, policy_weight=1.0, mixing_head=MixingHead(zero_init=False)
    )
    return ThoughtModel(LlamaForCausalLM(trunk), config, start_init_id=7, end_init_id=9, hidden_token_ids=[0]).eval()


def config(*overrides: str) -> EvaluateConfig:
    specs = plan(["quietstar/main"], [*SMOKE, *overrides])
    (found,) = [spec.config for spec in specs if spec.program == "evaluate"]
    assert isinstance(found, EvaluateConfig)
    return found


def context(folder: Path) -> Context:
    (spec,) = [spec for spec in plan(["quietstar/main"], SMOKE) if spec.program == "evaluate"]
    run = RunDir(folder / spec.id)
    run.path.mkdir(parents=True)
    hardware = validate(Hardware, compose("quietstar", SMOKE)["hardware"], source="test")
    return Context(run, 0, {}, hardware, Tracker(run, spec), threading.Event())


def ask(scorer: ThoughtScorer, task: str, *, limit: int | None = None) -> list[dict[str, Any]]:
    corpus = config().corpus
    rows = questions(corpus, family="facts" if "facts" in task else "arithmetic", count=7)  # type: ignore[arg-type]
    options = {"seed": 0, "tasks_dir": TASKS, "data_dir": None, "generated": {task: rows}}
    return evaluate_task(task, scorers={"": scorer}, limit=limit, **options).items  # type: ignore[arg-type]


class Everywhere(ThoughtScorer):
    """Thinks at every position, as the official code evaluates, to answer at a few."""

    def logits(
        self, input_ids_BT: Tensor, attention_mask_BT: Tensor, positions_BN: Tensor, *, seeds: Sequence[int]
    ) -> Tensor:
        all_BT = torch.arange(input_ids_BT.shape[1]).expand_as(input_ids_BT)
        return super().logits(input_ids_BT, attention_mask_BT, all_BT, seeds=seeds)[
            torch.arange(len(all_BT))[:, None], positions_BN
        ]


def test_thoughts_at_the_answers_alone_give_the_numbers_of_thoughts_everywhere() -> None:
    model = thinker()
    for task in ("chains_direct", "facts_direct"):
        sparse, full = (
            ask(kind(model, TOKENIZER, think=True, thought_seed=None), task) for kind in (ThoughtScorer, Everywhere)
        )
        assert [item["prob"] for item in sparse] == pytest.approx([item["prob"] for item in full], rel=1e-4)
        assert len({item["prob"] for item in sparse}) == 7


def test_sampled_thoughts_of_an_item_depend_on_nothing_but_the_item_and_their_seed() -> None:
    model = thinker()

    def probs(seed: int, *, batch_size: int | None = None, limit: int | None = None) -> list[float]:
        scorer = ThoughtScorer(model, TOKENIZER, think=True, thought_seed=seed, batch_size=batch_size)
        return [item["prob"] for item in ask(scorer, "facts_direct", limit=limit)]

    one = probs(1)
    assert probs(1, batch_size=1) == pytest.approx(one, rel=1e-5)
    assert probs(1, batch_size=2, limit=4) == pytest.approx(one[:4], rel=1e-5)
    assert all(abs(a / b - 1) > 1e-4 for a, b in zip(one, probs(2), strict=True))


def test_generation_thinks_before_every_token() -> None:
    """Against a plain loop: the text so far, one thought at its end, the likeliest token."""
    model = thinker()
    scorer = ThoughtScorer(model, TOKENIZER, think=True, thought_seed=None)
    contexts = [TOKENIZER(text).input_ids for text in ("Q: Tom has 3 pens.\nA:", "The quiet mill")]
    texts = scorer.generate(contexts, GREEDY, seeds=[0, 0])
    plain = []
    for ids in contexts:
        whole = list(ids)
        while len(whole) < len(ids) + 6 and "." not in TOKENIZER.decode(whole[len(ids) :]):
            last = torch.tensor([[len(whole) - 1]])
            found = model.predict(torch.tensor([whole]), None, last, generator=None)
            whole.append(int(found.mixed_BNV[0, 0].index_fill(-1, model.blocked, -torch.inf).argmax()))
            if whole[-1] == TOKENIZER.eos_token_id:
                break
        plain.append(TOKENIZER.decode(whole[len(ids) :], skip_special_tokens=True))
    assert texts == plain
    silent = ThoughtScorer(model, TOKENIZER, think=False, thought_seed=None)
    assert silent.generate(contexts, GREEDY, seeds=[0, 0]) != texts


def test_sampled_thoughts_of_a_row_do_not_depend_on_the_batch_around_it() -> None:
    model = thinker()
    ids_BT, mask_BT = torch.randint(10, 90, (3, 12)), torch.ones(3, 12, dtype=torch.long)
    mask_BT[1, 8:] = 0
    positions_BN = torch.tensor([[2, 5, 11], [3, 7, 7], [0, 0, 0]])

    def predicted(rows: list[int], num_positions: int, seed: int = 4) -> Prediction:
        noise = thought_noise(seed, [row + 1 for row in rows], "cpu")
        chosen = positions_BN[rows, :num_positions]
        return model.predict(ids_BT[rows], mask_BT[rows], chosen, generator=noise)

    whole = predicted([0, 1, 2], 3)
    for row, num_positions in ((0, 3), (1, 2), (2, 1)):
        alone = predicted([row], num_positions)
        assert torch.equal(alone.thoughts_BPNM[0], whole.thoughts_BPNM[row, :, :num_positions])
        torch.testing.assert_close(alone.mixed_BNV[0], whole.mixed_BNV[row, :num_positions], rtol=1e-4, atol=1e-5)
    assert not torch.equal(whole.thoughts_BPNM, predicted([0, 1, 2], 3, seed=5).thoughts_BPNM)


def test_a_stopped_evaluation_goes_on_with_the_same_numbers(tmp_path: Path) -> None:
    model, base = thinker(), thinker(seed=1)
    settings = config("eval.tasks=[chains_direct,chains_cot]", "eval.thought_seeds=[0,1,2]", "eval.limit=2")
    whole = context(tmp_path / "whole")
    expected = evaluation.score_tasks(model, base, TOKENIZER, config=settings, ctx=whole)
    stopped = context(tmp_path / "stopped")
    stopped.stop.set()
    with pytest.raises(Stopped, match="before task chains_direct"):
        evaluation.score_tasks(model, base, TOKENIZER, config=settings, ctx=stopped)

    class StopLater(threading.Event):  # after some batches
        left = 4

        def is_set(self) -> bool:
            self.left -= 1
            return self.left < 0

    stopped.stop = StopLater()
    with pytest.raises(Stopped, match="in task chains"):
        evaluation.score_tasks(model, base, TOKENIZER, config=settings, ctx=stopped)
    assert list((stopped.run.path / "responses").iterdir())
    stopped.stop = threading.Event()
    assert evaluation.score_tasks(model, base, TOKENIZER, config=settings, ctx=stopped) == expected
    assert stopped.notes == whole.notes
    assert not (stopped.run.path / "responses").exists()
    seeds = [expected["chains_direct/prob"], expected["chains_direct/prob_seed_std"]]
    assert min(seeds) > 0
    assert "chains_direct/prob_base_seed_std" not in expected


@pytest.mark.parametrize("seeds", ["greedy", "[5,6,7]"])
def test_every_tokens_losses_are_kept_and_add_up(tmp_path: Path, seeds: str) -> None:
    """Against the model's predictions at each position of each window alone."""
    model, base, ctx = thinker(), thinker(seed=1), context(tmp_path)
    settings = config(f"eval.thought_seeds={seeds}", "eval.num_windows=3", "eval.batch_size=2")
    texts = Windows(settings.corpus, TOKENIZER, split="heldout", seed=0, count=3).every()
    metrics = difficulty.gain_by_difficulty(model, base, texts, config=settings, ctx=ctx)
    kept = load_file(ctx.run.path / difficulty.TOKENS)
    lengths = texts["attention_mask"].sum(-1)
    assert len(kept["window"]) == int((lengths - 1).sum())
    assert kept["nll"].shape[0] == (1 if seeds == "greedy" else 3)
    for i in range(0, len(kept["window"]), 17):
        window, position = int(kept["window"][i]), int(kept["position"][i])
        ids_1T = texts["input_ids"][window][None, : lengths[window]]
        assert int(kept["token_id"][i]) == int(ids_1T[0, position])
        last = torch.tensor([[position - 1]])
        right = int(kept["token_id"][i])
        before = base.predict_base(ids_1T, None, last)[0, 0, right]
        found = model.predict(ids_1T, None, last, generator=None)
        torch.testing.assert_close(kept["nll_before"][i], -before, rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(kept["nll_base"][i], -found.base_BNV[0, 0, right], rtol=1e-4, atol=1e-5)
        if seeds == "greedy":
            torch.testing.assert_close(kept["nll"][0, i], -found.mixed_BNV[0, 0, right], rtol=1e-4, atol=1e-5)
    gain = (kept["nll_base"] - kept["nll"]).double().mean()
    assert metrics["text/gain"] == pytest.approx(float(gain), abs=1e-6)
    assert ("text/gain_seed_std" in metrics) == (seeds != "greedy")
    counts = np.array(ctx.notes["joint"]["counts"])
    assert counts.sum() == len(kept["window"])


def test_the_joint_distribution_counts_as_numpy_does() -> None:
    generator = torch.Generator().manual_seed(0)
    gain_Z, loss_Z = torch.randn(500, generator=generator).double(), 9 * torch.rand(500, generator=generator).double()
    found = difficulty.joint_distribution(gain_Z, loss_Z)
    edges = [[-np.inf, *found[key], np.inf] for key in ("y_edges", "x_edges")]
    expected, *_ = np.histogram2d(loss_Z.numpy(), gain_Z.numpy(), bins=edges)
    assert found["counts"] == expected.astype(int).tolist()
    assert found["x_quantiles"]["0.5"] == pytest.approx(float(gain_Z.quantile(0.5)))


def test_options_of_a_question_are_read_once() -> None:
    scorer = ThoughtScorer(thinker(), TOKENIZER, think=True, thought_seed=0)
    options: list[Request] = [([1, 20, 30], [token]) for token in (40, 41, 42)]
    assert scorer.batches(options, room=0) == [[0, 1, 2]]
    together = scorer.loglikelihood(options, allowed=None)
    alone = [scorer.loglikelihood([option], allowed=None)[0] for option in options]
    assert together == alone  # under the same noise

"""What thoughts bring: zero-shot answers with and without them, and the gain by difficulty of a token (Section 5).

Everything is measured twice on the same weights: with thoughts (the mixed prediction) and without (metrics that end in
`_base`). Metrics that end in `_before` are the base model's, from before the continued training.
Shapes: B windows, T tokens, N positions, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from retrace.core.config import data_root
from retrace.core.context import Context, Stopped
from retrace.core.data import generator
from retrace.core.evaluate import evaluate_task
from retrace.core.scoring import PositionScorer
from retrace.core.store import read_json, write_json
from retrace.core.tasks import Rows
from retrace.papers.quietstar.config import GENERATED, TASKS, EvaluateConfig
from retrace.papers.quietstar.corpus import questions
from retrace.papers.quietstar.model import ThoughtModel
from retrace.papers.quietstar.world import CorpusConfig

BATCH_TOKENS = 8192
DECILES = 10


class ThoughtScorer(PositionScorer):
    """Answers with a thought before each scored token, or without any."""

    def __init__(
        self,
        model: ThoughtModel,
        tokenizer: PreTrainedTokenizerBase,
        *,
        think: bool,
        max_length: int,
        noise: torch.Generator | None,
    ) -> None:
        super().__init__(tokenizer, max_length=max_length, batch_tokens=BATCH_TOKENS, device=model.trunk.device)
        self.model, self.think, self.noise = model, think, noise

    def logits(self, input_ids_BT: Tensor, attention_mask_BT: Tensor, positions_BN: Tensor) -> Tensor:
        """Next-token log-probabilities (B, N, V)."""
        if not self.think:
            return self.model.predict_base(input_ids_BT, attention_mask_BT, positions_BN)
        return self.model.predict(input_ids_BT, attention_mask_BT, positions_BN, generator=self.noise).mixed_BNV


def score_tasks(
    model: ThoughtModel,
    base: ThoughtModel,
    tokenizer: PreTrainedTokenizerBase,
    *,
    config: EvaluateConfig,
    ctx: Context,
) -> dict[str, float]:
    """Every task through lm-eval; one file a task, written as the task ends, so that a killed run goes on behind it."""
    room = model.trunk.config.max_position_embeddings - model.num_thought_positions
    metrics: dict[str, float] = {}
    notes = ctx.notes.setdefault("tasks", {})
    total = len(config.eval.tasks) + 1
    for number, name in enumerate(config.eval.tasks):
        if ctx.stop.is_set():
            raise Stopped(f"stopped before task {name}")
        path = ctx.run.path / "tasks" / f"{name}.json"
        result = read_json(path)
        if result is None:
            noise = _noise(config, name, model.trunk.device)
            scorers = {
                "": ThoughtScorer(model, tokenizer, think=True, max_length=room, noise=noise),
                "base": ThoughtScorer(model, tokenizer, think=False, max_length=room, noise=None),
                "before": ThoughtScorer(base, tokenizer, think=False, max_length=room, noise=None),
            }
            result = asdict(
                evaluate_task(
                    name,
                    scorers=scorers,
                    tasks_dir=TASKS,
                    data_dir=data_root(),
                    generated=_generated(name, config),
                    limit=config.eval.limit,
                )
            )
            write_json(path, result)
        metrics |= result["metrics"]
        notes[name] = {key: result[key] for key in ("version", "lm_eval", "task_hash", "num_shortened")}
        notes[name]["items"] = len(result["items"])
        ctx.tracker.progress(number + 1, total, seconds_left=None)
    for name in config.eval.tasks:
        if f"{name}/prob" in metrics:
            metrics[f"{name}/gain"] = metrics[f"{name}/prob"] - metrics[f"{name}/prob_base"]
    return metrics


def _generated(name: str, config: EvaluateConfig) -> Mapping[str, Rows]:
    """The held-out questions of a procedural task."""
    if name not in GENERATED or not isinstance(config.corpus, CorpusConfig):
        return {}
    return {name: questions(config.corpus, family=GENERATED[name], count=config.eval.num_questions)}


def _noise(config: EvaluateConfig, purpose: str, device: torch.device) -> torch.Generator | None:
    """None for greedy thoughts."""
    if config.eval.thought_decoding == "greedy":
        return None
    return generator(config.seed, "thoughts", purpose, device=device)


@torch.inference_mode()
def gain_by_difficulty(
    model: ThoughtModel, base: ThoughtModel, texts: Mapping[str, Tensor], *, config: EvaluateConfig, ctx: Context
) -> dict[str, float]:
    """Gain in log-likelihood (nats a token) on held-out text, by decile of difficulty (Section 5.2, Fig. 7).

    How hard a token is, the base model says, from before the training that is judged: a decile chosen by the losses
    that are compared would show a gain on "hard" tokens from noise alone.
    """
    parts: list[tuple[Tensor, Tensor, Tensor]] = []
    device = model.trunk.device
    noise = _noise(config, "deciles", device)
    for start in range(0, len(texts["input_ids"]), config.eval.batch_size):
        if ctx.stop.is_set():
            raise Stopped("stopped in the held-out text")
        ids_BT, mask_BT = (
            texts[key][start : start + config.eval.batch_size].to(device) for key in ("input_ids", "attention_mask")
        )
        positions_BN = torch.arange(ids_BT.shape[1] - 1, device=device).expand(len(ids_BT), -1)
        found = model.predict(ids_BT, mask_BT, positions_BN, generator=noise)
        targets_BN1 = ids_BT[:, 1:, None]
        difficulty_BNV = base.predict_base(ids_BT, mask_BT, positions_BN)
        real_BN = mask_BT[:, 1:].bool()
        nll = (-x.gather(-1, targets_BN1)[..., 0][real_BN] for x in (difficulty_BNV, found.base_BNV, found.mixed_BNV))
        parts.append(tuple(nll))  # type: ignore[arg-type]
    difficulty, without, with_thoughts = (torch.cat(column).double() for column in zip(*parts, strict=True))
    gain = (without - with_thoughts)[difficulty.argsort(stable=True)]
    deciles = [float(part.mean()) for part in gain.tensor_split(DECILES)]
    easier = float(gain[: len(gain) // 2].mean())
    return {
        "text/nll": float(with_thoughts.mean()),
        "text/nll_base": float(without.mean()),
        "text/nll_before": float(difficulty.mean()),
        "text/gain": float(gain.mean()),
        **{f"text/gain_decile_{i:02d}": value for i, value in enumerate(deciles, start=1)},
        "text/gain_hard_minus_easy": deciles[-1] - easier,
    }

"""What thoughts bring to easy and to hard tokens of held-out text (Section 5.2, Fig. 7; specification 3.3).

Shapes: B windows, T tokens, N positions, V vocabulary, Z real tokens with a token before them, S seeds of thoughts.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from safetensors.torch import save
from torch import Tensor

from retrace.core.context import Context, Stopped
from retrace.core.files import write_atomic
from retrace.papers.quietstar.config import EvaluateConfig
from retrace.papers.quietstar.model import ThoughtModel
from retrace.papers.quietstar.scorer import row_seed, thought_noise

DECILES = 10
TOKENS = "tokens.safetensors"  # in the run's folder
QUANTILES = (0.01, 0.05, 0.25, 0.5, 0.75, 0.95, 0.99)
# Edges between the bins of the joint distribution, in nats; the first and the last bin are open. Most gains are near 0.
GAIN_EDGES = (-2.0, -1.0, -0.5, -0.2, -0.1, -0.05, -0.02, 0.02, 0.05, 0.1, 0.2, 0.5, 1.0, 2.0)
LOSS_EDGES = (0.1, 0.3, 1.0, 2.0, 3.0, 4.0, 6.0, 8.0)


def gain_by_difficulty(
    model: ThoughtModel, base: ThoughtModel, texts: Mapping[str, Tensor], *, config: EvaluateConfig, ctx: Context
) -> dict[str, float]:
    """Gain in log-likelihood (nats a token) by decile of difficulty, over all real tokens of the windows.

    How hard a token is, the base model says, from before the training that is judged: a decile chosen by the losses
    that are compared would show a gain on "hard" tokens from noise alone. Every token's losses are left in
    `tokens.safetensors`, the joint distribution of gain and difficulty in the notes of the record.
    """
    tokens = token_losses(model, base, texts, config=config, ctx=ctx)
    write_atomic(ctx.run.path / TOKENS, save(tokens))
    difficulty_Z, without_Z = tokens["nll_before"].double(), tokens["nll_base"].double()
    gain_SZ = without_Z - tokens["nll"].double()
    gain_Z = gain_SZ.mean(0)
    if config.thoughts.num_sampled > 0:
        ctx.notes["joint"] = joint_distribution(gain_Z, difficulty_Z)
    sorted_Z = gain_Z[difficulty_Z.argsort(stable=True)]
    deciles = [float(part.mean()) for part in sorted_Z.tensor_split(DECILES)]
    easier = float(sorted_Z[: len(sorted_Z) // 2].mean())
    metrics = {
        "text/nll": float(tokens["nll"].double().mean()),
        "text/nll_base": float(without_Z.mean()),
        "text/nll_before": float(difficulty_Z.mean()),
        "text/gain": float(gain_Z.mean()),
        **{f"text/gain_decile_{i:02d}": value for i, value in enumerate(deciles, start=1)},
        "text/gain_hard_minus_easy": deciles[-1] - easier,
    }
    if len(gain_SZ) > 1:
        metrics["text/gain_seed_std"] = float(gain_SZ.mean(1).std())
    return metrics


@torch.inference_mode()
def token_losses(
    model: ThoughtModel, base: ThoughtModel, texts: Mapping[str, Tensor], *, config: EvaluateConfig, ctx: Context
) -> dict[str, Tensor]:
    """Of every real token its place and its losses in nats.

    `window` (Z), `position` (Z) within it, `token_id` (Z), all int32; `nll_before` (Z) of the base model, `nll_base`
    (Z) of the trained one without thoughts and `nll` (S, Z) with them, a row for each seed of thoughts (one if they
    are greedy), all float32. Raises Stopped where the context asks to stop.
    """
    device, size = model.trunk.device, config.eval.batch_size
    seeds = config.eval.thought_seeds
    parts: list[dict[str, Tensor]] = []
    for first in range(0, len(texts["input_ids"]), size):
        if ctx.stop.is_set():
            raise Stopped("stopped in the held-out text")
        ids_BT, mask_BT = (texts[key][first : first + size].to(device) for key in ("input_ids", "attention_mask"))
        positions_BN = torch.arange(ids_BT.shape[1] - 1, device=device).expand(len(ids_BT), -1)
        rows = [row_seed(ids_T[mask_T.bool()].tolist()) for ids_T, mask_T in zip(ids_BT, mask_BT, strict=True)]
        found = [
            model.predict(ids_BT, mask_BT, positions_BN, generator=thought_noise(seed, rows, device))
            for seed in ((None,) if seeds == "greedy" else seeds)
        ]
        real_BN, targets_BN1 = mask_BT[:, 1:].bool(), ids_BT[:, 1:, None]

        def nll(log_probs_BNV: Tensor, real_BN: Tensor = real_BN, targets_BN1: Tensor = targets_BN1) -> Tensor:
            return -log_probs_BNV.gather(-1, targets_BN1)[..., 0][real_BN].float().cpu()

        window_Z, position_Z = real_BN.nonzero(as_tuple=True)
        parts.append(
            {
                "window": (window_Z + first).int().cpu(),
                "position": (position_Z + 1).int().cpu(),
                "token_id": targets_BN1[..., 0][real_BN].int().cpu(),
                "nll_before": nll(base.predict_base(ids_BT, mask_BT, positions_BN)),
                "nll_base": nll(found[0].base_BNV),
                "nll": torch.stack([nll(prediction.mixed_BNV) for prediction in found]),
            }
        )
    return {name: torch.cat([part[name] for part in parts], -1) for name in parts[0]}


def joint_distribution(gain_Z: Tensor, loss_Z: Tensor) -> dict[str, Any]:
    """Counts of tokens by (base loss, gain), and the gain's quantiles: small enough for a record, which a report draws.

    `counts[i][j]`: loss between edges i - 1 and i of `y_edges`, gain likewise of `x_edges`, below the first edge and
    above the last included.
    """
    shape = (len(LOSS_EDGES) + 1, len(GAIN_EDGES) + 1)
    row_Z, column_Z = (
        torch.bucketize(values, torch.tensor(edges, dtype=values.dtype), right=True)
        for values, edges in ((loss_Z, LOSS_EDGES), (gain_Z, GAIN_EDGES))
    )
    counts = torch.bincount(row_Z * shape[1] + column_Z, minlength=shape[0] * shape[1]).view(shape)
    quantiles = torch.quantile(gain_Z, torch.tensor(QUANTILES, dtype=gain_Z.dtype))
    return {
        "title": "tokens of held-out text",
        "x_label": "gain from thoughts, nats",
        "y_label": "loss of the base, nats",
        "x_edges": list(GAIN_EDGES),
        "y_edges": list(LOSS_EDGES),
        "counts": counts.tolist(),
        "x_quantiles": {f"{q:g}": float(value) for q, value in zip(QUANTILES, quantiles, strict=True)},
    }

"""The page of thoughts that an evaluation attaches to its record."""

from __future__ import annotations

from transformers import PreTrainedTokenizerBase

from retrace.core.context import Context
from retrace.core.train import Batch
from retrace.papers.quietstar.config import EvaluateConfig
from retrace.papers.quietstar.documents import from_ids
from retrace.papers.quietstar.gains import GREEDY, Decoding
from retrace.papers.quietstar.inspection import inspect_document
from retrace.papers.quietstar.model import ThoughtModel
from retrace.papers.quietstar.thoughtpage import Part, page


def page_of_thoughts(
    model: ThoughtModel, tokenizer: PreTrainedTokenizerBase, texts: Batch, *, config: EvaluateConfig, ctx: Context
) -> str:
    """The first windows of the held-out text, token by token, as HTML; of sampled thoughts, one for each seed."""
    seeds = config.eval.thought_seeds
    decoding = GREEDY if seeds == "greedy" else Decoding(num_samples=len(seeds), seed=seeds[0])
    parts = []
    for number in range(min(config.eval.page_windows, config.eval.num_windows)):
        ids = texts["input_ids"][number][texts["attention_mask"][number].bool()].tolist()
        found = inspect_document(model, tokenizer, from_ids(tokenizer, ids), decoding=decoding)
        parts.append(Part(f"Window {number + 1}", found))
    run = {"model": ctx.parents["model"].id, "evaluated by": ctx.run.id, "seed": str(config.seed)}
    origin = {**run, "text": "held out of the training", "thoughts": str(parts[0].found.decoding)}
    if model.config.prefix:
        origin["each begins with"] = model.config.prefix
    return page(parts, title="Thoughts on held-out text", origin=origin)

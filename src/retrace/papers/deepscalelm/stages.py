"""The runs that an experiment needs, and what must be at hand before any of them starts.

moments:  measure
training: prepare (real text only) -> one train for each learning rate -> select
transfer: the same -> finetune
"""

from __future__ import annotations

from typing import Any

from retrace.core.config import data_root
from retrace.core.paper import Stage
from retrace.core.texts import LocalText, fingerprints
from retrace.papers.deepscalelm.config import (
    COMMONSENSE_QA,
    DeepScaleLMConfig,
    FinetuneConfig,
    MeasureConfig,
    PrepareConfig,
    RealText,
    SelectConfig,
    TrainConfig,
)


def stages(config: DeepScaleLMConfig) -> Stage:
    """The last stage of an experiment, with those that it builds on."""
    c = config
    if c.asks == "moments":
        measured = MeasureConfig(model=c.model, method=c.method, moments=c.moments, seed=c.seed)
        return Stage("measure", measured, seed=c.seed)
    text = _prepare(c)
    selected = _select(c, text)
    if c.asks == "training":
        return selected
    root = data_root()
    asked = root is not None and c.transfer.questions.kind == "commonsense_qa" and (root / COMMONSENSE_QA).is_file()
    files = fingerprints([LocalText(kind="local", path=COMMONSENSE_QA)]) if asked else {}
    last = FinetuneConfig(
        model=c.model, method=c.method, corpus=c.corpus, transfer=c.transfer, files=files, seed=c.seed
    )
    return Stage("finetune", last, seed=c.seed, parents={"model": selected, **text})


def _prepare(c: DeepScaleLMConfig) -> dict[str, Stage]:
    """Real text is cut into windows once, for all methods, seeds and learning rates."""
    if not isinstance(c.corpus, RealText):
        return {}
    config = PrepareConfig(
        corpus=c.corpus,
        vocab_size=c.model.vocab_size,
        seq_len=c.model.seq_len,
        num_windows=c.training.num_windows,
        num_heldout=c.training.num_heldout,
        files=fingerprints(c.corpus.every_source()),
    )
    return {"text": Stage("prepare", config, seed=0)}


def _select(c: DeepScaleLMConfig, text: dict[str, Stage]) -> Stage:
    """The choice among the learning rates of an arm, and the trainings that it chooses from."""
    shared: dict[str, Any] = {
        "model": c.model,
        "method": c.method,
        "corpus": c.corpus,
        "objective": c.training.objective,
        "num_windows": c.training.num_windows,
        "num_heldout": c.training.num_heldout,
        "seed": c.seed,
    }
    parents = {}
    for index, rate in enumerate(c.training.learning_rates):
        optim = c.training.optim.model_copy(update={"learning_rate": rate})
        parents[f"rate_{index}"] = Stage("train", TrainConfig(optim=optim, **shared), seed=c.seed, parents=text)
    chosen = SelectConfig(learning_rates=c.training.learning_rates, **shared)
    return Stage("select", chosen, seed=c.seed, parents={**parents, **text})


def check(config: DeepScaleLMConfig) -> None:
    """Raise ValueError for text out of reach, and for batches that the machine's processes can't share evenly."""
    if config.asks == "moments":
        return
    config.training.optim.check_processes(config.hardware.processes, key="training.optim")
    if isinstance(config.corpus, RealText):
        for source in config.corpus.every_source():
            source.check()
    if config.asks == "transfer":
        config.transfer.optim.check_processes(config.hardware.processes, key="transfer.optim")
        root = data_root()
        if config.transfer.questions.kind == "commonsense_qa" and (
            root is None or not (root / COMMONSENSE_QA).is_file()
        ):
            raise ValueError(
                f"transfer.questions.kind=commonsense_qa: {COMMONSENSE_QA} is not there: set RETRACE_DATA to the "
                "folder that holds it, or use procedural questions"
            )

"""The chain of runs that an experiment is, and what must be at hand before any of them starts."""

from __future__ import annotations

from retrace.core.config import data_root
from retrace.core.paper import Stage
from retrace.core.tasks import task_fingerprint, validate_tasks
from retrace.core.texts import fingerprints
from retrace.papers.quietstar.config import (
    GENERATED,
    TASKS,
    DistillConfig,
    EvaluateConfig,
    PretrainConfig,
    QuietStarConfig,
    TrainConfig,
)
from retrace.papers.quietstar.corpus import questions
from retrace.papers.quietstar.models import PretrainedModel, ScratchModel
from retrace.papers.quietstar.texts import TextCorpusConfig
from retrace.papers.quietstar.world import CorpusConfig


def stages(config: QuietStarConfig) -> Stage:
    """An experiment as a chain of runs: pretrain -> train -> evaluate, each shared wherever its own part is equal.

    A pretrained model takes the place of the first run; a curriculum trains in several; a student comes after them.
    Raises ValueError for an unknown task.
    """
    c = config
    tasks = {name: task_fingerprint(name, tasks_dir=TASKS, data_dir=data_root()) for name in c.eval.tasks}
    files = fingerprints(c.corpus.every_source()) if isinstance(c.corpus, TextCorpusConfig) else {}
    base: dict[str, Stage] = {}
    if isinstance(c.model, ScratchModel):
        assert c.base is not None
        first = PretrainConfig(
            corpus=c.corpus,
            model=c.model,
            num_windows=c.base.num_windows,
            optim=c.base.optim,
            files=files,
            seed=c.base.seed,
        )
        base["base"] = Stage("pretrain", first, seed=c.base.seed)
    else:
        files |= c.model.fingerprints()
    trained = _continued(c, files, base)
    thoughts = c.thoughts
    if c.student is not None:
        trained, thoughts = _student(c, files, base, trained), thoughts.model_copy(update={"num_sampled": 0})
    last = EvaluateConfig(
        corpus=c.corpus, model=c.model, thoughts=thoughts, eval=c.eval, tasks=tasks, files=files, seed=c.seed
    )
    return Stage("evaluate", last, seed=c.seed, parents={"model": trained, **base})


def _continued(c: QuietStarConfig, files: dict[str, str], base: dict[str, Stage]) -> Stage:
    """Continued training with thoughts: one stage, or the last of a curriculum."""
    found: Stage | None = None
    for step in (*c.curriculum.stages, None):
        thoughts, train = c.thoughts, c.train
        if step is not None:
            thoughts = thoughts.model_copy(update={"num_sampled": step.num_sampled, "num_true": step.num_true})
            optim = train.optim.model_copy(update={"learning_rate": step.learning_rate})
            train = train.model_copy(update={"optim": optim})
        config = TrainConfig(
            corpus=c.corpus,
            model=c.model,
            thoughts=thoughts,
            train=train,
            keeps=c.curriculum.keeps if found else None,
            files=files,
            seed=c.seed,
        )
        found = Stage("train", config, seed=c.seed, parents={**base, **({"before": found} if found else {})})
    assert found is not None
    return found


def _student(c: QuietStarConfig, files: dict[str, str], base: dict[str, Stage], teacher: Stage) -> Stage:
    assert c.student is not None
    optim = c.train.optim.model_copy(update={"steps": c.student.steps, "learning_rate": c.student.learning_rate})
    config = DistillConfig(
        corpus=c.corpus,
        model=c.model,
        teacher=c.thoughts,
        student=c.student,
        optim=optim,
        num_windows=c.train.num_windows,
        files=files,
        seed=c.seed,
    )
    return Stage("distill", config, seed=c.seed, parents={"teacher": teacher, **base})


def check(config: QuietStarConfig) -> None:
    """Raise ValueError for what can't be run here: tasks without data or questions, text or weights out of reach.

    And for batches that the machine's processes can't share evenly.
    """
    if config.base is not None:
        config.base.optim.check_processes(config.hardware.processes, key="base.optim")
    config.train.optim.check_processes(config.hardware.processes, key="train.optim")
    procedural = isinstance(config.corpus, CorpusConfig)
    validate_tasks(
        config.eval.tasks,
        tasks_dir=TASKS,
        data_dir=data_root(),
        generated=GENERATED if procedural else {},
        probe_hub=True,
    )
    if isinstance(config.corpus, CorpusConfig):
        for name in config.eval.tasks:
            if name in GENERATED:
                questions(config.corpus, family=GENERATED[name], count=config.eval.num_questions)
    else:
        for source in config.corpus.every_source():
            source.check()
    if isinstance(config.model, PretrainedModel):
        config.model.check()

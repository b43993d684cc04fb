"""A model for lm-eval's own command line, made of a function that gives a scorer."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from retrace.core.evaluate import scorer_model
from retrace.core.requests import OnProgress, Responses, Scorer
from retrace.core.tasks import read_task


def language_model(load: Callable[..., tuple[Scorer, int]], *, tasks_dir: Path) -> Any:
    """A class for lm-eval's own command line: `lm_eval --model NAME --model_args key=value,...`.

    `load` makes of the arguments a scorer and the seed of sampled texts. Of a task of `tasks_dir` the `allowed` answers
    hold there too: its `acc` is ours. Its `prob` has no name in lm-eval, which prints the perplexity of the answer:
    exp of the mean of -log(prob) over the items.
    """

    class CommandLineModel(scorer_model()):  # type: ignore[misc]  # known once lm-eval is imported
        def __init__(self, **arguments: Any) -> None:
            scorer, seed = load(**arguments)
            super().__init__(
                scorer,
                seed=seed,
                answers_of=self._answers,
                responses=Responses(),
                on_progress=_progress_bar(),
            )

        def generate_until(self, requests: Sequence[Any]) -> list[str]:
            for task in {request.task_name for request in requests}:
                self._answers(task)
            return super().generate_until(requests)

        def _answers(self, task: str) -> Sequence[str] | None:
            if not (tasks_dir / f"{task}.yaml").is_file():
                return None
            file = read_task(task, tasks_dir=tasks_dir)
            if file.subset is not None:
                raise ValueError(f"{task}: metadata.subset is for `retrace run`: here, choose items with --samples")
            return file.allowed

    return CommandLineModel


def _progress_bar() -> OnProgress:
    """A bar in the terminal for each round of requests."""
    from tqdm import tqdm

    bar: Any = None

    def show(share: float) -> None:
        nonlocal bar
        bar = bar or tqdm(total=1.0, bar_format="answers: {percentage:3.0f}%|{bar}| [{elapsed}<{remaining}]")
        bar.update(share - bar.n)
        if share == 1.0:
            bar.close()
            bar = None

    return show

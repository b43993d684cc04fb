"""Few-shot tasks on real images: captions by CIDEr, questions by VQA accuracy (Section 3.4). No torch at import."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Literal, Self

from pydantic import Field, model_validator

from retrace.core.config import Frozen
from retrace.papers.mm1.corpora import CorpusConfig, check

if TYPE_CHECKING:
    from torch import Tensor

    from retrace.papers.mm1.fewshot import Task
    from retrace.papers.mm1.packing import Picture


class PictureTask(Frozen):
    """A data set with a training split for demonstrations. Texts may be lists: references, or ten people's answers."""

    name: str = Field(pattern=r"^[a-z][a-z0-9_]*$")
    form: Literal["caption", "vqa"]
    train: CorpusConfig
    test: CorpusConfig
    num_train: int = Field(1000, ge=1)  # items, the first ones, that demonstrations are drawn from
    limit: int | None = Field(None, ge=2)  # items of the test split; null: all

    @model_validator(mode="after")
    def _rows_are_of_the_form(self) -> Self:
        wanted = "caption" if self.form == "caption" else "instruction"
        for split in (self.train, self.test):
            if split.document != wanted:
                raise ValueError(f"document={split.document} with form={self.form}: expected {wanted}")
        return self

    def check(self) -> None:
        """Raise ValueError where one of the splits can't be read; reads a row of each."""
        check(self.train)
        check(self.test)


def picture_task(config: PictureTask, *, image_size: int, seed: int, shots: Sequence[int] = (0, 4, 8)) -> Task:
    """The task as `fewshot.evaluate` takes it; `seed` decides the demonstrations."""
    from retrace.papers.mm1 import fewshot
    from retrace.papers.mm1.photos import Photos

    train = fewshot.read_items(config.train, limit=config.num_train) if max(shots) > 0 else []
    test = fewshot.read_items(config.test, limit=config.limit)
    photos = Photos(max_bad_share=config.test.max_bad_share)

    def load(pictures: Sequence[Picture]) -> list[Tensor | None]:
        return photos.load(pictures, image_size=image_size)

    captioning = config.form == "caption"
    return fewshot.Task(
        name=config.name,
        group="mmcore",
        form=fewshot.CAPTION if captioning else fewshot.VQA,
        shots=tuple(shots),
        episodes=lambda number: fewshot.with_demonstrations(train, test, shots=number, seed=seed),
        score=fewshot.score_captions if captioning else fewshot.score_answers,
        load=load,
    )

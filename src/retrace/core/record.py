"""A record: the small committed truth of one finished run, from which every figure and every verdict is computed."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Any, Literal, NamedTuple, Self, get_args

from pydantic import Field, ValidationError

from retrace.core.config import Frozen

PAGE_NAME = r"^[a-z][a-z0-9_]*$"
PageName = Annotated[str, Field(pattern=PAGE_NAME, max_length=60)]
Finished = Literal["DONE", "DIVERGED"]
FINISHED: tuple[Finished, ...] = get_args(Finished)


class Label(NamedTuple):
    """Who asked for a run: an arm of an ablation, with a seed. As text it is "<ablation>/<arm>/s<seed>"."""

    ablation: str
    arm: str  # that of a command line's overrides may hold slashes
    seed: str

    @classmethod
    def parse(cls, text: str) -> Self:
        ablation, _, rest = text.partition("/")
        arm, _, seed = rest.rpartition("/s")
        return cls(ablation, arm, seed)

    @property
    def ablation_arm(self) -> str:
        """What all seeds share, `<ablation>/<arm>`."""
        return f"{self.ablation}/{self.arm}"

    def __str__(self) -> str:
        return f"{self.ablation_arm}/s{self.seed}"


class RunCost(Frozen):
    """What a run used; None is unknown."""

    tokens: float | None = None
    flops: float | None = None
    seconds: float | None = None
    mfu: float | None = None


class Record(Frozen):
    """results/<paper>/records/<id>.json."""

    schema_version: Literal[1] = Field(1, alias="schema")
    id: str = Field(pattern=r"^[a-z0-9_-]+$", max_length=100)  # a record may come from elsewhere: its names are paths
    paper: str = Field(pattern=r"^[a-z][a-z0-9_]*$", max_length=40)
    program: str
    recipe: int
    labels: tuple[str, ...]  # see Label
    scale: str
    seed: int
    status: Finished
    config: dict[str, Any]
    parents: dict[str, str]
    metrics: dict[str, float]
    series: dict[str, tuple[tuple[int, float], ...]]  # curves of a few dozen points: (step, value)
    cost: RunCost
    provenance: dict[str, Any]
    pages: tuple[PageName, ...] = ()  # that belong to it: results/<paper>/pages/<id>--<name>.html

    @classmethod
    def load(cls, path: Path | str) -> Self:
        """Read a record; raises ValueError, naming the file, for another schema or a broken file."""
        with open(path, "rb", buffering=0) as file:
            content = file.read()
        try:
            return cls.model_validate_json(content)
        except ValidationError as error:
            first = error.errors()[0]
            where = ".".join(str(part) for part in first["loc"])
            raise ValueError(f"{path}: not a record: {where}: {first['msg']}; delete it and rerun") from None

    def to_json(self) -> str:
        return json.dumps(self.model_dump(mode="json", by_alias=True), indent=1, sort_keys=True, allow_nan=False) + "\n"

    def relabelled(self, labels: tuple[str, ...]) -> Self:
        return self.model_copy(update={"labels": labels})

"""From an ablation file to the runs that it needs: arm x seed, at one scale, with what they build on, each run once.

Targets: `<paper>/<ablation>`, `<paper>/<ablation>/<arm>` (one arm of it), `<paper>/main` (the base config alone),
`<paper>` (every ablation asked at the scale).
Overrides are Hydra's, with its sweep syntax, and come after an arm's own. An override of a key that an arm sets takes
the arm's place, so sweeping the key that the arms differ in gives arms of its own, and none under false names.
"""

from __future__ import annotations

import dataclasses
import shutil
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Annotated

from pydantic import Field, model_validator

from retrace.core.compose import compose, expand_sweep, override_key
from retrace.core.config import SCALES, Experiment, Frozen, Hardware, Scale, Tracking, read_yaml, suggest, validate
from retrace.core.discovery import configs_of, papers
from retrace.core.identity import run_id
from retrace.core.paper import Paper, Stage, load_paper
from retrace.core.record import Label
from retrace.core.safety import refuse_secrets

_NOT_SWEPT = ("hardware", "tracking")  # say where a run happens
_PLACEMENT_KEYS = ("scale", *_NOT_SWEPT)  # stand in no label


Name = Annotated[str, Field(pattern=r"^[a-z0-9][a-z0-9_.-]*$", max_length=60)]  # a part of labels; W&B takes 64


class Ablation(Frozen):
    """configs/<paper>/ablations/<name>.yaml: the smallest diffs from a named base, and the question they answer."""

    name: Name
    question: str
    locus: str
    base: str = Field(pattern=r"^[a-z][a-z0-9_]*/[a-z][a-z0-9_]*$", max_length=100)  # "<paper>/<config>"
    seeds: tuple[int, ...] = Field(min_length=1)
    scales: tuple[Scale, ...] = Field(
        SCALES, min_length=1
    )  # where the paper as a whole asks it; by name it always runs
    baseline: str
    arms: dict[Name, tuple[str, ...]] = Field(min_length=1)

    @model_validator(mode="after")
    def _baseline_is_an_arm(self) -> Ablation:
        if self.baseline not in self.arms:
            raise ValueError(f"baseline '{self.baseline}' is not an arm; the arms are: {', '.join(self.arms)}")
        return self


@dataclass(frozen=True)
class RunSpec:
    """One run, ready to be frozen into runs/<id>/config.json. `parents` maps a role to the id of a run."""

    id: str
    paper: str
    program: str
    recipe: int
    scale: str
    seed: int
    config: Frozen
    parents: Mapping[str, str]
    labels: tuple[str, ...]  # who asked for this run, see record.Label; no part of its identity
    hardware: Hardware
    tracking: Tracking
    accepts_diverged: bool = False  # it runs also where a parent diverged


def load_ablations(paper: str) -> dict[str, Ablation]:
    """Every ablation of a paper, by name, in the order of its files' names."""
    paths = sorted((configs_of(paper) / "ablations").glob("*.yaml"))
    return {path.stem: load_ablation(path) for path in paths}


def load_ablation(path: Path) -> Ablation:
    """One ablation file, validated; raises ValueError for a wrong key or value."""
    return validate(Ablation, {"name": path.stem, **read_yaml(path)}, source=str(path.name))


def resolve(target: str) -> list[Ablation]:
    """The ablations that a target of the command line names; `<paper>/main` is an ablation of one arm."""
    slug, name, arm = _parts(target)
    if name == "main" and not arm:
        seed = compose(slug, [])["seed"]
        arms: dict[str, tuple[str, ...]] = {"main": ()}
        return [
            Ablation(name="main", question="", locus="", base=f"{slug}/main", seeds=(seed,), baseline="main", arms=arms)
        ]
    ablations = load_ablations(slug)
    if not name:
        return list(ablations.values())
    if name not in ablations:
        raise ValueError(f"{target}: no such ablation{suggest(name, ['main', *ablations], what='ablations')}")
    return [ablations[name] if not arm else _one_arm(ablations[name], arm, target)]


def _parts(target: str) -> tuple[str, str, str]:
    """Paper, ablation and arm, "" where a target has none. Raises ValueError for what names no paper."""
    slug, *names = target.removesuffix("/").split("/")
    if slug not in papers():
        files = [configs_of(paper) / "ablations" / f"{slug}.yaml" for paper in papers()]
        under = [f"{paper}/{slug}" for paper, path in zip(papers(), files, strict=True) if path.is_file()]
        hint = f"; did you mean '{under[0]}'?" if under else suggest(slug, papers(), what="papers")
        raise ValueError(f"{target}: no such paper{hint}")
    load_paper(slug)
    if len(names) == 3 and names[2].removeprefix("s").isdigit():
        arm = "/".join([slug, *names[:2]])
        raise ValueError(f"{target}: the label of a run; as a target it is {arm} seed={names[2].removeprefix('s')}")
    if len(names) > 2 or not all(names):
        raise ValueError(f"{target}: expected paper, paper/ablation or paper/ablation/arm")
    name, arm, *_ = *names, "", ""
    return slug, name, arm


def _one_arm(ablation: Ablation, arm: str, target: str) -> Ablation:
    """An ablation of one of its arms alone; the runs keep their labels and identities."""
    if arm not in ablation.arms:
        raise ValueError(f"{target}: no such arm{suggest(arm, list(ablation.arms), what='arms')}")
    return ablation.model_copy(update={"arms": {arm: ablation.arms[arm]}, "baseline": arm})


def plan(targets: Sequence[str], overrides: Sequence[str] = (), *, check: bool = False) -> list[RunSpec]:
    """The runs of all targets, parents before children, each id once with the labels of all who need it.

    `check` also asks each paper for what a config can't show, such as missing datasets; do so before starting runs.
    Raises ValueError before anything is spent.
    """
    sweep = expand_sweep(overrides)
    _one_place(sweep)
    specs: dict[str, RunSpec] = {}
    for target in targets:
        slug, name, _ = _parts(target)
        paper = load_paper(slug)
        for ablation in resolve(target):
            texts = []
            for arm, seed, lines in _arms(ablation, sweep):
                if not name and _scale(ablation, lines) not in ablation.scales:
                    continue
                label = str(Label(ablation.name, arm, str(seed)))
                experiment = _compose(paper, ablation, lines)
                texts.append(experiment.model_dump_json())
                if check:
                    _check(paper, experiment)
                for spec in _runs(paper, experiment, label):
                    known = specs.get(spec.id)
                    labels = known.labels + spec.labels if known else spec.labels
                    specs[spec.id] = dataclasses.replace(spec, labels=tuple(dict.fromkeys(labels)))
            refuse_secrets("\n".join(texts), where=f"{slug}/{ablation.name}")
    if not specs:
        raise ValueError(
            f"{' '.join(targets)}: nothing to run: {' '.join(overrides)} is asked by none of the ablations"
        )
    return list(specs.values())


def _one_place(sweep: Sequence[tuple[str, ...]]) -> None:
    """Refuse a sweep over what only says where a run happens: one run would stand for all its values, with the last."""
    placed = (text for chosen in sweep for text in chosen if override_key(text).split(".")[0] in _NOT_SWEPT)
    for text in dict.fromkeys(placed):
        if any(text not in chosen for chosen in sweep):
            raise ValueError(
                f"{text}: one of several values, and a run is the same one under each: give {override_key(text)} one "
                "value, and sweep over what changes numbers"
            )


def _arms(ablation: Ablation, sweep: Sequence[tuple[str, ...]]) -> Iterator[tuple[str, int, list[str]]]:
    """(arm name, seed, overrides) of every run; see the module's docstring for arms that an override replaces."""
    seen = set()
    for chosen in sweep:
        keys = {override_key(text) for text in chosen}
        others = [text for text in chosen if override_key(text) != "seed"]  # given twice, it would be composed for each
        extra = [text for text in others if override_key(text).split(".")[0] not in _PLACEMENT_KEYS]
        place = tuple(text for text in others if text not in extra)
        seeds = [_seed(text) for text in chosen if text not in others] or ablation.seeds
        for arm, own in ablation.arms.items():
            kept = [text for text in own if override_key(text) not in keys]
            name = ",".join([*([arm] if kept or not own else []), *extra]) or arm
            for seed in seeds:
                if (name, seed, place) not in seen:
                    seen.add((name, seed, place))
                    yield name, seed, [*kept, *others, f"seed={seed}"]


def _seed(override: str) -> int:
    text = override.partition("=")[2]
    if not text.isdigit():
        raise ValueError(f"{override}: seeds are whole numbers from 0, as in seed=0 or seed=0,1,2 or seed=range(3)")
    return int(text)


def _check(paper: Paper, experiment: Experiment) -> None:
    hardware = experiment.hardware
    if hardware.slurm and shutil.which("sbatch") is None:
        raise ValueError(f"hardware={hardware.name} submits to Slurm, and this machine has no sbatch; use a login node")
    if hardware.slurm is None and hardware.device == "cuda" and shutil.which("nvidia-smi") is None:
        raise ValueError(f"hardware={hardware.name} needs an NVIDIA GPU, and this machine has none; try hardware=cpu")
    if paper.check is not None:
        paper.check(experiment)


def _scale(ablation: Ablation, overrides: Iterable[str]) -> str:
    """The scale that an arm would run at, whether or not the arm makes sense there."""
    return _scale_of(ablation.base, tuple(text for text in overrides if override_key(text) == "scale"))


@lru_cache(maxsize=64)
def _scale_of(base: str, overrides: tuple[str, ...]) -> str:
    """It is asked for every arm and seed, and composing takes ten milliseconds."""
    slug, _, name = base.partition("/")
    scale = compose(slug, list(overrides), name=name).get("scale")
    if scale not in SCALES:
        raise ValueError(
            f"{base}: scale={scale!r}: expected one of {', '.join(SCALES)}; a file of scale/ begins with the line "
            "'# @package _global_' and has a line such as 'scale: laptop'"
        )
    return str(scale)


def _compose(paper: Paper, ablation: Ablation, overrides: Iterable[str]) -> Experiment:
    slug, _, name = ablation.base.partition("/")
    if slug != paper.slug or not name:
        raise ValueError(f"{ablation.name}.yaml: base={ablation.base!r}: expected {paper.slug}/<config>")
    lines = list(overrides)
    try:
        return validate(paper.config, compose(slug, lines, name=name), source=f"{slug}/{ablation.name}")
    except ValueError as error:
        scale = _scale(ablation, lines)
        if scale in ablation.scales:
            raise
        asked = " or ".join(ablation.scales)
        raise ValueError(f"{slug}/{ablation.name} is asked at scale {asked}, not at {scale}: {error}") from None


def _runs(paper: Paper, experiment: Experiment, label: str) -> Iterator[RunSpec]:
    """The chain of an experiment, parents first, each once."""
    made: dict[int, str] = {}  # the run of each stage, on which several others may build

    def visit(stage: Stage) -> Iterator[RunSpec]:
        if id(stage) in made:
            return
        for parent in stage.parents.values():
            yield from visit(parent)
        ids = {role: made[id(parent)] for role, parent in stage.parents.items()}
        made[id(stage)] = run_id(
            paper=paper.slug,
            program=stage.program,
            recipe=paper.recipe,
            scale=experiment.scale,
            config=stage.config,
            parents=ids,
        )
        yield RunSpec(
            id=made[id(stage)],
            paper=paper.slug,
            program=stage.program,
            recipe=paper.recipe,
            scale=experiment.scale,
            seed=stage.seed,
            config=stage.config,
            parents=ids,
            labels=(label,),
            hardware=experiment.hardware,
            tracking=experiment.tracking,
            accepts_diverged=paper.programs[stage.program].accepts_diverged,
        )

    yield from visit(paper.stages(experiment))

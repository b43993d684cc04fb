"""Composing, sweeping, and one sentence for whatever is wrong."""

from __future__ import annotations

import pytest

from retrace.core import config
from retrace.core.compose import compose, expand_sweep
from retrace.core.config import Frozen, Hardware, validate
from retrace.core.plan import plan
from retrace.core.store import Store


def test_scale_and_seed_reach_the_composed_tree() -> None:
    tree = compose("quietstar", ["scale=smoke", "seed=3", "hardware.threads=2"])
    assert (tree["scale"], tree["seed"], tree["base"]["seed"], tree["hardware"]["threads"]) == ("smoke", 3, 3, 2)


def test_sweeps_are_the_product_of_hydras_syntax_and_lists_are_no_sweeps() -> None:
    assert expand_sweep(["a=1,2", "seed=range(3)", "eval.tasks=[x,y]"]) == [
        (f"a={a}", f"seed={s}", "eval.tasks=[x,y]") for a in (1, 2) for s in range(3)
    ]


@pytest.mark.parametrize(
    ("overrides", "expected"),
    [
        (["thoughts.num_smpled=2"], "thoughts.num_smpled=2: no such key; did you mean 'thoughts.num_sampled'?"),
        (["thoughts.num_sampled=-1"], "thoughts.num_sampled=-1: input should be greater than or equal to 0"),
        (["thoughts.num_sampled=two"], "thoughts.num_sampled='two': input should be a valid integer"),
        (["thoughts.num_thoughts=1"], "use baseline 'base_loss', or num_thoughts of 2 or more"),
        (["corpus.seq_len=64", "thoughts.num_true=64"], "thoughts.num_true=64 leaves no position to think at"),
        (["+thoughts.extra=1"], "keys can't be added or removed, only set"),
        (["scale=huge"], "laptop"),
        (["seed=-1"], "seeds are whole numbers from 0"),
        (["seed=a,b"], "seeds are whole numbers from 0"),
        (["corpus.mixture.prose=0.9"], "sum to"),
        (["thoughts.reward=best"], "thoughts.reward='best': input should be 'mixed' or 'thought'"),
        (["model.num_kv_heads=3"], "num_kv_heads=3 does not divide"),
        (["hardware.device=tpu"], "hardware.device='tpu'"),
        (["a=(1"], "is not an override"),
        (["seed=range(0)"], "a sweep over nothing"),
        (["seed=interval(0,1)"], "sweep with a=1,2 or range(3)"),
        (["scale=huge,laptop"], "scale=huge: no such scale for quietstar; there are: gpu, laptop, paper, smoke"),
        (["train.optim.micro_batch_size=3"], "micro_batch_size=3 does not divide batch_size=4"),
        (["thoughts.start_init=''"], "thoughts.start_init=''"),
        (["eval.tasks=[nothing]"], "nothing: no such task; the tasks are"),
    ],
)
def test_wrong_input_is_one_sentence_with_key_value_and_expectation(overrides: list[str], expected: str) -> None:
    first = [] if overrides[0].startswith("scale") else ["scale=smoke"]
    with pytest.raises(ValueError) as caught:
        plan(["quietstar/main"], [*first, *overrides])
    assert expected in str(caught.value)
    assert "\n" not in str(caught.value)


def test_unknown_targets_are_named_with_what_there_is() -> None:
    with pytest.raises(ValueError, match="quitstar: no such paper; did you mean 'quietstar'"):
        plan(["quitstar"])
    with pytest.raises(ValueError, match="did you mean 'thought_length'"):
        plan(["quietstar/thought_lenght"])
    with pytest.raises(ValueError, match="no such paper"):
        plan(["../../etc"])


def test_a_missing_task_or_folder_is_refused_before_anything_is_spent(
    monkeypatch: pytest.MonkeyPatch, tmp_path: object
) -> None:
    monkeypatch.setenv("RETRACE_DATA", f"{tmp_path}/nowhere")
    with pytest.raises(ValueError, match="RETRACE_DATA=.*nowhere: no such folder"):
        plan(["quietstar/main"], ["scale=smoke"], check=True)
    monkeypatch.delenv("RETRACE_DATA")
    with pytest.raises(ValueError, match="gsm8k_dircet: no such task; the tasks are: .*gsm8k_direct"):
        plan(["quietstar/main"], ["scale=smoke", "eval.tasks=[gsm8k_dircet]"], check=True)


def test_a_config_is_strict_and_frozen() -> None:
    class Config(Frozen):
        number: float
        flag: bool

    config = validate(Config, {"number": 1, "flag": True}, source="x")
    assert config.number == 1.0
    with pytest.raises(ValueError, match="flag='yes'"):
        validate(Config, {"number": 1.0, "flag": "yes"}, source="x")
    with pytest.raises(ValueError, match="numbr: no such key; did you mean 'number'"):
        validate(Config, {"numbr": 1.0, "flag": True, "number": 2.0}, source="x")
    with pytest.raises(ValueError, match="frozen"):
        config.number = 2.0


def test_a_worker_reads_back_exactly_what_was_planned(tmp_path: object) -> None:
    from pathlib import Path

    spec = plan(["quietstar/main"], ["scale=smoke"])[-1]
    run = Store(Path(str(tmp_path))).run(spec.id)
    run.freeze(spec, command="retrace run x")
    assert run.load() == (spec, "retrace run x")


@pytest.mark.parametrize(
    ("overrides", "cores", "spare"),
    [
        ([], 2, False),  # a run a core
        (["hardware.parallel_runs=1"], 2, True),
        (["hardware.parallel_runs=1", "hardware.threads=2"], 2, False),
        (["hardware.parallel_runs=1", "hardware.processes=2"], 4, True),
        (["hardware.threads=2"], 3, True),
    ],
)
def test_a_core_is_spare_where_runs_and_their_threads_leave_one(
    overrides: list[str], cores: int, spare: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(config, "num_cores", lambda: cores)
    hardware = validate(Hardware, compose("quietstar", overrides)["hardware"], source="hardware")
    assert hardware.has_spare_core == spare

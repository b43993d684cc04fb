"""What is composed once and kept is what Hydra would compose again, whatever was edited in between."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from retrace.core import compose as composing
from retrace.core import config
from retrace.core.compose import compose
from retrace.core.config import CONFIGS
from retrace.core.memo import MOST
from retrace.core.plan import load_ablations

CACHES = (composing._sources, composing._composed, composing._compose_groups)


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A cache folder of the test's own, and nothing remembered from other tests or for them."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    another_process()
    yield tmp_path / "cache" / "retrace"
    another_process()


def another_process() -> None:
    for function in CACHES:
        function.cache_clear()


@pytest.fixture
def configs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder of configs with one paper, demo."""
    monkeypatch.setattr(composing, "CONFIGS", tmp_path / "configs")
    monkeypatch.setattr(config, "CONFIGS", tmp_path / "configs")
    (tmp_path / "configs" / "demo").mkdir(parents=True)
    return tmp_path / "configs" / "demo"


def as_hydra_does(paper: str, overrides: list[str], name: str = "main") -> dict[str, Any]:
    return composing._resolve(composing._tree(paper, name, overrides), paper)


@pytest.mark.parametrize("paper", sorted(path.parent.name for path in CONFIGS.glob("*/ablations")))
def test_every_arm_has_with_any_seed_what_hydra_composes_with_that_seed(paper: str) -> None:
    for ablation in load_ablations(paper).values():
        for arm in ablation.arms.values():
            for seed in (0, 7, 31337):
                overrides = [*arm, f"scale={ablation.scales[0]}", f"seed={seed}"]
                name = ablation.base.partition("/")[2]
                assert compose(paper, overrides, name=name) == as_hydra_does(paper, overrides, name)


@pytest.mark.parametrize("value", ["run_${seed}", "'${oc.select:table.${seed},none}'", "[a, 'b${seed}']"])
def test_a_seed_that_does_more_than_stand_somewhere_is_composed_with(configs: Path, value: str) -> None:
    (configs / "main.yaml").write_text(f"seed: 0\ntable: {{0: x, 1: y, 10: z}}\nvalue: {value}\nagain: ${{value}}\n")
    for seed in (0, 1, 10):
        assert compose("demo", [f"seed={seed}"]) == as_hydra_does("demo", [f"seed={seed}"])


def test_an_edited_config_is_composed_anew(configs: Path, cache: Path) -> None:
    (configs / "main.yaml").write_text("seed: 0\nsize: 1\nof: ${seed}\n")
    assert compose("demo", ["seed=3"]) == {"seed": 3, "size": 1, "of": 3}
    assert len(list(cache.glob("*/*.json"))) == 1
    (configs / "main.yaml").write_text("seed: 0\nsize: 2\nof: ${seed}\n")
    another_process()
    assert compose("demo", ["seed=3"]) == {"seed": 3, "size": 2, "of": 3}


def test_what_is_kept_is_read_and_a_torn_file_is_made_again(configs: Path, cache: Path) -> None:
    (configs / "main.yaml").write_text("seed: 0\nsize: 1\n")
    compose("demo", ["seed=3"])
    (file,) = cache.glob("*/*.json")
    for text, size in (('{"seed": 0, "size": 5}', 5), ('{"seed": 0, "si', 1), ("", 1)):
        file.write_text(text)
        another_process()
        assert compose("demo", ["seed=3"])["size"] == size


def test_without_a_folder_to_keep_anything_in_all_goes_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "taken").write_text("")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "taken"))
    assert compose("quietstar", ["scale=smoke", "seed=4"])["seed"] == 4


def test_a_secret_in_an_override_is_refused_and_not_kept(
    configs: Path, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HF_TOKEN", "hf_0123456789abcdef")
    (configs / "main.yaml").write_text("seed: 0\nname: x\n")
    with pytest.raises(ValueError, match="holds the value of HF_TOKEN"):
        compose("demo", ["name=hf_0123456789abcdef", "seed=1"])
    assert not list(cache.glob("*/*"))


def test_of_many_generations_of_configs_the_last_are_kept(configs: Path, cache: Path) -> None:
    for size in range(2 * MOST):
        (configs / "main.yaml").write_text(f"seed: 0\nsize: {size}\n")
        another_process()
        compose("demo", ["seed=1"])
    assert MOST <= len(list(cache.iterdir())) <= MOST + 1

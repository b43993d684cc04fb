"""docs/add-a-paper.md to the letter: its files in an empty folder, its commands in an environment of their own."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import sysconfig
from pathlib import Path

import pytest
from conftest import Run

ROOT = Path(__file__).resolve().parents[1]
EXAMPLE = ROOT / "examples" / "double_descent"
DOCUMENT = (ROOT / "docs" / "add-a-paper.md").read_text()
FILES = dict(re.findall(r"^`([\w./]+)`:\n\n```\w+\n(.*?)^```$", DOCUMENT, flags=re.DOTALL | re.MULTILINE))
COMMANDS = "".join(re.findall(r"^```sh\n(.*?)^```$", DOCUMENT, flags=re.DOTALL | re.MULTILINE))


@pytest.fixture(scope="module")
def environment(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """A fresh virtual environment, active, that has what is installed here: what `make setup` would have made."""
    place = tmp_path_factory.mktemp("environment")
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", place], check=True)
    here, there = sysconfig.get_path("purelib"), place / sysconfig.get_path("purelib", vars={"base": ""}).lstrip("/")
    (there / "installed.pth").write_text(f"import site; site.addsitedir({here!r})\n")
    for name, module in {"pip": "pip", "retrace": "retrace.cli"}.items():
        (place / "bin" / name).write_text(f'#!/bin/sh\nexec "{place}/bin/python" -m {module} "$@"\n')
        (place / "bin" / name).chmod(0o755)
    offline = {"PIP_NO_INDEX": "1", "PIP_NO_DEPS": "1", "PIP_NO_BUILD_ISOLATION": "0"}  # 0: it is off, says pip
    kept = {name: value for name, value in os.environ.items() if name not in ("RETRACE_HOME", "VIRTUAL_ENV")}
    return {**kept, **offline, "PATH": f"{place}/bin:{os.environ['PATH']}", "WANDB_MODE": "disabled"}


@pytest.fixture(scope="module")
def followed(environment: dict[str, str], tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    """The folder of somebody who followed the document, and what the commands printed."""
    folder = tmp_path_factory.mktemp("newcomer") / "double_descent"
    for name, text in FILES.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(text)
    done = subprocess.run(
        ["bash", "-e", "-c", COMMANDS], cwd=folder, env=environment, capture_output=True, text=True, timeout=900
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return folder, done.stdout


def test_the_example_is_what_the_document_shows() -> None:
    shown = {name for name in FILES if (EXAMPLE / name).read_text() == FILES[name]}
    kinds = {".py", ".toml", ".yaml"}
    here = {str(path.relative_to(EXAMPLE)) for path in EXAMPLE.rglob("*") if path.suffix in kinds}
    assert shown == set(FILES) == {name for name in here if not name.startswith(("runs/", "results/"))}


def test_following_the_document_gives_the_verdicts_that_it_shows(followed: tuple[Path, str]) -> None:
    folder, printed = followed
    claims = re.findall(r"^(\W \w+) +(.+?) {2,}", DOCUMENT, flags=re.MULTILINE)
    assert len(claims) == FILES["double_descent/configs/claims.yaml"].count("- id:")
    for verdict, claim in claims:
        assert re.search(rf"^{re.escape(verdict)} +{re.escape(claim)} ", printed, flags=re.MULTILINE), claim
    assert re.search(r"^At scale laptop.*", DOCUMENT, flags=re.MULTILINE)[0] in printed  # type: ignore[index]
    assert "7 of 7 runs finished" in printed
    assert "35 of 35 runs finished" in printed
    assert (folder / "results" / "double_descent" / "index.html").is_file()
    committed = {path.name for path in (EXAMPLE / "results" / "double_descent" / "records").iterdir()}
    made = {path.name: json.loads(path.read_text()) for path in (folder / "results").glob("*/records/*.json")}
    assert {name for name, record in made.items() if record["scale"] == "laptop"} == committed
    code = next(iter(made.values()))["provenance"]["paper_code"]["double_descent"]
    assert code["package"] == "double-descent 0.1.0"


def test_other_commands_of_the_document_know_the_paper(followed: tuple[Path, str], environment: dict[str, str]) -> None:
    folder, _ = followed
    told = re.findall(r"`retrace (run double_descent/.*?)`", DOCUMENT, flags=re.DOTALL)
    assert len(told) == 2
    for command in told:
        planned = f"retrace {command.replace('run', 'plan', 1)}".replace("\n", " ")
        done = subprocess.run(
            ["bash", "-c", planned],
            cwd=folder,
            env={**environment, "RETRACE_HOME": str(folder)},
            capture_output=True,
            text=True,
        )
        assert done.returncode == 0, done.stderr


def test_a_job_in_the_queue_runs_a_copy_of_the_package(followed: tuple[Path, str], environment: dict[str, str]) -> None:
    folder, _ = followed
    script = (
        "import sys; from pathlib import Path; from retrace.core.snapshot import take; from retrace.core.store import "
        "Store; print(take(Store(Path(sys.argv[1])), papers=['double_descent'], allow_dirty=True))"
    )
    taken = subprocess.run(
        ["python", "-c", script, folder], env=environment, capture_output=True, text=True, check=True
    ).stdout.strip()
    seen = subprocess.run(
        ["python", "-c", "from retrace.core.discovery import configs_of; print(configs_of('double_descent'))"],
        env={**environment, "PYTHONPATH": f"{taken}/src"},
        capture_output=True,
        text=True,
        check=True,
    ).stdout.strip()
    assert seen == f"{taken}/src/double_descent/configs"
    assert (Path(seen) / "scale" / "smoke.yaml").is_file()


PACKAGE = "from retrace.core.paper import Paper\n"


@pytest.mark.parametrize(
    ("entries", "code", "expected"),
    [
        ("My-Paper = mine:PAPER", PACKAGE, "My-Paper = 'mine:PAPER' .* expected slug = 'package:PAPER'"),
        ("mine = mine", PACKAGE, "mine = 'mine' .* expected slug = 'package:PAPER'"),
        ("mine = gone:PAPER", PACKAGE, "mine: gone can't be imported: No module named 'gone'"),
        ("mine = mine:PAPER", "import gone_too\n", "mine: mine can't be imported: No module named 'gone_too'"),
        ("mine = mine:PAPER", PACKAGE, "mine: mine:PAPER is None; expected a Paper with slug='mine'"),
        ("mine = mine:PAPER", "PAPER = 'mine'\n", "mine: mine:PAPER is 'mine'; expected a Paper with slug='mine'"),
        ("quietstar = mine:PAPER", PACKAGE, "quietstar: a paper of Retrace and one of the package mine have this slug"),
    ],
)
def test_a_package_that_announces_itself_wrongly_is_told_in_one_sentence(
    entries: str, code: str, expected: str, tmp_path: Path, retrace: Run
) -> None:
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "__init__.py").write_text(code)
    info = tmp_path / "mine-1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: mine\nVersion: 1.0\n")
    (info / "entry_points.txt").write_text(f"[retrace.papers]\n{entries}\n")
    path = os.pathsep.join(filter(None, [str(tmp_path), str(ROOT / "src")]))
    done = retrace("list", "mine", PYTHONPATH=path)
    assert done.returncode == 2
    assert re.fullmatch(f"error: .*{expected}.*\n", done.stderr), done.stderr

"""The README says what is true: its verdicts are those of the records, its files exist, its commands parse."""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import Run

from retrace.core.config import CONFIGS

ROOT = Path(__file__).resolve().parents[1]
README = (ROOT / "README.md").read_text()


@pytest.mark.parametrize("slug", sorted(path.parent.name for path in CONFIGS.glob("*/main.yaml")))
def test_every_paper_has_a_page_that_says_the_four_things(slug: str) -> None:
    text = (ROOT / "docs" / f"{slug}.md").read_text()
    for heading in ("What the paper claims", "What came out", "What was changed, and why", "What could not be known"):
        assert f"\n## {heading}" in text
    assert f"<!-- verdicts of {slug} at laptop by ablation:" in text


def test_a_document_that_has_gone_stale_is_found(tmp_path: Path) -> None:
    """The check is what keeps the verdicts true, so it must be able to fail."""
    for name in ("README.md", "docs", "scripts", "results"):
        source, target = ROOT / name, tmp_path / name
        shutil.copytree(source, target) if source.is_dir() else shutil.copy(source, target)
    document = tmp_path / "docs" / "quietstar.md"
    document.write_text(document.read_text().replace("**contradicted**", "**reproduced**", 1))
    done = subprocess.run(
        [sys.executable, "scripts/documents.py", "--check"], cwd=tmp_path, capture_output=True, text=True
    )
    assert (done.returncode, done.stderr.partition(":")[0]) == (1, "docs/quietstar.md")


def test_the_verdicts_in_the_documents_are_those_of_the_records() -> None:
    done = subprocess.run([sys.executable, "scripts/documents.py", "--check"], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_every_file_that_the_documents_link_to_exists() -> None:
    for document in [ROOT / "README.md", *ROOT.glob("docs/*.md"), *ROOT.glob("benchmarks/*.md")]:
        for target in re.findall(r"\]\(((?!http)[^)#]+)\)", document.read_text()):
            assert (document.parent / target).exists(), f"{document.name} links to {target}"


def test_every_retrace_command_of_the_readme_is_accepted(retrace: Run) -> None:
    commands = re.findall(r"^retrace (\w+) ?(.*?)(?:  +#.*)?$", README, flags=re.MULTILINE)
    assert {command for command, _ in commands} >= {"list", "plan", "run", "status", "report", "doctor"}
    for command, rest in commands:
        arguments = rest.replace('"', "").split()
        if command == "run":  # what it would start; starting it is what the smoke and resume tests do
            command = "plan"
        if command == "report":
            continue
        if command in ("think", "cancel", "publish", "dashboard"):  # what they need, their own tests have
            arguments = ["--help"]
        done = retrace(command, *arguments)
        assert done.returncode == 0, f"retrace {command} {rest}: {done.stderr}"


def test_make_help_names_every_target_that_the_readme_mentions() -> None:
    shown = subprocess.run(["make", "help"], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    for target in re.findall(r"`?make ([a-z]+)", README):
        assert re.search(rf"^{target}\b", shown, flags=re.MULTILINE), f"make help does not show {target}"

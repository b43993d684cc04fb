"""The README says what is true: its verdicts are those of the records, its files exist, its commands parse."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

from conftest import Run

ROOT = Path(__file__).resolve().parents[1]
README = (ROOT / "README.md").read_text()


def test_the_verdicts_in_the_readme_are_those_of_the_records() -> None:
    done = subprocess.run(
        [sys.executable, "scripts/readme_verdicts.py", "--check"], cwd=ROOT, capture_output=True, text=True
    )
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

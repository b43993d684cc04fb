"""Which code made a record: its commit, and the hash of what differs from it."""

from __future__ import annotations

import subprocess
from pathlib import Path

import pytest

from retrace.core.provenance import commit, fingerprint, uncommitted


@pytest.fixture
def checkout(tmp_path: Path) -> Path:
    (tmp_path / "code.py").write_text("ONE = 1\n")
    name = "-c", "user.name=test", "-c", "user.email=test@example.org"
    for words in (["init", "-q"], ["add", "."], [*name, "commit", "-q", "-m", "as it is"]):
        subprocess.run(["git", "-C", tmp_path, *words], check=True)
    return tmp_path


def test_a_clean_checkout_has_a_commit_and_no_diff(checkout: Path, tmp_path_factory: pytest.TempPathFactory) -> None:
    assert len(commit(checkout) or "") == 40
    assert uncommitted(checkout) == ""
    assert commit(tmp_path_factory.mktemp("elsewhere")) is None


def test_codes_that_differ_in_new_files_alone_have_different_hashes(checkout: Path) -> None:
    hashes = set()
    for text in ("IDEA = 1\n", "IDEA = 2\n"):
        (checkout / "idea.py").write_text(text)
        hashes.add(fingerprint(uncommitted(checkout) or ""))
    assert len(hashes) == 2
    status = subprocess.run(["git", "-C", checkout, "status", "--porcelain"], capture_output=True, text=True)
    assert status.stdout == "?? idea.py\n"  # nothing is staged


def test_a_diff_that_is_no_utf_8_is_a_diff(checkout: Path) -> None:
    (checkout / "code.py").write_bytes("# gr\u00fc\u00dfe\n".encode("latin-1"))
    assert "+# gr\\xfc\\xdfe" in (uncommitted(checkout) or "")


def test_a_diff_leaves_nothing_in_the_repository(checkout: Path) -> None:
    def objects() -> set[Path]:
        return set((checkout / ".git" / "objects").rglob("*"))

    before = objects()
    (checkout / "idea.py").write_text("IDEA = 1\n")
    assert "+IDEA = 1" in (uncommitted(checkout) or "")
    assert objects() == before


def test_what_git_cannot_tell_is_not_called_clean(
    checkout: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (checkout / "code.py").write_text("ONE = 2\n")
    (checkout / ".git" / "index").write_bytes(b"no index")
    assert uncommitted(checkout) is None
    (checkout / ".git" / "index").unlink()
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path / "gone"))  # as where there is no room
    assert uncommitted(checkout) is None

"""Models of other people: what is told of where they come from."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest
from huggingface_hub import constants
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

from retrace.core.weights import load_pretrained, note_commit

COMMIT = "0123456789abcdef0123456789abcdef01234567"


def test_of_a_branch_of_the_hub_the_commit_is_noted_and_of_a_folder_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A model in the hub's cache, as `hf download` leaves it, and the same files in a folder."""
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    cached, folder = tmp_path / "models--lab--tiny", tmp_path / "folder"
    sizes = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    LlamaForCausalLM(LlamaConfig(vocab_size=8, **sizes)).save_pretrained(cached / "snapshots" / COMMIT)
    (cached / "refs").mkdir()
    (cached / "refs" / "main").write_text(COMMIT)
    shutil.copytree(cached / "snapshots" / COMMIT, folder)
    notes: dict[str, Any] = {"data": 1}
    options = {"cache_dir": tmp_path, "local_files_only": True, "use_safetensors": True}
    assert load_pretrained(AutoModelForCausalLM, "lab/tiny", **options).config.hidden_size == 16
    note_commit(notes, "lab/tiny", revision="main")
    note_commit(notes, str(folder), revision="main")
    assert notes == {"data": 1, "hub_commits": {"lab/tiny": COMMIT}}

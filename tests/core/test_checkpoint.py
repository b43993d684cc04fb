"""Checkpoints that somebody or something damaged: never believed, always told, and the run ends with its numbers."""

from __future__ import annotations

import logging
import os
import shutil
import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path

import pytest
import torch
from test_train import context, llama, next_token_loss, optim, train
from torch import Tensor, nn

from retrace.core.checkpoint import newest, save
from retrace.core.context import Diverged, Stopped

FILES = [
    "tensors.safetensors",
    "state.json",
    "metrics.jsonl",
    "manifest.json",
]  # the last one has the others' checksums
RUN = "demo-train-1"  # the folder, which a checkpoint knows
EVERY_STEP = "hardware.checkpoint_seconds=0"


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> dict[str, float]:
    return train(llama(), context(tmp_path_factory.mktemp("whole")), optim("fp32"))


@pytest.fixture(scope="module")
def stopped(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run that stopped at step 3 of 6, with the checkpoints of steps 2 and 3."""
    folder, calls = tmp_path_factory.mktemp("stopped") / RUN, 0
    ctx = context(folder, EVERY_STEP, "tracking.log_every=1")

    def loss_with_a_signal(*arguments: object) -> tuple[Tensor, Mapping[str, Tensor]]:
        nonlocal calls
        calls += 1
        if calls == 5:  # in the middle of the third step
            ctx.stop.set()
        return next_token_loss(*arguments)  # type: ignore[arg-type]

    with pytest.raises(Stopped):
        train(llama(), ctx, optim("fp32"), loss_with_a_signal)
    assert {path.name for path in (folder / "checkpoints").iterdir()} == {"step_00000002", "step_00000003"}
    assert sorted(path.name for path in (folder / "checkpoints/step_00000003").iterdir()) == sorted(FILES)
    return folder


def flip(file: Path, bit: int) -> None:
    content = bytearray(file.read_bytes())
    content[bit // 8] ^= 1 << bit % 8
    file.write_bytes(content)


DAMAGES = {
    "truncated": lambda file: os.truncate(file, file.stat().st_size // 2),
    "emptied": lambda file: os.truncate(file, 0),
    "longer": lambda file: file.write_bytes(file.read_bytes() + b"x"),
    "flipped": lambda file: flip(file, 8 * (file.stat().st_size - 5)),
    "deleted": Path.unlink,
    "nonsense": lambda file: file.write_text("[]"),
}


@pytest.mark.parametrize("damage", DAMAGES)
@pytest.mark.parametrize("name", FILES)
def test_a_damaged_file_sends_the_run_back_one_checkpoint_with_one_sentence_and_the_same_end(
    name: str, damage: str, stopped: Path, undisturbed: dict[str, float], tmp_path: Path
) -> None:
    shutil.copytree(stopped, tmp_path / RUN)
    DAMAGES[damage](tmp_path / RUN / "checkpoints" / "step_00000003" / name)
    ctx = context(tmp_path / RUN)
    assert train(llama(), ctx, optim("fp32")) == undisturbed
    (sentence,) = ctx.warnings
    assert sentence.startswith("checkpoint step_00000003 is damaged (")
    assert name in sentence
    assert sentence.endswith("): this run went on from step 2")


def test_without_a_sound_checkpoint_the_run_begins_anew_and_says_so(
    stopped: Path, undisturbed: dict[str, float], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    shutil.copytree(stopped, tmp_path / RUN)
    checkpoints = tmp_path / RUN / "checkpoints"
    flip(checkpoints / "step_00000003/state.json", 80)
    shutil.rmtree(checkpoints / "step_00000002")
    (checkpoints / "step_00000002").mkdir()
    (checkpoints / "step_00000003.bak").mkdir()  # somebody's copy is none of ours
    ctx = context(tmp_path / RUN)
    with caplog.at_level(logging.WARNING):
        assert train(llama(), ctx, optim("fp32")) == undisturbed
    expected = (
        "checkpoint step_00000003 is damaged (state.json does not match its checksum), step_00000002 is damaged "
        "(manifest.json: No such file or directory): none is left, so this run began anew"
    )
    assert ctx.warnings == caplog.messages == [expected]


@pytest.mark.parametrize("name", FILES)
def test_no_single_bit_can_be_flipped_unseen(name: str, stopped: Path, tmp_path: Path) -> None:
    source = stopped / "checkpoints" / "step_00000003"
    bits = 8 * (source / name).stat().st_size
    for bit in range(0, bits, 1 if name != FILES[0] else 997):  # of the tensors' checksum a sample is enough
        place = tmp_path / RUN / "checkpoints" / "step_00000003"
        shutil.copytree(source, place)
        flip(place / name, bit)
        assert newest(place.parent)[0] == -1, f"bit {bit} of {name}"
        assert not place.exists()


def test_a_checkpoint_that_cannot_be_opened_just_now_is_not_thrown_away(stopped: Path) -> None:
    with tempfile.TemporaryDirectory() as place:  # not in pytest's folder, which is closed to others
        os.chmod(place, 0o755)
        folder = Path(place) / RUN / "checkpoints"
        shutil.copytree(stopped / "checkpoints", folder)
        (folder / "step_00000003" / "state.json").chmod(0)
        if os.getuid() == 0:  # whom modes do not stop
            os.seteuid(65534)
        try:
            with pytest.raises(PermissionError, match="Permission denied"):
                newest(folder)
        finally:
            os.seteuid(os.getuid())
        (folder / "step_00000003" / "state.json").chmod(0o600)
        assert newest(folder) == (3, "")


def test_a_checkpoint_of_another_run_or_under_another_step_is_not_believed(
    stopped: Path, undisturbed: dict[str, float], tmp_path: Path
) -> None:
    shutil.copytree(stopped, tmp_path / "demo-train-2")
    checkpoints = tmp_path / "demo-train-2" / "checkpoints"
    shutil.rmtree(checkpoints / "step_00000002")
    assert newest(checkpoints) == (
        -1, f"checkpoint step_00000003 is damaged (it is of {RUN}): none is left, so this run began anew"
    )  # fmt: skip
    shutil.copytree(stopped, tmp_path / RUN)
    checkpoints = tmp_path / RUN / "checkpoints"
    (checkpoints / "step_00000002").rename(checkpoints / "step_00000099")
    (checkpoints / "step_00000098").write_text("no folder")
    ctx = context(tmp_path / RUN)
    assert train(llama(), ctx, optim("fp32")) == undisturbed
    assert (
        "step_00000099 is damaged (it is of step 2), step_00000098 is damaged (manifest.json: Not a" in ctx.warnings[0]
    )
    assert ctx.warnings[0].endswith("this run went on from step 3")


@pytest.mark.parametrize("harm", [Path.unlink, lambda file: os.truncate(file, 70), lambda file: file.write_text("5\n")])
def test_a_log_that_was_cut_or_deleted_or_edited_beside_its_checkpoints_is_whole_in_the_end(
    harm: Callable[[Path], None], stopped: Path, tmp_path: Path
) -> None:
    shutil.copytree(stopped, tmp_path / RUN)
    harm(tmp_path / RUN / "metrics.jsonl")
    ctx = context(tmp_path / RUN, "tracking.log_every=1")
    train(llama(), ctx, optim("fp32"))
    assert [step for step, _ in ctx.tracker.series()["loss/total"]] == [1, 2, 3, 4, 5, 6]


def test_a_checkpoint_that_cannot_be_written_leaves_nothing_behind(tmp_path: Path) -> None:
    """On a full disk it would take the room for the reason, and for all other runs."""
    (tmp_path / "metrics.jsonl").mkdir()  # can't be copied, after all else is written
    model = llama()
    optimizer = torch.optim.AdamW(model.parameters())
    with pytest.raises(IsADirectoryError):
        save(tmp_path / "checkpoints", step=1, model=model, optimizer=optimizer, state={})
    assert not list((tmp_path / "checkpoints").iterdir())


def test_a_loss_that_is_no_number_names_the_step_and_the_last_good_values(tmp_path: Path) -> None:
    calls = 0

    def loss(model: nn.Module, batch: Mapping[str, Tensor], noise: object) -> tuple[Tensor, Mapping[str, Tensor]]:
        nonlocal calls
        calls += 1
        value, seen = next_token_loss(model, batch, noise)  # type: ignore[arg-type]
        return (value * float("nan") if calls == 7 else value), seen  # in the fourth step

    with pytest.raises(Diverged) as caught:
        train(llama(), context(tmp_path), optim("fp32"), loss)
    assert caught.value.step == 3
    assert caught.value.metrics.keys() == {"loss/total", "grad_norm/all"}
    good = ", ".join(f"{name}={value:.4g}" for name, value in caught.value.metrics.items())
    assert str(caught.value) == f"loss/total was not finite at step 3; last good values: {good}"

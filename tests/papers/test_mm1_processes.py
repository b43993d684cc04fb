"""Two processes that train a multimodal model, sharded by FSDP2 or not, do what one does."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import torch
from multimodal import EXPERTS, pack, tiny_model

from retrace.core import checkpoint, parallel
from retrace.core.config import Hardware

ROWS: list[list[list[list[int | str]]]] = [[[[1, "image", 7, 8, 9]]], [[[1, 5, 6, 7]]]]  # the second has no image


def train(shard: bool) -> dict[str, float]:
    """Three updates on both batches; the sum of each tensor's absolute values."""
    torch.set_num_threads(1)
    world = int(os.environ.get("WORLD_SIZE", 1))
    hardware = Hardware(
        name="cpu", device="cpu", processes=world, threads=1, parallel_runs=1, shard=shard, compile=False,
        activation_checkpointing=True, peak_flops=None, planned_mfu=None, checkpoint_seconds=1.0,
    )  # fmt: skip
    inner = model = tiny_model(experts=EXPERTS, conv_stem=True).train()
    model.activation_checkpointing_enable()
    accelerator = parallel.make_accelerator(hardware, model=model, precision="fp32")
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
    model, optimizer = parallel.prepare(accelerator, model, optimizer)
    mine = ROWS[accelerator.process_index :: world]
    for _ in range(3):
        for number, rows in enumerate(mine, start=1):
            with parallel.micro_step(accelerator, model, precision="fp32", last=number == len(mine)):
                accelerator.backward(model(pack(rows)).loss / len(mine))
        parallel.release(inner)
        optimizer.step()
        optimizer.zero_grad()
    tensors = checkpoint.whole(checkpoint.model_tensors(inner), keep=accelerator.is_main_process)
    return {name: float(tensor.detach().double().abs().sum()) for name, tensor in tensors.items()}


def test_two_sharded_processes_of_which_one_has_no_image_train_as_one_does(tmp_path: Path) -> None:
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    file = tmp_path / "sharded.json"
    subprocess.run([*launcher, __file__, str(file)], check=True, capture_output=True, timeout=120)
    sharded, alone = json.loads(file.read_text()), train(False)
    assert sharded.keys() == alone.keys()
    assert max(abs(sharded[name] - alone[name]) / (abs(alone[name]) + 1e-6) for name in alone) < 1e-5


if __name__ == "__main__":
    found = train(True)
    if found:
        Path(sys.argv[1]).write_text(json.dumps(found))

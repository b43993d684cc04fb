"""A hub that goes away in the middle of a run that streams from it: one sentence, and the run goes on at the sample."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from hub import COMMIT, Hub
from test_mm1_real import OPTIM, TEXTS
from test_resume import numbers

from retrace.core.plan import RunSpec, plan
from retrace.core.store import Store

NAMES = [f"train-{number:03}.jsonl" for number in range(36)]
SMALL = [
    "scale=gpu", "seed=0", "hardware=cpu", "tracking.wandb=off", "tracking.log_every=1",
    "hardware.checkpoint_seconds=0",
    "data.vocab_size=290", "data.num_bpe_documents=20", "decoder.seq_len=64", "decoder.caption_words=0",
    "decoder.shape={hidden_size: 16, num_layers: 2, num_heads: 2, num_kv_heads: 2, intermediate_size: 32}",
    f"data.sources.text={{kind: hub, document: text, dataset: lab/texts, revision: '{COMMIT}'}}",
    *[text.replace("pretrain", "decoder") for text in OPTIM],
    "decoder.optim.steps=24", "decoder.optim.batch_size=32", "decoder.optim.micro_batch_size=32",
]  # fmt: skip


@pytest.fixture
def hub() -> Iterator[Hub]:
    """36 files of ten documents each, of some hundred tokens."""
    rows = [[" ".join(TEXTS[(10 * file + row) % len(TEXTS) :][:3]) for row in range(10)] for file in range(len(NAMES))]
    files = {
        name: "".join(json.dumps({"text": text}) + "\n" for text in texts).encode()
        for name, texts in zip(NAMES, rows, strict=True)
    }
    found = Hub("lab/texts", files)
    found.start()
    yield found
    found.stop()


@pytest.mark.slow  # the clients try again for a minute and a half before they give up
def test_a_hub_that_goes_away_fails_the_run_with_one_sentence_and_back_it_goes_on_at_the_sample(
    hub: Hub, tmp_path: Path
) -> None:
    specs = {spec.program: spec for spec in plan(["mm1/main"], SMALL)}
    decoder = specs["pretrain_decoder"]

    def work(home: Path, spec: RunSpec) -> str:
        run = Store(home).run(spec.id)
        run.freeze(spec, command="test")
        environment = {
            "RETRACE_HOME": str(home),
            "HF_ENDPOINT": hub.url,
            "HF_HUB_OFFLINE": "0",
            "HF_HOME": f"{home}/hf",
        }
        command = [sys.executable, "-m", "retrace.worker", str(run.path)]
        return subprocess.run(command, env={**os.environ, **environment}, stdout=subprocess.PIPE, text=True).stdout

    homes = [tmp_path / "steady", tmp_path / "broken"]
    for home in homes:
        assert work(home, specs["prepare"]).startswith("DONE")
    hub.sent.clear()
    assert work(homes[0], decoder).startswith("DONE")
    whole = [*hub.sent]

    hub.sent.clear()
    hub.last = len(whole) * 2 // 3
    said = work(homes[1], decoder)
    assert said.startswith("FAILED ValueError: lab/texts: ")
    assert "copy them below RETRACE_DATA" in said
    assert said.count("\n") == 1
    step = max(int(path.name[5:]) for path in (homes[1] / "runs" / decoder.id / "checkpoints").glob("step_*"))
    assert 12 < step < 24

    hub.last = None
    hub.sent.clear()
    hub.start()
    assert work(homes[1], decoder).startswith("DONE")
    assert numbers(homes[1], decoder) == numbers(homes[0], decoder)
    assert len(hub.sent) < len(whole) * 0.75  # it began with the block of rows in which it had stopped

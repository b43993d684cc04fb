"""Scales gpu and paper end to end, on shards that are made here, tiny models and a CPU."""

from __future__ import annotations

import io
import json
import tarfile
from pathlib import Path

import pyarrow
import pyarrow.parquet
import pytest
from conftest import Run
from PIL import Image
from transformers import (
    CLIPConfig,
    CLIPModel,
    CLIPTextConfig,
    CLIPVisionConfig,
    LlamaConfig,
    LlamaForCausalLM,
)

from retrace.core.bpe import train_bpe
from retrace.core.store import Store

COLORS = ("red", "green", "blue")
TEXTS = [f"the {a} square number {n} is beside the {b} one ." for n in range(40) for a in COLORS for b in COLORS]
OPTIM = [
    f"pretrain.optim.{setting}"
    for setting in ("steps=2", "batch_size=2", "micro_batch_size=1", "warmup_steps=1", "precision=fp32")
]
ROWS = ["pretrain.rows.seq_len=48", "pretrain.rows.max_images=4", "eval.batch_size=4", "eval.precision=fp32"]
QUIET = ["seed=0", "hardware=cpu", "tracking.wandb=off"]
HALF = "pretrain.mixture.weights={caption: 0.4, synthetic: 0.0, interleaved: 0.4, text: 0.2}"

LIKE = dict.fromkeys(("coco", "nocaps", "textcaps"), "coco")  # task of the paper -> the data in its place here
LIKE |= dict.fromkeys(("vqav2", "textvqa", "vizwiz", "gqa", "okvqa"), "vqa")


def photo(number: int) -> bytes:
    data = io.BytesIO()
    Image.new("RGB", (40, 30), [(200, 20, 20), (20, 180, 20), (20, 20, 200)][number % 3]).save(data, "JPEG")
    return data.getvalue()


def table(file: Path, **columns: list[object]) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    pyarrow.parquet.write_table(pyarrow.table(columns), file)


@pytest.fixture
def data(tmp_path: Path) -> Path:
    """A RETRACE_DATA with the layout that configs/mm1/scale/gpu.yaml names."""
    root = tmp_path / "data"
    said = [COLORS[n % 3] for n in range(12)]
    images: list[object] = [{"bytes": photo(n), "path": None} for n in range(12)]
    for name in ("captions", "synthetic"):
        (root / "mm1" / name).mkdir(parents=True)
        with tarfile.open(root / "mm1" / name / "0.tar", "w") as tar:
            for number, word in enumerate(said):
                for suffix, content in (("jpg", photo(number)), ("txt", f"a {word} square".encode())):
                    entry = tarfile.TarInfo(f"{number:04}.{suffix}")
                    entry.size = len(content)
                    tar.addfile(entry, io.BytesIO(content))
    pairs: list[object] = [[images[n], None, images[n + 1], None] for n in range(8)]
    words: list[object] = [[None, said[n], None, said[n + 1]] for n in range(8)]
    table(root / "mm1/interleaved/0.parquet", images=pairs, texts=words)
    (root / "mm1/text").mkdir()
    (root / "mm1/text/0.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in TEXTS))
    table(root / "mm1/text/0.parquet", text=list(TEXTS))
    asked: list[object] = ["what color ?"] * 12
    table(root / "mm1/instruction/0.parquet", image=images, question=asked, text=list(said))
    for split in ("train", "val"):
        captions: list[object] = [[f"a {word} square", f"one {word} thing"] for word in said]
        table(root / f"mm1/coco/{split}/0.parquet", image=images, text=captions)
        table(root / f"mm1/vqa/{split}/0.parquet", image=images, question=asked, text=[[word] * 3 for word in said])
    return root


def metrics(home: Path) -> dict[str, dict[str, float]]:
    return {record.program: record.metrics for record in Store(home).records("mm1")}


def test_the_gpu_scale_trains_encoder_decoder_and_model_on_local_shards(home: Path, retrace: Run, data: Path) -> None:
    small = [
        "data.vocab_size=290", "data.num_bpe_documents=300", "image_size=28", "connector.num_tokens=4", HALF,
        "connector.hidden_size=16", "connector.depth=1", "eval.shots=[0,1]", "decoder.seq_len=32",
        "encoder.text_tower={hidden_size: 16, num_layers: 1, num_heads: 2, intermediate_size: 32, max_tokens: 8, "
        "joint_size: 8, image_pooling: mean}",
        "decoder.shape={hidden_size: 16, num_layers: 2, num_heads: 2, num_kv_heads: 2, intermediate_size: 32}",
    ]  # fmt: skip
    small += [f"encoder.{s}" for s in ("hidden_size=16", "num_layers=1", "num_heads=2", "intermediate_size=32")]
    small += [text.replace("pretrain", part) for part in ("encoder", "decoder") for text in OPTIM]
    done = retrace("run", "mm1/main", "scale=gpu", *QUIET, *small, *OPTIM, *ROWS, RETRACE_DATA=str(data))
    assert done.returncode == 0, done.stdout + done.stderr
    found = metrics(home)
    assert found.keys() == {"prepare", "pretrain_encoder", "pretrain_decoder", "pretrain", "evaluate"}
    asked = found["evaluate"]
    for shots in (0, 1):
        mean = (asked[f"coco_{shots}/cider"] + asked[f"vqa_{shots}/vqa"]) / 2
        assert asked[f"mmcore_{shots}/mean"] == pytest.approx(mean)


def tiny_models(folder: Path) -> int:
    """A CLIP and a Llama with its tokenizer, of random weights, as transformers saves them; the size of the latter."""
    vision = CLIPVisionConfig(
        image_size=28, patch_size=14, hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=32
    )
    text = CLIPTextConfig(
        vocab_size=50, hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=32
    )
    CLIPModel(CLIPConfig(vision_config=vision.to_dict(), text_config=text.to_dict())).save_pretrained(folder / "clip")
    tokenizer = train_bpe(TEXTS, vocab_size=290, key="vocab_size", bos_token="<s>", eos_token="</s>")
    tokenizer.save_pretrained(folder / "llama")
    config = LlamaConfig(
        vocab_size=290, hidden_size=16, num_hidden_layers=2, num_attention_heads=2, num_key_value_heads=1,
        intermediate_size=32, tie_word_embeddings=False,
    )  # fmt: skip
    LlamaForCausalLM(config).save_pretrained(folder / "llama")
    return len(tokenizer)


@pytest.mark.slow  # a minute of two cores: five processes load their libraries
def test_the_paper_scale_continues_clip_and_llama_on_two_sharded_processes(
    home: Path, retrace: Run, data: Path
) -> None:
    sharded = ["hardware.processes=2", "hardware.shard=true"]
    size = tiny_models(data)
    own = [
        "data.sources.caption.pattern=mm1/captions/*.tar",
        "data.sources.synthetic.pattern=mm1/synthetic/*.tar",
        "data.sources.interleaved.pattern=mm1/interleaved/*.parquet",
        "data.sources.text.pattern=mm1/text/*.parquet",
        *[
            f"data.tasks.{name}.{split}.pattern=mm1/{folder}/{place}/*.parquet"
            for name, folder in LIKE.items()
            for split, place in (("train", "train"), ("test", "val"))
        ],
    ]  # fmt: skip
    models = [
        "encoder.name=clip", "encoder.hidden_size=16", "encoder.num_layers=2", "encoder.num_heads=2",
        "encoder.intermediate_size=32", "decoder.name=llama", f"decoder.vocab_size={size}", "image_size=56",
        "decoder.shape={hidden_size: 16, num_layers: 2, num_heads: 2, num_kv_heads: 1, intermediate_size: 32}",
        "connector.num_tokens=9", "connector.hidden_size=16", "connector.depth=1", "eval.shots=[0,1]",
        "eval.text_tasks=[]", HALF,
    ]  # fmt: skip
    done = retrace(
        "run", "mm1/main", "scale=paper", *QUIET, *own, *models, *OPTIM, *ROWS, *sharded, RETRACE_DATA=str(data)
    )
    assert done.returncode == 0, done.stdout + done.stderr
    found = metrics(home)
    assert found.keys() == {"pretrain", "evaluate"}
    assert {f"{name}_1/cider" for name in ("coco", "nocaps", "textcaps")} < found["evaluate"].keys()
    assert "mmcore_1/mean" in found["evaluate"]

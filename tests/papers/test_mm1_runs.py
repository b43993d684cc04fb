"""MM1's runs: which an experiment needs, what they share and cost, that they run, resume and plan."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
import threading
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest
import torch
from conftest import Run
from multimodal import carry_out
from safetensors.torch import load_file
from torch.utils.flop_counter import FlopCounterMode
from transformers import BertConfig, LlamaConfig, Qwen3Config

from retrace.core.bpe import train_bpe
from retrace.core.claims import load_claims
from retrace.core.compose import compose
from retrace.core.config import CONFIGS, validate
from retrace.core.context import Context
from retrace.core.plan import load_ablations, plan
from retrace.core.record import Record
from retrace.core.store import Store
from retrace.papers.mm1 import cost, evaluation, programs
from retrace.papers.mm1.choices import Corpora, PretrainedDecoder, PretrainedEncoder, ScratchEncoder
from retrace.papers.mm1.config import SUB_IMAGES, MM1Config, Rows
from retrace.papers.mm1.contrastive import ContrastiveModel
from retrace.papers.mm1.decoder import build_decoder
from retrace.papers.mm1.encoder import build_encoder
from retrace.papers.mm1.model import MultimodalModel
from retrace.papers.mm1.packing import Draft, Picture, Window, fill
from retrace.papers.mm1.program_configs import EncoderConfig, EvaluateConfig, FinetuneConfig, PretrainConfig
from retrace.papers.mm1.rows import Piece
from retrace.papers.mm1.sources import load_tokenizer
from retrace.papers.mm1.stages import check
from retrace.papers.mm1.world import IMAGE, vocabulary
from retrace.papers.mm1.worldtasks import world_tasks
from retrace.worker import execute

torch.set_num_threads(1)
QUIET = ["scale=smoke", "seed=0", "tracking.wandb=off"]
TUNED = ["finetune=${tuning.same}"]


def composed(*overrides: str) -> MM1Config:
    return validate(MM1Config, compose("mm1", ["scale=smoke", *overrides]), source="test")


@pytest.mark.parametrize(
    ("overrides", "said"),
    [
        (["connector.num_tokens=25"], "gives 3x3 of them: use at most 9 tokens, or kind attention_pool"),
        (["connector.num_tokens=5"], "expected a square, such as 4 or 9"),
        (["image_size=13"], "no multiple of patch_size=4: use 12"),
        (["pretrain.mixture.weights={caption: 0.5, text: 0.4}"], "expected probabilities that sum to 1"),
        (["pretrain.rows.seq_len=8", "connector.num_tokens=9"], "pretrain.rows.seq_len=8: an image takes 9 positions"),
        (["experts={num_experts: 4, every: 3}"], "no layer would have experts"),
        (["eval.shots=[4,0]"], "expected rising numbers from 0"),
        (["split_last=1"], "only a fine-tuning with sub_images=true splits; use null"),
        (["eval.text_tasks=[piqa]"], "procedural data brings its own text tasks"),
        (["pretrain.trained=[]"], "expected one or more"),
        (["data.held_out_shapes=0"], "greater than or equal to 1"),
        (
            [*TUNED, "connector.kind=average_pool", "tuning.same.image_size=4"],
            "connector.num_tokens=4: finetune.image_size=4 in patches of 4 gives 1x1 of them: use at most 1 tokens",
        ),
        ([*TUNED, "tuning.same.image_size=14"], "finetune.image_size=14 is no multiple of encoder.patch_size=4"),
        (
            ["finetune=${tuning.sub_images}", "tuning.sub_images.image_size=28"],
            "finetune.image_size=28 halved by sub_images is no multiple of encoder.patch_size=4",
        ),
        (["encoder.num_heads=3"], "encoder: hidden_size=16 with num_heads=3: expected a multiple of 3"),
        (["encoder.text_tower.num_heads=5"], "encoder.text_tower: hidden_size=16 with num_heads=5: expected"),
        (
            ["decoder.shape.num_heads=3", "decoder.shape.num_kv_heads=3"],
            "decoder.shape: hidden_size=16 with num_heads=3: expected a multiple of 6, for heads of one even size: use",
        ),
        (["decoder.shape.num_heads=16"], "hidden_size=16 with num_heads=16: expected a multiple of 32"),
        (["decoder.shape.num_heads=4", "decoder.shape.num_kv_heads=3"], "expected a number that divides it"),
        (
            ["encoder.objective=reconstructive", "image_size=4", "connector.num_tokens=1"],
            "encoder.objective=reconstructive with image_size=4: an image is one patch, and none is left to predict",
        ),
    ],
)  # fmt: skip
def test_what_does_not_fit_is_refused_in_one_sentence(overrides: list[str], said: str) -> None:
    with pytest.raises(ValueError, match="test: ") as refused:
        composed(*overrides)
    assert said in str(refused.value)
    assert "\n" not in str(refused.value)


def test_weights_of_an_unknown_source_are_refused() -> None:
    tree: dict[str, Any] = compose("mm1", ["scale=smoke"])
    tree["pretrain"]["mixture"]["weights"] = {"captions": 1.0}
    with pytest.raises(ValueError, match=r"weights\.captions: expected some of caption, synthetic"):
        validate(MM1Config, tree, source="test")


def test_real_data_must_hold_what_is_trained_on() -> None:
    tree: dict[str, Any] = compose("mm1", ["scale=gpu"])
    del tree["data"]["sources"]["text"]
    with pytest.raises(ValueError, match=r"data\.sources has no text, which is trained on; it has caption"):
        validate(MM1Config, tree, source="test")


def test_more_demonstrations_than_items_to_take_them_from_are_refused() -> None:
    tree: dict[str, Any] = compose("mm1", ["scale=gpu", "eval.shots=[0,9]"])
    name, task = next(iter(tree["data"]["tasks"].items()))
    task["num_train"] = 8
    with pytest.raises(ValueError, match=rf"eval\.shots=\[0, 9\]: data\.tasks\.{name}\.num_train=8 items are all that"):
        validate(MM1Config, tree, source="test")


def test_more_shots_than_photos_to_demonstrate_with_are_refused_before_anything_runs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("RETRACE_DATA", str(tmp_path))
    for split in ("train", "test"):
        (tmp_path / "photos" / split).mkdir(parents=True)
        lines = [json.dumps({"image": f"{number}.jpg", "text": "a ball"}) for number in range(3)]
        (tmp_path / "photos" / split / "captions.jsonl").write_text("\n".join(lines) + "\n")
    own = ["data=${photos}", "encoder.captions=caption", "decoder.caption_words=0.0"]
    own += ["pretrain.mixture.weights={caption: 0.9, interleaved: 0.0, text: 0.1}"]
    check(composed(*own, "eval.shots=[0,3]"))
    with pytest.raises(ValueError, match=r"eval\.shots=\[0, 4\]: data\.tasks\.photos\.train has 3 items to take demon"):
        check(composed(*own, "eval.shots=[0,4]"))


def test_synthetic_captions_take_their_share_of_the_captions_in_every_arm() -> None:
    assert composed().pretraining == composed().pretrain, "none: the run is the one it was"
    asked = {"main": [], "captions": ["pretrain.mixture.weights={caption: 1.0, interleaved: 0.0, text: 0.0}"]}
    weights = {n: composed("synthetic_share=0.07", *o).pretraining.mixture.weights for n, o in asked.items()}
    assert weights["main"] == pytest.approx({"caption": 0.4185, "synthetic": 0.0315, "interleaved": 0.45, "text": 0.1})
    assert weights["captions"] == pytest.approx({"caption": 0.93, "synthetic": 0.07, "interleaved": 0.0, "text": 0.0})
    without = "pretrain.mixture.weights={caption: 0.0, interleaved: 1.0, text: 0.0}"
    assert composed("synthetic_share=0.07", without).pretraining.mixture.used == ["interleaved"]


def test_arms_share_encoders_and_decoders_that_are_made_alike() -> None:
    specs = plan(["mm1"], QUIET)
    by_program = {name: [s for s in specs if s.program == name] for name in ("pretrain_encoder", "pretrain_decoder")}
    # of the base, and three of the learning rate's law
    assert len(by_program["pretrain_decoder"]) == 4
    # three resolutions, a larger one, a reconstructive one
    assert len(by_program["pretrain_encoder"]) == 5
    trained = [spec for spec in specs if spec.program == "pretrain"]
    used = {spec.parents["encoder"] for spec in trained}
    assert used == {spec.id for spec in by_program["pretrain_encoder"]}
    base = [
        s for s in trained if {"resolution/medium/s0", "connector/c_abstractor/s0", "text_share/t10/s0"} < set(s.labels)
    ]
    assert len(base) == 1, "the base of all ablations is one run"


def test_a_fine_tuning_trains_nothing_of_the_base_again() -> None:
    base = {spec.id for spec in plan(["mm1/main"], QUIET)}
    more = [spec for spec in plan(["mm1/fine_tuning"], QUIET) if spec.id not in base]
    assert [sum(spec.program == name for spec in more) for name in ("finetune", "evaluate")] == [3, 4]
    assert len(more) == 7, "mixed resolution is a matter of the evaluation alone"


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Record]]:
    """A home in which the longest chain has run: sub-images and all."""
    home = tmp_path_factory.mktemp("home")
    specs = [s for s in plan(["mm1/fine_tuning"], QUIET) if "fine_tuning/sub_images/s0" in s.labels]
    return home, carry_out(specs, home)


def optims(config: Any) -> Any:
    """The optimizer settings of a training's config: those of the part that is trained."""
    return next(config[part]["optim"] for part in ("finetune", "pretrain", "encoder", "decoder") if part in config)


def test_a_chain_runs_and_says_what_it_read(finished: tuple[Path, dict[str, Record]]) -> None:
    _, records = finished
    assert list(records) == ["pretrain_encoder", "pretrain_decoder", "pretrain", "finetune", "evaluate"]
    for program in ("pretrain_encoder", "pretrain_decoder", "pretrain", "finetune"):
        read, optim = records[program].provenance["data"], optims(records[program].config)
        rows = optim["steps"] * optim["batch_size"]
        assert sum(count for name, count in read.items() if name.endswith("/rows")) == rows
        assert {"too_long", "left_out"} <= {name.rpartition("/")[2] for name in read}
    metrics = records["evaluate"].metrics
    assert metrics["ask_color_0/acc"] >= 0
    assert metrics["grounded/digits"] in (0.0, 1.0)
    assert 0 <= metrics["textcore/mean"] <= 1


def test_every_metric_that_a_laptop_claim_reads_is_made(finished: tuple[Path, dict[str, Record]]) -> None:
    made = {metric for record in finished[1].values() for metric in record.metrics}
    asked = {
        m
        for claim in load_claims(CONFIGS / "mm1" / "claims.yaml")
        if "laptop" in claim.testable_at
        for _, m in claim.cells
    }
    shots = max(composed().eval.shots)
    assert {metric.replace("_4/", f"_{shots}/") for metric in asked} <= made


def test_every_claim_names_arms_that_are_there() -> None:
    arms = {name: ablation.arms for name, ablation in load_ablations("mm1").items()}
    assert load_claims(CONFIGS / "mm1" / "claims.yaml", arms=arms)


def test_prompts_of_mixed_resolution_split_the_last_images_alone() -> None:
    split = ["finetune=${tuning.sub_images}", "eval.shots=[0,4]"]
    whole, mixed = (plan(["mm1/main"], [*QUIET, *split, *more])[-1].config for more in ([], ["split_last=2"]))
    assert (whole.sub_images, mixed.sub_images) == (True, 2)  # type: ignore[attr-defined]
    assert [cost.prompt_images(whole, shots) for shots in (0, 4)] == [5, 25]  # type: ignore[arg-type]
    assert [cost.prompt_images(mixed, shots) for shots in (0, 4)] == [5, 13]  # type: ignore[arg-type]
    seen: list[int] = []

    class Model:
        """As far as a prompt is made of pieces."""

    answerer = evaluation.ModelAnswerer(Model(), side=2, last=2)  # type: ignore[arg-type]
    image, text = Piece(image=torch.zeros(3, 4, 4)), Piece((1,))
    for prompt in answerer._prompts([[image, text, image, text, image, text]]):
        seen = [0 if piece.image is None else piece.image.shape[-1] for piece in prompt]
    assert seen == [2, 0, *[2] * 5, 0, *[2] * 5, 0]


@pytest.mark.parametrize(("tuning", "part"), [("same", "connector"), ("interpolated", "decoder")])
def test_a_fine_tuning_trains_the_parts_that_it_names(
    tuning: str, part: str, finished: tuple[Path, dict[str, Record]], tmp_path: Path
) -> None:
    home, _ = finished
    shutil.copytree(home, tmp_path / "home")
    frozen = [*QUIET, f"finetune=${{tuning.{tuning}}}", f"tuning.{tuning}.trained=[{part}]"]
    specs = [spec for spec in plan(["mm1/main"], frozen) if spec.program == "finetune"]
    carry_out(specs, tmp_path / "home")
    store = Store(tmp_path / "home")
    before, after = (
        load_file(store.run(run).path / "model" / "model.safetensors")
        for run in (specs[0].parents["model"], specs[0].id)
    )
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    moved = {name for name in changed if before[name].shape != after[name].shape}
    assert {name.partition(".")[0] for name in changed - moved} == {part}
    assert all("position" in name for name in moved)
    assert bool(moved) == (tuning == "interpolated")


@pytest.mark.parametrize(
    ("part", "size"),
    [
        *[("encoder", size) for size in ("patch_size", "hidden_size", "num_layers", "intermediate_size")],
        *[("decoder.shape", size) for size in ("hidden_size", "num_layers", "num_kv_heads", "intermediate_size")],
    ],
)
def test_told_sizes_that_pretrained_weights_do_not_have_are_refused(part: str, size: str, tmp_path: Path) -> None:
    c, ctx, weights = composed("encoder.conv_stem=false"), SimpleNamespace(notes={}), {"kind": "pretrained"}
    build_encoder(c.vision, seed=0).trunk.save_pretrained(tmp_path / "encoder")
    build_decoder(c.decoder.shape, vocab_size=50, seed=0).trunk.save_pretrained(tmp_path / "decoder")
    weights |= {"revision": "main"}
    own = c.vision.model_dump(exclude={"image_size", "conv_stem"}) | weights | {"name": str(tmp_path / "encoder")}
    read = {"shape": c.decoder.shape.model_dump(), "vocab_size": 50} | weights | {"name": str(tmp_path / "decoder")}

    def load(*, checked: bool) -> None:
        parts = {"encoder": PretrainedEncoder(**own), "decoder": PretrainedDecoder(**read)}
        if checked:  # what `run` does before it starts anything
            return check(c.model_copy(update=parts))
        asked = PretrainConfig(
            image_size=c.image_size, connector=c.connector, experts=None, data=c.data, pretrain=c.pretrain, files={},
            seed=0, **parts,
        )  # fmt: skip
        programs._encoder(asked, ctx)  # type: ignore[arg-type]
        programs._decoder(asked, ctx)  # type: ignore[arg-type]

    load(checked=True)
    load(checked=False)
    told = own if part == "encoder" else read["shape"]
    real, told[size] = told[size], 2 * told[size]
    for checked in (True, False):
        with pytest.raises(ValueError, match=rf"{part}\.{size}={2 * real}: .* has {real}: correct the sizes"):
            load(checked=checked)


def test_positions_beyond_those_of_the_decoder_are_told_in_one_sentence() -> None:
    said: list[str] = []
    decoder = build_decoder(composed().decoder.shape, vocab_size=50, seed=0)
    for length in (4096, 5000):
        rows = Rows(seq_len=length, max_images=1, mask="documents")
        programs._warn_of_positions(decoder, rows, SimpleNamespace(warn=said.append), key="rows")  # type: ignore[arg-type]
    assert len(said) == 1
    assert said[0].startswith("rows.seq_len=5000: the decoder was trained on 4096 positions")


def test_a_pretraining_that_is_stopped_ends_as_one_that_never_was(
    finished: tuple[Path, dict[str, Record]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    _, records = finished
    specs = [s for s in plan(["mm1/main"], [*QUIET, "hardware.checkpoint_seconds=0"]) if s.program != "evaluate"]
    carry_out(specs[:2], tmp_path)
    store, (spec,) = Store(tmp_path), specs[2:]
    run = store.run(spec.id)
    run.freeze(spec, command="test")
    stop = threading.Event()
    real = programs._loss

    def loss_and_stop(*arguments: Any) -> Any:
        stop.set()
        return real(*arguments)

    monkeypatch.setattr(programs, "_loss", loss_and_stop)
    assert execute(run.path, store=store, stop=stop).status == "STOPPED"
    assert len(list((run.path / "checkpoints").glob("step_*"))) == 1
    monkeypatch.setattr(programs, "_loss", real)
    assert execute(run.path, store=store, stop=threading.Event()).status == "DONE"
    assert Record.load(run.path / "record.json").metrics == records["pretrain"].metrics


def test_rows_without_a_mask_are_other_rows_than_with_one() -> None:
    batch = {"document_ids_BL": torch.tensor([[1, 1, 2, 2, 0]]), "position_ids_BL": torch.tensor([[0, 1, 0, 1, 0]])}
    joined = programs._unmasked(lambda _: batch)(range(1))
    assert joined["document_ids_BL"].tolist() == [[1, 1, 1, 1, 0]]
    assert joined["position_ids_BL"].tolist() == [[0, 1, 2, 3, 0]]
    assert batch["document_ids_BL"].tolist() == [[1, 1, 2, 2, 0]]


def test_the_paper_scale_plans_and_costs_without_torch_or_network() -> None:
    code = (
        "import json, sys\n"
        "from retrace.core.plan import plan\n"
        "from retrace.core.planview import cost_of\n"
        "specs = plan(['mm1/recipes', 'mm1/main'], ['scale=paper', 'seed=0', 'hardware=gpu8'])\n"
        "assert 'torch' not in sys.modules and 'transformers' not in sys.modules\n"
        "print(json.dumps({s.labels[0]: cost_of(s).flops for s in specs if s.program == 'pretrain'}))\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    flops = json.loads(done.stdout)
    tokens = 200_000 * 512 * 4096
    patches = 200_000 * 512 * 16 * 576  # through a ViT-L of 303 million parameters
    assert flops["main/main/s0"] == pytest.approx(6 * 1.03e9 * tokens + 6 * 303e6 * patches, rel=0.15)
    assert flops["recipes/m30b/s0"] > 4 * flops["recipes/m7b/s0"] > 5 * flops["recipes/m3b/s0"]
    assert flops["recipes/m3b/s0"] < flops["recipes/m3b_experts/s0"] < 1.5 * flops["recipes/m3b/s0"]


@pytest.mark.parametrize("conv_stem", [False, True])
@pytest.mark.parametrize("kind", ["average_pool", "attention_pool", "c_abstractor"])
def test_counted_flops_and_parameters_are_those_of_the_model(kind: str, conv_stem: bool) -> None:
    config = composed(
        f"connector.kind={kind}", "connector.hidden_size=32", "connector.num_tokens=9", "encoder.hidden_size=64",
        "encoder.intermediate_size=128", "image_size=24", "decoder.shape.hidden_size=64",
        f"encoder.conv_stem={str(conv_stem).lower()}",
    )  # fmt: skip
    asked = PretrainConfig(
        image_size=config.image_size, encoder=config.encoder, connector=config.connector, decoder=config.decoder,
        experts=None, data=config.data, pretrain=config.pretrain, files={}, seed=0,
    )  # fmt: skip
    size = len(vocabulary())
    decoder = build_decoder(config.decoder.shape, vocab_size=size, seed=0)
    model = MultimodalModel(
        build_encoder(config.vision, seed=0), config.connector, decoder, image_token_id=vocabulary()[IMAGE]
    )
    counted = cost.parameters(asked)
    counted["decoder"] -= size * 64  # tied: one table
    for part, count in counted.items():
        matrices = [(n, p) for n, p in getattr(model, part).named_parameters() if p.dim() > 1]
        left_out = ("position", "squeeze", "excite", "queries")  # tables, and what is once an image
        real = sum(p.numel() for n, p in matrices if not any(word in n for word in left_out))
        assert count == pytest.approx(real, rel=0 if part == "encoder" else 0.12), part
    images = torch.rand(8, 3, 24, 24)
    with FlopCounterMode(display=False) as counter:
        model.encoder(images)
    attention = 4 * 8 * 64 * 36 * 36  # the counter misses it on a CPU
    assert 8 * cost.vision_flops(config.vision) - attention == counter.get_total_flops()
    with FlopCounterMode(display=False) as counter:
        model.image_tokens(images)
    ours = 8 * (cost.vision_flops(config.vision) + cost.connector_flops(config.connector, config.vision, out_size=64))
    unseen = attention + 4 * 8 * 64 * 36 * 9 * (kind == "attention_pool")
    assert ours - unseen == pytest.approx(counter.get_total_flops(), rel=0.12)


@pytest.mark.parametrize("pooling", ["mean", "mean_and_patches"])
def test_counted_flops_and_parameters_are_those_of_an_encoders_training(pooling: str) -> None:
    config = composed(f"encoder.text_tower.image_pooling={pooling}", "encoder.optim.steps=1")
    assert isinstance(config.encoder, ScratchEncoder)
    asked = EncoderConfig(vision=config.vision, encoder=config.encoder, data=config.data, files={}, seed=0)
    model = ContrastiveModel(build_encoder(config.vision, seed=0), config.encoder.text_tower, vocab_size=50, seed=0)
    tables = ("position", "token_embedding")
    matrices = [(n, p) for n, p in model.named_parameters() if p.requires_grad and p.dim() > 1]
    used = cost.pretrain_encoder(asked)
    assert used.memory.parameters == sum(p.numel() for n, p in matrices if not any(word in n for word in tables))
    words = torch.ones(4, 12, dtype=torch.long)
    with FlopCounterMode(display=False) as counter:
        model(torch.rand(4, 3, 12, 12), words, words)
    attention, scores = 4 * 4 * 16 * 9 * 9, (2 if pooling == "mean" else 4) * 4 * 4 * 16
    unused = 2 * 4 * 16 * 16  # of the text model, whose own pooling nobody reads
    assert used.flops / cost.TRAIN - attention == counter.get_total_flops() - scores - unused


@pytest.mark.parametrize("sub_images", [False, True])
@pytest.mark.parametrize(("words", "seq_len", "most"), [(0, 120, 30), (1, 120, 30), (9, 77, 3)])
def test_a_packed_row_holds_no_more_images_than_are_counted(
    words: int, seq_len: int, most: int, sub_images: bool
) -> None:
    each = SUB_IMAGES if sub_images else 1
    window = Window(seq_len, 4, most, pad_id=0, image_id=1, sub_images=each)
    pieces = window.cut(Draft([Picture(None), Piece((2,) * words)] * 50, "test"))
    sizes = [window.size(piece) for piece in pieces]
    found = max(each * sum(sizes[index][1] for index in row) for row in fill(sizes, window))
    counted = cost.row_images(Rows(seq_len=seq_len, max_images=most, mask="documents"), 4, sub_images=sub_images)
    assert found == counted if not words else found <= counted


def test_a_fine_tuning_on_sub_images_counts_all_that_the_encoder_gets() -> None:
    specs = plan(["mm1/main"], [*QUIET, "finetune=${tuning.sub_images}"])
    (config,) = [spec.config for spec in specs if spec.program == "finetune"]
    assert isinstance(config, FinetuneConfig)
    optim = config.finetune.optim  # rows of 40 positions hold two images of five times four tokens
    full = cost.forward_flops(config, tokens=40, keys=20.5, logits=0, images=10)
    assert cost.finetune(config).flops == cost.TRAIN * optim.steps * optim.batch_size * full


@pytest.mark.parametrize(
    ("arm", "advice"),
    [
        (
            "m30b",
            "6 of 6 runs DO NOT FIT into 80 GB: lower micro_batch_size, or an evaluation's batch_size, and/or shard",
        ),
        ("m7b_experts", "need larger GPUs: what each has whole"),
    ],
)
def test_the_advice_for_runs_that_do_not_fit_can_be_followed(arm: str, advice: str, retrace: Run) -> None:
    shown = retrace("plan", f"mm1/recipes/{arm}", "scale=paper", "hardware=gpu8").stdout
    assert advice in shown
    assert "activation_checkpointing=true" not in shown  # gpu8 has it


@pytest.mark.parametrize("shots", ["[0,4]", "[0]", "[4]"])
@pytest.mark.parametrize("tuned", [False, True])
def test_a_procedural_evaluation_is_counted_with_all_its_tasks(shots: str, tuned: bool) -> None:
    specs = plan(["mm1/main"], ["scale=laptop", f"eval.shots={shots}", *["finetune=${tuning.same}"] * tuned, "seed=0"])
    config = specs[-1].config
    assert isinstance(config, EvaluateConfig)
    tasks = world_tasks(config.data, image_size=24, count=1, seed=0, shots=config.eval.shots)  # type: ignore[arg-type]
    expected = 0
    for task in (task for task in tasks if tuned or task.group != "sft"):
        for number in task.shots:
            seen = cost.prompt_length(config, number) if task.group != "textcore" else cost.EPISODE_TEXT
            expected += config.eval.num_episodes * seen
    assert cost.evaluate(config).tokens == expected


@pytest.mark.parametrize(("key", "side"), [("image_size", 120), ("tuning.interpolated.image_size", 192)])
def test_procedural_images_beyond_what_is_drawn_are_refused_before_anything_runs(key: str, side: int) -> None:
    asked = ["scale=laptop", "finetune=${tuning.interpolated}", f"{key}={side}"]
    with pytest.raises(ValueError, match=rf"image_size={side}: procedural images have 96 pixels a side"):
        plan(["mm1/main"], asked)


def test_heads_and_vocabularies_that_are_counted_otherwise_are_refused() -> None:
    shape = {"hidden_size": 64, "num_layers": 2, "num_heads": 4, "num_kv_heads": 4, "intermediate_size": 96}
    own = PretrainedDecoder(kind="pretrained", name="it", revision="main", shape=shape, vocab_size=320)  # type: ignore[arg-type]
    sizes = {"hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 96}
    own.check_sizes(LlamaConfig(**sizes, vocab_size=320))
    with pytest.raises(ValueError, match=r"decoder.vocab_size=320: it has 300"):
        own.check_sizes(LlamaConfig(**sizes, vocab_size=300))
    with pytest.raises(ValueError, match=r"decoder.shape.num_kv_heads=4: it has no such size: name a model of another"):
        own.check_sizes(BertConfig(**sizes, vocab_size=320))
    with pytest.raises(ValueError, match=r"it: 4 heads of 32 in a hidden size of 64"):
        own.check_sizes(Qwen3Config(**sizes, num_key_value_heads=4, vocab_size=320, head_dim=32))


def test_a_tokenizer_smaller_than_a_padded_embedding_is_taken_and_a_larger_one_is_not(tmp_path: Path) -> None:
    train_bpe(["a red ball"] * 9, vocab_size=262, key="x", bos_token="<s>", eos_token="</s>").save_pretrained(tmp_path)
    shape = {"hidden_size": 64, "num_layers": 2, "num_heads": 4, "num_kv_heads": 4, "intermediate_size": 96}
    data, ctx = cast(Corpora, None), cast(Context, SimpleNamespace(parents={}))

    def load(rows: int) -> int:
        options = {"kind": "pretrained", "name": str(tmp_path), "revision": "main", "shape": shape, "vocab_size": rows}
        return len(load_tokenizer(data, PretrainedDecoder.model_validate(options), ctx))

    assert load(262) == load(320) == 263  # with the image token
    with pytest.raises(ValueError, match=r"decoder.vocab_size=261: the tokenizer of .* has 262 tokens"):
        load(261)

"""DeepScaleLM's data: sentences, corpora, masks, questions, images and sound; and what a wrong config is told."""

from __future__ import annotations

import json
import random
from pathlib import Path

import pytest
import torch

from retrace.core.compose import compose
from retrace.core.config import validate
from retrace.core.data import generator
from retrace.core.plan import plan
from retrace.core.store import RunDir
from retrace.core.texts import LocalText
from retrace.papers.deepscalelm import corpora
from retrace.papers.deepscalelm.answering import generated, padded
from retrace.papers.deepscalelm.config import (
    BOS,
    MASK,
    NUM_SPECIAL,
    DeepScaleLMConfig,
    ImageInput,
    PrepareConfig,
    ProceduralText,
    RealText,
    SpectrogramInput,
    ZipfInput,
)
from retrace.papers.deepscalelm.inputs import correlated, features, uncentred_correlation, zipf_tokens
from retrace.papers.deepscalelm.objective import examples, mask
from retrace.papers.deepscalelm.sentences import COMMON, NAME, OBJECT, TEMPLATE, VERB, World, zipf_weights

torch.set_num_threads(1)
TEXT = ProceduralText(
    kind="procedural", world_seed=3, num_topics=4, num_names=8, num_verbs=4, num_objects=4, num_common=4
)


def composed(*overrides: str, name: str = "main") -> DeepScaleLMConfig:
    return validate(DeepScaleLMConfig, compose("deepscalelm", ["scale=smoke", *overrides], name=name), source="test")


SHAPE = composed().model


def test_every_slot_of_a_sentence_holds_words_of_its_kind_and_topic() -> None:
    world = World(TEXT)
    topics, names = torch.arange(4).repeat(8), torch.arange(8).repeat_interleave(4)
    ids = world.sentences(topics, names, length=len(TEMPLATE), rng=generator(0, "test"))
    for slot, column in zip(TEMPLATE, ids.T, strict=True):
        if slot == NAME:
            assert torch.equal(column, world.names_N[names])
        elif slot == VERB:  # agrees with its subject
            assert torch.equal(column, world.verbs_KF[topics, names % 4])
        elif slot == OBJECT:
            assert bool((world.objects_KO[topics] == column[:, None]).any(1).all())
        else:
            assert slot == COMMON
            assert bool(torch.isin(column, world.common_C).all())
    assert int(ids.min()) >= NUM_SPECIAL


def test_entropies_are_those_of_the_texts() -> None:
    world = World(TEXT)
    ids = world.texts(4000, length=16, seed=5, purpose="train")
    counted = torch.bincount(ids.flatten(), minlength=TEXT.vocab_size).double() / ids.numel()
    assert float(torch.special.entr(counted).sum()) == pytest.approx(world.entropies()["unigram"], rel=5e-3)
    assert float((counted - world.probabilities()).abs().max()) < 5e-3
    assert float(world.probabilities().sum()) == pytest.approx(1.0)
    inside = [(ids[:, i], slot) for i, slot in enumerate(TEMPLATE) if slot in (OBJECT, COMMON)]
    assert world.entropies()["floor"] == pytest.approx(
        len(inside) / len(TEMPLATE) * float(torch.special.entr(zipf_weights(4)).sum())
    )


def test_a_seed_has_training_texts_of_its_own_and_all_share_the_heldout_ones() -> None:
    def of(split: corpora.Split, seed: int) -> torch.Tensor:
        return corpora.windows(TEXT, split, count=6, length=16, seed=seed, parents={})

    assert torch.equal(of("train", 1), of("train", 1))
    assert not torch.equal(of("train", 1), of("train", 2))
    assert torch.equal(of("test", 1), of("test", 2))
    assert not torch.equal(of("test", 1), of("valid", 1))


def test_rows_are_every_window_once_an_epoch_in_an_order_of_the_seed() -> None:
    ids = torch.arange(10)[:, None].expand(-1, 4).int()
    rows = corpora.Rows(ids, seed=0)
    first = rows(range(10))["input_ids"][:, 0]
    assert sorted(first.tolist()) == list(range(10))
    assert not torch.equal(first, corpora.Rows(ids, seed=1)(range(10))["input_ids"][:, 0])
    assert torch.equal(rows(range(3, 6))["input_ids"][:, 0], first[3:6])


def test_masking_hides_the_share_that_is_asked_and_labels_nothing_else() -> None:
    ids = torch.randint(NUM_SPECIAL, 47, (400, 64), generator=generator(0, "ids"))
    example = mask(ids, vocab_size=47, share=0.25, noise=generator(0, "noise"))
    chosen = example.labels_BT != -100
    assert float(chosen.float().mean()) == pytest.approx(0.25, abs=0.01)
    assert torch.equal(example.labels_BT[chosen], ids[chosen])
    assert torch.equal(example.input_ids_BT[~chosen], ids[~chosen])
    read = example.input_ids_BT[chosen]
    assert float((read == MASK).float().mean()) == pytest.approx(0.8, abs=0.02)
    assert float((read == ids[chosen]).float().mean()) == pytest.approx(0.1 + 0.1 / 44, abs=0.02)


@pytest.mark.parametrize("kind", ["decoder", "encoder_decoder"])
def test_causal_kinds_predict_what_they_have_not_read(kind: str) -> None:
    ids = torch.arange(100, 116).view(1, 16)
    shape = SHAPE.model_copy(update={"kind": kind})
    example = examples(ids, shape, mask_share=0.15, noise=generator(0, "noise"))
    if kind == "decoder":
        assert torch.equal(example.labels_BT, example.input_ids_BT + 1)
        return
    assert example.decoder_input_ids_BT is not None
    assert torch.equal(example.input_ids_BT, ids[:, :8])
    assert torch.equal(example.labels_BT, ids[:, 8:])
    assert int(example.decoder_input_ids_BT[0, 0]) == BOS
    assert torch.equal(example.decoder_input_ids_BT[:, 1:], ids[:, 8:-1])


def test_real_text_becomes_windows_of_each_split_with_a_tokenizer_of_its_own(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("RETRACE_DATA", str(tmp_path))
    rng = random.Random(0)
    for split in ("train", "valid", "test"):
        texts = [" ".join(rng.choices(["one", "two", "three", split], k=60)) for _ in range(12)]
        (tmp_path / f"{split}.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    sources = {s: (LocalText(kind="local", path=f"{s}.jsonl"),) for s in ("train", "valid", "test")}
    corpus = RealText(kind="text", num_bpe_documents=12, **sources)  # type: ignore[arg-type]
    settings = {"corpus": corpus, "vocab_size": 264, "seq_len": 16, "num_heldout": 4, "files": {}}
    config = PrepareConfig(num_windows=20, **settings)  # type: ignore[arg-type]
    run = RunDir(tmp_path / "run")
    with run.folder(corpora.FOLDER) as folder:
        corpora.prepare(config, folder)
    tokenizer = corpora.load_tokenizer({"text": run})
    for split, count in (("train", 20), ("valid", 4), ("test", 4)):
        ids = corpora.windows(corpus, split, count=count, length=16, seed=9, parents={"text": run})  # type: ignore[arg-type]
        others = {"train", "valid", "test"} - {split}
        assert not any(other in tokenizer.decode(ids.flatten().tolist()) for other in others)
    with pytest.raises(ValueError, match="9000 windows of the train text are wanted, but it gives"):
        corpora.prepare(PrepareConfig(num_windows=9000, **settings), tmp_path)  # type: ignore[arg-type]


def test_questions_have_one_right_choice_of_the_topic_that_the_text_does_not_hold() -> None:
    world = World(TEXT.model_copy(update={"num_objects": 8}))
    found = generated(world, 200, length=16, split="test")
    topic_of = {int(word): topic for topic, words in enumerate(world.objects_KO) for word in words}
    for ids_CT, answer in zip(found.ids_QCT, found.answers_Q.tolist(), strict=True):
        topics = [topic_of[int(choice)] for choice in ids_CT[:, -1]]
        text = ids_CT[0, :-2]
        assert len(set(topics)) == 4
        assert {topic_of[int(word)] for word in text if int(word) in topic_of} == {topics[answer]}
        assert int(ids_CT[answer, -1]) not in text.tolist()
    counts = torch.bincount(found.answers_Q, minlength=4)
    assert int(counts.min()) > 25  # no place is favoured


def test_padding_is_masked() -> None:
    found = padded([[[5, 6], [7]], [[8], [9, 10]]], [0, 1])
    assert found.mask_QCT.tolist() == [[[1, 1], [1, 0]], [[1, 0], [1, 1]]]
    assert found.ids_QCT[1, 1].tolist() == [9, 10]


@pytest.mark.parametrize(
    ("given", "low", "high"),
    [
        (ImageInput(kind="images", patch_size=4), 0.0, 0.6),
        (SpectrogramInput(kind="spectrograms", num_bands=20, frames_per_step=2), 0.4, 1.0),
    ],
)
def test_features_are_standardised_and_their_correlation_is_that_of_pairs(
    given: ImageInput | SpectrogramInput, low: float, high: float
) -> None:
    found = features(given, num_sequences=5, length=16, seed=1)
    values = found.values_BTP
    assert values.shape[:2] == (5, 16)
    assert float(values.square().mean()) == pytest.approx(1.0, rel=1e-3)
    products = torch.einsum("bip,bjp->bij", values, values)
    pairs = ~torch.eye(16, dtype=torch.bool)
    square = products.diagonal(dim1=1, dim2=2).mean()
    assert found.corr == pytest.approx(float(products[:, pairs].mean() / square), rel=1e-4)
    assert low < found.corr < high


def test_gaussian_input_has_the_correlation_that_is_asked() -> None:
    shape = SHAPE.model_copy(update={"hidden_size": 512, "seq_len": 64})
    x = correlated(0.3, shape=shape, num_sequences=16, seed=0)
    assert float(x.square().mean()) == pytest.approx(1.0, abs=0.03)
    assert uncentred_correlation(x) == pytest.approx(0.3, abs=0.02)


def test_zipf_tokens_collide_as_often_as_zipf_says() -> None:
    shape = SHAPE.model_copy(update={"vocab_size": 203, "seq_len": 400})
    ids = zipf_tokens(ZipfInput(kind="zipf", exponent=1.0), shape, num_sequences=8, seed=0)
    assert int(ids.min()) >= NUM_SPECIAL
    same = (ids[:, :, None] == ids[:, None, :]).double().mean(dim=(1, 2)).mean()
    expected = float(zipf_weights(200).square().sum())
    assert float(same) == pytest.approx(expected + (1 - expected) / 400, rel=0.1)


@pytest.mark.parametrize(
    ("overrides", "name", "message"),
    [
        (["method.name=dlsm"], "main", "no such method; did you mean 'dslm'"),
        (["method.options={q: 1.0}"], "main", "no option 'q'"),
        (["method.options={k: 40.0}"], "main", "choose a smaller k, more layers"),
        (["model.vocab_size=50"], "main", "model.vocab_size=50: the procedural corpus has 47 words"),
        (["model.num_heads=3"], "main", "num_heads=3 does not divide hidden_size=16"),
        (["training.learning_rates=[1.0e-3,1.0e-3]"], "main", "expected rising positive numbers"),
        (["input=zipf"], "moments", "method.corr0=measured: of tokens by Zipf's law"),
        (["input=images", "model.seq_len=15"], "moments", "images have a square number of patches"),
        (["model.kind=encoder_decoder"], "moments", "an encoder-decoder reads tokens; use kind zipf"),
        (["method.corr0=measured"], "main", "method.corr0=measured: there is nothing to measure in text"),
        (["transfer.questions.kind=commonsense_qa"], "transfer", "procedural goes with procedural"),
        (["model.kind=encoder_decoder"], "transfer", "choose encoder or decoder"),
    ],
)
def test_a_wrong_config_is_told_the_key_and_what_to_do(overrides: list[str], name: str, message: str) -> None:
    with pytest.raises(ValueError) as error:
        composed(*overrides, name=name)
    assert message in str(error.value)
    assert "\n" not in str(error.value)


def test_commonsense_qa_and_texts_must_be_there_before_a_run_starts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("RETRACE_DATA", raising=False)
    with pytest.raises(ValueError, match="RETRACE_DATA is not set"):
        plan(["deepscalelm/trainability"], ["scale=gpu", "seed=0"], check=True)
    assert plan(["deepscalelm/transfer"], ["scale=gpu", "seed=0"])

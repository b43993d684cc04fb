"""Few-shot evaluation: prompts as published, scores as published, and toy models that read the truth or do not."""

from __future__ import annotations

import dataclasses
import itertools
import json
import weakref
from collections.abc import Collection, Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from torch import Tensor

from retrace.core.compose import compose
from retrace.core.config import CONFIGS
from retrace.core.evaluate import evaluate_task
from retrace.core.requests import Sampling
from retrace.core.tasks import list_tasks, validate_tasks
from retrace.papers.mm1.captions import cider, normalize, tokenize, vqa_accuracy
from retrace.papers.mm1.choices import ImageTask
from retrace.papers.mm1.config import Evaluation
from retrace.papers.mm1.corpora import LocalShards, check
from retrace.papers.mm1.documents import build_tokenizer
from retrace.papers.mm1.evaluation import image_task
from retrace.papers.mm1.fewshot import (
    CAPTION,
    VQA,
    Form,
    Item,
    Task,
    answer,
    evaluate,
    group_means,
    read_items,
    sampled,
    score_captions,
    with_demonstrations,
)
from retrace.papers.mm1.packing import Picture
from retrace.papers.mm1.rows import Piece
from retrace.papers.mm1.textcore import TextScorer
from retrace.papers.mm1.world import ATTRIBUTES, Scene, WorldConfig, colors_of, successors, vocabulary
from retrace.papers.mm1.worldtasks import world_tasks

torch.set_num_threads(1)
TOKENIZER = build_tokenizer()
WORLD = WorldConfig(kind="procedural", world_seed=0, held_out_shapes=2, noisy_share=0.3, min_images=3, max_images=6)
TASKS = CONFIGS / "mm1" / "tasks"
Prompt = Sequence[Piece]
ANY: dict[str, Any] = {"readable": lambda item: item is not None}


class Toy:
    """Answers by a function of the prompt in words, where an image is the scene that it shows."""

    def __init__(self) -> None:
        self.seen: dict[bytes, Scene] = {}
        self.prompts: list[list[str | Scene]] = []

    def watch(self, task: Task) -> Task:
        """The task, with its images remembered."""

        def load(pictures: Sequence[Picture]) -> list[Tensor | None]:
            images = task.load(pictures)
            self.seen |= {i.numpy().tobytes(): p.what for i, p in zip(images, pictures, strict=True) if i is not None}
            return images

        return dataclasses.replace(task, load=load)

    def generate(self, prompts: Sequence[Prompt], *, max_new_tokens: int, stop: Collection[int]) -> list[list[int]]:
        found = []
        for prompt in prompts:
            parts = [
                TOKENIZER.decode(p.token_ids) if p.image is None else self.seen[p.image.numpy().tobytes()]
                for p in prompt
            ]
            self.prompts.append(parts)
            ids = TOKENIZER.encode(self.answer(parts), add_special_tokens=False)
            end = next((i for i, token in enumerate(ids) if token in stop), len(ids))
            found.append(ids[: min(end, max_new_tokens)])
        return found

    def log_likelihoods(
        self, prompts: Sequence[Prompt], candidates: Sequence[Sequence[Sequence[int]]]
    ) -> list[list[float]]:
        raise NotImplementedError

    def answer(self, parts: Sequence[str | Scene]) -> str:
        return "red" if parts else ""


class Truthful(Toy):
    """Reads images without error and takes the first rule that all demonstrations obey."""

    def answer(self, parts: Sequence[str | Scene]) -> str:
        query = [part for part in parts if isinstance(part, Scene)][-1:]
        if not query:
            return self.text(str(parts[-1]))
        if str(parts[-1]).startswith("question"):
            kinds = {"color": query[0].color, "shape": query[0].shape, "first": query[0].digits[0]}
            return next((said for word, said in kinds.items() if word in str(parts[-1])), query[0].digits[3])
        if str(parts[-1]).endswith("a photo of"):
            return f"{query[0].caption} \n red"
        turns = [
            (scene, str(said).split(" ")[0])
            for scene, said in itertools.pairwise(parts)
            if isinstance(scene, Scene) and isinstance(said, str)
        ]
        named = {scene.shape: said for scene, said in turns}
        rules = [lambda s: s.color, lambda s: s.shape, *(lambda s, c=c: s.digits[c] for c in range(4))]
        rules.append(lambda s: named[s.shape])
        return next(rule(query[0]) for rule in rules if all(rule(scene) == said for scene, said in turns))

    def text(self, said: str) -> str:
        words = said.removeprefix("<bos> ").split(" ")
        if words[-1] == "?":
            return words[words.index(words[-2]) + 2]
        if words[-1] == "=":
            return " ".join(str(sum(int(word) for word in words if word.isdigit())))
        following = successors(0)[words[-1]]
        return f"{following} {successors(0)[following]}"  # a chain goes on


def world(toy: Toy, count: int = 40, **options: Any) -> dict[str, Task]:
    return {t.name: toy.watch(t) for t in world_tasks(WORLD, image_size=8, count=count, seed=0, **options)}


def run(task: Task, toy: Toy, shots: int) -> Any:
    return evaluate(task, toy, shots=shots, tokenizer=TOKENIZER, batch_size=16)


def test_a_model_that_reads_the_images_gets_every_task_right_and_a_blind_one_does_not() -> None:
    seeing, blind = Truthful(), Toy()
    for toy in (seeing, blind):
        tasks = world(toy)
        assert list(tasks)[:8] == ["caption", "caption_unseen", *ATTRIBUTES]
        scores = [run(task, toy, shots) for task in tasks.values() for shots in task.shots]
        found = group_means(scores)
        groups = ("mmcore_0", "mmcore_4", "mmcore_8", "unseen_0", "textcore", "sft_0")
        assert set(found) == {f"{group}/mean" for group in groups}
        if toy is seeing:
            exact = [s for s in scores if s.task != "corner"]
            assert {s.main for s in exact} == {1.0}
            assert found["mmcore_0/mean"] == found["textcore/mean"] == found["sft_0/mean"] == 1
            assert found["mmcore_8/mean"] > 0.95
        else:
            assert max(found.values()) < 0.2


def test_only_the_corner_needs_several_demonstrations() -> None:
    toy = Truthful()
    corner = world(toy, count=200, shots=(1, 8))["corner"]
    few, many = (run(corner, toy, shots).main for shots in (1, 8))
    assert few == pytest.approx(0.734, abs=0.12)  # of the first corner that agrees, over all digits and four errors
    assert many > 0.97


def test_only_the_unseen_captions_ask_for_pairs_that_no_training_document_shows() -> None:
    unseen = colors_of(WORLD.world_seed, WORLD.held_out_shapes, unseen=True)
    for task in world_tasks(WORLD, image_size=8, count=30, seed=0):
        if task.group in ("mmcore", "unseen"):
            for episode in task.episodes(4):
                *shown, asked = [item.picture.what for item in (*episode.demonstrations, episode.query) if item.picture]
                assert (asked.color in unseen[asked.shape]) == (task.name == "caption_unseen")
                assert not any(scene.color in unseen[scene.shape] for scene in shown)
            assert task.episodes(4) == task.episodes(4)


def test_color_shape_and_digits_of_a_caption_are_scored_apart() -> None:
    class ColorBlind(Truthful):
        def answer(self, parts: Sequence[str | Scene]) -> str:
            words = super().answer(parts).split(" ")
            return " ".join(["cyan", words[1], words[2], words[3]])

    toy = ColorBlind()
    found = run(world(toy)["caption"], toy, 0).metrics
    assert found["caption_0/shape"] == 1
    assert found["caption_0/digits"] == 0.5
    assert found["caption_0/color"] < 0.4
    assert found["caption_0/all"] == 0
    assert found["caption_0/acc"] == pytest.approx((found["caption_0/color"] + 3) / 6)


def test_world_prompts_look_like_the_interleaved_documents() -> None:
    toy = Truthful()
    run(world(toy, count=2)["color"], toy, 4)
    prompt = toy.prompts[0]
    scenes = [part for part in prompt if isinstance(part, Scene)]
    assert prompt == ["<bos>", *(x for s in scenes[:-1] for x in (s, f"{s.color} \n")), scenes[-1]]


@pytest.mark.parametrize(("form", "shown", "asked"), [
    (CAPTION, "A photo of one dog.\n", "A photo of"),
    (VQA, "Question: What is it? Short answer: one dog.\n", "Question: What is it? Short answer:"),
])  # fmt: skip
def test_prompts_have_the_published_forms(form: Form, shown: str, asked: str) -> None:
    item = Item(Picture("x"), ("one dog.", "a dog"), "What is it?")
    assert form.text(item, answered=True) == shown
    assert form.text(item, answered=False) == asked


@pytest.mark.parametrize(("form", "said", "kept"), [
    (CAPTION, "a dog, on a mat. \nA photo of", "a dog, on a mat."),
    (VQA, "dog, cat", "dog"),
    (VQA, "dog. Or", "dog"),
    (VQA, "\ndog", ""),
])  # fmt: skip
def test_answers_end_at_the_published_stops(form: Form, said: str, kept: str) -> None:
    class Fixed:
        def decode(self, ids: Sequence[int], *, skip_special_tokens: bool) -> str:
            assert skip_special_tokens
            return "".join(map(chr, ids))

        def encode(self, text: str, *, add_special_tokens: bool) -> list[int]:
            return [*map(ord, text)] if not add_special_tokens else []

        eos_token_id = 0

    class Speaking(Toy):
        def generate(self, prompts: Sequence[Prompt], *, max_new_tokens: int, stop: Collection[int]) -> list[list[int]]:
            assert {0, ord("\n")} <= set(stop)
            assert max_new_tokens > 0
            return [[*map(ord, said)] for _ in prompts]

    assert answer(form, Speaking(), [[Piece((1,))]], tokenizer=Fixed()) == [kept]  # type: ignore[arg-type]


def test_demonstrations_come_from_the_training_split_and_grow_with_the_shots() -> None:
    train = [Item(None, (f"a{i}",)) for i in range(20)]
    test = [Item(None, (f"b{i}",)) for i in range(10)]
    asked = [with_demonstrations(train, test, shots=shots, most=8, seed=1, **ANY) for shots in (0, 4, 8)]
    none, four, eight = map(list, asked)
    for few, many in zip(four, eight, strict=True):
        assert many.demonstrations[:4] == few.demonstrations
        assert len(set(many.demonstrations)) == 8
        assert set(many.demonstrations) <= set(train)
    assert len({episode.demonstrations for episode in four}) == 10
    assert [episode.query for episode in four] == test
    assert [(episode.demonstrations, episode.query) for episode in none] == [((), item) for item in test]
    assert list(with_demonstrations(train, test, shots=4, most=8, seed=2, **ANY)) != four
    with pytest.raises(ValueError, match="21 shots are asked for, and the training split has 20 items"):
        next(with_demonstrations(train, test, shots=21, most=21, seed=1, **ANY))


def test_an_unreadable_demonstration_gives_its_place_to_another_and_moves_no_other() -> None:
    train = [Item(None, (f"a{i}",)) for i in range(12)]
    test = [Item(None, (f"b{i}",)) for i in range(30)]
    tried: list[Item] = []

    def readable(item: Item) -> bool:
        tried.append(item)
        return item not in train[:3]

    def asked(shots: int, **how: Any) -> list[tuple[Item, ...]]:
        return [e.demonstrations for e in with_demonstrations(train, test, shots=shots, most=8, seed=1, **how)]

    four, eight, whole = asked(4, readable=readable), asked(8, readable=readable), asked(8, **ANY)
    assert len(tried) <= 2 * len(train)
    assert four == [shown[:4] for shown in eight]
    for shown, before in zip(eight, whole, strict=True):
        assert len(set(shown)) == 8
        assert not set(shown) & set(train[:3])
        assert all(own == other for own, other in zip(shown, before, strict=True) if other not in train[:3])
    with pytest.raises(ValueError, match="8 shots are asked for, and fewer of the training split's 12 items can be re"):
        asked(8, readable=lambda item: item in train[:7])


def test_demonstrations_of_a_large_split_are_drawn_without_shuffling_it() -> None:
    class Large(list[Item]):
        def __len__(self) -> int:
            return 10**9

        def __getitem__(self, index: Any) -> Any:
            return Item(None, (str(index),))

    episodes = with_demonstrations(Large(), (Item(None, ("b",)) for _ in range(50)), shots=4, most=8, seed=1, **ANY)
    assert len({episode.demonstrations for episode in episodes}) == 50


def test_items_are_sampled_alike_in_every_order_of_asking_and_held_no_longer_than_needed() -> None:
    alive: list[int] = []

    def items() -> Iterator[Item]:
        for number in range(1000):
            found = Item(None, (str(number),))
            weakref.finalize(found, alive.remove, number)
            alive.append(number)
            assert len(alive) <= 22
            yield found

    chosen = [item.answers for item in sampled(items(), 20, key="a")]
    assert chosen == [item.answers for item in sampled(items(), 20, key="a")]
    assert len(set(chosen)) == 20 != sum(int(number) < 20 for (number,) in chosen)
    assert sum(1 for _ in sampled(items(), None, key="a")) == 1000


def test_questions_on_files_are_asked_with_their_photos_and_broken_photos_skip(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("RETRACE_DATA", str(tmp_path))
    rows = []
    for i in range(6):
        Image.new("RGB", (9, 9), (40 * i, 0, 0)).save(tmp_path / f"{i}.png")
        rows.append({"image": f"{i}.png", "question": "what color ?", "text": ["red"] * 9 + ["black"]})
    (tmp_path / "5.png").write_text("no image")
    (tmp_path / "a.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    config = LocalShards(kind="shards", pattern="a.jsonl", document="instruction", max_bad_share=0.5)
    settings = ImageTask(form="vqa", train=config, test=config, num_train=2, limit=None)
    asked = Evaluation(shots=(0, 1), num_episodes=2, batch_size=3, text_tasks=(), seed=0, precision="fp32")

    class Red(Toy):
        def generate(self, prompts: Sequence[Prompt], *, max_new_tokens: int, stop: Collection[int]) -> list[list[int]]:
            assert max_new_tokens > 0
            assert stop
            return [[vocabulary()["red"]] for _ in prompts]

    task = image_task("colors", settings, asked, TOKENIZER, image_size=4)
    assert {d.picture for e in task.episodes(1) for d in e.demonstrations} == {
        i.picture for i in itertools.islice(read_items(config), 2)
    }
    found = run(task, Red(), 1)
    assert found.num_skipped == 1
    assert len(found.items) == 5
    assert found.metrics == {"colors_1/vqa": 100.0}
    with pytest.raises(ValueError, match="document=instruction with form=caption: expected caption"):
        ImageTask(form="caption", train=config, test=config, limit=None)


class Silent(Toy):
    def generate(self, prompts: Sequence[Prompt], *, max_new_tokens: int, stop: Collection[int]) -> list[list[int]]:
        self.prompts += [[TOKENIZER.decode(p.token_ids) for p in prompt if p.image is None] for prompt in prompts]
        return [[] for _ in prompts] if max_new_tokens and stop else []


def questions(root: Path, rows: list[dict[str, Any]], name: str = "a.jsonl") -> LocalShards:
    """Questions on photos 0.png, 1.png, ..., of which the first can't be read."""
    for i, row in enumerate(rows):
        Image.new("RGB", (9, 9), (40 * i, 0, 0)).save(root / f"{i}.png")
        row |= {"image": f"{i}.png"}
    (root / "0.png").write_text("no image")
    (root / name).write_text("".join(json.dumps({"question": "what color ?", **row}) + "\n" for row in rows))
    return LocalShards(kind="shards", pattern=name, document="instruction", max_bad_share=0.5)


def asked_of(config: LocalShards, shots: tuple[int, ...]) -> Task:
    settings = ImageTask(form="vqa", train=config, test=config, limit=None)
    asked = Evaluation(shots=shots, num_episodes=2, batch_size=3, text_tasks=(), seed=0, precision="fp32")
    return image_task("colors", settings, asked, TOKENIZER, image_size=4)


def test_every_number_of_shots_asks_the_same_items(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RETRACE_DATA", str(tmp_path))
    task = asked_of(questions(tmp_path, [{"text": f"red {i}"} for i in range(9)]), (0, 2, 4))
    found = [run(task, Silent(), shots) for shots in task.shots]
    assert [[item["wanted"] for item in scores.items] for scores in found] == [[f"red {i}" for i in range(1, 9)]] * 3
    assert {scores.num_skipped for scores in found} == {1}
    assert [scores.num_asked for scores in found] == [8, 8, 8]
    one = len(
        TOKENIZER.encode(VQA.text(Item(None, ("red",), "what color ?"), answered=False), add_special_tokens=False)
    )
    assert found[0].num_text == 8 * (1 + one)  # behind the beginning of the document


def test_an_item_without_text_is_not_asked_and_blank_answers_do_not_count(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("RETRACE_DATA", str(tmp_path))
    texts = ["black", None, "  ", [], [None, " "], [None, "", "red", "blue"], "red"]
    config = questions(tmp_path, [*({"text": text} for text in texts), {"text": "red", "question": None}])
    assert [item.answers for item in read_items(config)] == [
        ("black",), (), (), (), (), ("red", "blue"), ("red",), ()
    ]  # fmt: skip
    task, toy = asked_of(config, (0, 2)), Silent()
    for shots in task.shots:
        found = run(task, toy, shots)
        assert [item["wanted"] for item in found.items] == ["red", "red"]
        assert (found.num_without_text, found.num_skipped, found.num_asked) == (5, 1, 2)
    assert not any("None" in str(part) for prompt in toy.prompts for part in prompt)
    with pytest.raises(ValueError, match="colors: no episode of 0 shots .* 1 have unreadable pictures, and 0 no text"):
        run(asked_of(questions(tmp_path, [{"text": "red"}]), (0,)), toy, 0)


@pytest.mark.parametrize("text", [[{"answer": "red"}], {"answer": "red"}, 3])
def test_an_answer_that_is_no_text_is_refused_by_its_row_and_before_a_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, text: Any
) -> None:
    monkeypatch.setenv("RETRACE_DATA", str(tmp_path))
    config = questions(tmp_path, [{"text": "red"}, {"text": text}])
    with pytest.raises(ValueError, match=r"a.jsonl: row 1: text=.*3?.*: expected a text or a list of texts: rewrite"):
        list(read_items(config))
    with pytest.raises(ValueError, match="expected a text or a list of texts"):
        check(questions(tmp_path, [{"text": text}]))


def test_what_a_question_says_of_special_tokens_is_none(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RETRACE_DATA", str(tmp_path))
    said = "what <image> color <eos> <pad> <bos> ?"
    task = asked_of(questions(tmp_path, [{"text": "red", "question": said} for _ in range(2)]), (0,))
    toy = Silent()
    run(task, toy, 0)
    assert toy.prompts[0][0] == "<bos>"
    assert "what color ?" in str(toy.prompts[0][1])
    assert not any(token in str(toy.prompts[0][1]) for token in ("<image>", "<eos>", "<pad>", "<bos>"))


def test_cider_is_what_the_official_scorer_gives() -> None:
    """Numbers of pycocoevalcap 1.2 on these words; and one by hand.

    By hand: two images share no word, so every n-gram counts log 2. A caption like its reference of two words agrees
    in both words and in the pair, and has nothing of lengths 3 and 4: 10 * (1 + 1 + 0 + 0) / 4 = 5.
    """
    captions = ["a man on a red horse", "two dogs near the tree", "a small house"]
    references = [
        ["a man riding a red horse", "the man rides on a big horse"],
        ["two dogs near a tree"],
        ["a big house", "small house near the tree"],
    ]
    assert cider(captions, references) == pytest.approx([313.7867220725119, 451.16148749497864, 232.4756405860756])
    assert cider(["red ring", "red"], [["red ring"], ["blue bar"]]) == pytest.approx([500, 0])
    assert cider(["a red ring", ""], [["A red ring!"], ["blue bar"]])[0] == pytest.approx(750)
    with pytest.raises(ValueError, match="CIDEr of 1 captions and 1 sets of references: expected as many, two or more"):
        cider(["a"], [["a"]])
    items = [Item(None, tuple(own)) for own in references]
    assert sum(score_captions(captions, items)["cider"]) / 3 == pytest.approx(332.4746, abs=1e-3)


def test_captions_are_cut_into_words_as_the_treebank_does() -> None:
    assert tokenize("A man's T-shirt, isn't it?") == ["a", "man", "'s", "t-shirt", "is", "n't", "it"]


@pytest.mark.parametrize(("agreeing", "score"), [(0, 0), (1, 30), (2, 60), (3, 90), (4, 100), (10, 100)])
def test_vqa_accuracy_is_the_mean_over_nine_annotators(agreeing: int, score: float) -> None:
    """One agreeing of ten: in nine of ten subsets it is there and gives 1/3, in one it is left out: 0.9 / 3."""
    assert vqa_accuracy("yes", ["yes"] * agreeing + ["no"] * (10 - agreeing)) == pytest.approx(score)


@pytest.mark.parametrize(("given", "normal"), [
    ("The Two  dogs.", "2 dogs"), ("1,000", "1000"), ("3.5 m.", "3.5 m"), ("dont", "don't"), ("don't", "don't"),
    ("red/blue", "red blue"), ("its", "its"), ("Whats up?", "what's up"), ("none", "0"), ("10:30", "10:30"),
    (".5", ".5"), ("about -.5 m.", "about .5 m"), ("wait...5", "wait5"), ("no.5", "no5"), ("...", ""),
])  # fmt: skip
def test_answers_are_normalised_before_they_are_compared(given: str, normal: str) -> None:
    assert normalize(given) == normal
    assert vqa_accuracy(given, [normal]) == 100


def test_the_text_tasks_of_the_paper_are_lm_evals_and_say_where_data_may_lie(tmp_path: Path) -> None:
    asked = compose("mm1", ["scale=paper"])["eval"]["text_tasks"]
    assert list_tasks(TASKS) == sorted(asked)
    validate_tasks(asked, tasks_dir=TASKS, data_dir=None, generated=[])
    with pytest.raises(ValueError, match=r"sciq: .*sciq/test.jsonl is missing: put it there"):
        validate_tasks(["sciq"], tasks_dir=TASKS, data_dir=tmp_path, generated=[])


def test_a_multimodal_model_answers_lm_eval(tmp_path: Path) -> None:
    """A toy that likes short words less than "red": the likeliest option, the last word, and a generated answer."""

    class LikesRed(Toy):
        def generate(self, prompts: Sequence[Prompt], *, max_new_tokens: int, stop: Collection[int]) -> list[list[int]]:
            assert vocabulary()["<eos>"] in stop or not stop
            return [[vocabulary()["red"]] * max_new_tokens for _ in prompts]

        def log_likelihoods(
            self, prompts: Sequence[Prompt], candidates: Sequence[Sequence[Sequence[int]]]
        ) -> list[list[float]]:
            assert len(prompts) == len(candidates)
            red = vocabulary()["red"]
            return [[-1.0 if red in ids else -9.0 for ids in choices] for choices in candidates]

    sciq = [
        {"support": "", "question": "what ?", "distractor1": "blue", "distractor2": wrong, "distractor3": "ring",
         "correct_answer": right}
        for right, wrong in (("red", "cyan"), ("cyan", "red"))
    ]  # fmt: skip
    lambada = [{"text": "we walk red"}, {"text": "we walk blue"}]
    for name, rows in (("sciq", sciq), ("lambada_openai", lambada)):
        (tmp_path / name).mkdir()
        (tmp_path / name / "test.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    scorer = TextScorer(LikesRed(), TOKENIZER, max_length=64, batch_size=3)
    for name in ("sciq", "lambada_openai"):
        found = evaluate_task(name, scorers={"": scorer}, seed=0, tasks_dir=TASKS, data_dir=tmp_path, generated={})
        assert found.metrics[f"{name}/acc"] == 0.5
    assert scorer.generate([[1]], Sampling(("\n",), 2, temperature=0), seeds=[0]) == ["red red"]

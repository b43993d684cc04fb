"""The lm-eval adapter: the restricted metric by hand, and every kind of request against lm-eval's own HFLM."""

from __future__ import annotations

import functools
import math
import statistics
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import yaml
from scorers import CausalLMScorer, PlainScorer
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from retrace.core.answers import answer_ids
from retrace.core.evaluate import _load, evaluate_task, scorer_model
from retrace.core.requests import Responses, Sampling, Scorer, encode_pair
from retrace.core.tasks import read_task

CHARACTERS = "\n " + "".join(chr(code) for code in range(33, 127))
TEXT = (
    "Q: How many of these are blue?\n(A) two\n(B) three\n(C) four\n(D) none at all\n(E) all\nA: B\n"
    " Answer: C D E A\n#### 1,234\n"
)


def character_tokenizer() -> PreTrainedTokenizerFast:
    """Every character is a token; no BOS."""
    vocabulary = {character: index for index, character in enumerate(CHARACTERS)} | {"<eos>": len(CHARACTERS)}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<eos>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex(r"[\s\S]"), behavior="isolated")
    tokenizer.decoder = decoders.Fuse()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<eos>")


def byte_pair_tokenizer(*, texts: list[str] = [TEXT], single_digits: bool = True) -> PreTrainedTokenizerFast:  # noqa: B006
    """Byte-level pairs with BOS, as most causal LMs have them."""
    tokenizer = Tokenizer(models.BPE())
    digits = [pre_tokenizers.Digits(individual_digits=True)] if single_digits else []
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([*digits, pre_tokenizers.ByteLevel(add_prefix_space=False)])
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=600,
        special_tokens=["<bos>", "<eos>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator([*texts, " A B C D E 42 42 42 42"] * 4, trainer)
    tokenizer.post_processor = processors.TemplateProcessing(single="<bos> $A", special_tokens=[("<bos>", 0)])
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<bos>", eos_token="<eos>", pad_token="<eos>")


def sentence_piece_tokenizer() -> PreTrainedTokenizerFast:
    """As Llama 2 and Mistral: a space is put before a text, and single digits stand behind a bare space."""
    pieces = [
        "<unk>",
        "<s>",
        "</s>",
        "\u2581",
        "\n",
        *"0123456789:,AQ",
        "\u2581A",
        "\u2581B",
        "\u2581C",
        "\u2581D",
        "\u2581E",
    ]
    vocabulary = {piece: index for index, piece in enumerate(pieces)}
    merges = [("\u2581", letter) for letter in "ABCDE"]
    vocabulary |= {letter: len(vocabulary) + i for i, letter in enumerate("BCDE")}
    tokenizer = Tokenizer(models.BPE(vocabulary, merges, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first", split=False)
    tokenizer.decoder = decoders.Metaspace(prepend_scheme="first", split=False)
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>", unk_token="<unk>")


def tiny_model(tokenizer: PreTrainedTokenizerFast, *, max_length: int = 512) -> LlamaForCausalLM:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=1,
        num_attention_heads=2,
        max_position_embeddings=max_length,
        initializer_range=0.3,  # predictions that differ from text to text
    )
    return LlamaForCausalLM(config).eval()


def write_task(folder: Path, name: str, **settings: Any) -> None:
    base = {
        "task": name,
        "test_split": "test",
        "output_type": "loglikelihood",
        "doc_to_text": "Q: {{question}}\nA:",
        "doc_to_target": " {{answer}}\n",
    }
    (folder / f"{name}.yaml").write_text(yaml.safe_dump(base | settings))


def requests_of(*arguments: Any) -> list[Any]:
    return [SimpleNamespace(args=args, task_name="task") for args in arguments]


def model_of(scorer: Scorer, *, seed: int = 0) -> Any:
    """The scorer as a model of lm-eval."""
    return scorer_model()(
        scorer, seed=seed, answers_of=lambda _: None, responses=Responses(), on_progress=lambda _: None
    )


class Bigram(PlainScorer):
    """The next token depends on the last one alone, by a table of weights that a reader can multiply out."""

    def __init__(self, weights: dict[str, dict[str, float]]) -> None:
        tokenizer = character_tokenizer()
        super().__init__(tokenizer, max_length=512, batch_tokens=256, device="cpu")
        self.logits_VV = torch.zeros(len(tokenizer), len(tokenizer))
        self.logits_VV[:, tokenizer.convert_tokens_to_ids("x")] = 9.0  # likeliest everywhere, but no answer
        for last, row in weights.items():
            for token, weight in row.items():
                ids = tokenizer.convert_tokens_to_ids([last, token])
                self.logits_VV[ids[0], ids[1]] = math.log(weight)

    def logits(self, input_ids_BT: Tensor, attention_mask_BT: Tensor, positions_BN: Tensor, **_: Any) -> Tensor:  # noqa: ARG002
        return self.logits_VV[input_ids_BT.gather(1, positions_BN)]


DIGITS = [*"0123456789", "\n"]


def test_answer_probability_by_hand(tmp_path):
    """Of the 11 answers, 1 and 7 come first with 10/49 and 30/49; behind 7 a number ends with 10/20; behind 1 comes 2
    with 10/20; all else is 1/11. The comma is read, so that the 0 stands behind a comma and not behind a 1, but not
    scored."""
    write_task(tmp_path, "sums", metadata={"allowed": DIGITS, "version": 2})
    scorer = Bigram({" ": {"1": 10, "7": 30}, "7": {"\n": 10}, "1": {"2": 10, ",": 500}})
    rows = [{"question": "?", "answer": answer} for answer in ("7", "1,080", "1234")]
    result = evaluate_task(
        "sums", scorers={"": scorer}, tasks_dir=tmp_path, seed=0, data_dir=None, generated={"sums": rows}
    )
    by_hand = [30 / 49 * 10 / 20, 10 / 49 / 11**4, 10 / 49 * 10 / 20 / 11**3]
    assert [item["prob"] for item in result.items] == pytest.approx(by_hand, rel=1e-5)
    assert [item["acc"] for item in result.items] == [1.0, 0.0, 0.0]
    assert [item["doc_id"] for item in result.items] == [0, 1, 2]
    assert result.metrics == pytest.approx({"sums/prob": sum(by_hand) / 3, "sums/acc": 1 / 3}, rel=1e-5)
    assert (result.version, result.num_shortened) == ("2", 0)


def test_scorers_share_items_and_limit_takes_the_first(tmp_path):
    write_task(tmp_path, "sums", metadata={"allowed": DIGITS})
    rows = [{"question": "?", "answer": answer} for answer in ("7", "8")]
    scorers = {"": Bigram({" ": {"7": 30}, "7": {"\n": 30}}), "base": Bigram({})}

    def run(rows: list[dict[str, str]], limit: int | None) -> Any:
        generated = {"sums": rows}
        return evaluate_task(
            "sums", scorers=scorers, tasks_dir=tmp_path, seed=0, data_dir=None, generated=generated, limit=limit
        )

    one = run(rows, 1)
    assert one.items == [pytest.approx({"doc_id": 0, "prob": 0.75**2, "acc": 1, "prob_base": 1 / 121, "acc_base": 0})]
    assert set(one.metrics) == {"sums/prob", "sums/acc", "sums/prob_base", "sums/acc_base"}
    assert one.task_hash == run(rows[:1], None).task_hash != run(rows, None).task_hash


@pytest.mark.parametrize("make", [character_tokenizer, byte_pair_tokenizer, sentence_piece_tokenizer])
def test_answer_ids_are_those_in_a_text(make):
    tokenizer = make()
    digits = answer_ids(tokenizer, DIGITS)
    context, continuation = encode_pair(tokenizer, "Q:\nA:", " 1,080\n")
    text = [DIGITS[digits.index(token)] for token in continuation if token in digits]
    assert text == [*"1080", "\n"]
    assert (context[0] == tokenizer.bos_token_id) == (tokenizer.bos_token_id is not None)
    if make is not character_tokenizer:
        letters = answer_ids(tokenizer, [" A", " B", " C", " D", " E", "\n"])
        assert encode_pair(tokenizer, "Q:\nA:", " C\n")[1] == [letters[2], letters[5]]


def test_a_tokenizer_that_merges_answers_is_refused(tmp_path):
    write_task(tmp_path, "sums", metadata={"allowed": DIGITS})
    tokenizer = byte_pair_tokenizer(single_digits=False)
    scorer = CausalLMScorer(tiny_model(tokenizer), tokenizer, batch_tokens=512)
    rows = {"sums": [{"question": "?", "answer": "42"}]}
    with pytest.raises(ValueError, match="' 42' is one token in this tokenizer"):
        evaluate_task("sums", scorers={"": scorer}, tasks_dir=tmp_path, seed=0, data_dir=None, generated=rows)
    with pytest.raises(ValueError, match=r"allowed=' A' is .* needs it to be one token"):
        answer_ids(character_tokenizer(), [" A"])


@pytest.fixture(scope="module")
def pair() -> tuple[Any, CausalLMScorer]:
    """lm-eval's own wrapper and ours of the same weights, with a window short enough to cut some contexts."""
    from lm_eval.models.huggingface import HFLM

    tokenizer = byte_pair_tokenizer()
    model = tiny_model(tokenizer, max_length=96)
    theirs = HFLM(pretrained=model, tokenizer=tokenizer, batch_size=3, max_length=96, add_bos_token=True, device="cpu")
    return theirs, CausalLMScorer(model, tokenizer, batch_tokens=200)


def test_loglikelihoods_equal_lm_evals(pair):
    theirs, scorer = pair
    ours = model_of(scorer)
    texts = [TEXT[:40], TEXT[:41] + " ", "", TEXT * 3]
    requests = requests_of(*[(text, f" {option}") for text in texts for option in ("A", "B", "none at all")])
    expected, found = theirs.loglikelihood(requests, disable_tqdm=True), ours.loglikelihood(requests)
    assert [score for score, _ in found] == pytest.approx([score for score, _ in expected], abs=1e-4)
    assert [greedy for _, greedy in found] == [greedy for _, greedy in expected]
    assert ours.num_shortened == 3


def test_rolling_loglikelihoods_equal_lm_evals(pair, monkeypatch):
    theirs, scorer = pair
    requests = requests_of((TEXT,), (TEXT * 3,))
    monkeypatch.setattr(theirs, "add_bos_token", False)  # the windows start with BOS: with it they had two
    expected = theirs.loglikelihood_rolling(requests, disable_tqdm=True)
    assert model_of(scorer).loglikelihood_rolling(requests) == pytest.approx(expected, abs=1e-3)


@pytest.mark.parametrize("plain", [False, True], ids=["cached", "plain"])
def test_generation_equals_lm_evals(pair, plain, monkeypatch):
    theirs, scorer = pair
    settings = {"until": ["e"], "max_gen_toks": 24, "do_sample": False, "temperature": 0.0}
    texts = [TEXT[:20], TEXT[:60], TEXT * 3]
    expected = theirs.generate_until(requests_of(*[(t, dict(settings)) for t in texts]), disable_tqdm=True)
    assert len(set(expected)) == 3
    ours = model_of(scorer)
    if plain:
        monkeypatch.setattr(scorer, "generate", functools.partial(PlainScorer.generate, scorer))
    assert ours.generate_until(requests_of(*[(t, settings) for t in texts])) == expected
    assert ours.num_shortened == 1
    with pytest.raises(ValueError, match="leave no room"):
        ours.generate_until(requests_of(("Q", settings | {"max_gen_toks": 96})))


def test_sampled_texts_are_the_same_with_and_without_a_cache_and_in_any_batch(pair):
    """Given the seed; and they are samples: other seeds and repetitions give other texts."""
    _, scorer = pair
    contexts = [[1, *range(5, 5 + n)] for n in (3, 9, 20)] * 2
    settings = Sampling(stop=("e",), max_new_tokens=16, temperature=0.8)
    seeds = [11, 12, 13, 14, 15, 16]
    together = scorer.generate(contexts, settings, seeds=seeds)
    alone = [scorer.generate([c], settings, seeds=[s])[0] for c, s in zip(contexts, seeds, strict=True)]
    plain = PlainScorer.generate(scorer, contexts, settings, seeds=seeds)
    cut = [[settings.cut(text) for text in texts] for texts in (together, alone, plain)]
    assert cut[0] == cut[1] == cut[2]
    assert len(set(cut[0])) > 4


def test_batches_do_not_move_scores(pair):
    _, scorer = pair
    requests = [encode_pair(scorer.tokenizer, TEXT[:n], TEXT[n : n + 9]) for n in (5, 20, 35, 60)]
    allowed = sorted({token for _, continuation in requests for token in continuation[::2]})
    together = scorer.loglikelihood(requests, allowed=allowed)
    alone = [scorer.loglikelihood([request], allowed=allowed)[0] for request in requests]
    assert [score for score, _ in together] == pytest.approx([score for score, _ in alone], abs=1e-5)


def test_evaluation_leaves_the_global_noise_alone(tmp_path):
    write_task(tmp_path, "sums", metadata={"allowed": DIGITS})
    torch.manual_seed(7)
    expected = torch.rand(3)
    torch.manual_seed(7)
    rows = {"sums": [{"question": "?", "answer": "7"}]}
    evaluate_task("sums", scorers={"": Bigram({})}, tasks_dir=tmp_path, seed=0, data_dir=None, generated=rows)
    assert torch.equal(torch.rand(3), expected)


def test_a_stock_task_keeps_all_of_its_settings(tmp_path):
    settings = {"task": "gsm8k", "include": "lm_eval/tasks/gsm8k/gsm8k.yaml"}
    settings["metadata"] = {"local": {"train": "train.jsonl", "test": "test.jsonl"}}
    (tmp_path / "gsm8k.yaml").write_text(yaml.safe_dump(settings))
    rows = [{"question": f"{n} + 1?", "answer": f"#### {n + 1}"} for n in range(6)]
    task = _load(read_task("gsm8k", tasks_dir=tmp_path), rows={"train": rows, "test": rows})
    assert (task.VERSION, task.get_config("num_fewshot"), task.OUTPUT_TYPE) == (3.0, 5, "generate_until")
    assert task.get_config("generation_kwargs")["until"] == ["Question:", "</s>", "<|im_end|>"]


FIRST = {"function": "first_integer", "after": "so"}
COT = {
    "output_type": "generate_until",
    "doc_to_target": "{{answer}}",
    "repeats": 4,
    "generation_kwargs": {
        "until": ["Q:"],
        "max_gen_toks": 9,
        "do_sample": True,
        "temperature": 0.5,
        "then": {"text": " so", "max_gen_toks": 3},
    },
    "filter_list": [
        {"name": "maj@4", "filter": [FIRST, {"function": "majority_vote"}, {"function": "take_first"}]},
        {"name": "single", "filter": [FIRST]},
    ],
    "metric_list": [{"metric": "exact_match", "aggregation": "mean", "higher_is_better": True}],
}


class Scripted:
    """Says what is written for a prompt, one answer a repetition; remembers what it was asked."""

    max_length = 512

    def __init__(self, answers: dict[str, list[str]]) -> None:
        self.tokenizer = character_tokenizer()
        self.answers = {prompt: iter(texts) for prompt, texts in answers.items()}
        self.asked: list[tuple[str, int, float]] = []

    def batches(self, requests: Any, *, room: int) -> list[list[int]]:  # noqa: ARG002
        return [[i] for i in range(len(requests))]

    def generate(self, contexts: Any, settings: Sampling, **_: Any) -> list[str]:
        prompts = [self.tokenizer.decode(context) for context in contexts]
        self.asked += [(prompt, settings.max_new_tokens, settings.temperature) for prompt in prompts]
        return [next(self.answers[prompt]) for prompt in prompts]


def test_a_vote_of_several_chains_of_thought_by_hand(tmp_path):
    """Two texts say 5 and two nothing, one of them since 7 stands behind a second question: a tie, which the answer
    that came first wins. For the other item 1,200 wins by three to one; the 99 stands before "so" and is no answer."""
    write_task(tmp_path, "sums", doc_to_text="{{question}}", **COT)
    rows = [{"question": "a", "answer": "5"}, {"question": "b", "answer": "1200"}]
    scorer = Scripted(
        {
            "a": ["x", "x Q: so 7", "y", "z"],
            "ax so": [" 5."],
            "ax  so": [""],
            "ay so": [" 5"],
            "az so": [" none"],
            "b": ["w", "w", "w", "99 w"],
            "bw so": [" $1,200", "1,200 apples", " 12"],
            "b99 w so": [" 1200"],
        }
    )
    result = evaluate_task(
        "sums", scorers={"": scorer}, seed=0, tasks_dir=tmp_path, data_dir=None, generated={"sums": rows}
    )
    assert result.metrics == {"sums/exact_match_maj@4": 1.0, "sums/exact_match_single": (2 / 4 + 3 / 4) / 2}
    first, second = result.items
    assert (first["exact_match_single"], second["exact_match_single"]) == (0.5, 0.75)
    assert first["texts"] == ["x so 5.", "x  so", "y so 5", "z so none"]
    assert {(room, temperature) for _, room, temperature in scorer.asked} == {(9, 0.5), (3, 0.5)}


def test_several_seeds_of_noise_are_one_model(tmp_path):
    write_task(tmp_path, "sums", metadata={"allowed": DIGITS})
    rows = [{"question": "?", "answer": answer} for answer in ("7", "8")]
    weights = {3: 30, 4: 90, 9: 10}
    scorers = {
        "": {
            seed: Bigram({" ": {"7": weight}, "7": {"\n": 1e9}, "8": {"\n": 1e9}}) for seed, weight in weights.items()
        },
        "base": Bigram({}),
    }
    found = evaluate_task("sums", scorers=scorers, seed=0, tasks_dir=tmp_path, data_dir=None, generated={"sums": rows})
    right = {seed: weight / (weight + 10) for seed, weight in weights.items()}
    wrong = {seed: 1 / (weight + 10) for seed, weight in weights.items()}
    by_seed = [(right[seed] + wrong[seed]) / 2 for seed in weights]
    assert found.metrics["sums/prob"] == pytest.approx(statistics.mean(by_seed), rel=1e-4)
    assert found.metrics["sums/prob_seed_std"] == pytest.approx(statistics.stdev(by_seed), rel=1e-4)
    assert found.metrics["sums/prob_base"] == pytest.approx(1 / 121)
    item = found.items[0]
    assert [item[f"prob_seed{seed}"] for seed in weights] == pytest.approx(list(right.values()), rel=1e-4)
    assert item["prob"] == pytest.approx(statistics.mean(right.values()), rel=1e-4)
    assert "prob_base_seed_std" not in found.metrics


def test_a_subset_is_the_first_items_of_the_shuffled_set(tmp_path):
    from datasets import Dataset

    write_task(tmp_path, "sums", metadata={"allowed": DIGITS, "subset": {"shuffle_seed": 42, "size": 5}})
    rows = [{"question": str(i), "answer": "7"} for i in range(20)]
    task = _load(read_task("sums", tasks_dir=tmp_path), rows={"test": rows})
    expected = Dataset.from_list(rows).shuffle(seed=42)["question"][:5]
    assert [doc["question"] for doc in task.eval_docs] == expected != [row["question"] for row in rows[:5]]

"""`retrace think` and the page of thoughts: what they show is what was measured, and any text stays text."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from collections.abc import Callable
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
import torch
from browser import CHROMIUM, Browser, chromium
from conftest import TINY, Run

from retrace.core.store import Store
from retrace.papers.quietstar.gains import GREEDY, Export, Inspection, Thought, TokenGain
from retrace.papers.quietstar.inspection import inspect
from retrace.papers.quietstar.pretrained import from_pretrained
from retrace.papers.quietstar.think import locate, think
from retrace.papers.quietstar.thoughtpage import Part, page
from retrace.papers.quietstar.thoughtview import lines, probability, signed, step_of, visible

TEXT = "Q: Ada has 3 plums, first gets 2.  How many\nnow?\n"
NASTY = "</script x></script><script>alert(1)</script><!--&amp; \"q\" 'a' \r\n\t\u2028\u202e\u00e9"
ORIGIN = {"model": f"a model <b>{NASTY}", "thoughts": "greedy"}


def token(text: str, gain: float | None, *thoughts: str) -> TokenGain:
    """A token without a model; what it gains, each of its thoughts gains."""
    known: dict[str, Any] = dict.fromkeys(("log_prob_base", "log_prob", "gain", "weight"))
    if gain is not None:
        known = {"log_prob_base": -5.0, "log_prob": -5.0 + gain, "gain": gain, "weight": 0.25}
    had = [Thought(text=text, token_ids=(1, 2), gain=gain or 0.0, weight=0.25) for text in thoughts]
    return TokenGain(text=text, id=1, thoughts=tuple(had), **known)


FOUND = Inspection(
    decoding=GREEDY,
    tokens=(
        token("First", None),
        *(token(f" g{i}", gain, f"thought {i}") for i, gain in enumerate((-2.0, -0.5, -0.1, 0.0, 0.1, 0.5, 2.0))),
        token("\n\n", 0.3, "of a newline"),
        token(NASTY, 1.5, NASTY, "another"),
        token("", -0.3, "inside of a character"),
        token("  word", 0.01, "\x1b[31mred"),
        token("long" * 40, 0.01, "longer" * 40),
    ),
)


class Seen(HTMLParser):
    """What a browser makes of a page: the characters of each document, its tokens, the data, every tag."""

    def __init__(self, content: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.documents: list[str] = []
        self.data, self.title = "", ""
        self._inside: list[str] = []
        self.feed(content)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        if tag in ("meta", "link"):
            return
        kind = "data" if dict(attrs).get("id") == "data" else dict(attrs).get("class") or tag
        self._inside.append(kind)
        if kind == "doc":
            self.documents.append("")

    def handle_endtag(self, tag: str) -> None:
        assert self._inside, f"</{tag}> ends nothing"
        self._inside.pop()

    def handle_data(self, data: str) -> None:
        if "doc" in self._inside:
            self.documents[-1] += data
        if self._inside[-1:] == ["data"]:
            self.data += data
        if self._inside[-1:] == ["title"]:
            self.title += data

    def tokens(self) -> list[dict[str, str | None]]:
        return [attributes for tag, attributes in self.tags if tag == "span" and "tabindex" in attributes]


def test_the_page_holds_the_document_the_numbers_and_the_thoughts_whatever_the_text() -> None:
    seen = Seen(page([Part("", FOUND)], title=f"About {NASTY}", origin=ORIGIN))
    assert seen.documents == [FOUND.text]
    assert seen.title == f"About {NASTY}"
    assert [tag for tag, _ in seen.tags].count("script") == 2
    rows = json.loads(seen.data)
    assert rows[0] == []
    assert [row[2] for row in rows[1:]] == [t.gain for t in FOUND.tokens[1:]]
    assert rows[9][4] == [[NASTY, 1.5, 0.25], ["another", 1.5, 0.25]]
    assert rows[1][:2] == pytest.approx([0.006738, 0.0009119], rel=1e-3)
    assert len(seen.tokens()) == len(rows)


def test_the_page_is_one_file_that_fetches_nothing() -> None:
    text = page([Part("", FOUND)], title="t", origin=ORIGIN)
    seen = Seen(text)
    assert not [a for _, attributes in seen.tags for a in attributes if a in ("src", "srcset", "action")]
    links = {attributes["href"] for _, attributes in seen.tags if "href" in attributes}
    assert all(link == "data:," or (link or "").startswith("#") for link in links)
    ids = [attributes["id"] for _, attributes in seen.tags if "id" in attributes]
    assert {(link or "")[1:] for link in links - {"data:,"}} <= set(ids)
    assert len(ids) == len(set(ids))
    for word in ("http", "url(", "@import", "fetch(", "import("):
        assert word not in re.sub(r"Content-Security-Policy|http-equiv", "", text), word


def test_gains_are_told_apart_without_colour_and_tokens_are_reached_without_a_mouse() -> None:
    seen = Seen(page([Part("", FOUND)], title="t", origin=ORIGIN))
    kinds = [(attributes["class"] or "").split() for attributes in seen.tokens()]
    assert kinds[:8] == [["t", k] if k else ["t"] for k in ("first", "m3", "m2", "m1", "", "p1", "p2", "p3")]
    assert kinds[8] == ["t", "p2", "mark"]
    assert seen.tokens()[8]["data-mark"] == "\u21b5"
    assert {attributes["role"] for attributes in seen.tokens()} == {"button"}
    assert {attributes["tabindex"] for attributes in seen.tokens()} == {"0"}
    style = page([Part("", FOUND)], title="t", origin=ORIGIN)
    for line in ("1px solid", "border-bottom-width:2px", "border-bottom-width:4px", "1px dashed"):
        assert line in style


def test_several_documents_share_a_page_in_their_order() -> None:
    other = Inspection(decoding=GREEDY, tokens=(token("Other", 0.2, "x"),))
    text = page([Part("Window 1", FOUND), Part("Window <2>", other)], title="t", origin=ORIGIN)
    seen = Seen(text)
    assert seen.documents == [FOUND.text, "Other"]
    assert len(json.loads(seen.data)) == len(FOUND.tokens) + 1
    assert "Window &lt;2&gt;" in text


def test_the_steps_of_the_scale() -> None:
    assert [step_of(g) for g in (-9, -1, -0.9, -0.25, -0.05, -0.04, 0, 0.05, 0.3, 1)] == [
        -3, -3, -2, -2, -1, 0, 0, 1, 2, 3,
    ]  # fmt: skip
    assert [signed(g) for g in (-0.0001, 0.0, 0.5, -0.25)] == ["0.000", "0.000", "+0.500", "-0.250"]
    assert [probability(p) for p in (0.0, -3.0, -9.0)] == ["1.000", "0.050", "1e-04"]


def test_what_a_terminal_shows_cannot_move_its_cursor() -> None:
    assert visible("a\nb\x1b[2J\r\u202e") == "a\u21b5b\\x1b[2J\\r\\u202e"
    nasty = Inspection(decoding=GREEDY, tokens=(*FOUND.tokens, token("\x1b[2J", 0.5, "\x1b[31mred")))
    for rich in (False, True):
        shown = "\n".join(line.plain for line in lines(nasty, {"model": "\x1bm"}, rich=rich))
        assert "\x1b" not in shown
        assert "\r" not in shown
        assert "\\x1b[31mred" in shown
    assert "First g0 g1" in shown  # the document in colour


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A home with both arms of an ablation, its records, and the report."""
    home = tmp_path_factory.mktemp("think")
    for command in (["run", "quietstar/thoughts", *TINY, "seed=0"], ["report", "quietstar", "--scale", "smoke"]):
        environment = {**os.environ, "RETRACE_HOME": str(home)}
        done = subprocess.run(
            [sys.executable, "-m", "retrace.cli", *command], env=environment, capture_output=True, text=True
        )
        assert done.returncode == 0, done.stdout + done.stderr
    return home


@pytest.fixture(scope="module")
def trained(home: Path) -> Path:
    """The folder of the run that was trained with thoughts, whose mixing head is opened so that there is a gain."""
    run = next(
        path.parent
        for path in (home / "runs").glob("quietstar-train-*/config.json")
        if json.loads(path.read_text())["config"]["thoughts"]["num_sampled"]
    )
    model, tokenizer = from_pretrained(run / "model")
    from retrace.papers.quietstar.pretrained import save_pretrained

    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.1 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(0))
    save_pretrained(model, run / "model", tokenizer)
    return run


@pytest.fixture
def call(home: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """`think` as the command line calls it, in that home."""
    monkeypatch.setattr("retrace.papers.quietstar.think.Store", lambda: Store(home))
    return think


def test_the_command_prints_every_token_and_writes_page_and_json(
    call: Callable[..., None], trained: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    data, shown = tmp_path / "new" / "out.json", tmp_path / "out.html"
    call("thoughts/thoughts/s0", TEXT, samples=2, seed=3, temperature=1.5, json=data, html=shown)
    printed = capsys.readouterr()
    assert printed.err == ""
    assert "\x1b" not in printed.out
    export = Export.model_validate_json(data.read_text())
    decoding = export.decoding
    assert (decoding.num_samples, decoding.seed, decoding.temperature) == (2, 3, 1.5)
    model, tokenizer = from_pretrained(trained / "model")
    found = inspect(model, tokenizer, TEXT, decoding=decoding)
    assert export.tokens == found.tokens
    assert export.text == TEXT
    assert export.summary == found.summary()
    assert export.origin["run"] == trained.name
    rows = printed.out.splitlines()
    assert rows[0].startswith(
        f"model thoughts/thoughts/s0, run {trained.name}, scale smoke, seed 0, thoughts 2 sampled"
    )
    for i, token in enumerate(found.tokens):
        first, second = rows[2 + 2 * i], rows[3 + 2 * i]
        assert token.gain is not None
        assert first.split()[:1] == [signed(token.gain)]
        assert visible(token.text.strip(" ")) in first
        for row, thought in zip((first, second), token.thoughts, strict=True):
            assert row.endswith(visible(thought.text.strip()))
            assert signed(thought.gain) in row
    assert "tokens: mean gain" in rows[-1]
    seen = Seen(shown.read_text())
    assert seen.documents == [TEXT]
    assert seen.title == "What thoughts/thoughts/s0 thinks"
    assert trained.name in shown.read_text()


def test_the_model_is_named_by_run_label_or_folder(home: Path, trained: Path) -> None:
    store = Store(home)
    inner = trained / "model"
    for word in (trained.name, trained.name[:-3], "thoughts/thoughts/s0", "quietstar/thoughts/thoughts/s0"):
        folder, origin = locate(word, store=store)
        assert folder == inner
        assert (origin["run"], origin["scale"], origin["seed"]) == (trained.name, "smoke", "0")
    for path in (trained, inner):
        assert locate(str(path), store=store) == (inner, {"model": str(path)})


def test_the_text_comes_from_a_file_or_standard_input_as_it_stands(
    home: Path, trained: Path, tmp_path: Path, retrace: Run
) -> None:
    text = "Q: Ada has 3 plums,\r\n first gets 2.\n"
    file = tmp_path / "text"
    file.write_bytes(text.encode())
    environment = {**os.environ, "RETRACE_HOME": str(home)}
    command = [sys.executable, "-m", "retrace.cli", "think", trained.name, "-", "--json", str(tmp_path / "stdin")]
    done = subprocess.run(command, env=environment, input=text.encode(), capture_output=True)
    assert done.returncode == 0, done.stderr
    done = retrace("think", trained.name, "--file", str(file), "--json", str(tmp_path / "file"), RETRACE_HOME=str(home))
    assert (done.returncode, done.stderr) == (0, "")
    assert (tmp_path / "file").read_text() == (tmp_path / "stdin").read_text()
    assert json.loads((tmp_path / "file").read_text())["text"] == text


def test_bad_input_is_one_sentence_that_says_what_would_work(
    call: Callable[..., None], home: Path, trained: Path, tmp_path: Path
) -> None:
    latin = tmp_path / "latin"
    latin.write_bytes("caf\u00e9".encode("latin-1"))
    runs = {path.name.split("-")[1]: path.name for path in (home / "runs").iterdir()}
    for arguments, options, message in (
        ([trained.name, ""], {}, "the text is empty: give a sentence"),
        ([trained.name], {}, "expected one text"),
        ([trained.name, "x"], {"file": latin}, "expected one text"),
        ([trained.name], {"file": latin}, "latin: not UTF-8 text"),
        ([trained.name, "x"], {"seed": 1}, "sample thoughts with --samples"),
        ([trained.name, "x"], {"samples": 1, "temperature": 0.0}, "--temperature 0.0: expected more than 0"),
        ([trained.name, "x"], {"html": tmp_path}, "is a folder: name a file"),
        ([trained.name, TEXT * 400], {}, r"the model has 4096 positions.*--window \d+"),
        (["thoughts/none/s0", "x"], {}, "never thinks"),
        (["thoughts/other/s0", "x"], {}, "no finished train run in .*retrace status"),
        (["quietstar/main", "x"], {}, "no finished train run .* and not the name of a model"),
        (["nobody/nothing", "x"], {}, "no finished train run .* not to be had from the hub"),
        ([runs["evaluate"], "x"], {}, "a run of program 'evaluate': expected one of 'train'"),
        ([str(home / "runs" / runs["pretrain"]), "x"], {}, "a plain language model without the two thought tokens"),
        (["quietstar-train-", "x"], {}, "names 2 finished runs: give the id of one"),
    ):
        with pytest.raises(ValueError, match=message) as caught:
            call(*arguments, **options)
        assert len(str(caught.value).splitlines()) == 1


def test_an_evaluation_attaches_the_page_of_runs_that_think_and_the_report_links_it(home: Path) -> None:
    evaluated = [record for record in Store(home).records("quietstar") if record.program == "evaluate"]
    records = {record.config["thoughts"]["num_sampled"] > 0: record for record in evaluated}
    assert {thinks: record.pages for thinks, record in records.items()} == {True: ("thoughts",), False: ()}
    results = home / "results" / "quietstar"
    (file,) = (results / "pages").iterdir()
    assert file.name == f"{records[True].id}--thoughts.html"
    assert file.stat().st_size < 64_000
    seen = Seen(file.read_text())
    assert len(seen.documents) == 2
    assert all(re.search(r"\n", document) for document in seen.documents)
    assert records[True].id in file.read_text()
    assert records[True].parents["model"] in file.read_text()
    for report in ("index.html", "REPORT.md"):
        assert (results / report).read_text().count(f"pages/{file.name}") == 2


@pytest.fixture(scope="module")
def browser() -> Any:
    if CHROMIUM is None:
        pytest.skip("no Chromium on this machine: the page is not opened in a browser")
    with chromium() as opened:
        yield opened


@pytest.fixture
def opened(browser: Browser, tmp_path: Path) -> Browser:
    file = tmp_path / "page.html"
    file.write_text(page([Part("", FOUND)], title="t", origin=ORIGIN), encoding="utf-8", newline="")
    browser.problems.clear()
    browser.requests.clear()
    browser.open(file, width=360, height=740)
    return browser


PANEL = "document.querySelector('#panel').innerText"


def test_a_browser_shows_the_document_complains_of_nothing_and_fetches_nothing(opened: Browser) -> None:
    assert opened.problems == []
    assert [url.rpartition("/")[2] for url in opened.requests] == ["page.html"]
    assert opened.evaluate("document.querySelector('.doc').textContent") == FOUND.text
    opened.evaluate("document.querySelectorAll('.doc .t').forEach(t => t.focus())")
    assert opened.problems == []


@pytest.mark.parametrize(("width", "dark"), [(360, False), (360, True), (800, False), (1400, False)])
def test_nothing_runs_over_the_edge_whatever_the_width(opened: Browser, tmp_path: Path, width: int, dark: bool) -> None:
    opened.open(tmp_path / "page.html", width=width, height=740, dark=dark)
    opened.mouse(".doc .p3")
    assert opened.evaluate("document.documentElement.scrollWidth") <= width
    assert opened.evaluate("document.querySelector('#panel').getBoundingClientRect().right") <= width
    opened.mouse(".doc .t:last-of-type")
    assert "longer" in opened.evaluate(PANEL)
    assert opened.evaluate("(p => p.scrollWidth <= p.clientWidth)(document.querySelector('#panel'))")


def test_thoughts_are_reached_by_keyboard(opened: Browser) -> None:
    shown = []
    for _ in range(3):  # past the skip link and the first token, which has no thought
        opened.press("Tab")
        shown.append(opened.evaluate(PANEL))
    assert "Skip" in opened.evaluate("document.querySelector('a.skip').innerText")
    assert "nothing comes before it" in shown[1]
    assert "thought 0" in shown[2]
    assert "\u22122.000 nats" in shown[2]
    opened.press("ArrowRight")
    assert "thought 1" in opened.evaluate(PANEL)
    opened.press("ArrowLeft")
    label = opened.evaluate("document.activeElement.getAttribute('aria-label')")
    assert label == "g0: gain \u22122.000 nats, 0.007 without a thought, 0.001 with; thought: thought 0"
    opened.press("Escape")
    assert "Point at a token" in opened.evaluate(PANEL)


def test_thoughts_are_shown_to_a_pointer_and_stay_after_a_tap(opened: Browser) -> None:
    opened.mouse(".doc .p2")
    assert "thought 5" in opened.evaluate(PANEL)
    opened.mouse(".doc .m2", click=True)
    opened.mouse("h1")
    assert "thought 1" in opened.evaluate(PANEL)
    opened.mouse(".doc .p3:nth-of-type(10)")
    panel = opened.evaluate(PANEL)
    assert "another" in panel
    assert "alert(1)" in panel
    assert opened.evaluate("document.querySelectorAll('script').length") == 2

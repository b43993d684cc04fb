"""The pages in a headless Chromium: quiet, fetching nothing, within the window, legible, for keys and for paper."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from browser import CHROMIUM, Browser, chromium
from test_report import NOW, PAPER, records, results
from test_scales import verdicts

from retrace.core.outlook import Need, Outlook
from retrace.core.paper import Panel
from retrace.core.record import Record
from retrace.core.report import build_overview, build_report
from retrace.core.samples import Samples
from retrace.papers.deepscalelm import profile_figures
from retrace.papers.quietstar import joint_figures

RESULTS = Path(__file__).resolve().parents[2] / "results"
COMMITTED = [page.relative_to(RESULTS).as_posix() for page in sorted(RESULTS.glob("**/index.html"))]
LONG = "an_arm_with_a_name_that_is_longer_than_any_column_of_any_table_and_has_no_place_to_break"

OVERLAPPING = """[...document.querySelectorAll('.verdicts td, .verdicts th')].flatMap(cell => {
  const room = cell.getBoundingClientRect();
  return [...cell.querySelectorAll('.chip, .value, .soft, .says, svg')].filter(e => e.checkVisibility()
    && !e.closest('details .scroll') && e.getBoundingClientRect().right > room.right + 1);
}).map(e => e.outerHTML.slice(0, 80)).slice(0, 5)"""
OPEN = "document.querySelectorAll('details').forEach(d => d.open = true)"
OVERFLOWING = """[...document.querySelectorAll('body *')].filter(e => {
  const box = e.getBoundingClientRect();
  return box.width && box.right > document.documentElement.clientWidth + 1
    && !e.closest('.scroll, pre, nav, svg, .skip') && getComputedStyle(e.closest('thead') ?? e).clipPath === 'none';
}).map(e => `${e.tagName} ${e.className} ${e.textContent.slice(0, 40)}`).slice(0, 5)"""

# Each text's colour upon what lies behind it, by the formula of WCAG 2; large text needs 3, other text 4.5.
PALE = """(() => {
  const parse = c => (c.match(/[\\d.]+/g) || [0, 0, 0, 0]).map(Number);
  const over = (a, b) => [0, 1, 2].map(i => a[i] * (a[3] ?? 1) + b[i] * (1 - (a[3] ?? 1)));
  const light = c => {
    const [r, g, b] = c.map(v => v / 255).map(v => v <= .04045 ? v / 12.92 : ((v + .055) / 1.055) ** 2.4);
    return .2126 * r + .7152 * g + .0722 * b;
  };
  const base = parse(getComputedStyle(document.body).backgroundColor);
  const behind = e => {
    if (!e) return base;
    const own = parse(getComputedStyle(e).backgroundColor);
    return own[3] === 0 ? behind(e.parentElement) : over(own, behind(e.parentElement));
  };
  const found = [], seen = new Set();
  for (const e of document.querySelectorAll('body *')) {
    if (e.closest('.skip') || ![...e.childNodes].some(n => n.nodeType === 3 && n.data.trim())) continue;
    if (['TITLE', 'STYLE'].includes(e.tagName.toUpperCase())) continue;
    const style = getComputedStyle(e), key = e.tagName + e.className + style.color + style.fill + behind(e);
    if (seen.has(key)) continue;
    seen.add(key);
    const back = behind(e), front = over(parse(e.closest('svg') ? style.fill : style.color), back);
    const [one, two] = [light(front), light(back)].sort((a, b) => b - a);
    const size = parseFloat(style.fontSize), large = size >= 24 || size >= 18.66 && style.fontWeight >= 700;
    const ratio = (one + .05) / (two + .05);
    if (ratio < (large ? 3 : 4.5)) found.push(`${ratio.toFixed(2)}: ${e.textContent.trim().slice(0, 40)}`);
  }
  return [found, seen.size];
})()"""


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    if CHROMIUM is None:
        pytest.skip("no Chromium on this machine: the pages are not opened in a browser")
    with chromium() as opened:
        yield opened


def rich_records() -> list[Record]:
    """The records of the other tests, one arm of a long name, and every kind of figure."""
    curve = [[index / 9, 10.0**index] for index in range(10)]
    profiles = {"variance": {"log": True, "measured": curve, "predicted": curve}}
    joint = {"title": "tokens", "x_label": "gain (nats)", "y_label": "loss (nats)", "x_edges": [-1.0, 1.0],
             "y_edges": [1.0], "counts": [[1, 2, 3], [3, 4, 5]], "x_quantiles": {}}  # fmt: skip
    found = records()
    for record in records()[:3]:
        labels = (f"size/{LONG}/s{record.seed}",)
        provenance = {**record.provenance, "profiles": profiles, "joint": joint}
        changes = {"id": f"{record.id}x", "labels": labels, "provenance": provenance}
        found.append(record.model_copy(update=changes))
    return found


def panels(arms: dict[str, tuple[str, ...]], samples: Samples) -> dict[str, list[Panel]]:
    """What any of the papers draws of its own."""
    both = [drawn(arms, samples) for drawn in (profile_figures.panels, joint_figures.panels)]
    return {name: [panel for found in both for panel in found.get(name, ())] for name in arms}


@pytest.fixture(scope="module")
def pages(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    home = tmp_path_factory.mktemp("pages")
    need = Need("size", 3, 2.5e15, None)
    look = Outlook("gpu", ("later",), need, (need,), "GPU-hours", "planned", f"retrace plan {LONG}", "retrace run demo")
    found = replace(results(records=rich_records()), paper=replace(PAPER, panels="test_report_in_browser:panels"))
    both = replace(found, verdicts={**found.verdicts, "gpu": verdicts()["gpu"]})
    build_report(both, scale="laptop", now=NOW, out=home / "demo", outlook=(look,))
    build_overview([found], now=NOW, out=home)
    made = {"made report": home / "demo" / "index.html", "made overview": home / "index.html"}
    return made | {name: RESULTS / name for name in COMMITTED}


NAMES = ["made report", "made overview", *COMMITTED]


@pytest.mark.parametrize("name", NAMES)
def test_a_page_says_nothing_to_the_console_and_asks_for_nothing_but_itself(
    browser: Browser, pages: dict[str, Path], name: str
) -> None:
    browser.problems.clear()
    browser.requests.clear()
    browser.open(pages[name])
    browser.evaluate(OPEN)
    assert browser.problems == []
    assert browser.requests == [pages[name].resolve().as_uri()]


@pytest.mark.parametrize("width", [320, 390, 1000, 1280])
@pytest.mark.parametrize("name", NAMES)
def test_nothing_reaches_out_of_the_window(browser: Browser, pages: dict[str, Path], name: str, width: int) -> None:
    browser.open(pages[name], width=width)
    browser.evaluate(OPEN)
    assert browser.evaluate(OVERFLOWING) == []
    assert browser.evaluate(OVERLAPPING) == []
    assert browser.evaluate("document.documentElement.scrollWidth") <= width


@pytest.mark.parametrize("dark", [False, True], ids=["light", "dark"])
@pytest.mark.parametrize("name", NAMES)
def test_text_stands_out_from_what_is_behind_it(
    browser: Browser, pages: dict[str, Path], name: str, dark: bool
) -> None:
    browser.open(pages[name], dark=dark)
    browser.evaluate(OPEN)
    pale, styles = browser.evaluate(PALE)
    assert pale == []
    assert styles > 8


def test_text_that_is_too_pale_is_found(browser: Browser, tmp_path: Path) -> None:
    page = tmp_path / "pale.html"
    page.write_text('<body style="background:#fff"><p style="color:#999">pale</p><p style="color:#666">not</p></body>')
    browser.open(page)
    assert browser.evaluate(PALE)[0] == ["2.85: pale"]


def test_the_tab_key_reaches_everything_that_can_be_used_and_shows_where_it_is(
    browser: Browser, pages: dict[str, Path]
) -> None:
    browser.open(pages["made report"], height=2000)
    expected = """[...document.querySelectorAll('a[href], summary, input:checked, pre, .scroll')]
      .filter(e => e.checkVisibility({contentVisibilityAuto: true})).length"""
    wanted = browser.evaluate(expected)
    browser.evaluate("window.reached = new Set(), window.unmarked = []")
    for _ in range(wanted + 2):
        browser.press("Tab")
        browser.evaluate("""(() => {
          const e = document.activeElement;
          if (e === document.body) return;
          reached.add(e);
          const marked = e.tagName === 'INPUT' ? e.parentElement : e;
          if (getComputedStyle(marked).outlineStyle === 'none') unmarked.push(e.outerHTML.slice(0, 80));
        })()""")
    assert browser.evaluate("reached.size") == wanted > 40
    assert browser.evaluate("unmarked") == []


def test_a_filter_by_key_leaves_the_claims_of_one_verdict(browser: Browser, pages: dict[str, Path]) -> None:
    browser.open(pages["made report"])
    shown = "[...document.querySelectorAll('tr.claim')].filter(e => e.checkVisibility()).map(e => e.id)"
    assert len(browser.evaluate(shown)) == len(results().claims)
    browser.evaluate("document.getElementById('show-all').focus()")
    headings = "[...document.querySelectorAll('.judged, .unjudged')].filter(e => e.checkVisibility()).length"
    assert browser.evaluate(headings) == 2
    for claims in (["claim-bigger", "claim-nasty", "claim-stable"], ["claim-later"], ["claim-flat"]):
        browser.press("ArrowRight")
        assert browser.evaluate(shown) == claims
        assert browser.evaluate(headings) == 1


def test_a_number_is_two_steps_from_its_record(browser: Browser, pages: dict[str, Path]) -> None:
    page = pages["made report"]
    browser.open(page)
    browser.mouse("table.metrics td a", click=True)
    browser.evaluate("new Promise(done => setTimeout(done, 100))")
    assert re.search(r"#small\d$", str(browser.evaluate("location.href")))
    line: Any = browser.evaluate("document.querySelector('tr:target').innerText")
    assert "demo-evaluate-small0" in line
    assert "retrace run demo/size/small scale=laptop seed=0" in line


@pytest.mark.parametrize("name", NAMES)
def test_on_paper_nothing_is_cut_off_and_nothing_lies_on_something_else(
    browser: Browser, pages: dict[str, Path], name: str
) -> None:
    browser.open(pages[name], width=718, paper=True)  # A4 less its margins
    assert browser.evaluate("document.documentElement.scrollWidth") <= 718
    assert browser.evaluate(OVERLAPPING) == []


def test_on_paper_there_is_ink_on_white_and_no_menu(browser: Browser, pages: dict[str, Path], tmp_path: Path) -> None:
    browser.open(pages["made report"], width=718, dark=True, paper=True)
    assert browser.evaluate("getComputedStyle(document.body).backgroundColor") == "rgb(255, 255, 255)"
    assert not browser.evaluate("document.querySelector('nav').checkVisibility()")
    assert not browser.evaluate("document.querySelector('.filter').checkVisibility()")
    assert browser.evaluate(PALE)[0] == []
    browser.pdf(tmp_path / "page.pdf")
    assert (tmp_path / "page.pdf").read_bytes().startswith(b"%PDF")

"""One page for all papers: written whenever one is reported, and honest about those without records."""

from __future__ import annotations

import re
import shutil
from dataclasses import replace
from pathlib import Path

from conftest import Run
from test_scales import NOW, PAPER, results

from retrace.core.report import build_overview
from retrace.core.results import judge_paper


def built(out: Path) -> dict[str, str]:
    nothing = replace(PAPER, slug="empty", title="Empty: nothing")
    empty = judge_paper(nothing, claims=(), ablations=(), records=(), planned={})
    build_overview([results("laptop"), empty], now=NOW, out=out)
    return {name: (out / name).read_text() for name in ("index.html", "README.md")}


def test_every_judged_claim_is_there_with_its_verdict_and_leads_to_the_report(tmp_path: Path) -> None:
    files = built(tmp_path)
    for text in files.values():
        assert "4 of 7 judged claims of 1 paper reproduced." in text
        assert "empty: no records that judge a claim yet." in text
        for claim in results("laptop").claims:
            assert claim.says in text
        assert text.count("retrace report empty") == 1
    for claim in results("laptop").claims:
        assert f'href="demo/index.html#claim-{claim.id}"' in files["index.html"]
    assert "(demo/REPORT.md)" in files["README.md"]


def test_a_claim_that_two_scales_judge_counts_once_with_what_the_larger_says(tmp_path: Path) -> None:
    both = results("laptop", "gpu")
    laptop = both.verdicts["laptop"]
    gpu = [replace(v, scale="gpu", outcome="contradicted") for v in laptop if v.outcome == "reproduced"]
    build_overview([replace(both, verdicts={"laptop": laptop, "gpu": gpu[:1]})], now=NOW, out=tmp_path)
    assert "3 of 7 judged claims of 1 paper reproduced." in (tmp_path / "README.md").read_text()


def test_the_overview_fetches_nothing(tmp_path: Path) -> None:
    page = built(tmp_path)["index.html"]
    assert "<script" not in page
    assert not re.search(r'src=|url\(|@import|<link(?! rel="icon" href="data:,")', page)


def test_reporting_without_a_paper_writes_the_overview_also_where_nothing_was_run(home: Path, retrace: Run) -> None:
    done = retrace("report")
    assert done.returncode == 0, done.stderr
    assert "No claim is judged yet." in (home / "results" / "README.md").read_text()
    assert (home / "results" / "index.html").is_file()


def test_a_report_of_a_scale_without_records_is_refused_and_the_one_that_is_there_stays(
    home: Path, retrace: Run
) -> None:
    folder = home / "results" / "quietstar"
    (folder / "records").mkdir(parents=True)
    committed = Path(__file__).resolve().parents[2] / "results" / "quietstar" / "records"
    shutil.copy(min(committed.glob("*.json")), folder / "records")
    assert retrace("report", "quietstar").returncode == 0
    before = (folder / "index.html").read_bytes()
    refused = retrace("report", "quietstar", "--scale", "gpu")
    assert refused.returncode == 2
    assert "--scale gpu: quietstar has no records of that scale; there are records of: laptop" in refused.stderr
    all_papers = retrace("report", "--scale", "gpu")
    assert all_papers.returncode == 0, all_papers.stderr
    assert "quietstar: no records at scale gpu, so its report stays as it is" in all_papers.stdout
    assert (folder / "index.html").read_bytes() == before

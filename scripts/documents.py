"""Write what came out into README.md and docs/ from the records: `python scripts/documents.py [--check]`.

A table of verdicts stands between `<!-- verdicts of PAPER at SCALE: ... -->` and `<!-- end of verdicts -->`; with `by
ablation` behind SCALE, one for each ablation, with its figures. A paper without records says so there. How well FLOPs
predict the times of runs stands between `<!-- times of runs at SCALE: ... -->` and `<!-- end of times -->`.
"""

from __future__ import annotations

import re
import sys
from collections.abc import Iterator
from pathlib import Path

from retrace.core.cost import check_times
from retrace.core.discovery import papers
from retrace.core.reportview import summary, view_verdict
from retrace.core.results import PaperResults, load_results
from retrace.core.store import Store
from retrace.core.verdicts import JUDGED, Verdict

ROOT = Path(__file__).resolve().parents[1]
FILES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
PLACE = re.compile(
    r"(<!-- verdicts of (\w+) at (\w+)( by ablation)?: [^\n]*-->\n).*?(<!-- end of verdicts -->)", re.DOTALL
)
TIMES = re.compile(r"(<!-- times of runs at (\w+): [^\n]*-->\n).*?(<!-- end of times -->)", re.DOTALL)


def table(verdicts: list[Verdict], *, paper: bool) -> Iterator[str]:
    """Judged claims as a Markdown table, with what the paper prints where that is asked for."""
    yield f"| claim, in our words |{' the paper |' * paper} difference here, 95 % interval | seeds | verdict |"
    yield f"|---|{'---|' * paper}---|---|---|"
    for verdict in verdicts:
        shown, claim = view_verdict(verdict).shown, verdict.claim
        printed = f" {(claim.paper or 'prints no number').replace('|', '/')} |" * paper
        found = f"{shown.mean} {shown.interval}"
        yield f"| {claim.says} |{printed} {found} | {len(verdict.seeds)} | **{verdict.outcome}** |"


def by_ablation(results: PaperResults, scale: str, verdicts: list[Verdict]) -> Iterator[str]:
    """The question of each ablation, its judged claims, and the figures of what they compare."""
    slug, words = results.paper.slug, results.words
    ablations = {ablation.name: ablation for ablation in results.ablations}
    for name in dict.fromkeys(verdict.claim.ablation for verdict in verdicts):  # the claims are in the paper's order
        ablation = ablations[name]
        own = [verdict for verdict in verdicts if verdict.claim.ablation == name]
        yield from (f"### {ablation.question}", "")
        yield f"{ablation.locus}; arms: {', '.join(ablation.arms)}. `retrace run {slug}/{name} scale={scale}`"
        yield from ("", *table(own, paper=True), "")
        metrics = dict.fromkeys(metric for verdict in own for _, metric in verdict.claim.cells)
        for title, file in figures(slug, name, {metric: words.get(metric, metric) for metric in metrics}):
            yield f"![{title[:1].upper()}{title[1:]}: every run by arm](../results/{slug}/figures/{file.name})"
        yield ""


def figures(slug: str, ablation: str, metrics: dict[str, str]) -> Iterator[tuple[str, Path]]:
    """(title, file) of the metrics that were drawn, or else of the profiles over depth, the first part of each."""
    folder, found = ROOT / "results" / slug / "figures", False
    for metric, title in metrics.items():
        file = folder / f"{ablation}--{re.sub(r'[^A-Za-z0-9_.]', '-', metric)}.svg"
        if file.is_file():
            found = True
            yield title, file
    if not found:
        for file in sorted(folder.glob(f"{ablation}--profile--*.svg")):
            if not file.stem.endswith("--agreement") and not re.search(r"--[2-9]$", file.stem):
                yield re.sub(r"-+", " ", file.stem.split("--")[2]), file


def section(slug: str, scale: str, *, ablations: bool) -> str:
    """What stands at one place."""
    results = load_results(slug, store=Store(ROOT), scale=scale)
    found = results.verdicts[scale]
    judged = [verdict for verdict in found if verdict.outcome in JUDGED]
    if not judged:
        return f"No run of scale {scale} is on record yet: `make reproduce-{slug} SCALE={scale}`."
    if not ablations:
        return "\n".join(table(judged, paper=False))
    report = f"[the report](../results/{slug}/REPORT.md)"
    lines = [f"{summary(found, scale=scale)} Every sample, the curves and the commands: {report}.", ""]
    return "\n".join([*lines, *by_ablation(results, scale, judged)]).rstrip()


def times(scale: str) -> str:
    """Measured times against those predicted, paper by paper."""
    lines = ["| paper | runs | half are within | nine in ten within | sum of all |", "|---|--:|--:|--:|--:|"]
    for slug in papers():
        check = check_times(record for record in Store(ROOT).records(slug) if record.scale == scale)
        if check is not None:
            errors = f"{100 * check.half:.0f} % | {100 * check.most:.0f} % | {100 * (check.total - 1):+.0f} %"
            lines.append(f"| {slug} | {check.runs} | {errors} |")
    return "\n".join(lines)


def main() -> int:
    stale = []
    for path in FILES:
        text = path.read_text()
        new = PLACE.sub(lambda m: f"{m[1]}{section(m[2], m[3], ablations=bool(m[4]))}\n{m[5]}", text)
        new = TIMES.sub(lambda m: f"{m[1]}{times(m[2])}\n{m[3]}", new)
        if new != text:
            stale.append(str(path.relative_to(ROOT)))
            if "--check" not in sys.argv:
                path.write_text(new)
    if stale and "--check" in sys.argv:
        names = " and ".join(stale)
        print(f"{names}: not what the records say: run python scripts/documents.py", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())

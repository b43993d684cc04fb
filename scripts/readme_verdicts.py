"""Write the verdict table into README.md from the committed records: `python scripts/readme_verdicts.py [--check]`."""

from __future__ import annotations

import sys
from pathlib import Path

from retrace.core.claims import load_claims
from retrace.core.config import CONFIGS
from retrace.core.reportview import view_verdict
from retrace.core.results import planned_runs
from retrace.core.store import Store
from retrace.core.verdicts import judge_all

ROOT = Path(__file__).resolve().parents[1]
BEGIN, END = "<!-- verdicts: scripts/readme_verdicts.py writes this -->", "<!-- end of verdicts -->"
SHOWN = ("reproduced", "direction only", "contradicted", "inconclusive")


def table(slug: str, scale: str) -> str:
    """The judged claims of a paper as a Markdown table."""
    store = Store(ROOT)
    claims = load_claims(CONFIGS / slug / "claims.yaml")
    verdicts = judge_all(claims, store.records(slug), scale=scale, planned=planned_runs(slug, scale=scale, store=store))
    lines = ["| claim, in our words | difference here, 95 % interval | seeds | verdict |", "|---|---|---|---|"]
    for verdict in verdicts:
        if verdict.outcome in SHOWN:
            shown = view_verdict(verdict).shown
            found = f"{shown.mean} {shown.interval}"
            lines.append(f"| {verdict.claim.says} | {found} | {len(verdict.seeds)} | **{verdict.outcome}** |")
    return "\n".join(lines)


def main() -> int:
    readme = ROOT / "README.md"
    text = readme.read_text()
    head, _, rest = text.partition(BEGIN)
    _, _, tail = rest.partition(END)
    new = f"{head}{BEGIN}\n{table('quietstar', 'laptop')}\n{END}{tail}"
    if "--check" in sys.argv:
        if new != text:
            print(
                "README.md does not show what the records say: run python scripts/readme_verdicts.py", file=sys.stderr
            )
            return 1
        return 0
    readme.write_text(new)
    return 0


if __name__ == "__main__":
    sys.exit(main())

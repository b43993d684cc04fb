"""Write the verdict tables into README.md from the committed records: `python scripts/readme_verdicts.py [--check]`.

A table stands between `<!-- verdicts of PAPER at SCALE: ... -->` and `<!-- end of verdicts -->`.
"""

from __future__ import annotations

import re
import sys
from pathlib import Path

from retrace.core.claims import load_claims
from retrace.core.config import CONFIGS
from retrace.core.reportview import view_verdict
from retrace.core.results import planned_runs
from retrace.core.store import Store
from retrace.core.verdicts import judge_all

ROOT = Path(__file__).resolve().parents[1]
PLACE = re.compile(r"(<!-- verdicts of (\w+) at (\w+): [^\n]*-->\n).*?(<!-- end of verdicts -->)", re.DOTALL)
SHOWN = ("reproduced", "direction only", "contradicted", "inconclusive")


def table(slug: str, scale: str) -> str:
    """The judged claims of a paper as a Markdown table."""
    store = Store(ROOT)
    claims = load_claims(CONFIGS / slug / "claims.yaml")
    records = store.records(slug)
    planned = planned_runs(slug, records, scale=scale, store=store)
    verdicts = judge_all(claims, records, scale=scale, planned=planned)
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
    new = PLACE.sub(lambda found: f"{found[1]}{table(found[2], found[3])}\n{found[4]}", text)
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

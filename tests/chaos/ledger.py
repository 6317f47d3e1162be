"""What the chaos suite found, as one table in docs/reliability.md."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

REPO = Path(__file__).parents[2]
RESULTS = REPO / "benchmarks" / "results" / "reliability.json"
PAGE = REPO / "docs" / "reliability.md"
BEGIN, END = "<!-- table: made by `make chaos` -->", "<!-- end of table -->"
_COLUMNS = ("promise", "fault", "tries", "lost", "duplicated", "wrong", "seconds lost", "figure", "asked for")


@dataclasses.dataclass(frozen=True)
class Finding:
    """One line of the table."""

    promise: str
    fault: str
    """What was broken on purpose."""
    tries: int
    """How often."""
    figure: str
    """What was found, in a few words with numbers."""
    target: str
    """What was asked for."""
    lost: int = 0
    duplicated: int = 0
    wrong: int = 0
    seconds_lost: float | None = None
    """Wall time that one fault cost (median), where that was measured."""


class Ledger:
    """Findings of one session; kept only when the whole suite runs at full size."""

    def __init__(self, keep: bool) -> None:
        self.keep = keep
        self.findings: list[Finding] = []

    def record(self, finding: Finding) -> None:
        """Note a finding, and write it at once: a run that is cut off keeps what it found."""
        self.findings.append(finding)
        self.write()

    def write(self) -> None:
        """Merge into benchmarks/results/reliability.json by (promise, fault), and put the table into docs/reliability.md."""
        if not (self.keep and self.findings):
            return
        rows = {(r["promise"], r["fault"]): r for r in json.loads(RESULTS.read_text())} if RESULTS.exists() else {}
        rows |= {(f.promise, f.fault): dataclasses.asdict(f) for f in self.findings}
        ordered = [rows[key] for key in sorted(rows)]
        RESULTS.write_text(json.dumps(ordered, indent=1, ensure_ascii=False) + "\n")
        before, rest = PAGE.read_text().split(BEGIN)
        PAGE.write_text(f"{before}{BEGIN}\n{table(ordered)}{END}{rest.split(END)[1]}")


def table(rows: list[dict[str, object]]) -> str:
    """The findings as a Markdown table."""
    lines = ["| " + " | ".join(_COLUMNS) + " |", "| " + " | ".join("---" for _ in _COLUMNS) + " |"]
    for row in rows:
        seconds = "" if row["seconds_lost"] is None else f"{row['seconds_lost']:.1f}"
        cells = [row[k] for k in ("promise", "fault", "tries", "lost", "duplicated", "wrong")]
        lines.append("| " + " | ".join(map(str, [*cells, seconds, row["figure"], row["target"]])) + " |")
    return "\n".join(lines) + "\n"

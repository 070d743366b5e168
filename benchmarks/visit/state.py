"""A visit: where it writes, what time is left, and all that it has found so far.

Everything found is in `data`, plain enough for JSON, and is written anew after each part:
`visit.json` all of it; `rows.csv` every timed row; `visit.md` the page. A folder that comes back from a lent
machine may hold few files, so the files of `benchmarks/results/` are made from `visit.json` by `--publish`.
"""

import json
import sys
import time
from dataclasses import dataclass
from pathlib import Path

from benchmarks import machine, tables
from benchmarks.providers import is_ours
from benchmarks.rows import Row, refused, with_speed_ups
from benchmarks.visit import page, proof
from benchmarks.visit.commands import Command

PARTS = ("notes", "parts", "proof", "rates", "reports", "jobs")


@dataclass
class Visit:
    out: Path
    work: Path  # what nobody needs afterwards
    deadline: float  # of time.monotonic()
    rehearsal: bool
    spoil: str  # an operation whose results are spoilt, to see it refused; only in a rehearsal
    data: dict

    @property
    def device(self) -> str:
        return "cpu" if self.rehearsal else "cuda"

    def left(self) -> float:
        """Seconds until the visit must be over."""
        return self.deadline - time.monotonic()

    def within(self, seconds: float) -> float:
        """That much time, or what is left; a rehearsal, on however slow a machine, has all that is left."""
        return self.left() if self.rehearsal else min(seconds, self.left())

    def say(self, line: str) -> None:
        print(line, flush=True)

    def note(self, sentence: str) -> None:
        """Say it, and keep it for the page."""
        self.data["notes"].append(sentence)
        self.say(f"  {sentence}")

    def command(self, name: str, module: str, *arguments: object, limit_s: float, env=None) -> Command:
        """`python -m module arguments`; its log is in the work folder."""
        log = self.work / f"{name.replace(':', '-').replace('/', '-')}.log"
        argv = [sys.executable, "-m", module, *map(str, arguments)]
        return Command(name, argv, limit_s, log, env or {})

    def rows(self) -> list[Row]:
        """Every row measured so far; without figures where its operation's tests failed."""
        return [
            row for report in self.data["reports"].values() for row in trusted(report, self.data["proof"])
        ]

    def save(self) -> None:
        self.out.mkdir(parents=True, exist_ok=True)
        tables.replace_file(self.out / "visit.json", json.dumps(self.data, indent=1) + "\n")
        tables.replace_file(self.out / "rows.csv", tables.as_csv(self.rows(), self.data["machine"]))
        tables.replace_file(self.out / "visit.md", page.whole(self.data, self.rows()))


def trusted(report: dict, checks: dict) -> list[Row]:
    """A report's rows with their factors; ours have no figures where the operation's tests failed."""
    rows = [Row(**row) for row in report["rows"]]
    note = proof.doubt(checks, report["operation"])
    return with_speed_ups(refused(row, note) if note and is_ours(row.provider) else row for row in rows)


def new(facts: dict) -> dict:
    """What a visit knows at its start."""
    return {"machine": facts, "rehearsal": bool(facts.get("rehearsal")), **{name: {} for name in PARTS}} | {
        "notes": []
    }


def resumed(path: Path, facts: dict) -> dict:
    """What an earlier visit of the same commit left in `path`; its notes and times are its own."""
    if not path.exists():
        return new(facts)
    data = json.loads(path.read_text())
    same = data["machine"]["commit"] == facts["commit"] and data["rehearsal"] == bool(facts.get("rehearsal"))
    return data if same and facts["commit"] != machine.UNKNOWN else new(facts)

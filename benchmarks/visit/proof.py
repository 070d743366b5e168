"""What was found of each operation's correctness, and whether its speed may be spoken of.

A check is one way of asking (cases against the reference on a backend, the repository's GPU tests, a memory
checker): how many cases passed of how many, and a sentence for each that failed.
"""

import json
from pathlib import Path

from benchmarks.visit.commands import Ended

Check = dict  # operation, how, passed, planned, failed (sentences), note
MOST_SENTENCES = 5  # of the failures of one check; they are alike


def check(operation: str, how: str, passed: int, planned: int, failed: list[str], note: str = "") -> Check:
    return {
        "operation": operation,
        "how": how,
        "passed": passed,
        "planned": planned,
        "failed": failed[:MOST_SENTENCES],
        "note": note,
    }


def doubt(proof: dict[str, Check], operation: str) -> str:
    """Why no speed-up of the operation may be printed; empty where it may."""
    checks = [each for each in proof.values() if each["operation"] == operation]
    failed = [f"{each['how']}: {sentence}" for each in checks for sentence in each["failed"]]
    if failed:
        return failed[0]
    return "" if is_asked(proof, operation) else "no case against the reference was run"


def is_asked(proof: dict[str, Check], operation: str) -> bool:
    """Whether any case has been compared with the reference."""
    checks = [each for each in proof.values() if each["operation"] == operation]
    return any(each["passed"] or each["failed"] for each in checks if each["how"].startswith("truth"))


def of_truth(lines: Path, ended: Ended) -> list[Check]:
    """Checks of `truth.py`'s lines; a case that was begun and not ended is a failure, by crash or hang."""
    found: dict[tuple[str, str], list[dict]] = {}
    for line in read_lines(lines):
        found.setdefault((line["operation"], line["backend"]), []).append(line)
    return [_of_one(*subject, each, ended) for subject, each in found.items()]


def read_lines(path: Path) -> list[dict]:
    """JSON lines; the last may have been cut off."""
    lines = path.read_text().splitlines() if path.exists() else []
    return [json.loads(line) for line in lines if line.endswith("}")]


def _of_one(operation: str, backend: str, lines: list[dict], ended: Ended) -> Check:
    verdicts = [line for line in lines if line["case"] and line["verdict"] != "started"]
    failed = [f"{line['case']}: {line['note']}" for line in verdicts if line["verdict"] == "wrong"]
    last = lines[-1]
    if last["case"] and last["verdict"] == "started" and ended.why():
        failed.append(f"{last['case']}: did not return ({ended.why()})")
    passed = sum(line["verdict"] == "passed" for line in verdicts)
    planned = sum(line.get("planned", 0) for line in lines)
    notes = dict.fromkeys(line["note"] for line in lines if line["verdict"] == "not run")
    return check(operation, f"truth {backend}", passed, planned, failed, "; ".join(notes))

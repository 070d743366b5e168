"""The repository's tests that are marked `gpu`, in shares, as checks of the operations they speak of."""

import sys
from pathlib import Path

from benchmarks.machine import ROOT
from benchmarks.visit.commands import Command, Ended
from benchmarks.visit.proof import Check, check, read_lines

GRACE_S = 30  # beyond which a share is ended, test and all


def commands(library: str, shares: int, seconds: float, folder: Path) -> list[Command]:
    """Those that need the CUDA library ("with"), or all others ("without")."""
    files = [path for path in sorted((ROOT / "tests").rglob("test_*.py")) if "mark.gpu" in path.read_text()]
    return [
        _command(f"tests:{library}:{index}", library, f"{index}/{shares}", files, seconds, folder)
        for index in range(shares)
    ]


def _command(name: str, library: str, share: str, files: list[Path], seconds: float, folder: Path) -> Command:
    stem = name.replace(":", "-")
    argv = [sys.executable, "-m", "pytest", "-q", "-m", "gpu", "--continue-on-collection-errors"]
    argv += ["-p", "no:cacheprovider", "-p", "benchmarks.visit.pytest_outcomes", "--rootdir", str(ROOT)]
    argv += ["--outcomes", str(folder / f"{stem}.jsonl"), "--share", share, "--library", library]
    argv += ["--seconds", f"{seconds:.0f}", *map(str, files)]
    return Command(name, argv, seconds + GRACE_S, folder / f"{stem}.log")


def checks(shares: list[tuple[Path, Ended]]) -> list[Check]:
    """One check an operation, of the outcomes of every share."""
    outcomes = {}
    broken = []
    for path, ended in shares:
        lines = read_lines(path)
        outcomes |= {line["test"]: _ended(line, ended) for line in lines if line["test"]}
        if ended.code not in (0, 1, 5):  # pytest's: all passed, some failed, none collected
            broken.append(f"{ended.name}: {ended.why()}")
    operations = dict.fromkeys(name for line in outcomes.values() for name in line["operations"])
    return [_of_one(operation, list(outcomes.values()), broken) for operation in operations]


def _ended(line: dict, share: Ended) -> dict:
    """A test's last line; one that never came back has failed."""
    if line["verdict"] != "started":
        return line
    return line | {"verdict": "wrong", "note": f"did not return ({share.why() or 'no outcome'})"}


def _of_one(operation: str, outcomes: list[dict], broken: list[str]) -> Check:
    mine = [line for line in outcomes if operation in line["operations"]]
    failed = [f"{_short(line)}: {line['note']}" for line in mine if line["verdict"] == "wrong"]
    passed = sum(line["verdict"] == "passed" for line in mine)
    skipped = dict.fromkeys(line["note"] for line in mine if line["verdict"] == "not run")
    return check(operation, "pytest -m gpu", passed, len(mine), failed, "; ".join([*skipped, *broken]))


def _short(line: dict) -> str:
    return line["test"].rpartition("/")[2]

"""Then the figures: the roofs, each benchmark within its time, the headline once more, compiled."""

import json

from benchmarks import tables
from benchmarks.catalogue import BENCHMARKS
from benchmarks.rows import Row
from benchmarks.visit import proof
from benchmarks.visit.commands import run
from benchmarks.visit.state import Visit, trusted

RATES_S, BENCH_S, COMPILED_S, GRACE_S = 40, 25, 45, 30


def measure_rates(visit: Visit) -> str:
    """The roofs and other rates; why there are none, empty where there are."""
    out = visit.work / "rates.json"
    arguments = ["--device", visit.device, "--out", out, *_quick(visit)]
    limit = visit.within(RATES_S)
    ended = run(visit.command("rates", "benchmarks.visit.rates", *arguments, limit_s=limit))
    if not ended.why():
        visit.data["rates"] = json.loads(out.read_text())
    return ended.why()


def measure_benchmarks(visit: Visit, names: list[str], compiled: bool = False) -> str:
    """Rows of these benchmarks; why some are missing, empty where none is.

    compiled: the headline workloads once more, torch.compile among the providers; those rows replace what
    was measured before.
    """
    folder = visit.work / ("compiled" if compiled else "figures")
    (visit.work / "rates.json").write_text(json.dumps(visit.data["rates"]))
    limit = max(1.0, visit.within((COMPILED_S if compiled else BENCH_S) + GRACE_S) - GRACE_S)
    options = ["--device", visit.device, "--rates", visit.work / "rates.json", "--out", folder]
    options += ["--limit", f"{limit:.0f}", *_quick(visit), *(["--compiled"] if compiled else [])]
    if visit.rehearsal or compiled or all(_is_doubted(visit, name) for name in names):
        options += ["--headline"]
    title = f"{'compiled' if compiled else 'bench'}:{'+'.join(names)}"
    ended = run(visit.command(title, "benchmarks.visit.timed", *names, *options, limit_s=limit + GRACE_S))
    for name in names:
        path = folder / f"{name}.json"
        if path.exists():
            report = json.loads(path.read_text())
            old = visit.data["reports"].get(name) if compiled else None
            visit.data["reports"][name] = merged(old, report) if old else report
            _say_headline(visit, name)
    return ended.why()


def merged(old: dict, new: dict) -> dict:
    """The old report, with the new one's rows in the place of those of the same workload."""
    cases = {Row(**row).case for row in new["rows"]}
    kept = [row for row in old["rows"] if Row(**row).case not in cases]
    return old | {"rows": new["rows"] + kept, "not_run": new["not_run"]}


def _is_doubted(visit: Visit, name: str) -> bool:
    return name != "dispatch" and bool(proof.doubt(visit.data["proof"], BENCHMARKS[name].operation))


def _quick(visit: Visit) -> list[str]:
    return ["--quick"] if visit.rehearsal else []


def _say_headline(visit: Visit, name: str) -> None:
    for row in trusted(visit.data["reports"][name], visit.data["proof"]):
        if row.headline:
            visit.say("  " + "  ".join(tables.cells(row)))

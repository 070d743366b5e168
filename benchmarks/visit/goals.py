"""The goals of the issue that asked for the visit, beside what came: met, missed, or not measured."""

from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace

from benchmarks import model_table
from benchmarks.rows import TEST_FAILED, Row
from benchmarks.visit.choices import chosen
from benchmarks.visit.rates import SUSTAINED

MET, MISSED, NOT_MEASURED = "met", "missed", "not measured"
LARGE = 4096 * 4096
SEVEN_B = "llama2-7b"


@dataclass(frozen=True)
class Outcome:
    goal: str
    came: str
    verdict: str


def outcomes(data: dict, rows: Iterable[Row]) -> list[Outcome]:
    """One line a goal. `data`: of a visit; a job's floor is its FLOPs at the measured bf16 matmul rate, the
    best one; beside it stands what came of the rate that the card keeps up."""
    rows = list(rows)
    device = data["machine"]["device"]
    large = [row for row in rows if _elements(row) >= LARGE]
    found = [
        _share("prune_nm_: 85% of the copy bandwidth, from 4096x4096 up", 85, "prune_nm_", large, device),
        _share("add_sq_norm_: 85% of it, from 4096x4096 up", 85, "add_sq_norm_", large, device),
        _share(
            "prune_rows_: 60% of it, 4096 and 11008 columns, from 4096x4096 up",
            60,
            "prune_rows_",
            [row for row in large if row.shape.split("x")[1] in ("4096", "11008")],
            device,
        ),
        _share(
            "add_coactivation_: 75% of the bf16 matmul rate, 16384 tokens a call",
            75,
            "add_coactivation_",
            [row for row in rows if row.dtype == "bfloat16" and row.setting.endswith(" 16384 tokens")],
            device,
        ),
    ]
    jobs = model_table.merged(data["jobs"])
    rate = data["rates"].get("roofs", {}).get("flops_per_s")
    for sequential, most in (("block", 1.25), ("linear", 1.3)):
        goal = f"wanda 2:4 on {SEVEN_B}, --sequential {sequential}: at most {most} times its floor"
        outcome = _job(goal, jobs, "wanda", lambda report, s=sequential: _over_floor(report, s, rate), most)
        found.append(_with_sustained(outcome, data, sequential))
    for method, least, factor in (
        ("wanda", 3, _over_published),
        ("connect", 6, _over_published),
        ("sparsegpt", 15, _over_published_without_forwards),
    ):
        what = "the published code" + (", forwards excluded" if method == "sparsegpt" else "")
        goal = f"{method} 2:4 on {SEVEN_B}: {least} times as fast as {what}"
        found.append(_job(goal, jobs, method, factor, least, at_least=True))
    return found


def _elements(row: Row) -> int:
    sizes = row.shape.split("x")
    return int(sizes[0]) * int(sizes[1]) if len(sizes) == 2 and row.operation != "dispatch" else 0


def _share(goal: str, least: float, operation: str, rows: list[Row], device: str) -> Outcome:
    """By the worst workload, of the backend that `auto` takes."""
    mine = [row for row in rows if row.operation == operation]
    failed = [row for row in mine if row.status == TEST_FAILED]
    if failed:
        return Outcome(goal, f"test failed: {failed[0].note}", TEST_FAILED)
    cases: dict[tuple, dict[str, Row]] = {}
    for row in mine:
        if row.roof_pct is not None:
            cases.setdefault(row.case, {})[row.provider] = row
    taken = [row for row in (chosen(ours, device) for ours in cases.values()) if row]
    if not taken:
        return Outcome(goal, "-", NOT_MEASURED)
    worst = min(taken, key=lambda row: row.roof_pct)
    best = max(taken, key=lambda row: row.roof_pct)
    came = (
        f"{worst.roof_pct:.0f}% to {best.roof_pct:.0f}%, lowest: {worst.shape} {worst.dtype} {worst.setting}"
    )
    return Outcome(goal, f"{came} ({worst.provider})", MET if worst.roof_pct >= least else MISSED)


def _job(
    goal: str,
    jobs: dict,
    method: str,
    factor: Callable[[dict], float | None],
    bound: float,
    at_least: bool = False,
) -> Outcome:
    report = jobs.get(f"{SEVEN_B}/2:4", {"rows": []})
    rows = [row for row in report["rows"] if row["method"] == method]
    value = factor(report | {"rows": rows}) if rows else None
    if value is None:
        return Outcome(goal, "-", NOT_MEASURED)
    met = value >= bound if at_least else value <= bound
    return Outcome(goal, f"{value:.2f} times", MET if met else MISSED)


def _with_sustained(outcome: Outcome, data: dict, sequential: str) -> Outcome:
    kept = [each["value"] for each in data["rates"].get("rates", []) if each["name"] == SUSTAINED]
    if outcome.verdict == NOT_MEASURED or not kept:
        return outcome
    report = data["jobs"][f"{SEVEN_B}/2:4/wanda"]
    value = _over_floor(report, sequential, kept[0] * 1e12)
    return replace(outcome, came=f"{outcome.came} ({value:.2f} at the rate that 4 s of matmuls keep)")


def _row(report: dict, pipeline: str, sequential: str = "block") -> dict | None:
    """A pipeline's row; none where it has pruned other weights than the published one."""
    found = [row for row in report["rows"] if (row["pipeline"], row["sequential"]) == (pipeline, sequential)]
    return found[0] if found and found[0]["agreement"] is not False else None


def _over_floor(report: dict, sequential: str, flops_per_s: float | None) -> float | None:
    row, flops = _row(report, "wanda_fast", sequential), report["flops"][sequential]
    return row["wall_s"] / (flops / flops_per_s) if row and flops_per_s else None


def _over_published(report: dict) -> float | None:
    row = _row(report, "wanda_fast")
    return row["over_same_dtype"] if row else None


def _over_published_without_forwards(report: dict) -> float | None:
    ours, published = (_row(report, pipeline) for pipeline in ("wanda_fast", "published"))
    if not ours or not published:
        return None
    times = [sum(row["seconds"][phase] for phase in ("statistics", "selection")) for row in (published, ours)]
    return times[0] / times[1] if times[1] else None

"""`bench_prune_model`'s results as a page, and as the README's table of whole jobs."""

import json
import statistics
from pathlib import Path

from benchmarks import machine
from benchmarks.tables import markdown, times

PHASES = ("read", "block inputs", "dense pass", "one pass", "statistics", "selection", "pruned pass", "write")
PHASES += ("other",)
ONCE = ("read", "block inputs", "write", "other")  # phases that hang on no block
COLUMNS = ("method", "dtype", "pipeline", "seconds", "over published, same dtype", "over published, float32")
COLUMNS += ("of GEMM rate", "peak memory")
LEAST_AGREEMENT = 0.99  # of the masks of block 0's query: sums in another order swap near ties, no more
PIPELINES = ("published", "wanda_fast, block", "wanda_fast, linear")  # as `_name` has them
NOT_MEASURED = "A whole job: not measured."
GPU_NOT_MEASURED = "On a GPU: not measured."


def page(report: dict) -> str:
    """Conditions, the table, how often both pipelines prune the same weights."""
    parts = [conditions(report), table(report), phases(report), agreement(report)]
    parts += [f"Not run: {what}: {reason}." for what, reason in report["not_run"].items()]
    if report["machine"]["device"] == "cpu":
        parts.append(GPU_NOT_MEASURED)
    return "\n\n".join(part for part in parts if part) + "\n"


def section(results: Path, device: str) -> list[str]:
    """docs/speed.md's part on whole jobs on such a device: the newest run on each kind of machine."""
    reports = [report for report in newest(results) if report["machine"]["device"] == device]
    if not reports:
        return [NOT_MEASURED]
    return [part for each in reports for part in (conditions(each), table(each), agreement(each))]


def newest(results: Path) -> list[dict]:
    """Of each kind of machine."""
    reports = [json.loads(path.read_text()) for path in results.glob("*/prune_model.json")]
    reports.sort(key=lambda report: report["machine"]["date"])
    kind = ("cpu", "gpu", "cpu_capability", "cores")
    return list({tuple(report["machine"].get(name) for name in kind): report for report in reports}.values())


def summary(results: Path) -> str:
    """A table a model; a line for each machine, method and dtype: seconds, and how many times as fast as
    the published code."""
    by_work: dict[str, dict[tuple[str, ...], dict[str, str]]] = {}
    for report in newest(results):
        work = report["workload"]
        jobs = by_work.setdefault(
            f"**{work['model']}**, {work['nsamples']} x {work['seqlen']} tokens, {work['sparsity_type']}:", {}
        )
        for row in _sorted(report):
            method, dtype, pipeline = _name(row)
            cells = jobs.setdefault((machine.short_name(report["machine"]), method, dtype), {})
            cells[pipeline] = _seconds_and_factor(row)
    parts = []
    for work, jobs in by_work.items():
        lines = [(*job, *(cells.get(name, "-") for name in PIPELINES)) for job, cells in jobs.items()]
        parts += [work, markdown(("machine", "method", "dtype", *PIPELINES), lines)]
    return "\n\n".join(parts or [NOT_MEASURED])


def _seconds_and_factor(row: dict) -> str:
    seconds, factor = f"{row['wall_s']:.1f} s", _factor(row, "over_same_dtype")
    return seconds if row["pipeline"] == "published" or factor == times(None) else f"{seconds}, {factor}"


def merged(reports: dict[str, dict]) -> dict[str, dict]:
    """SHAPE/PATTERN -> the report of all its methods' runs; from a report for each SHAPE/PATTERN/METHOD."""
    found: dict[str, dict] = {}
    for name, report in reports.items():
        setting = name.rpartition("/")[0]
        old = found.get(setting, report | {"runs": [], "gemm": [], "not_run": {}})
        found[setting] = old | {part: old[part] + report[part] for part in ("runs", "gemm")}
        found[setting]["not_run"] = old["not_run"] | report["not_run"]
        commits = machine.joined(run["commit"] for run in found[setting]["runs"])
        found[setting]["machine"] = old["machine"] | {"commit": commits}
        found[setting]["rows"] = rows(found[setting])
    return found


def rows(report: dict) -> list[dict]:
    """One a job: medians of its runs, and factors of wall time over the published pipeline."""
    keys = ("method", "dtype", "pipeline", "sequential")
    jobs = dict.fromkeys(tuple(run[key] for key in keys) for run in report["runs"])
    found = []
    for job in jobs:
        runs = [run for run in report["runs"] if tuple(run[key] for key in keys) == job]
        found.append(dict(zip(keys, job, strict=True)) | _medians(runs, report))
    published = {
        (row["dtype"], row["method"]): row["wall_s"] for row in found if row["pipeline"] == "published"
    }
    for row in found:
        for name, dtype in (("over_same_dtype", row["dtype"]), ("over_float32", "float32")):
            wall = published.get((dtype, row["method"]))
            row[name] = wall / row["wall_s"] if row["agreement"] and wall is not None else None
    return found


def _medians(runs: list[dict], report: dict) -> dict:
    """Of one job; a published pipeline that ran on some blocks is scaled, but for what hangs on no block.

    What the first use of a kernel costs is then multiplied too. So its dense pass, the same work whatever the
    method, is taken from the method where it was fastest.
    """
    work, first = report["workload"], runs[0]
    published = first["pipeline"] == "published"
    share = work["blocks"] / work["published_blocks"] if published else 1.0
    scaled = [
        {name: value * (1 if name in ONCE else share) for name, value in run["seconds"].items()}
        for run in runs
    ]
    if share > 1:
        method, dense = _fastest_dense_pass(report, first["dtype"])
        if first["method"] != method:
            scaled = [seconds | {"dense pass": share * dense} for seconds in scaled]
    walls = [sum(seconds.values()) for seconds in scaled]
    seconds = {name: statistics.median(each[name] for each in scaled) for name in scaled[0]}
    passes = seconds["dense pass"] + seconds["one pass"] + seconds["pruned pass"]
    flops = report["flops"]["published" if published else first["sequential"]]
    masks = [run["masks"] for run in runs if run["masks"]]
    lowest = {name: min(each[name] for each in masks) for name in masks[0]} if masks else None
    return {
        "wall_s": statistics.median(walls),
        "walls_s": walls,
        "seconds": seconds,
        "peak_bytes": max(run["peak_bytes"] for run in runs),
        "gemm_share": flops / passes / gemm_rate(report, first["dtype"]) if passes else None,
        "masks": lowest,
        "agreement": None if lowest is None else lowest["first linear"] >= LEAST_AGREEMENT,
    }


def _fastest_dense_pass(report: dict, dtype: str) -> tuple[str, float]:
    """The method where the published one was fastest, and its seconds on the blocks that it ran on."""
    found: dict[str, list[float]] = {}
    for run in report["runs"]:
        if run["pipeline"] == "published" and run["dtype"] == dtype:
            found.setdefault(run["method"], []).append(run["seconds"]["dense pass"])
    medians = {method: statistics.median(seconds) for method, seconds in found.items()}
    return min(medians.items(), key=lambda each: each[1])


def gemm_rate(report: dict, dtype: str) -> float:
    return statistics.median(each["flops_per_s"] for each in report["gemm"] if each["dtype"] == dtype)


def conditions(report: dict) -> str:
    work, flops = report["workload"], report["flops"]
    dtypes = dict.fromkeys(each["dtype"] for each in report["gemm"])
    rates = ", ".join(f"{gemm_rate(report, dtype) / 1e12:.3g} TFLOP/s in {dtype}" for dtype in dtypes)
    counts = sorted({len(row["walls_s"]) for row in report["rows"]})
    runs = "one run each" if counts == [1] else f"medians of {counts[0]} to {counts[-1]} runs"
    part = ""
    if work["published_blocks"] < work["blocks"]:
        part = (
            f" The published pipeline ran on {work['published_blocks']} of {work['blocks']} blocks; its "
            "seconds are multiplied, with the dense pass of the method where it was fastest (a kernel's "
            "first use is slow)."
        )
    return (
        f"Whole job, {work['model']}, {work['nsamples']} x {work['seqlen']} tokens, "
        f"{work['sparsity_type']}: seconds, {runs}.{part} Matmuls of the model's "
        f"shapes, {work['gemm_tokens']} tokens each, reach {rates}; the share counts "
        f"{flops['published'] / 1e12:.3g} TFLOP for the published two passes, {flops['block'] / 1e12:.3g} "
        f"for ours, {flops['linear'] / 1e12:.3g} for --sequential linear (linears, and half of attention's "
        f"square). {machine.sentence(report['machine'])}"
    )


def table(report: dict) -> str:
    """Seconds in all (fastest to slowest round), factors, share of the matmul rate."""
    device = report["machine"]["device"]
    return markdown(COLUMNS, [(*_name(row), *_cells(row, device)) for row in _sorted(report)])


def phases(report: dict) -> str:
    """Seconds of each phase."""
    lines = [(*_name(row), *(f"{row['seconds'][phase]:.2f}" for phase in PHASES)) for row in _sorted(report)]
    return markdown((*COLUMNS[:3], *PHASES), lines)


def agreement(report: dict) -> str:
    """Masks in common with the published pipeline in the same dtype."""
    found = [
        f"{row['method']} {row['dtype']} {row['sequential']}: "
        + ", ".join(f"{name} {share:.2%}" for name, share in row["masks"].items())
        for row in report["rows"]
        if row["masks"]
    ]
    return "Masks in common with the published pipeline's: " + "; ".join(found) + "." if found else ""


def _sorted(report: dict) -> list[dict]:
    order = {"published": 0, "wanda_fast": 1}
    return sorted(report["rows"], key=lambda row: (row["method"], row["dtype"], order[row["pipeline"]]))


def _name(row: dict) -> tuple[str, ...]:
    pipeline = row["pipeline"] if row["pipeline"] == "published" else f"wanda_fast, {row['sequential']}"
    return row["method"], row["dtype"], pipeline


def _cells(row: dict, device: str) -> tuple[str, ...]:
    factors = [_factor(row, key) for key in ("over_same_dtype", "over_float32")]
    low, high = min(row["walls_s"]), max(row["walls_s"])
    share = "-" if row["gemm_share"] is None else f"{row['gemm_share']:.0%}"
    if device == "cuda" and (row["gemm_share"] or 0) > 1:  # a CPU's pruned pass leaves products out
        share = "**wrong split**"  # a pass's work was counted as another phase's: see LOG.md
    wall = f"{row['wall_s']:.2f}" + (f" ({low:.2f} to {high:.2f})" if high > low else "")
    return (wall, *factors, share, f"{row['peak_bytes'] / 2**20:,.0f} MiB")


def _factor(row: dict, key: str) -> str:
    return "**other masks**" if row["agreement"] is False else times(row[key])

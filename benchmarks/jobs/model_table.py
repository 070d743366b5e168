"""`bench_prune_model`'s runs as rows, and as Markdown for docs/speed.md."""

import json
import statistics
from pathlib import Path

from benchmarks.core import machine
from benchmarks.core.tables import markdown, rounded, times

PHASES = ("read", "block inputs", "dense pass", "one pass", "statistics", "selection", "pruned pass", "write")
ONCE = ("read", "block inputs", "write", "other")  # phases that do not depend on the number of blocks
KEYS = ("method", "dtype", "pipeline", "sequential")
COLUMNS = ("method", "dtype", "pipeline", "seconds", "over published, same dtype", "over published, float32")
COLUMNS += ("of GEMM rate", "peak memory", "masks in common with the published pipeline")
LEAST_AGREEMENT = 0.99  # of the masks of block 0's query: sums in another order swap near ties, no more


def read(path: Path) -> dict:
    return json.loads(path.read_text(encoding="utf-8"))


def newest(results: Path, device: str) -> list[dict]:
    """For each kind of machine and each job, the newest report; the newest first."""
    found = {}
    for report in sorted(map(read, results.glob("*/job-*.json")), key=lambda each: each["machine"]["date"]):
        facts, work = report["machine"], report["workload"]
        if facts["device"] == device:
            kind = [facts.get(name) for name in ("cpu", "gpu", "cpu_capability", "cores")]
            found[(*kind, work["model"], work["sparsity_type"])] = report
    return sorted(found.values(), key=lambda each: each["machine"]["date"], reverse=True)


def page(report: dict) -> str:
    """Conditions, the table, seconds of each phase, and what was not run."""
    found = rows(report)
    names = (*PHASES, "other")
    lines = [(*_name(row), *(f"{row['seconds'][phase]:.2f}" for phase in names)) for row in found]
    parts = [conditions(report), table(report), markdown((*COLUMNS[:3], *names), lines)]
    return "\n\n".join([*parts, *(f"Not run: {k}: {why}." for k, why in report["not_run"].items())]) + "\n"


def rows(report: dict) -> list[dict]:
    """One a job: medians of its runs, and factors of wall time over the published pipeline."""
    jobs = dict.fromkeys(tuple(run[key] for key in KEYS) for run in report["runs"])
    found = []
    for job in jobs:
        runs = [run for run in report["runs"] if tuple(run[key] for key in KEYS) == job]
        found.append(dict(zip(KEYS, job, strict=True)) | _medians(runs, report))
    published = {
        (row["dtype"], row["method"]): row["wall_s"] for row in found if row["pipeline"] == "published"
    }
    for row in found:
        for name, dtype in (("over_same_dtype", row["dtype"]), ("over_float32", "float32")):
            wall = published.get((dtype, row["method"]))
            row[name] = wall / row["wall_s"] if row["agreement"] and wall is not None else None
    order = {"published": 0, "wanda_fast": 1}
    return sorted(found, key=lambda row: (row["method"], row["dtype"], order[row["pipeline"]]))


def _medians(runs: list[dict], report: dict) -> dict:
    """Of one job. Seconds of a published pipeline that ran on some blocks are scaled to all blocks.

    Scaling would also multiply what the first use of a kernel costs. The dense pass is the same work whatever
    the method, so it is taken from the method where it was fastest.
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
    """The method whose published dense pass was fastest, and its seconds on the blocks that it ran on."""
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
    rates = ", ".join(f"{rounded(gemm_rate(report, dtype) / 1e12)} TFLOP/s in {dtype}" for dtype in dtypes)
    counts = sorted({len(row["walls_s"]) for row in rows(report)})
    runs = "one run each" if counts == [1] else f"medians of {counts[0]} to {counts[-1]} runs"
    part = ""
    if work["published_blocks"] < work["blocks"]:
        part = (
            f" The published pipeline ran on {work['published_blocks']} of {work['blocks']} blocks. Its "
            "seconds are scaled to all blocks, with the dense pass of the method where it was fastest, since "
            "the first use of a kernel is slow."
        )
    published, block, linear = (rounded(flops[each] / 1e12) for each in ("published", "block", "linear"))
    return (
        f"Seconds: {runs}.{part} Matmuls of the model's shapes, {work['gemm_tokens']} tokens each, reach "
        f"{rates}. The share of that rate counts {published} TFLOP for the two published passes, {block} for "
        f"ours, {linear} for --sequential linear (linears, and half of attention's square). "
        f"{machine.sentence(report['machine'])}"
    )


def title(report: dict) -> str:
    work = report["workload"]
    return (
        f"{work['model']}, {work['nsamples']} x {work['seqlen']} tokens, {work['sparsity_type']}, on "
        f"{machine.name(report['machine'])}"
    )


def table(report: dict) -> str:
    """Seconds in all (fastest to slowest round), factors, share of the matmul rate."""
    device = report["machine"]["device"]
    return markdown(COLUMNS, [(*_name(row), *_cells(row, device)) for row in rows(report)])


def _name(row: dict) -> tuple[str, ...]:
    pipeline = row["pipeline"] if row["pipeline"] == "published" else f"wanda_fast, {row['sequential']}"
    return row["method"], row["dtype"], pipeline


def _cells(row: dict, device: str) -> tuple[str, ...]:
    wrong = row["agreement"] is False
    factors = ["**other masks**" if wrong else times(row[key]) for key in ("over_same_dtype", "over_float32")]
    low, high = min(row["walls_s"]), max(row["walls_s"])
    share = "-" if row["gemm_share"] is None else f"{row['gemm_share']:.0%}"
    # Above 1 on a GPU, work of a pass was counted in another phase (LOG.md). A CPU skips products with zeros.
    if device == "cuda" and (row["gemm_share"] or 0) > 1:
        share = "-"
    wall = f"{row['wall_s']:.2f}" + (f" ({low:.2f} to {high:.2f})" if high > low else "")
    masks = ", ".join(f"{name} {share:.2%}" for name, share in (row["masks"] or {}).items())
    return wall, *factors, share, f"{row['peak_bytes'] / 2**20:,.0f} MiB", masks or "-"

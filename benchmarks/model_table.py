"""`bench_prune_model`'s results as a page, and as the README's table of whole jobs."""

import json
from pathlib import Path

from benchmarks import machine
from benchmarks.tables import markdown, times

PHASES = ("read", "block inputs", "dense pass", "one pass", "statistics", "selection", "pruned pass", "write")
PHASES += ("other",)
COLUMNS = ("method", "dtype", "pipeline", "wall", "over published, same dtype", "over published, float32")
COLUMNS += (*PHASES, "of GEMM rate", "peak memory")
GPU_NOT_MEASURED = "On a GPU: not measured."


def page(report: dict) -> str:
    """Conditions, the table, how often both pipelines prune the same weights."""
    parts = [conditions(report), table(report), agreement(report)]
    parts += [f"Not run: {what}: {reason}." for what, reason in report["not_run"].items()]
    if report["machine"]["device"] == "cpu":
        parts.append(GPU_NOT_MEASURED)
    return "\n\n".join(part for part in parts if part) + "\n"


def section(results: Path, device: str) -> list[str]:
    """The README's part on whole jobs on such a device: the newest run there is."""
    reports = [json.loads(path.read_text()) for path in results.glob("*/prune_model.json")]
    reports = [report for report in reports if report["machine"]["device"] == device]
    if not reports:
        return ["A whole job: not measured."]
    newest = max(reports, key=lambda report: report["machine"]["date"])
    return [conditions(newest), table(newest), agreement(newest)]


def conditions(report: dict) -> str:
    flops, gemm = report["flops"], report["gemm_flops_per_s"]
    rates = ", ".join(f"{rate / 1e12:.3g} TFLOP/s in {dtype}" for dtype, rate in gemm.items())
    part = ""
    if report["published_blocks"] < report["blocks"]:
        part = (
            f" The published pipeline ran on {report['published_blocks']} of {report['blocks']} blocks; its "
            "seconds are multiplied."
        )
    return (
        f"Whole job, {report['model']}, {report['nsamples']} x {report['seqlen']} tokens, "
        f"{report['sparsity_type']}: seconds, medians of {report['rounds']} rounds.{part} Matmuls of the "
        f"model's shapes, {report['gemm_tokens']} tokens each, reach {rates}; the share counts "
        f"{flops['published'] / 1e12:.3g} TFLOP for the published two passes, {flops['block'] / 1e12:.3g} "
        f"for ours, {flops['linear'] / 1e12:.3g} for --sequential linear (linears, and half of attention's "
        "square). "
        f"{machine.sentence(report['machine'])}"
    )


def table(report: dict) -> str:
    order = {"published": 0, "wanda_fast": 1}
    rows = sorted(report["rows"], key=lambda row: (row["method"], row["dtype"], order[row["pipeline"]]))
    return markdown(COLUMNS, [_cells(row) for row in rows])


def agreement(report: dict) -> str:
    """Masks in common with the published pipeline in the same dtype."""
    found = [
        f"{row['method']} {row['dtype']} {row['sequential']}: "
        + ", ".join(f"{name} {share:.2%}" for name, share in row["masks"].items())
        for row in report["rows"]
        if row["masks"]
    ]
    return "Masks in common with the published pipeline's: " + "; ".join(found) + "." if found else ""


def _cells(row: dict) -> tuple[str, ...]:
    name = row["pipeline"] if row["pipeline"] == "published" else f"wanda_fast, {row['sequential']}"
    factors = [times(row[key]) for key in ("over_same_dtype", "over_float32")]
    if row["agreement"] is False:
        factors = ["**other masks**"] * 2
    low, high = min(row["walls_s"]), max(row["walls_s"])
    share = "-" if row["gemm_share"] is None else f"{row['gemm_share']:.0%}"
    wall = f"{row['wall_s']:.2f} ({low:.2f} to {high:.2f})"
    seconds = [f"{row['seconds'][phase]:.2f}" for phase in PHASES]
    peak = f"{row['peak_bytes'] / 2**20:,.0f} MiB"
    return (row["method"], row["dtype"], name, wall, *factors, *seconds, share, peak)

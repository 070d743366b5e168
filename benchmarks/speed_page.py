"""docs/speed.md: every figure of `benchmarks/results/` that stands for a machine of its kind.

The headline workloads: our backends, won or lost, from the newest file of each operation, on a CPU and on a
GPU. What has no file reads "not measured".
"""

from pathlib import Path

import typer

from benchmarks import model_table, tables
from benchmarks.catalogue import BENCHMARKS
from benchmarks.providers import OURS, TORCH
from benchmarks.rows import Row

COLUMNS = ("operation", *tables.COLUMNS)
INTRODUCTION = """\
Median time of one call, the share of what a plain copy (for the co-activation, a matmul) reaches on the same
machine in the same run, and factors over the published algorithm and over the best plain torch. Below 1.00x
we are slower. All shapes and providers are in `benchmarks/results/`; your own machine's: `make bench`."""
TITLES = {"cpu": "CPU", "cuda": "GPU"}
NOT_MEASURED = "not measured"


def section(results: Path) -> str:
    """Everything between the page's two comments."""
    parts = [INTRODUCTION]
    for device, title in TITLES.items():
        parts += [f"### {title}", *_device(latest(results, device)), *model_table.section(results, device)]
    return "\n\n".join(parts)


def latest(results: Path, device: str) -> dict[str, Path]:
    """The newest file of each operation that was measured on such a device, smoke tests aside."""
    reports = {path: tables.read(path) for path in results.glob("*/*.json") if path.stem in BENCHMARKS}
    for path, report in reports.items():
        if report["machine"].get("rehearsal"):
            raise typer.BadParameter(f"{path} is no measurement. {tables.REHEARSAL}")
    return {
        path.stem: path
        for path, report in sorted(reports.items(), key=lambda item: item[1]["machine"]["date"])
        if report["machine"]["device"] == device and not report["quick"]
    }


def _device(paths: dict[str, Path]) -> list[str]:
    lines = [line for name in BENCHMARKS if name != "dispatch" for line in _lines(name, paths)]
    parts = [tables.markdown(COLUMNS, lines)]
    for folder in sorted({path.parent for path in paths.values()}):
        report = tables.read(next(path for path in paths.values() if path.parent == folder))
        parts.append(f"`{folder.name}`: {tables.conditions(report['machine'], report['roofs'])}")
        parts += plot(folder, "../benchmarks/results")
    return parts + _dispatch(paths)


def plot(folder: Path, results: str) -> list[str]:
    """A folder's roofline; `results`: the way to its parent from the page."""
    name = "roofline.svg"
    return [f"![Roofline]({results}/{folder.name}/{name})"] if (folder / name).exists() else []


def _lines(name: str, paths: dict[str, Path]) -> list[tuple[str, ...]]:
    if name not in paths:
        operation = BENCHMARKS[name].operation
        return [(operation, *[NOT_MEASURED if column == "time" else "-" for column in tables.COLUMNS])]
    return [(row.operation, *tables.cells(row)) for row in headlines(paths[name])]


def headlines(path: Path) -> list[Row]:
    """The headline workloads' rows of our backends; of plain torch where there is none."""
    rows = [row for row in tables.read(path)["rows"] if row.headline]
    return [row for row in rows if row.provider in OURS] or [row for row in rows if row.provider == TORCH]


def _dispatch(paths: dict[str, Path]) -> list[str]:
    if "dispatch" not in paths:
        return []
    rows: list[Row] = tables.read(paths["dispatch"])["rows"]
    calls = [f"`{row.setting}` {row.provider} {tables.duration(row.time_ms)}" for row in rows]
    return ["What a call costs before any work: " + "; ".join(calls) + "."]

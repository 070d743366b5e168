"""`make pages`: docs/speed.md, docs/quality.md and the pictures in docs/images, from the results.

A page's text above the line `MARKER` is written by hand and kept.
"""

from pathlib import Path

from benchmarks import charts
from benchmarks.core import machine, results, tables
from benchmarks.core.catalogue import BENCHMARKS
from benchmarks.core.providers import OURS, TORCH
from benchmarks.core.results import Run, replace_file
from benchmarks.core.rows import Row
from benchmarks.jobs import model_table
from benchmarks.quality.results import Results, mean_and_std
from wanda_kernels.dispatch.backends import TABLE

MARKER = "<!-- Everything below is written by `make pages`. -->"
DEVICES = {"cuda": "GPU", "cpu": "CPU"}
NOT_MEASURED = "Not measured."
METHODS = ("magnitude", "wanda", "wanda@refine=3", "connect", "gated", "wanda+obs")
METHODS += ("sparsegpt", "sparsegpt@polish=10", "admm")
RANKED_ALIKE = ("wanda", "connect", "gated")  # differ in gated MLPs alone
PATTERNS = ("0.3", "0.4", "0.5", "0.6", "0.7", "4:8", "2:4")
SIZES = (1, 4, 16, 64)
SIZE = 16  # calibration windows of the methods table
ABOUT_OPERATIONS = """\
Median time of one call; share of what a plain copy (for sums of products, a matmul) reaches on the same
machine in the same run; factors over the published algorithm and over the best plain torch. Below 1.00x we
are slower. Every shape and provider is in `benchmarks/results/*/operations.csv`."""


def write(root: Path, folder: Path) -> None:
    """All pages below `root`, from the results in `folder`."""
    docs, every = root / "docs", Results.every(folder / "quality")
    for name, text in (("speed.md", speed(folder)), ("quality.md", quality(every))):
        page = docs / name
        by_hand = page.read_text(encoding="utf-8").split(MARKER)[0]
        replace_file(page, f"{by_hand}{MARKER}\n\n{text}\n")


def draw(root: Path, folder: Path) -> None:
    """The pictures below `root`; needs matplotlib (the bench extra)."""
    images = root / "docs" / "images"
    charts.draw_speed(charts.speed_data(folder), images / "speed.svg")
    every = Results.every(folder / "quality")
    charts.draw_quality(charts.quality_data(every), images / "quality.svg")
    charts.draw_frontier(charts.frontier_data(every), images / "frontier.svg")


def speed(folder: Path) -> str:
    """Whole jobs, then operations, then the cost of a call; a GPU's before a CPU's."""
    runs = latest(folder)
    parts = ["## Whole jobs"]
    for device, title in DEVICES.items():
        reports = model_table.newest(folder, device)
        parts += [] if reports else [f"On a {title}: not measured."]
        for report in reports:
            parts += [f"### {model_table.title(report)}", model_table.table(report)]
            parts += [model_table.conditions(report)]
    parts += ["## Operations", ABOUT_OPERATIONS]
    for device, title in DEVICES.items():
        parts += [f"### {title}", *_operations(runs[device])]
    parts += ["## Cost of a call on tensors of a few elements"]
    for device, title in DEVICES.items():
        parts += [f"**{title}**", *_dispatch(runs[device])]
    return "\n\n".join(parts)


def latest(folder: Path) -> dict[str, dict[str, tuple[Path, Run]]]:
    """By device and operation, the newest folder that has it; raises `ValueError` for a rehearsal."""
    found: dict[str, dict[str, tuple[Path, Run]]] = {device: {} for device in DEVICES}
    dates: dict[tuple[str, str], str] = {}
    for path in sorted(path.parent for path in folder.glob(f"*/{results.TABLE}")):
        run = results.read(path)
        if why_not := tables.warning(run.machine, run.quick):
            raise ValueError(f"{path} is no measurement. {why_not}")
        device = run.machine["device"]
        for row in run.rows:
            if row.date >= dates.get((device, row.operation), ""):
                dates[device, row.operation] = row.date
                found[device][row.operation] = path, run
    return found


def headlines(run: Run, operation: str) -> list[Row]:
    """The rows of our backends on the headline workloads; of plain torch if there is none.

    A backend that has been removed since the run is left out.
    """
    served = set(OURS).intersection(TABLE.get(operation, OURS))
    rows = [row for row in run.rows if row.headline and row.operation == operation]
    return [row for row in rows if row.provider in served] or [row for row in rows if row.provider == TORCH]


def _operations(of_device: dict[str, tuple[Path, Run]]) -> list[str]:
    names = [each.operation for each in BENCHMARKS.values() if each.operation != "dispatch"]
    rows = [row for name in names if name in of_device for row in headlines(of_device[name][1], name)]
    missing = [name for name in names if name not in of_device]
    parts = [tables.markdown(tables.COLUMNS, map(tables.cells, rows))] if rows else []
    parts += [f"Not measured: {', '.join(missing)}."] if missing else []
    return parts + _conditions(of_device, names)


def _conditions(of_device: dict[str, tuple[Path, Run]], names: list[str]) -> list[str]:
    """The machine of each folder, and each of its runs: commit, roofs, load, date."""
    parts = []
    for path, run in {path: run for path, run in of_device.values()}.items():
        shown = [row for row in run.rows if row.operation in names and of_device[row.operation][0] == path]
        if not shown:
            continue
        groups: dict[tuple, list[Row]] = {}
        for row in shown:
            groups.setdefault((row.commit, row.copy_gb_s, row.matmul_tflop_s), []).append(row)
        sentences = [f"`{path.name}`: {machine.hardware(run.machine)}."]
        for (commit, copy, matmul), rows in groups.items():
            loads, dates = sorted({row.load_before for row in rows}), sorted({row.date for row in rows})
            operations = ", ".join(dict.fromkeys(row.operation for row in rows))
            sentences.append(
                f"{operations}: commit {commit}; load {_ends(loads)} before; {_ends(dates)}. Roofs, measured "
                f"first: {copy:,.1f} GB/s ({run.copy}), {matmul:,.3g} TFLOP/s ({run.matmul})."
            )
        parts.append("\n- ".join(sentences))
    return parts


def _ends(values: list) -> str:
    return f"{values[0]} to {values[-1]}" if len(values) > 1 else f"{values[0]}"


def _dispatch(of_device: dict[str, tuple[Path, Run]]) -> list[str]:
    if "dispatch" not in of_device:
        return [NOT_MEASURED]
    calls: dict[str, dict[str, str]] = {}
    for row in of_device["dispatch"][1].rows:
        if row.operation == "dispatch":
            name = row.provider.replace(row.setting, "NAME")
            calls.setdefault(row.setting, {})[name] = tables.duration(row.time_ms)
    used = list(dict.fromkeys(name for found in calls.values() for name in found))
    lines = [(operation, *(found.get(name, "-") for name in used)) for operation, found in calls.items()]
    return [tables.markdown(("NAME", *used), lines), *_conditions(of_device, ["dispatch"])]


def quality(every: list[Results]) -> str:
    """The methods, then the number of calibration windows."""
    parts = ["## Methods"]
    for found in every:
        about = f"**{found.label}**, dense {found.dense:.2f}; {found.protocol}."
        spent = f" Seconds and memory: {machine.sentence(found.machine)}" if found.machine else ""
        parts += [about + spent, methods_table(found)]
    parts += ["## Calibration windows"]
    for found in every:
        parts += [f"**{found.label}**, dense {found.dense:.2f}; {found.protocol}.", windows_table(found)]
    return "\n\n".join(parts)


def methods_table(found: Results) -> str:
    """Method x pattern: perplexity mean (std) over seeds, seconds, peak memory."""
    lines = []
    for method in METHODS:
        for pattern in PATTERNS:
            perplexities = found.perplexities(method, pattern, SIZE)
            if not perplexities:
                continue
            cost = found.cost(method, pattern)
            spent = (f"{cost.seconds:.1f} s", f"{cost.peak_bytes / 2**20:.0f} MiB") if cost else ("-", "-")
            lines.append((method, pattern, mean_and_std(perplexities), str(len(perplexities)), *spent))
    return tables.markdown(("method", "pattern", "perplexity", "seeds", "whole job", "peak memory"), lines)


def windows_table(found: Results) -> str:
    """Calibration windows x method, on the seeds that all have, and for how many gated is the best."""
    lines = []
    for pattern in PATTERNS:
        for size in SIZES:
            of = {method: found.perplexities(method, pattern, size) for method in RANKED_ALIKE}
            seeds = set.intersection(*(set(perplexities) for perplexities in of.values()))
            if len(seeds) < 2:
                continue
            means = [mean_and_std({seed: each[seed] for seed in seeds}) for each in of.values()]
            wins = sum(min(of, key=lambda method, s=seed: of[method][s]) == "gated" for seed in seeds)
            lines.append((pattern, str(size), *means, str(len(seeds)), str(wins)))
    columns = ("pattern", "calibration windows", *RANKED_ALIKE, "seeds", "gated is best")
    return tables.markdown(columns, lines) if lines else NOT_MEASURED


if __name__ == "__main__":
    write(machine.ROOT, machine.RESULTS)
    draw(machine.ROOT, machine.RESULTS)

"""`python -m benchmarks.readme`: the figures in README.md and docs/speed.md, from `benchmarks/results/`.

They stand between two comments of each page. The README says in one line a job and one an operation what
docs/speed.md has by shape, setting and provider.
"""

from collections.abc import Callable
from pathlib import Path
from typing import Annotated

import typer

from benchmarks import model_table, pages, speed_page, tables
from benchmarks.catalogue import BENCHMARKS
from benchmarks.machine import ROOT
from benchmarks.rows import OK, Row
from benchmarks.speed_page import NOT_MEASURED, TITLES
from benchmarks.tables import RESULTS

SECTION = "benchmarks"
MEASURES = ("over published", "over torch", "of roof")
COLUMNS = ("operation", *(f"{title}: {measure}" for title in TITLES.values() for measure in MEASURES))

app = typer.Typer(add_completion=False)


@app.command()
def write(
    readme: Annotated[Path, typer.Option(help="The page with the summary.")] = ROOT / "README.md",
    speed: Annotated[Path, typer.Option(help="The page with every figure.")] = ROOT / "docs" / "speed.md",
    results: Annotated[Path, typer.Option(help="Folder of DATE-MACHINE folders.")] = RESULTS,
) -> None:
    """Replace what stands between the two comments of each page."""
    pages.replace_section(readme, SECTION, summary(results))
    pages.replace_section(speed, SECTION, speed_page.section(results))


def summary(results: Path) -> str:
    """Whole jobs, a line each; the operations, the range over their headline workloads; the plots."""
    paths = {device: speed_page.latest(results, device) for device in TITLES}
    names = [name for name in BENCHMARKS if name != "dispatch"]
    lines = [_line(name, [of_device.get(name) for of_device in paths.values()]) for name in names]
    folders = sorted({path.parent for of_device in paths.values() for path in of_device.values()})
    plots = [plot for folder in folders for plot in speed_page.plot(folder, "benchmarks/results")]
    return "\n\n".join([model_table.summary(results), tables.markdown(COLUMNS, lines), *plots])


def _line(name: str, paths: list[Path | None]) -> tuple[str, ...]:
    cells = [cell for path in paths for cell in _ranges(path)]
    return (BENCHMARKS[name].operation, *cells)


def _ranges(path: Path | None) -> tuple[str, ...]:
    """Lowest to highest of each measure, over the headline workloads; of each the fastest of our backends."""
    if path is None:
        return (NOT_MEASURED, "-", "-")
    rows = speed_page.headlines(path)
    wrong = [row for row in rows if row.status != OK]
    if wrong:
        return (f"**{wrong[0].status}**: {wrong[0].provider}, {wrong[0].note}", "-", "-")
    fastest: dict[tuple[str, ...], Row] = {}
    for row in rows:
        fastest[row.case] = min(row, fastest.get(row.case, row), key=lambda each: each.time_ms)
    return (
        _range(tables.times, [row.over_published for row in fastest.values()]),
        _range(tables.times, [row.over_torch for row in fastest.values()]),
        _range(_percent, [row.roof_pct for row in fastest.values()]),
    )


def _percent(value: float) -> str:
    return f"{value:.0f}%" if value >= 1 else f"{value:.1f}%"


def _range(text: Callable[[float], str], values: list[float | None]) -> str:
    known = [value for value in values if value is not None]
    ends = dict.fromkeys(text(end) for end in (min(known), max(known))) if known else ["-"]
    return " to ".join(ends)


if __name__ == "__main__":
    app()

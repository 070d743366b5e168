"""Rows as text: cells, Markdown for pages, aligned columns for a terminal."""

from collections.abc import Iterable

from benchmarks.core import machine
from benchmarks.core.roofs import Roofs
from benchmarks.core.rows import OK, Row

COLUMNS = (
    *("operation", "shape", "dtype", "setting", "backend", "time", "spread"),
    *("rate", "of roof", "over published", "over torch"),
)
REHEARSAL = "A rehearsal on a CPU, tiny shapes and interpreted kernels: its figures say nothing of speed."
QUICK = "A smoke test on tiny shapes: its figures say nothing of speed."


def warning(facts: dict, quick: bool) -> str:
    return REHEARSAL if facts.get("rehearsal") else QUICK if quick else ""


def conditions(facts: dict, roofs: Roofs) -> str:
    return (
        f"{machine.sentence(facts)} Roofs, measured first: {roofs.bytes_per_s / 1e9:,.1f} GB/s "
        f"({roofs.copy}), {roofs.flops_per_s / 1e12:,.3g} TFLOP/s ({roofs.matmul})."
    )


def cells(row: Row) -> tuple[str, ...]:
    """A row as text, in the order of `COLUMNS`; an unknown value is a dash."""
    case = (row.operation, row.shape, row.dtype, row.setting, row.provider)
    if row.status != OK:
        return *case, f"**{row.status}**: {row.note}", *["-"] * 5
    return (
        *case,
        duration(row.time_ms),
        "one run" if row.rounds == 1 else _or_dash(row.spread_pct, "{:.0f}%"),
        rate(row),
        _or_dash(row.roof_pct, "{:.1f}%"),
        times(row.over_published),
        times(row.over_torch),
    )


def duration(time_ms: float | None) -> str:
    if time_ms is None:
        return "-"
    if time_ms < 1:
        return f"{time_ms * 1e3:.3g} us"
    return f"{time_ms:,.3g} ms" if time_ms < 1e3 else f"{time_ms:,.0f} ms"


def rate(row: Row) -> str:
    if row.roof == "flops":
        return f"{rounded(row.tflop_s)} TFLOP/s"
    return "-" if row.gb_s is None else f"{rounded(row.gb_s)} GB/s"


def rounded(value: float) -> str:
    """To three significant digits: 3,280 or 0.131."""
    return f"{float(f'{value:.3g}'):,g}"


def times(factor: float | None) -> str:
    """A speed-up; below 1 it is a loss."""
    return _or_dash(factor, "{:,.2f}x" if factor is not None and factor < 10 else "{:,.0f}x")


def _or_dash(value: float | None, pattern: str) -> str:
    return "-" if value is None else pattern.format(value)


def markdown(header: Iterable[str], lines: Iterable[Iterable[str]]) -> str:
    header = list(header)
    table = [header, ["---"] * len(header), *(list(line) for line in lines)]
    return "\n".join("| " + " | ".join(cell.replace("|", "\\|") for cell in line) + " |" for line in table)


def aligned(header: Iterable[str], *lines: Iterable[str]) -> str:
    """Columns as wide as their widest cell."""
    table = [tuple(header), *map(tuple, lines)]
    widths = [max(map(len, column)) for column in zip(*table, strict=True)]
    table.insert(1, tuple("-" * width for width in widths))
    padded = ([cell.ljust(width) for cell, width in zip(line, widths, strict=True)] for line in table)
    return "\n".join("  ".join(line).rstrip() for line in padded)

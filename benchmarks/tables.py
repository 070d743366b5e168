"""Rows as files: JSON for programs, CSV for spreadsheets, Markdown for readers; written as they come."""

import csv
import io
import json
import os
from collections.abc import Iterable, Mapping
from dataclasses import asdict, fields
from pathlib import Path

from benchmarks import machine
from benchmarks.roofs import Roofs
from benchmarks.rows import OK, Row

COLUMNS = (
    "shape",
    "dtype",
    "setting",
    "provider",
    "time",
    "spread",
    "rate",
    "of roof",
    "over published",
    "over torch",
)
REHEARSAL = "A rehearsal on a CPU, tiny shapes and interpreted kernels: its figures say nothing of speed."
RESULTS = machine.ROOT / "benchmarks" / "results"


def write(
    folder: Path,
    operation: str,
    rows: list[Row],
    facts: dict,
    roofs: Roofs,
    quick: bool,
    not_run: Mapping[str, str],
) -> None:
    """`<operation>.json`, `.csv` and `.md` in `folder`, each replaced as a whole."""
    folder.mkdir(parents=True, exist_ok=True)
    name = operation.rstrip("_")
    report = {
        "operation": operation,
        "quick": quick,
        "machine": facts,
        "roofs": asdict(roofs),
        "not_run": dict(not_run),
        "rows": [asdict(row) for row in rows],
    }
    replace_file(folder / f"{name}.json", json.dumps(report, indent=1) + "\n")
    replace_file(folder / f"{name}.csv", as_csv(rows, facts))
    replace_file(folder / f"{name}.md", _page(operation, rows, facts, roofs, quick, not_run))


def read(path: Path) -> dict:
    """A JSON file written here, with its rows as `Row`."""
    return from_json(json.loads(path.read_text()))


def from_json(report: dict) -> dict:
    return report | {"rows": [Row(**row) for row in report["rows"]], "roofs": Roofs(**report["roofs"])}


def replace_file(path: Path, text: str) -> None:
    """Write the whole file or leave the old one: whoever is interrupted leaves no half of it."""
    partial = path.with_name(path.name + ".partial")
    partial.write_text(text, encoding="utf-8")
    os.replace(partial, path)


def as_csv(rows: Iterable[Row], facts: dict) -> str:
    """Every field of every row, and the machine beside it."""
    text = io.StringIO()
    names = [field.name for field in fields(Row)]
    where = {f"machine_{name}": value for name, value in facts.items()}
    writer = csv.DictWriter(text, [*names, *where], lineterminator="\n")
    writer.writeheader()
    writer.writerows(asdict(row) | where for row in rows)
    return text.getvalue()


def _page(operation, rows, facts, roofs: Roofs, quick: bool, not_run: Mapping[str, str]) -> str:
    parts = [f"# {operation}", conditions(facts, roofs)]
    if facts.get("rehearsal"):
        parts.append(f"**{REHEARSAL}**")
    elif quick:
        parts.append("**A smoke test on tiny shapes: these figures say nothing about speed.**")
    if operation != "dispatch":
        parts.append(
            "Time is the median of calls on cold buffers, variants interleaved; spread is between quartiles. "
            "torch.compile is run on the headline shapes in bf16."
        )
    parts.append(markdown(COLUMNS, [cells(row) for row in rows]))
    parts += [f"Not run: {provider}: {reason}." for provider, reason in not_run.items()]
    return "\n\n".join(parts) + "\n"


def conditions(facts: dict, roofs: Roofs) -> str:
    measured = (
        f"Roofs, measured first: {roofs.bytes_per_s / 1e9:,.1f} GB/s ({roofs.copy}), "
        f"{roofs.flops_per_s / 1e12:,.3g} TFLOP/s ({roofs.matmul})."
    )
    return f"{machine.sentence(facts)} {measured}"


def cells(row: Row) -> tuple[str, ...]:
    """A row as text, in the order of `COLUMNS`; what is not known is a dash."""
    if row.status != OK:
        return row.shape, row.dtype, row.setting, row.provider, f"**{row.status}**: {row.note}", *["-"] * 5
    return (
        row.shape,
        row.dtype,
        row.setting,
        row.provider,
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
    return (
        f"{time_ms * 1e3:.3g} us"
        if time_ms < 1
        else f"{time_ms:,.3g} ms"
        if time_ms < 1e3
        else f"{time_ms:,.0f} ms"
    )


def rate(row: Row) -> str:
    if row.roof == "flops":
        return f"{row.tflop_s:.3g} TFLOP/s"
    return _or_dash(row.gb_s, "{:,.3g} GB/s")


def times(factor: float | None) -> str:
    """A speed-up; below one it is a loss and reads so."""
    return _or_dash(factor, "{:,.2f}x" if factor is not None and factor < 10 else "{:,.0f}x")


def _or_dash(value: float | None, pattern: str) -> str:
    return "-" if value is None else pattern.format(value)


def markdown(header: Iterable[str], lines: Iterable[Iterable[str]]) -> str:
    header = list(header)
    table = [header, ["---"] * len(header), *(list(line) for line in lines)]
    return "\n".join("| " + " | ".join(cell.replace("|", "\\|") for cell in line) + " |" for line in table)

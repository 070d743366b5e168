"""A run's folder: `operations.csv`, a line for each row; `machine.json`, what the rows were measured on.

Rows of operations that a later run into the same folder leaves out are kept, each with its own commit, date,
load and roofs.
"""

import csv
import io
import json
import os
from dataclasses import asdict, dataclass, field, fields, replace
from pathlib import Path

from benchmarks.core import machine
from benchmarks.core.roofs import Roofs
from benchmarks.core.rows import Row

TABLE, MACHINE = "operations.csv", "machine.json"


@dataclass
class Run:
    """The content of a folder. `not_run`: by operation and provider, why it was left out."""

    machine: dict
    copy: str = ""  # what the roofs were measured with
    matmul: str = ""
    quick: bool = False
    not_run: dict[str, dict[str, str]] = field(default_factory=dict)
    rows: list[Row] = field(default_factory=list)


class OtherMachineError(ValueError):
    """The folder has figures of another machine."""


def write(
    folder: Path, rows: list[Row], facts: dict, roofs: Roofs, quick: bool, not_run: dict[str, str]
) -> None:
    """Replace the rows of one operation in the folder; raises `OtherMachineError`."""
    operation = rows[0].operation
    run = read(folder) if (folder / TABLE).exists() else Run(facts)
    if different := machine.difference(run.machine, facts):
        raise OtherMachineError(f"{folder} holds figures of another machine: {different}")
    measured = dict(copy_gb_s=roofs.bytes_per_s / 1e9, matmul_tflop_s=roofs.flops_per_s / 1e12)
    measured |= {name: facts[name] for name in ("load_before", "commit", "date")}
    kept = [row for row in run.rows if row.operation != operation]
    about = asdict(replace(run, machine=facts, copy=roofs.copy, matmul=roofs.matmul, quick=quick, rows=[]))
    about["not_run"][operation] = dict(not_run)
    del about["rows"]
    folder.mkdir(parents=True, exist_ok=True)
    replace_file(folder / TABLE, as_csv(kept + [replace(row, **measured) for row in rows]))
    replace_file(folder / MACHINE, compact_json(about))


def read(folder: Path) -> Run:
    with (folder / TABLE).open(newline="", encoding="utf-8") as file:
        rows = [_row(line) for line in csv.DictReader(file)]
    return Run(**json.loads((folder / MACHINE).read_text(encoding="utf-8")), rows=rows)


def _row(line: dict[str, str]) -> Row:
    return Row(**{each.name: _value(each.type, line[each.name]) for each in fields(Row)})


def _value(kind, text: str):
    if kind is str:
        return text
    if kind is bool:
        return text == "True"
    if text == "":
        return None
    return text if kind == str | None else int(text) if kind == int | None else float(text)


def as_csv(rows: list[Row]) -> str:
    text = io.StringIO()
    writer = csv.DictWriter(text, [each.name for each in fields(Row)], lineterminator="\n")
    writer.writeheader()
    writer.writerows(asdict(row) for row in rows)
    return text.getvalue()


def compact_json(content: dict) -> str:
    """JSON with a line for each key, and for each item of a list."""
    lines = []
    for name, value in content.items():
        text = json.dumps(value)
        if isinstance(value, list) and value:
            text = "[\n  " + ",\n  ".join(map(json.dumps, value)) + "\n ]"
        lines.append(f" {json.dumps(name)}: {text}")
    return "{\n" + ",\n".join(lines) + "\n}\n"


def replace_file(path: Path, text: str) -> None:
    """Write the whole file, or leave the old one untouched if interrupted."""
    partial = path.with_name(path.name + ".partial")
    partial.write_text(text, encoding="utf-8")
    os.replace(partial, path)

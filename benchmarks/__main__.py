"""`python -m benchmarks`: every operation, correctness first, then time; files as they finish.

    python -m benchmarks                          the CPU, or the GPU where torch sees one
    python -m benchmarks --only prune_nm --only dispatch
    python -m benchmarks --quick                  tiny shapes: a smoke test

Exits 1 where a provider's result was wrong.
"""

from datetime import date
from pathlib import Path
from typing import Annotated

import torch
import typer
from rich.console import Console

from benchmarks import machine, roofline, roofs, tables
from benchmarks.catalogue import BENCHMARKS
from benchmarks.measure import BUDGET_S, measure
from benchmarks.rows import FAILED
from benchmarks.suite import Session
from benchmarks.tables import RESULTS

app = typer.Typer(add_completion=False)
console = Console(highlight=False, soft_wrap=True)


@app.command()
def run(
    only: Annotated[
        list[str] | None, typer.Option(help="An operation, such as prune_nm; may be repeated.")
    ] = None,
    quick: Annotated[bool, typer.Option("--quick", help="Tiny shapes: a smoke test.")] = False,
    out: Annotated[Path | None, typer.Option(help="Folder; else benchmarks/results/DATE-MACHINE.")] = None,
    device: Annotated[str, typer.Option(help="auto, cpu or cuda.")] = "auto",
    seconds: Annotated[float | None, typer.Option(help="Timed per provider and workload.")] = None,
    no_compile: Annotated[bool, typer.Option("--no-compile", help="Leave torch.compile out.")] = False,
) -> None:
    """Measure the operations against published code and plain torch, on this machine."""
    names = _chosen(only)
    device = _device(device)
    facts = machine.describe(device)
    folder = out or (
        Path("out/benchmarks-quick") if quick else RESULTS / f"{date.today()}-{machine.slug(facts)}"
    )
    measured = roofs.measure(device, quick)
    budget = seconds if seconds is not None else 0.002 if quick else BUDGET_S[device]
    session = Session(device, quick, not (quick or no_compile), budget, measured)
    console.print(tables.conditions(facts, measured))
    rows = []
    for name in names:
        console.print(f"\n[bold]{BENCHMARKS[name].operation}[/bold]")
        rows += measure(BENCHMARKS[name], session, facts, folder, _say)
    measured_here = [path for path in sorted(folder.glob("*.json")) if path.stem in BENCHMARKS]
    plotted = [row for path in measured_here for row in tables.read(path)["rows"]]
    reason = roofline.plot(folder / "roofline.svg", plotted, measured, machine.sentence(facts))
    message = f"No roofline plot: {reason}." if reason else f"Plot: {folder / 'roofline.svg'}"
    console.print(message, markup=False)
    console.print(f"Tables: {folder}")
    if any(row.status == FAILED for row in rows):
        raise typer.Exit(1)


def _chosen(only: list[str] | None) -> list[str]:
    names = [name.removeprefix("bench_").rstrip("_") for name in only or BENCHMARKS]
    for name in names:
        if name not in BENCHMARKS:
            raise typer.BadParameter(f"no benchmark {name!r}: choose from {', '.join(BENCHMARKS)}")
    return names


def _device(device: str) -> str:
    if device == "auto":
        return "cuda" if torch.cuda.is_available() else "cpu"
    if device not in BUDGET_S:
        raise typer.BadParameter(f"unknown device {device!r}: choose auto, cpu, cuda")
    if device == "cuda" and not torch.cuda.is_available():
        raise typer.BadParameter("torch sees no CUDA GPU")
    return device


def _say(line: str) -> None:
    console.print(line, markup=False)


if __name__ == "__main__":
    app()

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

from benchmarks import (
    bench_add_coactivation,
    bench_add_gated_coactivation,
    bench_add_sq_norm,
    bench_dispatch,
    bench_prune_matrix,
    bench_prune_nm,
    bench_prune_rows,
    bench_prune_variant,
    machine,
    roofline,
    roofs,
    tables,
)
from benchmarks.rows import FAILED, Row, with_speed_ups
from benchmarks.suite import Session

MODULES = (  # in order of worth: a visit to a GPU may end early
    bench_prune_nm,
    bench_prune_rows,
    bench_add_coactivation,
    bench_add_gated_coactivation,
    bench_add_sq_norm,
    bench_prune_matrix,
    bench_prune_variant,
    bench_dispatch,
)
BENCHMARKS = {module.BENCHMARK.operation.rstrip("_"): module.BENCHMARK for module in MODULES}
RESULTS = Path(__file__).parent / "results"
BUDGET_S = {"cpu": 1.0, "cuda": 0.15}

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
    rows = [row for name in names for row in _run_one(BENCHMARKS[name], session, facts, folder)]
    plotted = [row for path in sorted(folder.glob("*.json")) for row in tables.read(path)["rows"]]
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


@torch.inference_mode()
def _run_one(benchmark, session: Session, facts: dict, folder: Path) -> list[Row]:
    """One operation's rows, printed and written after each workload."""
    console.print(f"\n[bold]{benchmark.operation}[/bold]")
    line = benchmark.lineup(session)
    rows = []
    for found in benchmark.run(session, line):
        rows = with_speed_ups(rows + found)
        tables.write(folder, benchmark.operation, rows, facts, session.roofs, session.quick, line.not_run)
        for row in rows[-len(found) :]:
            console.print("  ".join(tables.cells(row)), markup=False)
    for provider, reason in line.not_run.items():
        console.print(f"Not run: {provider}: {reason}.", markup=False)
    return rows


if __name__ == "__main__":
    app()

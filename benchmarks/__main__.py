"""`make bench`: the speed of the operations on this machine, against the published code and torch.

    python -m benchmarks                          the CPU, or the GPU where torch sees one
    python -m benchmarks --only prune_nm --only dispatch
    python -m benchmarks --quick                  tiny shapes: a smoke test

Every result is compared with the reference before it is timed. Rows are written after each workload; the
table of the headline workloads comes last. Exits 1 where a provider's result was wrong.
"""

import argparse
import sys
import time
from datetime import date
from itertools import compress
from pathlib import Path

import torch

from benchmarks.core import machine, results, roofs, tables
from benchmarks.core.catalogue import BENCHMARKS
from benchmarks.core.providers import OURS
from benchmarks.core.rows import FAILED, Row
from benchmarks.core.suite import BUDGET_S, Session, measure


def main(arguments: list[str] | None = None) -> int:
    options = _parse(arguments)
    facts = machine.describe(options.device)
    folder = options.out or machine.RESULTS / f"{date.today()}-{machine.slug(facts)}"
    if warning := machine.busy(facts):
        print(warning, flush=True)
    session = Session(
        options.device,
        options.quick,
        budget_s=options.seconds,
        roofs=roofs.measure(options.device, options.quick),
        headline=options.headline,
        until=time.monotonic() + options.limit,
    )
    print(tables.conditions(facts, session.roofs), flush=True)
    benchmarks = [BENCHMARKS[name] for name in options.only or BENCHMARKS]
    progress = Progress(sum(len(benchmark.cases(session)) for benchmark in benchmarks))
    rows: list[Row] = []
    try:
        for benchmark in benchmarks:
            rows += measure(benchmark, session, facts, folder, progress)
    except results.OtherMachineError as error:
        print(error, file=sys.stderr)
        return 2
    print(f"\n{tables.conditions(facts, session.roofs)}\n\n{summary(rows)}\n")
    print(warning or tables.warning(facts, options.quick) or "The machine was quiet before the run.")
    print(f"Every shape and provider: {folder / results.TABLE}")
    wrong = [f"{row.operation} {row.shape} {row.provider}" for row in rows if row.status == FAILED]
    if wrong:
        print(f"{FAILED}, not timed: {', '.join(wrong)}")
    return 1 if wrong else 0


def summary(rows: list[Row]) -> str:
    """The headline workloads: our backends, and whatever failed."""
    shown = [row for row in rows if (row.headline and row.provider in OURS) or row.status == FAILED]
    lines = [tables.cells(row) for row in shown if row.operation != "dispatch"]
    keep = [name not in ("spread", "rate") for name in tables.COLUMNS]
    return tables.aligned(*[[*compress(line, keep)] for line in (tables.COLUMNS, *lines)])


class Progress:
    """Prints a line for each workload: which of how many, and every provider's time."""

    def __init__(self, total: int):
        self.total, self.done, self.began = total, 0, time.monotonic()

    def __call__(self, rows: list[Row]) -> None:
        self.done += 1
        times = ", ".join(f"{row.provider} {tables.cells(row)[tables.COLUMNS.index('time')]}" for row in rows)
        operation, shape, dtype, setting = rows[0].case
        elapsed = time.monotonic() - self.began
        where = f"[{self.done}/{self.total}, {elapsed:.0f} s]"
        print(f"{where} {operation} {shape} {dtype} {setting}: {times}", flush=True)


def _parse(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser("python -m benchmarks", description=__doc__.splitlines()[0])
    words = dict(action="append", metavar="OPERATION", choices=[*BENCHMARKS])
    parser.add_argument("--only", help=f"may be repeated: {', '.join(BENCHMARKS)}", **words)
    parser.add_argument("--quick", action="store_true", help="tiny shapes: a smoke test")
    parser.add_argument("--headline", action="store_true", help="only the workloads of the last table")
    parser.add_argument("--out", type=Path, help="folder (benchmarks/results/DATE-MACHINE)")
    parser.add_argument("--device", choices=("auto", *BUDGET_S), default="auto")
    parser.add_argument("--seconds", type=float, help="timed per provider and workload")
    parser.add_argument("--limit", type=float, default=float("inf"), help="seconds after which to stop")
    options = parser.parse_args(arguments)
    if options.device == "auto":
        options.device = "cuda" if torch.cuda.is_available() else "cpu"
    if options.device == "cuda" and not torch.cuda.is_available():
        parser.error("torch sees no CUDA GPU")
    if options.seconds is None:
        options.seconds = 0.002 if options.quick else BUDGET_S[options.device]
    if options.quick and not options.out:
        options.out = Path("out/benchmarks-quick")
    return options


if __name__ == "__main__":
    raise SystemExit(main())

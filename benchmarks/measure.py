"""One benchmark's rows: each workload's are said and written as soon as they are there."""

import time
from collections.abc import Callable
from pathlib import Path

import torch

from benchmarks import tables
from benchmarks.rows import Row, with_speed_ups
from benchmarks.suite import Session

BUDGET_S = {"cpu": 1.0, "cuda": 0.15}  # of timed calls, for each provider on each workload


@torch.inference_mode()
def measure(
    benchmark,
    session: Session,
    facts: dict,
    folder: Path,
    say: Callable[[str], None],
    until: float = float("inf"),
) -> list[Row]:
    """Rows of a `suite.Benchmark`, written to `folder`; no workload is begun after `until` (monotonic)."""
    line = benchmark.lineup(session)
    rows = []
    for found in benchmark.run(session, line):
        rows = with_speed_ups(rows + found)
        tables.write(folder, benchmark.operation, rows, facts, session.roofs, session.quick, line.not_run)
        for row in rows[-len(found) :]:
            say("  ".join(tables.cells(row)))
        if time.monotonic() > until:
            say(f"{benchmark.operation}: out of time; any workload after this one is left out.")
            break
    for provider, reason in line.not_run.items():
        say(f"Not run: {provider}: {reason}.")
    return rows

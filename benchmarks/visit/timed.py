"""`python -m benchmarks.visit.timed NAME ...`: benchmarks in a process of their own, written as they come."""

import argparse
import json
import time
from dataclasses import replace
from pathlib import Path

from benchmarks import machine
from benchmarks.catalogue import BENCHMARKS
from benchmarks.measure import BUDGET_S, measure
from benchmarks.roofs import Roofs
from benchmarks.suite import Benchmark, Session
from benchmarks.workloads import Workload


def headline_first(benchmark, only: bool):
    """The benchmark with its headline workloads before the others, or alone."""
    if not isinstance(benchmark, Benchmark):
        return benchmark

    def workloads(device: str, quick: bool) -> list[Workload]:
        found = sorted(benchmark.workloads(device, quick), key=lambda workload: not workload.headline)
        return [workload for workload in found if workload.headline or not only]

    return replace(benchmark, workloads=workloads)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("names", nargs="+")
    parser.add_argument("--device", required=True, choices=("cpu", "cuda"))
    parser.add_argument("--rates", required=True, type=Path, help="file of benchmarks.visit.rates")
    parser.add_argument("--out", required=True, type=Path, help="folder")
    parser.add_argument("--limit", type=float, required=True, help="seconds; no workload is begun after them")
    parser.add_argument("--quick", action="store_true", help="tiny shapes")
    parser.add_argument("--headline", action="store_true", help="headline workloads alone")
    parser.add_argument("--compiled", action="store_true", help="with torch.compile")
    options = parser.parse_args()
    until = time.monotonic() + options.limit
    measured = Roofs(**json.loads(options.rates.read_text())["roofs"])
    seconds = 0.0 if options.quick else BUDGET_S[options.device]
    session = Session(options.device, options.quick, options.compiled, seconds, measured)
    facts = machine.describe(options.device)
    for name in options.names:
        benchmark = headline_first(BENCHMARKS[name], options.headline)
        measure(benchmark, session, facts, options.out, lambda line: print(line, flush=True), until)


if __name__ == "__main__":
    main()

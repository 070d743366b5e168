"""`python -m benchmarks.gpu_visit` (`make bench-gpu`): all that needs a GPU, in one command of 9 minutes.

    make bench-gpu ARGS="--out $OUT"                  a bare machine: torch, triton, transformers, pytest
    make bench-gpu ARGS="--out $OUT --only jobs"      a part again: see --help
    WANDA_BENCH_REHEARSE=1 make bench-gpu             the same path on a CPU; nothing of it is a figure
    python -m benchmarks.gpu_visit --publish FILE     afterwards: files of benchmarks/results for the README

In this order: the machine; the CUDA library; every operation against the reference, the tests marked `gpu`,
compute-sanitizer; roofs; benchmarks in order of worth; whole jobs; torch.compile; goals beside what came. An
operation with a failed test gets no speed-up. Written after each part; an interrupt keeps what is done.

A checkout without .git: WANDA_BENCH_COMMIT, or a file COMMIT, says which commit it is. Exits 1 where an
operation's test failed or it was interrupted, 2 on wrong usage.
"""

import argparse
import os
import signal
import sys
import tempfile
import time
from collections.abc import Callable
from datetime import date
from pathlib import Path

import torch

from benchmarks import machine
from benchmarks.catalogue import BENCHMARKS
from benchmarks.tables import RESULTS
from benchmarks.visit import figures, jobs, page, proof, proving, publish, state
from wanda_kernels.dispatch.backends import TABLE

REHEARSAL = os.environ.get("WANDA_BENCH_REHEARSE") == "1"
LEAST_S = 20  # a part that would have less is left out
JOBS_SHARE = 0.3  # of the time, kept free of benchmarks where jobs are asked for
SPOILT = "prune_matrix_"  # in a rehearsal: its results are made wrong, and its speed-ups must be refused
COMPILED_IN_REHEARSAL = ["add_sq_norm"]  # the compiler takes ten seconds each
STAGES = (*proving.STAGES, "rates", "bench", "jobs", "compiled")


def main(arguments: list[str] | None = None) -> int:
    options = _parse(arguments)
    if options.publish:
        try:
            print(publish.publish(options.publish, options.results))
        except publish.PublishError as error:
            print(error, file=sys.stderr)
            return 2
        return 0
    if not REHEARSAL and not torch.cuda.is_available():
        print("torch sees no CUDA GPU here; WANDA_BENCH_REHEARSE=1 rehearses on a CPU", file=sys.stderr)
        return 2
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    with tempfile.TemporaryDirectory(prefix="gpu_visit") as work:
        visit = _begin(options, Path(work))
        try:
            _visit(visit, options.only or list(STAGES))
            code = _exit_code(visit)
        except KeyboardInterrupt:
            code = 1
            visit.note("interrupted: what follows was not measured")
        finally:
            visit.save()
            visit.say(page.closing(visit.data, visit.rows()))
            visit.say(f"\n{visit.out / 'visit.md'} has all of it.")
    return code


def _begin(options: argparse.Namespace, work: Path) -> state.Visit:
    began = time.monotonic()
    if REHEARSAL:
        os.environ["TRITON_INTERPRET"] = "1"  # the children's Triton
    paths = [str(machine.ROOT), str(machine.ROOT / "kernels"), os.environ.get("PYTHONPATH", "")]
    os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, paths))
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    facts = machine.describe("cpu" if REHEARSAL else "cuda")
    out = options.out or _default_folder(facts)
    data = state.resumed(out / "visit.json", facts) | {"seed": options.seed}
    deadline = began + 60 * options.minutes
    visit = state.Visit(out, work, deadline, REHEARSAL, SPOILT if REHEARSAL else "", data)
    visit.save()
    visit.say(machine.sentence(facts))
    return visit


def _default_folder(facts: dict) -> Path:
    kind = "rehearsal" if REHEARSAL else f"{date.today()}-{machine.slug(facts)}"
    return machine.ROOT / "out" / "gpu_visit" / kind


def _visit(visit: state.Visit, only: list[str]) -> None:
    """The parts that `only` names, in the visit's order."""
    benches = [name for name in BENCHMARKS if "bench" in only or name in only]
    compiled = [name for name in BENCHMARKS if "compiled" in only and name != "dispatch"]
    wanted_jobs = [
        name for name in jobs.names(visit.rehearsal) if "jobs" in only or name.startswith(tuple(only))
    ]
    _prove(visit, only, benches + compiled, needs_library=bool(wanted_jobs))
    if "rates" in only or (benches or compiled) and not visit.data["rates"]:
        _part(visit, "rates", figures.measure_rates)
    kept = JOBS_SHARE * visit.left() if wanted_jobs else 0
    if visit.data["rates"]:
        # a process each, so that what a kernel does ends no other's figures
        for names in [benches] if visit.rehearsal and benches else [[name] for name in benches]:
            _part(visit, f"bench {', '.join(names)}", figures.measure_benchmarks, names, kept=kept)
    for name in wanted_jobs:
        _part(visit, f"job {name}", jobs.measure, name)
    if visit.data["rates"]:
        for name in COMPILED_IN_REHEARSAL if visit.rehearsal and compiled else compiled:
            _part(visit, f"compiled {name}", figures.measure_benchmarks, [name], True)


def _prove(visit: state.Visit, only: list[str], names: list[str], needs_library: bool) -> None:
    """The stages asked for, and the truth of every benchmark whose figures would have none."""
    measured = [operation for operation in TABLE if operation.rstrip("_") in names]
    stages = [stage for stage in proving.STAGES if stage in only]
    if "truth" not in stages and any(not proof.is_asked(visit.data["proof"], each) for each in measured):
        stages.append("truth")
    if stages:
        asked = list(TABLE) if set(only) & set(proving.STAGES) else measured
        for operation in [each for each in asked if not _has_benchmark(each)]:
            visit.note(f"{operation} has no benchmark: no truth on real shapes, no figures")
        _part(visit, "truth", proving.prove, asked, stages)
    elif not visit.rehearsal and (names or needs_library):
        _part(visit, "build", proving.build)


def _part(visit: state.Visit, name: str, run: Callable[..., str], *arguments, kept: float = 0) -> None:
    """Run a part where there is time for it, and write down how it ended: `run` says why it failed."""
    began, left = time.monotonic(), visit.left()
    if left - kept < LEAST_S:
        visit.data["parts"].setdefault(name, {"state": "left out: no time", "seconds": 0.0})
    else:
        visit.say(f"\n{name} ({left:.0f} s left)")
        why = run(visit, *arguments)
        if why:
            visit.note(f"{name}: {why}")
        visit.data["parts"][name] = {"state": why or "done", "seconds": time.monotonic() - began}
    visit.save()


def _exit_code(visit: state.Visit) -> int:
    """0 where no operation that was asked is in doubt; in a rehearsal, where the spoilt one alone is."""
    checks = visit.data["proof"]
    asked = {
        each["operation"] for each in checks.values() if each["failed"] or _has_benchmark(each["operation"])
    }
    doubted = {operation for operation in asked if proof.doubt(checks, operation)}
    return 0 if doubted == ({visit.spoil} if visit.rehearsal and checks else set()) else 1


def _has_benchmark(operation: str) -> bool:
    return operation.rstrip("_") in BENCHMARKS


def _parse(arguments: list[str] | None) -> argparse.Namespace:
    formatter = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser("gpu_visit", description=__doc__, formatter_class=formatter)
    parser.add_argument("--minutes", type=float, default=9, help="for all of it (9)")
    parser.add_argument("--out", type=Path, help="folder for visit.json, rows.csv, visit.md and logs")
    parser.add_argument("--only", action="append", metavar="NAME", help="see below; may be repeated")
    parser.add_argument("--seed", type=int, default=int(time.time()) % 2**31, help="of the operands drawn")
    parser.add_argument("--publish", type=Path, nargs="+", metavar="VISIT.json")
    parser.add_argument("--results", type=Path, default=RESULTS, help="where --publish writes")
    parser.epilog = f"--only: {', '.join(STAGES)}; {', '.join(BENCHMARKS)}; or a job, or how one begins: "
    parser.epilog += f"{', '.join(jobs.names(REHEARSAL))}."
    options = parser.parse_args(arguments)
    known = (*STAGES, *BENCHMARKS)
    for name in options.only or []:
        if name not in known and not any(job.startswith(name) for job in jobs.names(REHEARSAL)):
            parser.error(f"--only {name}: choose from {', '.join(known)} or a job")
    return options


if __name__ == "__main__":
    raise SystemExit(main())

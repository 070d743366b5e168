"""`python -m tools.gpu` (`make bench-gpu`): everything that needs a GPU, in one command of nine minutes.

    make bench-gpu ARGS="--out DIR"           needs torch, triton, transformers, pytest, hypothesis, nvcc
    make bench-gpu ARGS="--only jobs"         one step: build, tests, sanitize, bench, jobs
    WANDA_BENCH_REHEARSE=1 make bench-gpu     the same steps on a CPU; its figures are no measurements

Builds the CUDA library, tests it and the Triton kernels, also under compute-sanitizer, and then times the
operations and whole jobs until the minutes are used. Nothing is timed before the tests have passed at the
same commit. DIR gets run.md, and the results that `make pages` reads in benchmarks/results/DATE-MACHINE.

A checkout without .git: WANDA_BENCH_COMMIT, or a file COMMIT, says which commit it is. Exits 1 where a step
failed or was interrupted, 2 on wrong usage.
"""

import argparse
import os
import signal
import sys
import tempfile
import time
from pathlib import Path

import torch

from benchmarks.core import machine
from tools.gpu import page, steps

STEPS = {
    "build": steps.build,
    "tests": steps.tests,
    "sanitize": steps.sanitize,
    "bench": steps.bench,
    "jobs": steps.jobs,
}
TIMED = ("bench", "jobs")
UNTRUSTED = "not run: nothing is timed before the tests have passed at this commit"


def main(arguments: list[str] | None = None) -> int:
    options = _parse(arguments)
    if not machine.rehearsing() and not torch.cuda.is_available():
        print("torch sees no CUDA GPU here; WANDA_BENCH_REHEARSE=1 rehearses on a CPU", file=sys.stderr)
        return 2
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    deadline = time.monotonic() + 60 * options.minutes
    _prepare_environment()
    with tempfile.TemporaryDirectory(prefix="gpu") as work:
        run = steps.GpuRun.open(options.out, Path(work), deadline)
        try:
            return execute(run, options.only or list(STEPS))
        except KeyboardInterrupt:
            run.add("interrupted", 0.0, ["the steps that follow were not run"])
            return 1
        finally:
            page.write(run)
            print(f"\n{page.steps_table(run)}\n\nThe page: {run.out / 'run.md'}")


def execute(run: steps.GpuRun, only: list[str]) -> int:
    """The steps in their order; those that time something, only after tests that passed."""
    needed = {"build"} | ({"tests"} if set(only) & set(TIMED) and not run.trusted else set())
    failed = False
    for name in [name for name in STEPS if name in needed.union(only)]:
        print(f"\n{name} ({run.left():.0f} s left)", flush=True)
        began = time.monotonic()
        problems = [UNTRUSTED] if name in TIMED and not run.trusted else STEPS[name](run)
        run.add(name, time.monotonic() - began, problems)
        failed = failed or bool(problems)
        page.write(run)
    return 1 if failed else 0


def _prepare_environment() -> None:
    """For the processes that the steps start."""
    if machine.rehearsing():
        os.environ["TRITON_INTERPRET"] = "1"
    paths = [str(machine.ROOT), str(machine.ROOT / "kernels"), os.environ.get("PYTHONPATH", "")]
    os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, paths))
    os.environ.setdefault("HF_HUB_OFFLINE", "1")


def _parse(arguments: list[str] | None) -> argparse.Namespace:
    formatter = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser("python -m tools.gpu", description=__doc__, formatter_class=formatter)
    parser.add_argument("--minutes", type=float, default=9, help="for all steps (9)")
    parser.add_argument("--out", type=Path, default=machine.ROOT / "out" / "gpu", help="folder (out/gpu)")
    parser.add_argument("--only", action="append", choices=STEPS, help="a step; may be repeated")
    return parser.parse_args(arguments)


if __name__ == "__main__":
    raise SystemExit(main())

"""First the truth: the CUDA library is built while Triton's tests run, then come its own."""

import os
import sys
from collections.abc import Iterable

from benchmarks.catalogue import BENCHMARKS
from benchmarks.machine import ROOT
from benchmarks.visit import gpu_tests, proof, sanitizer
from benchmarks.visit.commands import Command, Ended, run, run_all
from benchmarks.visit.state import Visit
from wanda_kernels.dispatch.backends import TABLE

BUILD = ROOT / "build" / "visit"  # kept from call to call while the machine is
BUILD_S, TRUTH_S, TESTS_S, SANITIZER_S = 120, 75, 75, 60  # at most, each; many run at once
GRACE_S = 30
TEST_SHARES = {"without": 4, "with": 2}  # the CUDA library
STAGES = ("tests", "truth", "sanitize")


def prove(visit: Visit, operations: list[str], stages: Iterable[str]) -> str:
    """Fill `data["proof"]` anew for these operations; the tests are asked as a whole."""
    at_once = 1 if visit.rehearsal else max(1, (os.cpu_count() or 1) // 2)
    for key in [key for key, each in visit.data["proof"].items() if each["operation"] in operations]:
        del visit.data["proof"][key]
    ended: dict[str, Ended] = {}
    try:
        first = [] if visit.rehearsal else [_build(visit)]
        _run(visit, first + _commands(visit, operations, stages, "without", ["triton"]), at_once, ended)
        why = "" if visit.rehearsal else _built(ended["build"])
        native = ["cpu" if visit.rehearsal else "cuda"]
        second = [] if why else _commands(visit, operations, stages, "with", native)
        _run(visit, second + _watched(visit, operations, stages), at_once, ended)
    finally:  # an interrupt keeps what has ended
        _collect(visit, ended)
    return why


def build(visit: Visit) -> str:
    """The CUDA library, where nothing else is to be done meanwhile; why there is none, or nothing."""
    return _built(run(_build(visit)))


def _build(visit: Visit) -> Command:
    """For this GPU alone; the machine's own compiler and torch."""
    architecture = visit.data["machine"]["capability"].replace(".", "")
    env = {"WANDA_FAST_CUDA": "1", "WANDA_FAST_CUDA_ARCHITECTURES": architecture}
    argv = [sys.executable, str(ROOT / "csrc" / "build.py"), "cuda", str(BUILD), "--report"]
    return Command("build", argv, visit.within(BUILD_S), visit.out / "build.log", env)


def _built(ended: Ended) -> str:
    """Why there is no CUDA C++; empty where there is, for all children from now on."""
    if ended.why():
        return f"libwanda_cuda.so was not built: {ended.why()}"
    os.environ["WANDA_KERNELS_NATIVE_DIR"] = str(BUILD)
    return ""


def subjects(operations: list[str], backends: list[str]) -> list[str]:
    """OPERATION:BACKEND of every cell of the backend table that has a benchmark to take cases from."""
    return [
        f"{operation}:{backend}"
        for operation in operations
        for backend in backends
        if backend in TABLE[operation] and operation.rstrip("_") in BENCHMARKS
    ]


def _commands(
    visit: Visit, operations: list[str], stages: Iterable[str], library: str, backends: list[str]
) -> list[Command]:
    found = []
    if "truth" in stages:
        each = subjects(operations, backends)
        for group in [each] if visit.rehearsal and each else [[one] for one in each]:
            found.append(_truth(visit, "truth", group, TRUTH_S))
    if "tests" in stages:
        shares = 1 if visit.rehearsal else TEST_SHARES[library]
        found += gpu_tests.commands(library, shares, visit.within(TESTS_S), visit.work)
    return found


def _truth(visit: Visit, how: str, group: list[str], limit_s: float, *options: str) -> Command:
    name = f"{how}:{group[0]}"
    seconds = max(1.0, visit.within(limit_s + GRACE_S) - GRACE_S)
    arguments = [*group, "--device", visit.device, "--limit", f"{seconds:.0f}", "--seed", visit.data["seed"]]
    arguments += ["--out", visit.work / f"{name.replace(':', '-')}.jsonl", *options]
    if visit.rehearsal:
        arguments += ["--quick", "--short", "--spoil", visit.spoil]
    return visit.command(name, "benchmarks.visit.truth", *arguments, limit_s=seconds + GRACE_S)


def _watched(visit: Visit, operations: list[str], stages: Iterable[str]) -> list[Command]:
    """Every operation on one small workload, under the tools of compute-sanitizer."""
    if "sanitize" not in stages:
        return []
    if not sanitizer.path():
        visit.note("compute-sanitizer is not on the PATH: no memory checks")
        return []
    return [
        sanitizer.under(tool, _truth(visit, tool, group, SANITIZER_S, "--quick", "--short"))
        for tool, backend in sanitizer.WATCHES
        if (group := subjects(operations, [backend]))
    ]


def _run(visit: Visit, commands: list[Command], at_once: int, ended: dict[str, Ended]) -> None:
    for each in run_all(commands, at_once):
        visit.say(f"  {each.name}: {each.seconds:.0f} s")
        if each.why() and each.name != "build":
            visit.note(f"{each.name}: {each.why()}")
        ended[each.name] = each


def _collect(visit: Visit, all_ended: dict[str, Ended]) -> None:
    checks, shares, logs = [], [], []
    for name, ended in all_ended.items():
        how = name.partition(":")[0]
        lines = ended.log.with_suffix(".jsonl")
        if how == "truth":
            checks += proof.of_truth(lines, ended)
        elif how == "tests":
            shares.append((lines, ended))
        elif how != "build":
            checks += sanitizer.judged(how, ended)
            logs.append(f"### {name}\n{ended.log.read_text(errors='replace')}")
    checks += gpu_tests.checks(shares)
    visit.data["proof"] |= {f"{each['how']} {each['operation']}": each for each in checks}
    if logs:
        (visit.out / "sanitizer.log").write_text("\n".join(logs), encoding="utf-8")

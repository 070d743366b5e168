"""The steps of a GPU run. Each returns its problems as sentences; none: it succeeded."""

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path

from benchmarks.core import machine, results
from benchmarks.core.catalogue import BENCHMARKS

BUILD = machine.ROOT / "build" / "gpu"
KERNEL_TESTS = machine.ROOT / "tests" / "wanda_kernels"
BUILD_S, TESTS_S, SANITIZE_S, BENCH_S, JOB_S = 150, 150, 90, 50, 150  # at most, of one command
LEAST_S = 20  # a command that would have less time is left out
JOBS_SHARE = 0.4  # of the remaining time, kept for whole jobs
# torch's allocator hands out parts of large blocks, in which an overrun stays inside the block
UNCACHED = {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}
NO_PLUGINS = {"PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1"}  # the machine's own may not work, and none is needed
WATCHES = (("memcheck", "triton"), ("memcheck", "cuda"), ("racecheck", "cuda"))
FOUND = 99  # compute-sanitizer's exit code for a finding
FINDING = r"^========= +((?:Invalid|Uninitialized|Misaligned|Error: |Warning: |Program hit).*)"
PASSED = (0, 5)  # pytest's exit codes: all passed, none collected
JOBS = (
    ("llama2-7b", "2:4", "wanda"),
    ("llama2-7b", "2:4", "connect"),
    ("llama2-7b", "2:4", "sparsegpt"),
    ("llama2-7b", "unstructured", "wanda"),
    ("llama3-8b", "2:4", "wanda"),
    ("llama2-7b", "2:4", "admm"),
    ("qwen3-30b-a3b-sixth", "2:4", "wanda"),
)


@dataclass
class GpuRun:
    """What was run so far, kept in `checks.json`: a later call of the same commit trusts its tests."""

    out: Path
    work: Path
    deadline: float  # on time.monotonic()
    facts: dict
    trusted: bool = False  # the tests have passed
    steps: list[dict] = field(default_factory=list)  # name, seconds, problems

    @classmethod
    def open(cls, out: Path, work: Path, deadline: float) -> "GpuRun":
        run = cls(out, work, deadline, machine.describe("cpu" if machine.rehearsing() else "cuda"))
        out.mkdir(parents=True, exist_ok=True)
        if (out / "checks.json").exists():
            earlier = json.loads((out / "checks.json").read_text())
            if earlier["commit"] == run.facts["commit"] != machine.UNKNOWN:
                run.trusted, run.steps = earlier["trusted"], earlier["steps"]
        return run

    def left(self) -> float:
        return self.deadline - time.monotonic()

    def add(self, name: str, seconds: float, problems: list[str]) -> None:
        if name == "tests":
            self.trusted = not problems
        self.steps.append({"name": name, "seconds": seconds, "problems": problems})
        for problem in problems:
            print(f"  {problem}", flush=True)
        content = {"commit": self.facts["commit"], "trusted": self.trusted, "steps": self.steps}
        results.replace_file(self.out / "checks.json", results.compact_json(content))

    def start(self, name: str, *argv: object, limit_s: float, env: dict | None = None) -> "Command":
        """A rehearsal, on a CPU that may be slow, has no limit but the deadline."""
        limit = self.left() if machine.rehearsing() else min(limit_s, self.left())
        log = self.work / f"{len(os.listdir(self.work))}.log"
        with log.open("wb") as output:
            process = subprocess.Popen(
                list(map(str, argv)),
                stdout=output,
                stderr=subprocess.STDOUT,
                stdin=subprocess.DEVNULL,
                env=os.environ | (env or {}),
                start_new_session=True,
            )
        return Command(name, process, time.monotonic() + limit, log)


@dataclass
class Command:
    """A process with a group of its own: a kernel that hangs or crashes ends this command alone."""

    name: str
    process: subprocess.Popen
    deadline: float
    log: Path

    def problems(self, fine: tuple[int, ...] = (0,)) -> list[str]:
        """Waits for the end; says what went wrong unless the exit code is fine."""
        try:
            code = self.process.wait(max(0.0, self.deadline - time.monotonic()))
            ended = f"exit code {code}"
        except subprocess.TimeoutExpired:
            code, ended = None, "out of time"
        finally:
            self.stop()
        print(f"  {self.name}: {self.last_line()}", flush=True)
        return [] if code in fine else [f"{self.name}: {ended}: {self.last_line()}"]

    def stop(self) -> None:
        """End the process and all that it has started."""
        if self.process.poll() is None:
            os.killpg(self.process.pid, signal.SIGKILL)
            self.process.wait()

    def last_line(self) -> str:
        lines = self.log.read_text(errors="replace").strip().splitlines()
        return lines[-1].strip("= ") if lines else "no output"


def build(run: GpuRun) -> list[str]:
    """The CUDA library, for this GPU alone, by the machine's own compiler and torch."""
    if machine.rehearsing():
        return []
    architecture = run.facts["capability"].replace(".", "")
    env = {"WANDA_FAST_CUDA": "1", "WANDA_FAST_CUDA_ARCHITECTURES": architecture}
    argv = [sys.executable, machine.ROOT / "csrc" / "build.py", "cuda", BUILD]
    os.environ["WANDA_KERNELS_NATIVE_DIR"] = str(BUILD)
    return run.start("build", *argv, limit_s=BUILD_S, env=env).problems()


def tests(run: GpuRun) -> list[str]:
    """All at once, a process for each file: those with tests marked `gpu`, and the operations' own."""
    every = sorted(machine.ROOT.glob("tests/**/test_*.py"))
    marked = [path for path in every if "mark.gpu" in path.read_text()]
    groups = [[path] for path in dict.fromkeys([*marked, *operation_tests()])]
    which = []
    if machine.rehearsing():
        # interpreted kernels take minutes: the marked tests alone, which are skipped
        groups, which = [marked], ["-m", "gpu"]
    commands = []
    try:
        for group in groups:
            pytest = _pytest(*which, *group)
            commands.append(run.start(group[0].name, *pytest, limit_s=TESTS_S, env=NO_PLUGINS))
        return [problem for command in commands for problem in command.problems(PASSED)]
    finally:
        for command in commands:
            command.stop()


def operation_tests() -> list[Path]:
    """Those that run on every backend that serves an operation, on the GPU if there is one."""
    every = {path: path.read_text() for path in sorted(KERNEL_TESTS.glob("test_*.py"))}
    return [path for path, text in every.items() if "\nOPERATION = " in text or "device_of" in text]


def _pytest(*arguments: object) -> list[object]:
    return [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", *arguments]


def sanitize(run: GpuRun) -> list[str]:
    """The operations' tests, whose shapes are small, under compute-sanitizer."""
    path = shutil.which("compute-sanitizer")
    if not path:
        return [] if machine.rehearsing() else ["compute-sanitizer is not on the PATH: no memory checks"]
    problems = []
    for tool, backend in WATCHES:
        watched = [path, "--tool", tool, "--report-api-errors", "no", "--error-exitcode", FOUND]
        watched += _pytest("-x", "-k", backend, *operation_tests())
        env = UNCACHED | NO_PLUGINS
        command = run.start(f"{tool} {backend}", *watched, limit_s=SANITIZE_S, env=env)
        problems += command.problems(PASSED)
        found = re.findall(FINDING, command.log.read_text(errors="replace"), re.MULTILINE)
        problems += [f"{tool} {backend}: {found[0]}"] if found else []
    return problems


def bench(run: GpuRun) -> list[str]:
    """The operations, a process each, in the order of their importance."""
    problems, kept = [], JOBS_SHARE * run.left()
    for names in [list(BENCHMARKS)] if machine.rehearsing() else [[name] for name in BENCHMARKS]:
        limit = min(BENCH_S, run.left() - kept)
        if limit < LEAST_S:
            problems.append(f"bench {names[0]}: not run, no time left")
            continue
        argv = [sys.executable, "-m", "benchmarks", "--device", run.facts["device"], "--out", run.out]
        argv += ["--limit", limit, *(word for name in names for word in ("--only", name))]
        argv += ["--quick", "--headline"] if machine.rehearsing() else []
        # a workload that has begun is finished
        problems += run.start(f"bench {names[0]}", *argv, limit_s=limit + LEAST_S).problems()
    return problems


def jobs(run: GpuRun) -> list[str]:
    """Whole jobs; the published pipeline runs on one block."""
    problems = []
    for shape, pattern, method in (("tiny", "2:4", "wanda"),) if machine.rehearsing() else JOBS:
        name = f"job {shape} {pattern} {method}"
        if run.left() < LEAST_S:
            problems.append(f"{name}: not run, no time left")
            continue
        out = run.out / f"job-{shape}-{pattern.replace(':', 'of')}.json"
        argv = [sys.executable, "-m", "benchmarks.jobs.bench_prune_model", "--device", run.facts["device"]]
        argv += ["--shape", shape, "--methods", method, "--sparsity-type", pattern, "--out", out]
        argv += ["--rounds", 1, "--reference-blocks", 1]
        if machine.rehearsing():
            argv += ["--nsamples", 2, "--seqlen", 32, "--dtype", "float32", "--sequential", "block"]
        problems += run.start(name, *argv, limit_s=JOB_S).problems()
    return problems

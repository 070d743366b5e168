"""What a figure was measured on: machine, driver, versions, clocks, commit."""

import os
import platform
import re
import subprocess
from collections.abc import Iterable
from datetime import datetime, timezone
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import torch

ROOT = Path(__file__).parents[2]
RESULTS = ROOT / "benchmarks" / "results"
UNKNOWN = "unknown"
OPENMP = ("OMP_NUM_THREADS", "OMP_WAIT_POLICY", "GOMP_SPINCOUNT")  # a waiting thread spins by default
GPU_QUERY = "driver_version,clocks.sm,clocks.mem,clocks.max.sm,power.limit,power.draw,temperature.gpu"
SAME_MACHINE = ("cpu", "gpu", "cpu_capability", "threads", "torch")  # equal in all runs of one table
BUSY = 0.5  # load average per core above which a run's times are doubtful


def rehearsing() -> bool:
    """Whether this is a rehearsal of a GPU run on a CPU, with interpreted kernels."""
    return os.environ.get("WANDA_BENCH_REHEARSE") == "1"


def describe(device: str) -> dict[str, str | int | float]:
    """Facts by name, ready for JSON."""
    facts = {
        "device": device,
        "cpu": _cpu_name(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "openmp": " ".join(f"{name}={os.environ[name]}" for name in OPENMP if name in os.environ)
        or "defaults",
        "cpu_capability": torch.backends.cpu.get_cpu_capability(),
        "load_before": round(os.getloadavg()[0], 2) if hasattr(os, "getloadavg") else UNKNOWN,
        "python": platform.python_version(),
        "torch": torch.__version__,
        "triton": _version("triton"),
        "commit": _commit(),
        "date": datetime.now(timezone.utc).strftime("%Y-%m-%d %H:%M UTC"),
    }
    if rehearsing():
        facts["rehearsal"] = True
    return facts | (_gpu() if device == "cuda" else {})


def busy(facts: dict) -> str:
    """A warning where other programs use the cores; else empty."""
    load = facts["load_before"]
    if load == UNKNOWN or load <= BUSY * facts["cores"]:
        return ""
    return (
        f"Warning: the load average is {load} on {facts['cores']} cores, so other programs are running. "
        "Times will be too long and will vary."
    )


def difference(before: dict, now: dict) -> str:
    """What differs between two machines whose figures would share a file; empty where nothing does."""
    found = {name: (before.get(name), now.get(name)) for name in SAME_MACHINE}
    return ", ".join(f"{name} {old!r}, now {new!r}" for name, (old, new) in found.items() if old != new)


def name(facts: dict) -> str:
    """`NVIDIA H200`, `Intel Xeon Processor, 2 cores, AVX512`."""
    if facts["device"] == "cuda":
        return facts["gpu"]
    return f"{_plain(facts['cpu'])}, {facts['cores']} cores, {facts['cpu_capability']}"


def slug(facts: dict) -> str:
    """A short name for folders: `nvidia-h200`, `intel-xeon-processor-2-cores`."""
    name = facts["gpu"] if facts["device"] == "cuda" else f"{_plain(facts['cpu'])} {facts['cores']} cores"
    return re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-")


def _plain(cpu: str) -> str:
    return re.sub(r"\((R|TM)\)", "", cpu)


def hardware(facts: dict) -> str:
    """Machine and versions."""
    where = f"{facts['cpu']}, {facts['cores']} cores, {facts['threads']} threads (OpenMP {facts['openmp']})"
    where = f"{where}, {facts['cpu_capability']}"
    if facts["device"] == "cuda":
        clock = f"SM clock {facts['clocks.sm']} of {facts['clocks.max.sm']}"
        where = f"{facts['gpu']}, driver {facts['driver_version']}, {clock}, CUDA {facts['cuda']}"
    return f"{where}; torch {facts['torch']}, triton {facts['triton']}, Python {facts['python']}"


def sentence(facts: dict) -> str:
    """The conditions above a table."""
    run = f"commit {facts['commit']}; load {facts['load_before']} before; {facts['date']}"
    return f"{hardware(facts)}; {run}."


def _cpu_name() -> str:
    info = Path("/proc/cpuinfo")
    names = re.findall(r"model name\s*:\s*(.+)", info.read_text()) if info.exists() else []
    return names[0].strip() if names else platform.processor() or platform.machine()


def _gpu() -> dict[str, str]:
    capability = ".".join(map(str, torch.cuda.get_device_capability(0)))
    facts = {"gpu": torch.cuda.get_device_name(0), "capability": capability, "cuda": str(torch.version.cuda)}
    answer = _output("nvidia-smi", "--id=0", f"--query-gpu={GPU_QUERY}", "--format=csv,noheader")
    names = GPU_QUERY.split(",")
    values = [value.strip() for value in answer.split(",")] if answer else [UNKNOWN] * len(names)
    return facts | dict(zip(names, values, strict=True))


def _commit() -> str:
    """Of the checkout; of a tree without .git, from WANDA_BENCH_COMMIT or the file COMMIT."""
    written = ROOT / "COMMIT"
    told = os.environ.get("WANDA_BENCH_COMMIT") or (written.read_text().strip() if written.exists() else "")
    if told:
        return told
    commit = _output("git", "-C", str(ROOT), "rev-parse", "--short", "HEAD") or UNKNOWN
    code = ("--", ".", ":!benchmarks/results")
    changed = _output("git", "-C", str(ROOT), "status", "--porcelain", "--untracked-files=no", *code)
    return f"{commit} with changes" if changed else commit


def joined(commits: Iterable[str]) -> str:
    """Each once, in their order."""
    return ", ".join(dict.fromkeys(commits))


def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return "none"


def _output(*command: str) -> str:
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True, timeout=30).stdout.strip()
    except (OSError, subprocess.SubprocessError):
        return ""

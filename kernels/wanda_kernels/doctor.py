"""The facts behind `wanda-fast doctor`: versions, devices, libraries, and the backend of every operation."""

import os
import platform
import sys
from importlib.metadata import PackageNotFoundError, version

import torch

from wanda_kernels.dispatch import backends
from wanda_kernels.native import library

Fact = tuple[str, str, str]  # section, name, value

VARIABLES = (
    "WANDA_KERNELS_BACKEND",
    "WANDA_KERNELS_CPU_ISA",
    "WANDA_KERNELS_NATIVE_DIR",
    "TRITON_INTERPRET",
    "CUDA_VISIBLE_DEVICES",
)


def diagnose() -> list[tuple[str, str, str]]:
    """Find out what this machine has and which backend serves which operation, and why not another.

    Loads the compiled libraries; runs no kernel.

    Returns: (section, name, value) of every fact, in the order to print them. Sections are "versions", "cpu",
        "gpu", "libraries", "operations" and "environment".
    """
    return [*_versions(), *_cpu(), *_gpus(), *_libraries(), *_operations(), *_environment()]


def _versions() -> list[Fact]:
    triton = _version("triton") or "not installed"
    return [
        ("versions", "python", f"{platform.python_version()} on {platform.system()} {platform.machine()}"),
        ("versions", "torch", f"{torch.__version__}, {_built_for()}"),
        ("versions", "triton", triton),
    ]


def _built_for() -> str:
    if torch.version.hip:
        return f"built for ROCm {torch.version.hip}"
    return f"built for CUDA {torch.version.cuda}" if torch.version.cuda else "a CPU build"


def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return ""


def _cpu() -> list[Fact]:
    facts = [
        ("cpu", "cores", f"{os.cpu_count()}, of which torch uses {torch.get_num_threads()}"),
        ("cpu", "torch's instruction set", torch.backends.cpu.get_cpu_capability()),
    ]
    if not library.why_not("cpu"):
        in_use = library.cpu_isa() or "WANDA_KERNELS_CPU_ISA names none that can run"
        facts.append(
            ("cpu", "kernels' instruction sets", f"{', '.join(library.cpu_isas())}; in use: {in_use}")
        )
    return facts


def _gpus() -> list[Fact]:
    if not torch.cuda.is_available():
        return [("gpu", "gpu", "none that torch can use")]
    facts = []
    for index in range(torch.cuda.device_count()):
        properties = torch.cuda.get_device_properties(index)
        memory = f"{properties.total_memory / 2**30:.0f} GiB"
        capability = f"sm_{properties.major}{properties.minor}"
        facts.append(("gpu", f"cuda:{index}", f"{properties.name}, {memory}, {capability}"))
    return facts


def _libraries() -> list[Fact]:
    return [
        ("libraries", name, library.why_not(backend) or f"loaded from {library.library_path(backend)}")
        for backend, name in library.LIBRARIES.items()
    ]


def _operations() -> list[Fact]:
    devices = ["cpu", "cuda"] if torch.cuda.is_available() else ["cpu"]
    return [
        ("operations", f"{operation} on {device}", _chosen(operation, device))
        for device in devices
        for operation in backends.OPERATIONS
    ]


def _chosen(operation: str, device: str) -> str:
    """The chosen backend, and why no backend before it serves, or has no such operation."""
    try:
        chosen = backends.choose_backend(operation, device)
    except backends.BackendError as error:
        return str(error)
    if os.environ.get("WANDA_KERNELS_BACKEND"):
        return f"{chosen} (WANDA_KERNELS_BACKEND)"
    order = backends.order(operation, device)
    without = [each for each, kind in backends.DEVICE_OF.items() if kind == device and each not in order]
    passed_over = [*without, *order[: order.index(chosen)]]
    reasons = "; ".join(f"{each}: {backends.why_not(operation, device, each)}" for each in passed_over)
    return f"{chosen} ({reasons or 'the first choice'})"


def _environment() -> list[Fact]:
    executable = [("environment", "python", sys.executable)]
    return executable + [("environment", name, os.environ[name]) for name in VARIABLES if name in os.environ]

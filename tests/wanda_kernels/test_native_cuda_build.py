"""Every .cu compiles, the library links against this torch's headers, and no kernel spills registers.

This needs nvcc but no GPU. It builds for sm_80 and sm_90 only, to save minutes; releases add sm_89.
"""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

BUILD = Path(__file__).resolve().parents[2] / "csrc" / "build.py"
KERNELS = (
    "Li512EEEvNS_14StackSelectionEj",  # prune_rows_kernel with up to 512 threads
    "Li1024EEEvNS_14StackSelectionEj",  # prune_rows_kernel with up to 1024 threads
    "prune_long_rows_kernel",
    "order_keys_kernel",
    "find_thresholds_kernel",
    "count_high_kernel",
    "count_low_kernel",
    "prune_at_most_kernel",
    "sum_slab_kernel",
    "add_slabs_kernel",
    "sum_segments_kernel",
    "add_segments_kernel",
    "packed_linear_kernel",
)
MOST_STATIC_BYTES = 9 << 10  # shared memory; kMostStaticBytes in device.cuh and cuda_on_cpu.h
MOST_REGISTERS = 65_536  # registers of a multiprocessor

pytestmark = pytest.mark.skipif(not shutil.which("nvcc"), reason="no nvcc")


@pytest.fixture(scope="module")
def report(tmp_path_factory):
    """(library, {(kernel, sm): [(registers, stack, spilled bytes, static shared bytes), ...]})"""
    folder = tmp_path_factory.mktemp("cuda")
    settings = {"WANDA_FAST_CUDA": "1", "WANDA_FAST_CUDA_ARCHITECTURES": "80 90"}
    said = subprocess.run(
        [sys.executable, str(BUILD), "cuda", str(folder), "--report"],
        env={**os.environ, **settings},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    assert said.returncode == 0, said.stdout
    return Path(said.stdout.split()[-1]), _usage(said.stdout)


def _usage(text: str) -> dict[tuple[str, str], list[tuple[int, int, int, int]]]:
    pattern = (
        r"entry function '(\S+)' for 'sm_(\d+)'.*?(\d+) bytes stack frame, (\d+) bytes spill stores, "
        r"(\d+) bytes spill loads.*?Used (\d+) registers(?:[^\n]*?(\d+) bytes smem)?"
    )
    usage: dict[tuple[str, str], list[tuple[int, int, int, int]]] = {}
    for name, sm, *sizes in re.findall(pattern, text, re.DOTALL):
        kernel = next((each for each in KERNELS if each in name), name)
        stack, stores, loads, registers, shared = (int(each or 0) for each in sizes)
        usage.setdefault((kernel, sm), []).append((registers, stack, stores + loads, shared))
    return usage


def test_library_links(report):
    library, _ = report
    assert library.name == "libwanda_cuda.so" and library.stat().st_size > 100_000


def test_library_says_why_a_gpu_cannot_run_it(report):
    """Asks about a GPU that does not exist.

    The library is loaded lazily, since a CPU torch lacks a function that it calls."""
    probe = (
        "import ctypes, os, sys, torch\n"
        "why_not = ctypes.CDLL(sys.argv[1], mode=os.RTLD_LAZY).wanda_cuda_why_not\n"
        "why_not.restype = ctypes.c_char_p\n"
        "print(why_not(torch.cuda.device_count()).decode())"
    )
    command = [sys.executable, "-c", probe, str(report[0])]
    said = subprocess.run(command, capture_output=True, text=True)
    assert said.returncode == 0 and said.stdout.strip(), said.stderr


@pytest.mark.parametrize("sm", ["80", "90"])
@pytest.mark.parametrize("kernel", KERNELS)
def test_no_spills(report, kernel, sm):
    variants = report[1][kernel, sm]
    assert variants
    for registers, stack, spilled, _ in variants:
        assert spilled == 0 and stack == 0, (
            f"{kernel} sm_{sm}: {registers} registers, {stack} B stack, {spilled} B"
        )


@pytest.mark.parametrize("sm", ["80", "90"])
@pytest.mark.parametrize(
    ("kernel", "threads"), [(KERNELS[0], 512), (KERNELS[1], 1024), ("prune_long_rows_kernel", 1024)]
)
def test_rows_leave_room_for_all_threads(report, kernel, threads, sm):
    assert max(registers for registers, *_ in report[1][kernel, sm]) * threads <= MOST_REGISTERS


def test_static_shared_memory_is_within_its_bound(report):
    most = {kernel: max(shared for *_, shared in variants) for kernel, variants in report[1].items()}
    assert 8 << 10 < max(most.values()) <= MOST_STATIC_BYTES, most

"""Loads the compiled libraries: `cpu` (csrc/cpu, for every CPU) and `cuda` (csrc/cuda).

Each is a plain shared library in this folder. It registers `torch.ops.wanda_kernels.native_*` for its device
through PyTorch's stable ABI, so it serves every Python version and every torch from 2.10 on. A library is
loaded when `why_not` is first called for it.

`WANDA_KERNELS_NATIVE_DIR` names another folder to load from. `WANDA_KERNELS_CPU_ISA` forces the CPU kernels
of avx512, avx2 or portable.
"""

import ctypes
import logging
import os
from collections.abc import Callable
from functools import cache
from pathlib import Path

import torch

logger = logging.getLogger(__name__)

LIBRARIES = {"cpu": "libwanda_cpu.so", "cuda": "libwanda_cuda.so"}

# `root` is the square root of a [in] statistic, `scale` a [out, in] statistic. Both libraries register the
# first five operations; the CPU library registers all.
_SELECTION = "Tensor(a!) weight, Tensor? root, Tensor? scale"
SCHEMAS = (
    "native_add_sq_norm_(Tensor(a!) acc, Tensor x) -> ()",
    "native_add_sq_norm_segments_(Tensor(a!) acc, Tensor x, Tensor offsets) -> ()",
    f"native_prune_rows_({_SELECTION}, int num_pruned, Tensor(b!)? mask) -> ()",
    f"native_prune_matrix_({_SELECTION}, int rank, Tensor(b!)? mask) -> ()",
    f"native_prune_variant_({_SELECTION}, float ratio, Tensor(b!) alpha, Tensor(c!)? mask) -> ()",
    f"native_prune_nm_({_SELECTION}, int n, int m, Tensor(b!)? mask) -> ()",
    "native_mark_lowest_(Tensor w, Tensor? root, Tensor? divisor, int rank, Tensor(a!) pruned) -> ()",
    "native_sparsegpt_block_(Tensor(a!) w, Tensor? root, Tensor? divisor, Tensor u, Tensor(b!) pruned,"
    " int n, int m, Tensor(c!) errors) -> ()",
    "native_admm_step_(Tensor(a!) primal, Tensor(b!) dual, Tensor dense, Tensor(c!) pruned, int num_pruned,"
    " int n, int m, float ratio) -> int",
    "native_polish_step_(Tensor(a!) z, Tensor(b!) residual, Tensor(c!) direction, Tensor product,"
    " Tensor(d!) rho, Tensor inverse_diagonal, Tensor pruned) -> ()",
    "native_refine_groups_(Tensor w, Tensor(a!) pruned, Tensor(b!) c, Tensor h, int n, int m) -> ()",
    "native_refine_swaps_(Tensor w, Tensor(a!) pruned, Tensor(b!) c, Tensor h, int m) -> ()",
    "native_activate_(Tensor(a!) out, Tensor x, int activation, int power) -> ()",
    "native_activate_gated_(Tensor(a!) out, Tensor gate, Tensor up, int activation) -> ()",
    "native_add_product_(Tensor(a!) acc, Tensor a, Tensor b, bool in_bf16) -> ()",
    "native_add_square_(Tensor(a!) acc, Tensor x, bool in_bf16) -> ()",
    "native_mirror_(Tensor(a!) acc) -> ()",
    "native_all_finite(Tensor x, bool non_negative) -> bool",
    "native_count_zeros(Tensor x) -> int",
    "native_attends(Tensor q) -> bool",
    "native_attend_(Tensor(a!) out, Tensor q, Tensor k, Tensor v, float scale) -> ()",
    "native_rotate_(Tensor(a!) out, Tensor x, Tensor cos, Tensor sin) -> ()",
    "native_rms_norm_(Tensor(a!) out, Tensor x, Tensor weight, float epsilon) -> ()",
    "native_gated_product_(Tensor(a!) out, Tensor gate, Tensor up, int activation) -> ()",
    "native_multiplies(Tensor weight, bool sparse) -> bool",
    "native_linear_(Tensor(a!) out, Tensor x, Tensor weight, Tensor? bias, bool sparse) -> bool",
    "native_packed_linear_(Tensor(a!) out, Tensor x, Tensor bits, Tensor values, Tensor? offsets,"
    " Tensor? bias) -> ()",
    "native_unpack_rows_(Tensor(a!) out, Tensor bits, Tensor values, Tensor? offsets) -> ()",
)


def library_path(backend: str) -> Path:
    folder = os.environ.get("WANDA_KERNELS_NATIVE_DIR") or Path(__file__).parent
    return Path(folder) / LIBRARIES[backend]


@cache
def why_not(backend: str) -> str:
    """Load the library of "cpu" or "cuda". Returns why that failed, or an empty string.

    A process tries once.
    """
    if backend == "cuda" and not torch.cuda.is_available():
        return "torch sees no CUDA GPU"
    path = library_path(backend)
    if not path.exists():
        return f"{path.name} was not built (it needs a compiler and torch at install: see docs/usage.md)"
    _define_operations()
    try:
        torch.ops.load_library(str(path))
    except OSError as error:
        reason = f"{path.name} does not load: {error}"
        logger.warning("%s", reason)
        return reason
    return ""


@cache
def why_not_on_gpu(index: int) -> str:
    """Why that GPU cannot run the CUDA library, which must be loaded, or an empty string."""
    probe = ctypes.CDLL(str(library_path("cuda"))).wanda_cuda_why_not
    probe.restype = ctypes.c_char_p
    error = probe(index).decode()
    if not error:
        return ""
    reason = f"{LIBRARIES['cuda']} cannot run on cuda:{index}: {error}"
    logger.warning("%s", reason)
    return reason


@cache
def _define_operations() -> torch.library.Library:
    library = torch.library.Library("wanda_kernels", "FRAGMENT")
    for schema in SCHEMAS:
        library.define(schema)
    return library


@cache
def native_op(name: str) -> Callable:
    """The registered op. Kept, since looking it up takes a microsecond."""
    return getattr(torch.ops.wanda_kernels, name).default


def cpu_isa() -> str:
    """The instruction set that the CPU kernels use now: avx512, avx2 or portable."""
    return _cpu_string("wanda_cpu_isa")


def cpu_isas() -> tuple[str, ...]:
    """The instruction sets of the CPU kernels that this machine can run, widest first."""
    return tuple(_cpu_string("wanda_cpu_isas").split(","))


def products() -> tuple[str, ...]:
    """The operand types, of bf16 and fp32, for which the CPU library computes a^T b over tokens itself.

    torch computes the others in fp32. If bf16 is among them, a bf16 model's co-activations round their
    operands to bf16.
    """
    return tuple(filter(None, _cpu_string("wanda_cpu_products").split(",")))


def squares() -> tuple[str, ...]:
    """The operand types, of bf16 and fp32, for which the CPU library computes x^T x over tokens itself."""
    return tuple(filter(None, _cpu_string("wanda_cpu_squares").split(",")))


def _cpu_string(function: str) -> str:
    call = getattr(ctypes.CDLL(str(library_path("cpu"))), function)
    call.restype = ctypes.c_char_p
    return call().decode()

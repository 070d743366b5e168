"""The compiled backends: `cpu` (csrc/cpu, for any CPU) and `cuda` (csrc/cuda), loaded when first asked for.

Each is a plain shared library beside this file that registers `torch.ops.wanda_kernels.native_*` for its
device through PyTorch's stable ABI. It depends on neither the Python version nor, from 2.10 on, on torch's.
`WANDA_KERNELS_NATIVE_DIR` names another folder to load from; `WANDA_KERNELS_CPU_ISA` forces avx512, avx2 or
portable.
"""

import ctypes
import logging
import os
from collections.abc import Callable
from functools import cache
from pathlib import Path

import torch
from torch import Tensor

from wanda_kernels.native.reused_memory import empty
from wanda_kernels.sparsegpt import prune_in_blocks_

logger = logging.getLogger(__name__)

DTYPES = (torch.float32, torch.float16, torch.bfloat16)  # of weights and activations
LIBRARIES = {"cpu": "libwanda_cpu.so", "cuda": "libwanda_cuda.so"}

# One definition for both libraries. `root`: square root of a [in] statistic; `scale`: a [out, in] statistic.
_SELECTION = "Tensor(a!) weight, Tensor? root, Tensor? scale"
SCHEMAS = (
    "native_add_sq_norm_(Tensor(a!) acc, Tensor x) -> ()",
    f"native_prune_rows_({_SELECTION}, int num_pruned, Tensor(b!)? mask) -> ()",
    f"native_prune_nm_({_SELECTION}, int n, int m, Tensor(b!)? mask) -> ()",
    f"native_prune_matrix_({_SELECTION}, int rank, Tensor(b!)? mask) -> ()",
    f"native_prune_variant_({_SELECTION}, float ratio, Tensor(b!) alpha, Tensor(c!)? mask) -> ()",
    "native_mark_lowest_(Tensor w, Tensor? root, Tensor? divisor, int rank, Tensor(a!) pruned) -> ()",
    "native_prune_and_update_(Tensor(a!) w, Tensor? root, Tensor? divisor, Tensor u, Tensor(b!) pruned,"
    " int n, int m, Tensor(c!) errors) -> ()",
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
)
ACTIVATION_CODES = {None: 0, "silu": 1, "gelu": 2, "gelu_tanh": 3, "relu": 4}  # kernels.h, enum Activation
BLOCK_TOKENS = 1024  # of fp32 copies: 1024 x 11008 is 45 MB
HESSIAN_COLUMNS = 256  # of a band of the Hessian: wide enough for a matmul, little below the diagonal


def library_path(backend: str) -> Path:
    folder = os.environ.get("WANDA_KERNELS_NATIVE_DIR") or Path(__file__).parent
    return Path(folder) / LIBRARIES[backend]


@cache
def why_not(backend: str) -> str:
    """Load the library of "cpu" or "cuda"; why that failed, empty where it did not. Tries once a process."""
    if backend == "cuda" and not torch.cuda.is_available():
        return "torch sees no CUDA GPU"
    path = library_path(backend)
    if not path.exists():
        return f"{path.name} was not built (it needs a compiler and torch at install: see README)"
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
    """Why that GPU cannot run the CUDA library, which is loaded; empty where it can. Asks once a process."""
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


def cpu_isa() -> str:
    """The instruction set that the CPU kernels use now: avx512, avx2 or portable."""
    return _cpu_string("wanda_cpu_isa")


def cpu_isas() -> tuple[str, ...]:
    """The instruction sets of the CPU kernels that this machine can run, widest first."""
    return tuple(_cpu_string("wanda_cpu_isas").split(","))


def products() -> tuple[str, ...]:
    """The operands, bf16 and fp32, whose products over tokens the CPU library sums itself; torch sums others,
    in fp32. Co-activations of a bf16 model have operands rounded to bf16 where that is one of them."""
    return tuple(filter(None, _cpu_string("wanda_cpu_products").split(",")))


def squares() -> tuple[str, ...]:
    """As products, for x^T x."""
    return tuple(filter(None, _cpu_string("wanda_cpu_squares").split(",")))


def _cpu_string(function: str) -> str:
    call = getattr(ctypes.CDLL(str(library_path("cpu"))), function)
    call.restype = ctypes.c_char_p
    return call().decode()


def add_sq_norm_(acc: Tensor, x: Tensor) -> None:
    _op("native_add_sq_norm_")(acc, as_rows(x))


def add_coactivation_(
    acc: Tensor, gate: Tensor, x: Tensor, activation: str | None, power: int, sq_norm: Tensor | None
) -> None:
    """Blocks of tokens become fp32, activation, abs and power applied; a matmul sums them into acc.

    Where the CPU multiplies bf16 pairs, a bf16 model's operands are rounded to bf16; sums stay fp32.
    """
    add_product_ = _product_of(x.dtype)
    gate, x = as_rows(gate), as_rows(x)
    if sq_norm is not None:
        _op("native_add_sq_norm_")(sq_norm, x)
    for gate_block, x_block in zip(gate.split(BLOCK_TOKENS), x.split(BLOCK_TOKENS), strict=True):
        add_product_(acc, _activated(gate_block, activation, power), _activated(x_block, None, power))


def add_gated_coactivation_(
    acc_gate: Tensor,
    acc_up: Tensor,
    gate: Tensor,
    up: Tensor,
    x: Tensor,
    activation: str | None,
    sq_norm: Tensor | None,
) -> None:
    """As add_coactivation_; one pass over gate and up makes both products' fp32 operands."""
    add_product_ = _product_of(x.dtype)
    gate, up, x = as_rows(gate), as_rows(up), as_rows(x)
    if sq_norm is not None:
        _op("native_add_sq_norm_")(sq_norm, x)
    n_out = gate.shape[1]
    for blocks in zip(*(each.split(BLOCK_TOKENS) for each in (gate, up, x)), strict=True):
        operands = empty(len(blocks[0]), 2 * n_out, dtype=torch.float32, device=x.device)
        _op("native_activate_gated_")(operands, *blocks[:2], ACTIVATION_CODES[activation])
        x_squared = _activated(blocks[2], None, 2)
        add_product_(acc_gate, operands[:, :n_out], x_squared)
        add_product_(acc_up, operands[:, n_out:], x_squared)


def _product_of(dtype: torch.dtype) -> Callable[[Tensor, Tensor, Tensor], None]:
    """acc += a^T b of fp32 a and b, for a model of that dtype."""
    in_bf16 = _in_bf16(dtype, products())
    if in_bf16 is None:
        return lambda acc, a, b: acc.addmm_(a.t(), b)
    return lambda acc, a, b: _op("native_add_product_")(acc, a, b, in_bf16)


def _in_bf16(dtype: torch.dtype, own: tuple[str, ...]) -> bool | None:
    """Whether the library, whose own operands these are, takes a model of that dtype in bf16, or in fp32;
    None: torch does."""
    if dtype == torch.bfloat16 and "bf16" in own:
        return True
    return False if "fp32" in own else None


def add_hessian_(acc: Tensor, x: Tensor) -> None:
    """Half of it, the diagonal and what is above, by the library's product or, in bands of rows, by torch's
    fp32 matmul; then that is mirrored below."""
    in_bf16 = _in_bf16(x.dtype, squares())
    bands = [slice(i, min(i + HESSIAN_COLUMNS, len(acc))) for i in range(0, len(acc), HESSIAN_COLUMNS)]
    for tokens in as_rows(x).split(BLOCK_TOKENS):
        tokens = tokens.float()
        if in_bf16 is not None:
            _op("native_add_square_")(acc, tokens, in_bf16)
            continue
        for band in bands:
            acc[band, band.start :].addmm_(tokens[:, band].t(), tokens[:, band.start :])
    _op("native_mirror_")(acc)  # the bands' too: a matmul's rounding need not be symmetric


def prune_rows_(weight: Tensor, scale: Tensor | None, num_pruned: int, mask: Tensor | None) -> None:
    _op("native_prune_rows_")(weight, *_root_or_scale(scale), num_pruned, mask)


def prune_nm_(weight: Tensor, scale: Tensor | None, n: int, m: int, mask: Tensor | None) -> None:
    _op("native_prune_nm_")(weight, *_root_or_scale(scale), n, m, mask)


def prune_matrix_(weight: Tensor, scale: Tensor | None, rank: int, mask: Tensor | None) -> None:
    _op("native_prune_matrix_")(weight, *_root_or_scale(scale), rank, mask)


def prune_variant_(weight: Tensor, scale: Tensor | None, ratio: float, mask: Tensor | None) -> Tensor:
    alpha = torch.empty((), dtype=torch.float64, device=weight.device)
    _op("native_prune_variant_")(weight, *_root_or_scale(scale), ratio, alpha, mask)
    return alpha


def sparsegpt_(weight: Tensor, *rest) -> None:
    prune_in_blocks_(mark_lowest, prune_and_update_block, weight, *rest)


def mark_lowest(w: Tensor, u: Tensor, pruned: Tensor, selector: str, root: Tensor | None, rank: int) -> None:
    _op("native_mark_lowest_")(w, root, _divisor(u, selector), rank, pruned)


def prune_and_update_block(
    w: Tensor, u: Tensor, pruned: Tensor, selector: str, root: Tensor | None, n: int, m: int, errors: Tensor
) -> None:
    _op("native_prune_and_update_")(w, root, _divisor(u, selector), u, pruned, n, m, errors)


def _divisor(u: Tensor, selector: str) -> Tensor | None:
    """What the squares of weights are divided by, where that is the score."""
    return u.diagonal().square() if selector == "obs" else None


def _activated(x: Tensor, activation: str | None, power: int) -> Tensor:
    out = empty(*x.shape, dtype=torch.float32, device=x.device)
    _op("native_activate_")(out, x, ACTIVATION_CODES[activation], power)
    return out


@cache
def _op(name: str) -> Callable:
    """The registered op itself: looking it up anew costs a microsecond a call."""
    return getattr(torch.ops.wanda_kernels, name).default


def as_rows(x: Tensor) -> Tensor:
    """`[..., features]` as `[tokens, features]` with contiguous rows, copied only where it must be."""
    if x.dim() == 2 and x.stride(1) == 1:
        return x
    x = x.reshape(-1, x.shape[-1])
    return x if x.shape[1] <= 1 or x.stride(1) == 1 else x.contiguous()


def _root_or_scale(scale: Tensor | None) -> tuple[Tensor | None, Tensor | None]:
    """A vector's root is taken here, once, as the reference takes it; a matrix's by the kernel."""
    if scale is None:
        return None, None
    if scale.dim() == 1:
        return scale.sqrt().contiguous(), None
    return None, as_rows(scale)


def reads(tensor: Tensor) -> bool:
    """Whether `all_finite` and `count_zeros` take a tensor: on the CPU, of a weight's dtype, not empty."""
    fits = tensor.device.type == "cpu" and tensor.dtype in DTYPES and tensor.dim() and tensor.numel()
    return bool(fits) and not why_not("cpu")


def all_finite(tensor: Tensor, non_negative: bool) -> bool:
    """Whether a tensor holds no NaN, no infinity and, if asked, nothing negative."""
    return _op("native_all_finite")(as_rows(tensor), non_negative)


def count_zeros(tensor: Tensor) -> int:
    """How many elements are +0.0 or -0.0."""
    return _op("native_count_zeros")(as_rows(tensor))

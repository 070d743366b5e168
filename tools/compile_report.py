"""Compile every Triton kernel variant that the launchers choose, without a GPU, and report its resources.

`python -m tools.compile_report` prints registers, stack and shared memory of each (kernel, dtype, tile). It
exits with 1 if a variant spills, or needs more shared memory than the chip has. The launchers run on meta
tensors, with each kernel replaced by a recorder of its arguments, so the compiled variants are those that a
GPU would run. TRITON_INTERPRET must be unset before Triton is first imported, so this needs a process of its
own.
"""

import argparse
import importlib
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from contextlib import nullcontext
from dataclasses import dataclass
from itertools import product
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import torch

from wanda_kernels.column_squares import saving_column_squares
from wanda_kernels.reference.activations import ACTIVATIONS
from wanda_kernels.triton_ops import (
    add_coactivation,
    add_gated_coactivation,
    add_hessian,
    add_sq_norm,
    admm_step,
    grouped_product,
    packed_linear,
    polish_step,
    prune_matrix,
    prune_nm,
    prune_rows,
    prune_strided_nm,
    prune_strided_rows,
    refine_groups,
    refine_swaps,
    sparsegpt_block,
    unpack_rows,
)
from wanda_kernels.triton_ops import forward as triton_forward

SHARED_LIMIT = {80: 166_912, 90: 232_448}  # bytes a block may have: A100; H100 and H200
MODULES = (
    add_sq_norm,
    add_coactivation,
    add_gated_coactivation,
    add_hessian,
    grouped_product,
    prune_rows,
    prune_nm,
    prune_strided_rows,
    prune_strided_nm,
    prune_matrix,
    sparsegpt_block,
    refine_groups,
    refine_swaps,
    polish_step,
    admm_step,
    packed_linear,
    unpack_rows,
    triton_forward,
)
OPTIONS = ("num_warps", "num_stages", "enable_fp_fusion")
FLOATS = (torch.bfloat16, torch.float16, torch.float32)
# (dtype, whether with a scale matrix and a mask, which take most registers); fp16 differs from bf16 in loads
# only
WEIGHTS = tuple(product((torch.bfloat16, torch.float32), (False, True))) + ((torch.float16, False),)
# silu stands for relu, gelu_tanh and none, which take no more
FUSED = tuple(product(FLOATS[:2], ("silu", "gelu"), (1,))) + ((torch.bfloat16, "silu", 2),)
TYPES = {
    torch.float32: "fp32",
    torch.float16: "fp16",
    torch.bfloat16: "bf16",
    torch.float64: "fp64",
    torch.uint8: "u8",
    torch.int8: "i8",
    torch.int16: "i16",
    torch.int32: "i32",
    torch.int64: "i64",
}


@dataclass(frozen=True)
class Variant:
    """One specialisation of a kernel: types and constants of its arguments, and which are multiples of 16."""

    module: str
    kernel: str
    signature: tuple[tuple[str, str], ...]
    constants: tuple[tuple[str, object], ...]
    divisible: tuple[int, ...]  # positions of arguments that are multiples of 16
    options: tuple[tuple[str, int], ...]

    def __str__(self) -> str:
        pointers = [kind[1:] for _, kind in self.signature if kind.startswith("*")]
        dtype = next((kind for kind in pointers if kind in ("bf16", "fp16")), pointers[0])
        constants = " ".join(f"{name}={value}" for name, value in self.constants)
        return f"{self.kernel} {dtype} {constants} warps={dict(self.options).get('num_warps', 4)}"


@dataclass(frozen=True)
class Usage:
    """Resources after assembly: registers a thread, bytes of stack a thread (spills), shared a block."""

    registers: int
    stack: int
    shared: int

    def excess(self, arch: int) -> str:
        """What exceeds the budget; empty if nothing does."""
        if self.stack:
            return f"{self.stack} bytes of stack"
        if self.shared > SHARED_LIMIT[arch]:
            return f"{self.shared} bytes shared, the chip has {SHARED_LIMIT[arch]}"
        return ""


class _Recorder:
    """Replaces a Triton kernel in its module and records the variant that each launch would compile."""

    def __init__(self, module: str, kernel: Any):
        self.module, self.kernel = module, kernel
        self.launches: list[Variant] = []

    def __getitem__(self, grid: tuple[int, ...]) -> Callable[..., None]:
        return self.launch

    def launch(self, *args: Any, **kwargs: Any) -> None:
        options = {name: kwargs.pop(name) for name in OPTIONS if name in kwargs}
        values = dict(zip(self.kernel.arg_names, args, strict=False)) | kwargs
        signature, constants, divisible = [], [], []
        for position, parameter in enumerate(self.kernel.params):
            value = values[parameter.name]
            kind = _type_of(value, parameter)
            signature.append((parameter.name, kind))
            if kind == "constexpr":
                constants.append((parameter.name, value))
            elif isinstance(value, torch.Tensor) or not parameter.do_not_specialize and value % 16 == 0:
                divisible.append(position)
        found = (tuple(signature), tuple(constants), tuple(divisible), tuple(options.items()))
        self.launches.append(Variant(self.module, self.kernel.__name__, *found))


def _type_of(value: Any, parameter: Any) -> str:
    if isinstance(value, torch.Tensor):
        return "*" + TYPES[value.dtype]
    if isinstance(value, float):
        return "fp32"
    if parameter.is_constexpr or value == 1 and not parameter.do_not_specialize:
        return "constexpr"
    return "i32" if -(2**31) <= value < 2**31 else "i64"


def variants() -> list[Variant]:
    """Every distinct variant, from shapes and dtypes that reach each row of each launcher's table."""
    kernels = [
        (m, name, kernel) for m in MODULES for name, kernel in vars(m).items() if name.endswith("_kernel")
    ]
    recorders = [_Recorder(module.__name__, kernel) for module, _, kernel in kernels]
    for (module, name, _), recorder in zip(kernels, recorders, strict=True):
        setattr(module, name, recorder)
    try:
        _launch_sums()
        _launch_rows()
        _launch_nm()
        _launch_matrix()
        _launch_coactivation()
        _launch_gated_coactivation()
        _launch_hessian()
        _launch_segments()
        _launch_sparsegpt()
        _launch_refine()
        _launch_steps()
        _launch_packed()
        _launch_forward()
    finally:
        for module, name, kernel in kernels:
            setattr(module, name, kernel)
    return list(dict.fromkeys(variant for recorder in recorders for variant in recorder.launches))


def _operands(dtype: torch.dtype, n_cols: int, heaviest: bool) -> tuple:
    """(weight, scale, mask) on the meta device: a scale vector and no mask, or a scale matrix and a mask."""
    n_rows = 4096
    weight = torch.empty(n_rows, n_cols, dtype=dtype, device="meta")
    if not heaviest:
        return weight, torch.empty(n_cols, device="meta"), None
    mask = torch.empty(n_rows, -(-n_cols // 8), dtype=torch.uint8, device="meta")
    return weight, torch.empty(n_rows, n_cols, device="meta"), mask


def _stack(dtype: torch.dtype, n_cols: int, heaviest: bool, transposed: bool) -> tuple:
    """As `_operands`, for a stack of experts."""
    n_experts, n_rows = 8, 768
    shape = (n_experts, n_cols, n_rows) if transposed else (n_experts, n_rows, n_cols)
    weight = torch.empty(shape, dtype=dtype, device="meta")
    weight = weight.transpose(1, 2) if transposed else weight
    if not heaviest:
        return weight, torch.empty(n_experts, n_cols, device="meta"), None
    mask = torch.empty(n_experts, n_rows, -(-n_cols // 8), dtype=torch.uint8, device="meta")
    return weight, torch.empty(n_experts, n_rows, n_cols, device="meta"), mask


def _launch_sums() -> None:
    for dtype in FLOATS:
        add_sq_norm.add_sq_norm_(
            torch.empty(4096, device="meta"), torch.empty(2048, 4096, dtype=dtype, device="meta")
        )


def _launch_rows() -> None:
    for n_cols in [most_cols for most_cols, _, _ in prune_rows.SEGMENTS] + [65_536]:
        for dtype, heaviest in WEIGHTS:
            weight, scale, mask = _operands(dtype, n_cols, heaviest)
            prune_rows.prune_rows_(weight, scale, n_cols // 2, mask)
    for n_cols in (128, 1024, 2048, 2880, 8192, 16_384, 28_672):
        for dtype, heaviest in WEIGHTS:
            weight, scale, mask = _stack(dtype, n_cols, heaviest, transposed=True)
            prune_rows.prune_rows_(weight, scale, n_cols // 2, mask)
    for stack in _stacks_of_ones():
        prune_rows.prune_rows_(stack, torch.empty(stack.shape[::2], device="meta"), 1, None)


def _stacks_of_ones() -> tuple[torch.Tensor, ...]:
    """One row and column, or one row of four columns that are apart: sizes and strides of 1 are constants."""
    transposed = torch.empty(2, 4, 8, dtype=torch.bfloat16, device="meta")[..., :1].transpose(1, 2)
    return torch.empty(2, 1, 1, dtype=torch.bfloat16, device="meta"), transposed


def _launch_nm() -> None:
    for dtype, heaviest in WEIGHTS:
        for (n, m), n_cols in [
            *product(((1, 2), (2, 4), (4, 8), (8, 16), (16, 32)), (4096,)),
            ((2, 4), 512),
            ((3, 5), 4000),
        ]:
            weight, scale, mask = _operands(dtype, n_cols, heaviest)
            prune_nm.prune_nm_(weight, scale, n, m, mask)
            if n_cols > 512:
                weight, scale, mask = _stack(dtype, n_cols, heaviest, transposed=True)
                prune_nm.prune_nm_(weight, scale, n, m, mask)
    # an expert's rows are not a multiple of 16 elements
    stack = torch.empty(8, 100, 1000, dtype=torch.bfloat16, device="meta")
    prune_nm.prune_nm_(stack[:, :99], torch.empty(8, 1000, device="meta"), 2, 4, None)
    prune_nm.prune_nm_(_stacks_of_ones()[1], torch.empty(2, 4, device="meta"), 2, 4, None)


def _launch_matrix() -> None:
    for dtype in FLOATS:
        weight, scale, mask = _operands(dtype, 4096, heaviest=True)
        prune_matrix.prune_matrix_(weight, None, 1000, None)
    prune_matrix.prune_matrix_(weight, scale, 1000, mask)


def _launch_coactivation() -> None:
    for dtype, activation in product(FLOATS, ACTIVATIONS):
        x = torch.empty(2048, 4096, dtype=dtype, device="meta")
        sq_norm = torch.empty(4096, device="meta") if activation is None else None
        add_coactivation.operand(x, activation, 1, sq_norm)
    for size, (dtype, activation, power) in product((1024, 4096), FUSED):
        x = torch.empty(2048, size, dtype=dtype, device="meta")
        add_coactivation.add_fused_(torch.empty(size, size, device="meta"), x, x, activation, power)
    one = torch.empty(2048, 1, dtype=torch.bfloat16, device="meta")  # a stride of 1 is a constant
    add_coactivation.add_fused_(torch.empty(1, 1, device="meta"), one, one, "silu", 1)


def _launch_gated_coactivation() -> None:
    for dtype, activation in product(FLOATS, ACTIVATIONS):
        if dtype != torch.bfloat16 and activation not in ("silu", "gelu"):
            continue
        x = torch.empty(2048, 4096, dtype=dtype, device="meta")
        add_gated_coactivation.operands(x, x, x, activation, torch.empty(4096, device="meta"))


def _launch_hessian() -> None:
    acc, x = torch.empty(4096, 4096, device="meta"), torch.empty(2048, 4096, device="meta")
    add_hessian.add_symmetric_(acc, x.bfloat16())  # fp16 takes the same instructions
    add_hessian.mirror_(acc)
    one = torch.empty(2048, 1, dtype=torch.bfloat16, device="meta")  # a stride of 1 is a constant
    add_hessian.add_symmetric_(torch.empty(1, 1, device="meta"), one)


def _launch_segments() -> None:
    layers = (128, 2048, torch.int64), (384, 512, torch.int32)  # experts, features, dtype of the offsets
    for dtype, (n_experts, width, counted) in product(FLOATS, layers):
        x = torch.empty(32_768, width, dtype=dtype, device="meta")
        offsets = torch.empty(n_experts + 1, dtype=counted, device="meta")
        add_sq_norm.add_sq_norm_(torch.empty(n_experts, width, device="meta"), x, offsets)
        acc = torch.empty(n_experts, width, width, device="meta")
        add_coactivation.add_coactivation_(acc, x, x, "silu", 1, None, offsets)
        add_hessian.add_hessian_(acc, x, offsets)
    one = torch.empty(2048, 1, dtype=torch.bfloat16, device="meta")  # a stride of 1 is a constant
    offsets = torch.empty(2, dtype=torch.int64, device="meta")
    add_sq_norm.add_sq_norm_(torch.empty(1, 1, device="meta"), one, offsets)
    add_hessian.add_hessian_(torch.empty(1, 1, 1, device="meta"), one, offsets)


def _launch_sparsegpt() -> None:
    rules = product(((0.5, 0, 0), (None, 2, 4)), ("obs", "wanda", "magnitude"), (4096,))
    # blocks of 120 columns, and rows that are not a multiple of 16 bytes apart
    for (ratio, n, m), selector, size in (*rules, ((None, 12, 24), "obs", 3840), ((0.5, 0, 0), "obs", 4095)):
        weight, upper = torch.empty(4096, size, device="meta"), torch.empty(size, size, device="meta")
        dead, scale = torch.empty(size, dtype=torch.bool, device="meta"), torch.empty(size, device="meta")
        scale = scale if selector == "wanda" else None
        sparsegpt_block.sparsegpt_(weight, upper, dead, ratio, n, m, selector, scale, None, None)


def _launch_refine() -> None:
    # rows that are not a multiple of 16 bytes apart take other loads
    for size, (n, m) in ((4096, (2, 4)), (4096, (4, 8)), (4095, (3, 5)), (4096, (1, 16))):
        refine_groups.refine_groups(*_block(size, 128 // m * m), n, m)
    for size in (4096, 4095):
        refine_swaps.refine_swaps(*_block(size, 128), 128)


def _block(size: int, width: int) -> tuple[torch.Tensor, ...]:
    """(w, pruned, c, h) of mask descent."""
    w, pruned = (torch.empty(4096, size, dtype=dtype, device="meta") for dtype in (torch.float32, torch.bool))
    hessian = torch.empty(size, size, device="meta")
    return w[:, :width], pruned[:, :width], torch.empty(4096, width, device="meta"), hessian[:width, :width]


def _launch_steps() -> None:
    for size in (100, 576, 1024, 4096, 4095, 14_336, 28_672, 65_536):
        z, residual, direction, product = (torch.empty(4096, size, device="meta") for _ in range(4))
        pruned = torch.empty(4096, size, dtype=torch.bool, device="meta")
        admm_step.admm_step_(z, residual, direction, pruned, size // 2, 0, 0, 1.0)
        if size <= 4096:
            vectors = torch.empty(4096, device="meta"), torch.empty(size, device="meta")
            polish_step.polish_step(z, residual, direction, product, *vectors, pruned)
    for (n, m), size in (((2, 4), 4096), ((4, 8), 4096), ((16, 32), 4096), ((3, 5), 4095)):
        primal, dual, dense = (torch.empty(4096, size, device="meta") for _ in range(3))
        pruned = torch.empty(4096, size, dtype=torch.bool, device="meta")
        admm_step.admm_step_(primal, dual, dense, pruned, 0, n, m, 1.0)


def _launch_packed() -> None:
    # rows of the same length, a multiple of 16 or not, and of different lengths with a bias
    integers = (torch.int8, torch.int16, torch.int32, torch.int64)
    layouts = (
        (4096, False, FLOATS, integers),
        *((n, n == 4096, FLOATS[:1], integers[1:2]) for n in (4095, 4096)),
    )
    for n_cols, uneven, floats, copied in layouts:
        bits = torch.empty(4096, (n_cols + 7) // 8, dtype=torch.uint8, device="meta")
        shape = (4096 * 2048,) if uneven else (4096, n_cols // 2)
        offsets = torch.empty(4097, dtype=torch.int64, device="meta") if uneven else None
        for dtype in floats:
            values, x = (torch.empty(each, dtype=dtype, device="meta") for each in (shape, (8, n_cols)))
            bias = values.new_empty(4096) if uneven else None
            packed_linear.packed_linear(x, bits, values, offsets, bias)
        for dtype in copied:
            values = torch.empty(shape, dtype=dtype, device="meta")
            unpack_rows.unpack_rows(values.new_empty(4096, n_cols), bits, values, offsets)


def _launch_forward() -> None:
    for dtype, summed in product(FLOATS, (saving_column_squares, nullcontext)):
        with summed():
            for size in (4096, triton_forward.MOST_COLUMNS):
                x, weight = (torch.empty(*shape, size, dtype=dtype, device="meta") for shape in ((2048,), ()))
                triton_forward.rms_norm(x, weight, 1e-5)
            for activation in ("silu", "gelu"):
                triton_forward.gated_product(x, x, activation)
    for dtype, (n_heads, head_dim) in product(FLOATS, ((32, 128), (8, 128), (40, 80))):
        x = torch.empty(8, 2048, n_heads, head_dim, dtype=dtype, device="meta").transpose(1, 2)
        turn = torch.empty(1, 2048, head_dim, dtype=dtype, device="meta")
        triton_forward.rotary(x, turn, turn)


def compile_variant(variant: Variant, arch: int) -> Usage:
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    names = [name for name, _ in variant.signature]
    source = ASTSource(
        getattr(importlib.import_module(variant.module), variant.kernel),
        signature=dict(variant.signature),
        constexprs={(names.index(name),): value for name, value in variant.constants},
        attrs={(position,): [["tt.divisibility", 16]] for position in variant.divisible},
    )
    binary = triton.compile(source, target=GPUTarget("cuda", arch, 32), options=dict(variant.options))
    tool = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(binary.asm["cubin"])
        file.flush()
        command = [tool, "-res-usage", file.name]
        text = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    registers, stack = re.search(r"REG:(\d+) STACK:(\d+)", text).groups()
    return Usage(int(registers), int(stack), binary.metadata.shared)


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--arch", type=int, nargs="*", default=list(SHARED_LIMIT), help="default: 80 and 90")
    parser.add_argument("--kernel", default="", help="only kernels whose name contains this")
    parser.add_argument("--jobs", type=int, default=os.cpu_count())
    options = parser.parse_args(argv)
    if os.environ.get("TRITON_INTERPRET") == "1":
        parser.error("unset TRITON_INTERPRET: interpreted kernels cannot be compiled")
    jobs = [
        (variant, arch) for variant in variants() if options.kernel in variant.kernel for arch in options.arch
    ]
    bad = 0
    print("| arch | variant | registers | stack | shared |\n| --- | --- | --- | --- | --- |")
    with ProcessPoolExecutor(options.jobs, mp_context=get_context("spawn")) as pool:
        usages = pool.map(compile_variant, *zip(*jobs, strict=True), chunksize=4)
        for (variant, arch), usage in zip(jobs, usages, strict=True):
            excess = usage.excess(arch)
            bad += bool(excess)
            note = f" **{excess}**" if excess else ""
            row = f"| sm_{arch} | {variant} | {usage.registers} | {usage.stack} | {usage.shared} |{note}"
            print(row, flush=True)
    print(f"\n{len(jobs)} variants compiled, {bad} over budget")
    return 1 if bad else 0


if __name__ == "__main__":
    sys.exit(main())

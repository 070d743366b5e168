"""Compile every (kernel, dtype, tile) that the launchers' tables choose, with no GPU: registers, stack, shared.

`python -m wanda_kernels.compile_report` prints the table. The launchers themselves run, on meta tensors, with each
kernel replaced by a recorder of its arguments: what is compiled here is what they would launch there. Needs
TRITON_INTERPRET unset before Triton's first import, hence a process of its own.
"""

import argparse
import importlib
import inspect
import os
import re
import subprocess
import tempfile
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import torch

SHARED_LIMIT = {80: 166_912, 90: 232_448}  # bytes a block may have: A100, H100 and H200
OPTIONS = ("num_warps", "num_stages", "enable_fp_fusion")
TYPES = {
    torch.float32: "fp32",
    torch.float16: "fp16",
    torch.bfloat16: "bf16",
    torch.float64: "fp64",
    torch.uint8: "u8",
    torch.int32: "i32",
    torch.int64: "i64",
}


@dataclass(frozen=True)
class Variant:
    """One compilation: a kernel by name, what it is specialised to, and for which chip."""

    module: str
    kernel: str
    signature: tuple[tuple[str, str], ...]
    constants: tuple[tuple[str, object], ...]
    divisible: tuple[int, ...]  # argument positions that are multiples of 16
    options: tuple[tuple[str, int], ...]
    arch: int


@dataclass(frozen=True)
class Usage:
    """What ptxas gave a variant: registers a thread, bytes of stack a thread (spills), shared bytes a block."""

    registers: int
    stack: int
    shared: int


class _Recorder:
    """Stands in for a Triton kernel in its launcher's module and keeps what each launch specialises on."""

    def __init__(self, module: str, name: str, parameters: dict[str, inspect.Parameter]):
        self.module, self.name, self.parameters = module, name, parameters
        self.launches: dict[tuple, None] = {}

    def __getitem__(self, grid):
        return self.launch

    def launch(self, *args, **kwargs):
        options = {name: kwargs.pop(name) for name in OPTIONS if name in kwargs}
        bound = inspect.Signature(self.parameters.values()).bind(*args, **kwargs).arguments
        signature, constants, divisible = [], [], []
        for position, (name, value) in enumerate(bound.items()):
            kind = _type_of(value, self.parameters[name])
            signature.append((name, kind))
            if kind == "constexpr":
                constants.append((name, value))
            elif isinstance(value, torch.Tensor) or value % 16 == 0:
                divisible.append(position)
        self.launches[tuple(signature), tuple(constants), tuple(divisible), tuple(options.items())] = None


def _type_of(value, parameter: inspect.Parameter) -> str:
    if isinstance(value, torch.Tensor):
        return "*" + TYPES[value.dtype]
    if "constexpr" in str(parameter.annotation) or value == 1:
        return "constexpr"
    return "i32" if -(2**31) <= value < 2**31 else "i64"


def variants(cases: Iterator, arch: int) -> Iterator[Variant]:
    """Every distinct launch that `cases`, of (module name, function that calls its launcher), lead to."""
    for name, call in cases:
        module = importlib.import_module(f"wanda_kernels.{name}")
        kernels = {k: v for k, v in vars(module).items() if k.endswith("_kernel")}
        recorders = {
            k: _Recorder(v.fn.__module__, v.fn.__name__, inspect.signature(v.fn).parameters)
            for k, v in kernels.items()
        }
        vars(module).update(recorders)
        try:
            call(module)
        finally:
            vars(module).update(kernels)
        for r in recorders.values():
            for launch in r.launches:
                yield Variant(r.module, r.name, *launch, arch)


def compile_variant(variant: Variant) -> Usage:
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    kernel = getattr(importlib.import_module(variant.module), variant.kernel)
    names = [name for name, _ in variant.signature]
    source = ASTSource(
        kernel,
        signature=dict(variant.signature),
        constexprs={(names.index(k),): v for k, v in variant.constants},
        attrs={(i,): [["tt.divisibility", 16]] for i in variant.divisible},
    )
    binary = triton.compile(source, target=GPUTarget("cuda", variant.arch, 32), options=dict(variant.options))
    registers, stack = _resource_usage(binary.asm["cubin"])
    return Usage(registers, stack, binary.metadata.shared)


def _resource_usage(cubin: bytes) -> tuple[int, int]:
    import triton

    tool = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        text = subprocess.run(
            [tool, "-res-usage", file.name], capture_output=True, text=True, check=True
        ).stdout
    found = re.search(r"REG:(\d+) STACK:(\d+)", text)
    return int(found[1]), int(found[2])

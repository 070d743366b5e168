"""add_hessian_: x^T x for SparseGPT. FLOP: a product and a sum for each pair of columns, once, and token."""

import math

import torch
from torch import Tensor

from benchmarks.core import shapes
from benchmarks.core.providers import PUBLISHED, Provider
from benchmarks.core.suite import Benchmark
from benchmarks.core.workloads import Operands, Workload, dtypes

WIDEST = 14_336  # its Hessian is 0.8 GB, the next one's 3.3
TOLERANCE = 1e-5  # fp32 sums of a few thousand terms, in any order, relative to the largest
CUT_OFF = 2**-24 / 16  # a token: tensor cores truncate a running sum every 16 tokens (add_hessian.py)


def published(acc: Tensor, x: Tensor, seen: int = 0) -> None:
    """A product of transposed, scaled fp32 copies, a mean over samples. SparseGPT's published code."""
    acc *= seen / (seen + 2)
    x = math.sqrt(2 / (seen + 2)) * x.t().float()
    acc += x.matmul(x.t())


def workloads(device: str, quick: bool) -> list[Workload]:
    widths = shapes.QUICK_SHAPES[0][1:] if quick else _widths(device)
    return [
        _workload(n_tokens, width, dtype, device, headline=index == len(widths) - 1)
        for index, width in enumerate(widths)
        for n_tokens in ((32,) if quick else shapes.TOKENS[device])
        for dtype in dtypes(index == len(widths) - 1)
    ]


def _widths(device: str) -> list[int]:
    if device == "cuda":
        return sorted(width for width in shapes.widths(device, False) if width <= WIDEST)
    return [shapes.SMOLLM2.hidden, shapes.SMOLLM2.intermediate, 4096]


def _workload(n_tokens: int, width: int, dtype: torch.dtype, device: str, headline: bool) -> Workload:
    return Workload(
        operation="add_hessian_",
        linear=f"inputs of width {width}",
        shape=f"{n_tokens}x{width}",
        dtype=dtype,
        setting=f"{n_tokens} tokens",
        make_operands=lambda: _operands(n_tokens, width, dtype, device),
        params=(),
        n_bytes=n_tokens * width * dtype.itemsize + 8 * width * width,
        n_flops=n_tokens * width * (width + 1),
        bound="flops",
        error=error_of_largest,
        tolerance=TOLERANCE + (n_tokens * CUT_OFF if device == "cuda" and dtype.itemsize == 2 else 0),
        headline=headline and dtype == torch.bfloat16,
    )


def error_of_largest(result: Tensor, expected: Tensor) -> float:
    """Largest error, as a fraction of the largest element; infinite where a result is not finite."""
    error = ((result - expected).abs().max() / expected.abs().max()).item()
    return error if error == error else float("inf")


def _operands(n_tokens: int, width: int, dtype: torch.dtype, device: str) -> Operands:
    torch.manual_seed(0)
    return torch.zeros(width, width, device=device), torch.randn(n_tokens, width, device=device).to(dtype)


BENCHMARK = Benchmark("add_hessian_", workloads, [Provider(PUBLISHED, published)])

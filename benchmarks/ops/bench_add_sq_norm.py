"""add_sq_norm_: sums of squares of the columns. Bytes: x read once, the accumulator read and written."""

import torch
from torch import Tensor

from benchmarks.core import shapes
from benchmarks.core.providers import PUBLISHED, Provider
from benchmarks.core.suite import Benchmark
from benchmarks.core.workloads import Operands, Workload, dtypes, relative_error

TOLERANCE = 1e-5  # fp32 sums of a few thousand terms, in any order


def published(acc: Tensor, x: Tensor, seen: int = 0) -> None:
    """norm() squared of a transposed fp32 copy, as a running mean over samples. Wanda's published code."""
    x = x.reshape(-1, x.shape[-1]).t().type(torch.float32)
    acc *= seen / (seen + 1)
    acc += torch.norm(x, p=2, dim=1) ** 2 / (seen + 1)


def workloads(device: str, quick: bool) -> list[Workload]:
    headline_widths = {
        shape[1] for shape in shapes.weights(device, quick) if shapes.is_headline(shape, device, quick)
    }
    return [
        _workload(n_tokens, width, dtype, device, headline)
        for width in shapes.widths(device, quick)
        for headline in [width in headline_widths]
        for n_tokens in ((32,) if quick else shapes.TOKENS[device])
        for dtype in dtypes(headline)
    ]


def _workload(n_tokens: int, width: int, dtype: torch.dtype, device: str, headline: bool) -> Workload:
    return Workload(
        operation="add_sq_norm_",
        linear=f"inputs of width {width}",
        shape=f"{n_tokens}x{width}",
        dtype=dtype,
        setting=f"{n_tokens} tokens",
        make_operands=lambda: _operands(n_tokens, width, dtype, device),
        params=(),
        n_bytes=n_tokens * width * dtype.itemsize + 8 * width,
        n_flops=2 * n_tokens * width,
        bound="bytes",
        error=relative_error,
        tolerance=TOLERANCE,
        headline=headline and dtype == torch.bfloat16,
    )


def _operands(n_tokens: int, width: int, dtype: torch.dtype, device: str) -> Operands:
    torch.manual_seed(0)
    return torch.zeros(width, device=device), torch.randn(n_tokens, width, device=device).to(dtype)


BENCHMARK = Benchmark("add_sq_norm_", workloads, [Provider(PUBLISHED, published)])

"""add_sq_norm_: sums of squares of the columns. Bytes: x read once, the accumulator read and written."""

from itertools import pairwise

import torch
from torch import Tensor

import wanda_kernels
from benchmarks.core import shapes
from benchmarks.core.providers import PUBLISHED, Provider
from benchmarks.core.suite import Benchmark
from benchmarks.core.workloads import Operands, Workload, dtypes, relative_error

TOLERANCE = 1e-5  # fp32 sums of a few thousand terms, in any order
EXPERTS, ROUTED = 128, 8  # of an expert layer of Qwen3-30B-A3B, whose inputs are HIDDEN wide
HIDDEN = 2048


def published(acc: Tensor, x: Tensor, offsets: Tensor | None = None) -> None:
    """Wanda's published code; with offsets, for one expert after the other."""
    for sums, tokens in [(acc, x)] if offsets is None else _of_experts(acc, x, offsets):
        _published(sums, tokens)


def _published(acc: Tensor, x: Tensor, seen: int = 0) -> None:
    """norm() squared of a transposed fp32 copy, as a running mean over samples."""
    x = x.reshape(-1, x.shape[-1]).t().type(torch.float32)
    acc *= seen / (seen + 1)
    acc += torch.norm(x, p=2, dim=1) ** 2 / (seen + 1)


def one_call_an_expert(acc: Tensor, x: Tensor, offsets: Tensor) -> None:
    for sums, tokens in _of_experts(acc, x, offsets):
        wanda_kernels.add_sq_norm_(sums, tokens)


def _of_experts(acc: Tensor, x: Tensor, offsets: Tensor) -> list[tuple[Tensor, Tensor]]:
    """The sums and tokens of every expert that has tokens; on a GPU the host waits."""
    bounds = enumerate(pairwise(offsets.tolist()))
    return [(acc[expert], x[first:end]) for expert, (first, end) in bounds if first < end]


def workloads(device: str, quick: bool) -> list[Workload]:
    headline_widths = {
        shape[1] for shape in shapes.weights(device, quick) if shapes.is_headline(shape, device, quick)
    }
    dense = [
        _workload(n_tokens, width, dtype, device, headline)
        for width in shapes.widths(device, quick)
        for headline in [width in headline_widths]
        for n_tokens in ((32,) if quick else shapes.TOKENS[device])
        for dtype in dtypes(headline)
    ]
    return [*dense, _expert_workload(device, *((8, 2, 16, 64) if quick else (EXPERTS, ROUTED, 4096, HIDDEN)))]


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


def _expert_workload(device: str, n_experts: int, routed: int, n_tokens: int, width: int) -> Workload:
    dtype = torch.bfloat16
    return Workload(
        operation="add_sq_norm_",
        linear=f"{n_experts} experts' inputs of width {width}",
        shape=f"{n_tokens * routed}x{width}",
        dtype=dtype,
        setting=f"{n_experts} experts",
        make_operands=lambda: _expert_operands(device, n_experts, routed, n_tokens, width, dtype),
        params=(),
        n_bytes=n_tokens * routed * width * dtype.itemsize + 8 * n_experts * width,
        n_flops=2 * n_tokens * routed * width,
        bound="bytes",
        error=relative_error,
        tolerance=TOLERANCE,
        headline=True,
        peers=(Provider("one call an expert", one_call_an_expert),),
    )


def _expert_operands(device, n_experts, routed, n_tokens, width, dtype) -> Operands:
    """Tokens sorted by expert: each is routed to some, of which a few are chosen often and a few rarely."""
    torch.manual_seed(0)
    popular = torch.randn(n_experts).exp().expand(n_tokens, n_experts)
    counts = popular.multinomial(routed).flatten().bincount(minlength=n_experts)
    offsets = torch.cat([torch.zeros(1, dtype=torch.int64), counts.cumsum(0)]).to(device)
    x = torch.randn(n_tokens * routed, width, device=device).to(dtype)
    return torch.zeros(n_experts, width, device=device), x, offsets


BENCHMARK = Benchmark("add_sq_norm_", workloads, [Provider(PUBLISHED, published)])

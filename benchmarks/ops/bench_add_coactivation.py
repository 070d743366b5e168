"""add_coactivation_: Wanda-CoNNect's statistic of an up_proj. FLOP: one matmul that contracts over tokens."""

from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.core import shapes
from benchmarks.core.providers import PUBLISHED, Provider
from benchmarks.core.suite import Benchmark
from benchmarks.core.workloads import Operands, Workload, relative_error

CPU_TOKENS = 512  # one call of the published code takes a fraction of a second
# operands rounded to 16 bits are off in the 8th or 11th bit each; a sum of positive terms is off by no more
TOLERANCES = {torch.bfloat16: 2**-7, torch.float16: 2**-10, torch.float32: 1e-4}


def published(acc: Tensor, gate: Tensor, x: Tensor, activation: str, power: int) -> None:
    """einsum of fp32 copies, added to the sum. Wanda-CoNNect's published code, after its act_fn."""
    gate, x = F.silu(gate.float()).abs().t(), x.t().float().abs()
    acc += torch.einsum("ik,jk->ji", x, gate)


def sixteen_bit(acc: Tensor, gate: Tensor, x: Tensor, activation: str, power: int) -> None:
    """A 16-bit matmul, fast where there are tensor cores; the product itself is rounded to 16 bits."""
    acc += F.silu(gate).abs().t() @ x.abs()


def workloads(device: str, quick: bool) -> list[Workload]:
    return of_gated_mlps("add_coactivation_", ("silu", 1), 1, TOLERANCES, device, quick)


def of_gated_mlps(
    operation: str, params: tuple, n_sums: int, tolerances: dict, device: str, quick: bool
) -> list[Workload]:
    """n_sums accumulators, the outputs of as many projections, and their input."""
    tokens = (32,) if quick else shapes.TOKENS["cuda"] if device == "cuda" else (CPU_TOKENS,)
    return [
        Workload(
            operation=operation,
            linear=shapes.names().get(shape, "quick"),
            shape=f"{shape[0]}x{shape[1]}",
            dtype=dtype,
            setting=f"silu, {n_tokens} tokens",
            make_operands=partial(_operands, n_tokens, shape, n_sums, dtype, device),
            params=params,
            n_bytes=n_tokens * (n_sums * shape[0] + shape[1]) * dtype.itemsize
            + 8 * n_sums * shape[0] * shape[1],
            n_flops=2 * n_sums * n_tokens * shape[0] * shape[1],
            bound="flops",
            error=relative_error,
            tolerance=tolerances[dtype],
            headline=dtype == torch.bfloat16 and index == 0,
        )
        for index, shape in enumerate(shapes.gated(device, quick))
        for n_tokens in tokens
        for dtype in (tolerances if index == 0 else (torch.bfloat16,))
    ]


def _operands(n_tokens, shape: tuple[int, int], n_sums: int, dtype, device: str) -> Operands:
    torch.manual_seed(0)
    widths = [shape[0]] * n_sums + [shape[1]]
    activations = (torch.randn(n_tokens, width, device=device).to(dtype) for width in widths)
    return *torch.zeros(n_sums, *shape, device=device), *activations


BENCHMARK = Benchmark(
    "add_coactivation_",
    workloads,
    [Provider(PUBLISHED, published), Provider("torch 16-bit", sixteen_bit, slack=2**-7)],
)

"""add_gated_coactivation_: the statistics of `gated`. FLOP: two matmuls that contract over tokens.

Judged by the gate projection's sum, the harder of the two, which comes first among the operands.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.core import shapes
from benchmarks.core.providers import PUBLISHED, Provider
from benchmarks.core.suite import Benchmark
from benchmarks.core.workloads import Operands, Workload, relative_error
from benchmarks.ops.bench_add_coactivation import CPU_TOKENS

# squares rounded to bf16 are off by 2^-8 each; a sum of positive terms is off by no more than a pair
TOLERANCES = {torch.bfloat16: 2**-7, torch.float32: 1e-4}


def published(acc_gate: Tensor, acc_up: Tensor, gate: Tensor, up: Tensor, x: Tensor, activation: str) -> None:
    """The formulas of docs/gated.md in fp32, as Wanda-CoNNect's published code has its own."""
    gate, up, x = gate.float(), up.float(), x.float().square()
    open_share = torch.sigmoid(gate)
    effect = up * open_share * (1 + gate * (1 - open_share))
    acc_gate += torch.einsum("to,ti->oi", effect.square(), x)
    acc_up += torch.einsum("to,ti->oi", F.silu(gate).square(), x)


def workloads(device: str, quick: bool) -> list[Workload]:
    tokens = (32,) if quick else shapes.TOKENS["cuda"] if device == "cuda" else (CPU_TOKENS,)
    return [
        _workload(n_tokens, shape, dtype, device, headline=dtype == torch.bfloat16 and index == 0)
        for index, shape in enumerate(shapes.gated(device, quick))
        for n_tokens in tokens
        for dtype in (TOLERANCES if index == 0 else (torch.bfloat16,))
    ]


def _workload(
    n_tokens: int, shape: tuple[int, int], dtype: torch.dtype, device: str, headline: bool
) -> Workload:
    n_out, n_in = shape
    return Workload(
        operation="add_gated_coactivation_",
        linear=shapes.names().get(shape, "quick"),
        shape=f"{n_out}x{n_in}",
        dtype=dtype,
        setting=f"silu, {n_tokens} tokens",
        make_operands=lambda: _operands(n_tokens, shape, dtype, device),
        params=("silu",),
        n_bytes=n_tokens * (2 * n_out + n_in) * dtype.itemsize + 16 * n_out * n_in,
        n_flops=4 * n_tokens * n_out * n_in,
        bound="flops",
        error=relative_error,
        tolerance=TOLERANCES[dtype],
        headline=headline,
    )


def _operands(n_tokens: int, shape: tuple[int, int], dtype: torch.dtype, device: str) -> Operands:
    torch.manual_seed(0)
    widths = (shape[0], *shape)
    gate, up, x = (torch.randn(n_tokens, width, device=device).to(dtype) for width in widths)
    return *torch.zeros(2, *shape, device=device), gate, up, x


BENCHMARK = Benchmark("add_gated_coactivation_", workloads, [Provider(PUBLISHED, published)])

"""add_coactivation_: Wanda-CoNNect's statistic of an up_proj. FLOP: one matmul that contracts over tokens."""

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.core import shapes
from benchmarks.core.providers import PUBLISHED, Provider
from benchmarks.core.suite import Benchmark
from benchmarks.core.workloads import Operands, Workload, dtypes, relative_error

GPU_TOKENS = (2048, 8192, 16384, 32768)  # of the first shape: where does the sum's own traffic cease to count
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
    tokens = (32,) if quick else shapes.TOKENS["cuda"] if device == "cuda" else (CPU_TOKENS,)
    return [
        _workload(
            n_tokens,
            shape,
            dtype,
            device,
            headline=dtype == torch.bfloat16 and index == 0 and n_tokens in tokens,
        )
        for index, shape in enumerate(shapes.gated(device, quick))
        for n_tokens in (GPU_TOKENS if device == "cuda" and index == 0 and not quick else tokens)
        for dtype in dtypes(index == 0 and n_tokens == tokens[0])
    ]


def _workload(
    n_tokens: int, shape: tuple[int, int], dtype: torch.dtype, device: str, headline: bool
) -> Workload:
    n_out, n_in = shape
    return Workload(
        operation="add_coactivation_",
        linear=shapes.names().get(shape, "quick"),
        shape=f"{n_out}x{n_in}",
        dtype=dtype,
        setting=f"silu, {n_tokens} tokens",
        make_operands=lambda: _operands(n_tokens, shape, dtype, device),
        params=("silu", 1),
        n_bytes=n_tokens * (n_out + n_in) * dtype.itemsize + 8 * n_out * n_in,
        n_flops=2 * n_tokens * n_out * n_in,
        bound="flops",
        error=relative_error,
        tolerance=TOLERANCES[dtype],
        headline=headline,
    )


def _operands(n_tokens: int, shape: tuple[int, int], dtype: torch.dtype, device: str) -> Operands:
    torch.manual_seed(0)
    gate, x = (torch.randn(n_tokens, width, device=device).to(dtype) for width in shape)
    return torch.zeros(shape, device=device), gate, x


BENCHMARK = Benchmark(
    "add_coactivation_",
    workloads,
    [Provider(PUBLISHED, published), Provider("torch 16-bit", sixteen_bit, slack=2**-7)],
)

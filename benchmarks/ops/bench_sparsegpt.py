"""sparsegpt_: selection and update, given the factor of the Hessian.

FLOP: two for each weight and each column to its left.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

import wanda_kernels
from benchmarks.core.providers import PUBLISHED, Provider
from benchmarks.core.suite import Benchmark
from benchmarks.core.workloads import (
    Operands,
    Workload,
    correlated_hessian,
    hessian_shapes,
    relative_norm,
)
from benchmarks.jobs.published_selection import update_by_columns

PATTERNS = ("2:4", 0.5)
# sums in another order: at a near tie the other weight is pruned, which changes all weights to its right
SLACK = 2e-2


@dataclass(frozen=True)
class Shared(wanda_kernels.Factor):
    """A factor that all of the ring's slots share, since no call changes it."""

    nbytes: int = 0

    def clone(self) -> "Shared":
        return self


def published(weight: Tensor, factor: Shared, pattern: str | float) -> None:
    """SparseGPT's published loop over columns."""

    def importances(values: Tensor, first: int) -> Tensor:
        return values**2 / factor.upper.diagonal()[first : first + values.shape[1]] ** 2

    w = weight.float()
    update_by_columns(w, factor.upper, str(pattern), importances)
    weight.copy_(w)


def workloads(device: str, quick: bool) -> list[Workload]:
    return [
        _workload(shape, name, pattern, device, headline=index == 0)
        for index, (shape, name) in enumerate(hessian_shapes(device, quick).items())
        for pattern in PATTERNS
    ]


def _workload(
    shape: tuple[int, int], name: str, pattern: str | float, device: str, headline: bool
) -> Workload:
    n_out, n_in = shape
    return Workload(
        operation="sparsegpt_",
        linear=name,
        shape=f"{n_out}x{n_in}",
        dtype=torch.bfloat16,
        setting=pattern if isinstance(pattern, str) else f"{pattern:.0%}",
        make_operands=lambda: _operands(shape, device),
        params=(pattern,),
        n_bytes=4 * n_out * n_in + 4 * n_in * n_in // 2,
        n_flops=n_out * n_in * n_in,
        bound="flops",
        error=relative_norm,
        tolerance=0.0,
        headline=headline,
    )


def _operands(shape: tuple[int, int], device: str) -> Operands:
    torch.manual_seed(0)
    n_out, n_in = shape
    weight = (torch.randn(n_out, n_in, device=device) * 0.02).bfloat16()
    factor = wanda_kernels.factor_hessian(correlated_hessian(n_in, device))
    return weight, Shared(factor.upper, factor.dead, factor.dampening)


BENCHMARK = Benchmark("sparsegpt_", workloads, [Provider(PUBLISHED, published, slack=SLACK)])

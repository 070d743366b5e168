"""polish_: conjugate gradients on the support of Wanda's 2:4 mask.

FLOP: one product with the Hessian for the first residual, and one a step.
"""

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

STEPS = (4, 10)  # admm's default, and the published number
# sums in another order, then rounding to bf16
TOLERANCE = 1e-3
# one step length for all rows
SLACK = 5e-2


def published(weight: Tensor, dense: Tensor, pruned: Tensor, hessian: Tensor, steps: int) -> None:
    """ALPS's published loop, scaled with the Hessian's diagonal as there: one step length for all rows."""
    scale = hessian.diagonal().sqrt()
    h, kept = hessian / scale / scale[:, None], ~pruned
    z = weight.float() * scale * kept
    residual = (dense.float() * scale - z) @ h * kept
    direction, rho = residual.clone(), residual.square().sum()
    for _ in range(steps):
        product = direction @ h
        step = rho / (direction * product).sum()
        z += step * direction
        residual -= step * product
        residual *= kept
        last, rho = rho, residual.square().sum()
        direction = residual + rho / last * direction
    weight.copy_(z / scale)


def workloads(device: str, quick: bool) -> list[Workload]:
    return [
        _workload(shape, name, steps, device, headline=index == 0)
        for index, (shape, name) in enumerate(hessian_shapes(device, quick).items())
        for steps in STEPS
    ]


def _workload(shape: tuple[int, int], name: str, steps: int, device: str, headline: bool) -> Workload:
    n_out, n_in = shape
    return Workload(
        operation="polish_",
        linear=name,
        shape=f"{n_out}x{n_in}",
        dtype=torch.bfloat16,
        setting=f"{steps} steps",
        make_operands=lambda: _operands(shape, device),
        params=(steps,),
        n_bytes=7 * n_out * n_in + 4 * n_in * n_in,
        n_flops=(steps + 1) * 2 * n_out * n_in * n_in,
        bound="flops",
        error=relative_norm,
        tolerance=TOLERANCE,
        headline=headline,
    )


def _operands(shape: tuple[int, int], device: str) -> Operands:
    torch.manual_seed(0)
    n_out, n_in = shape
    dense = (torch.randn(n_out, n_in, device=device) * 0.02).bfloat16()
    hessian = wanda_kernels.damped_hessian(correlated_hessian(n_in, device))
    weight = dense.clone()
    wanda_kernels.prune_nm_(weight, hessian.diagonal().contiguous(), 2, 4)
    return weight, dense, weight == 0, hessian


BENCHMARK = Benchmark("polish_", workloads, [Provider(PUBLISHED, published, slack=SLACK)])

"""refine_mask_: one sweep of mask descent from Wanda's mask.

FLOP: the products of all blocks with the Hessian; the choices within a block are not counted. There is no
published code.
"""

import torch
from torch import Tensor

import wanda_kernels
from benchmarks.core.suite import Benchmark
from benchmarks.core.workloads import Operands, Workload, correlated_hessian, hessian_shapes

RATIO = 0.5
SWEEPS = 1
ROWS_OF_SWAPS = {"cpu": 64, "cuda": 4096}  # the reference takes 20 s for 576 rows on two cores
# a product's sums in another order: at a near tie another mask is chosen
TOLERANCE = 1e-3


def workloads(device: str, quick: bool) -> list[Workload]:
    every = hessian_shapes(device, quick)
    of_groups = [
        _workload(shape, name, "2:4", device, headline=index == 0)
        for index, (shape, name) in enumerate(every.items())
    ]
    (n_out, n_in), name = next(iter(every.items()))
    few_rows = min(n_out, ROWS_OF_SWAPS[device]), n_in
    return [*of_groups, _workload(few_rows, name, None, device, headline=True)]


def _workload(
    shape: tuple[int, int], name: str, pattern: str | None, device: str, headline: bool
) -> Workload:
    n_out, n_in = shape
    return Workload(
        operation="refine_mask_",
        linear=name,
        shape=f"{n_out}x{n_in}",
        dtype=torch.bfloat16,
        setting=pattern or f"{RATIO:.0%}",
        make_operands=lambda: _operands(shape, pattern, device),
        params=(pattern, SWEEPS),
        n_bytes=2 * n_out * n_in + 2 * n_out * n_in + 4 * n_in * n_in,
        n_flops=2 * n_out * n_in * n_in,
        bound="flops",
        error=differing_marks,
        tolerance=TOLERANCE,
        headline=headline,
        changed=1,
    )


def differing_marks(result: Tensor, expected: Tensor) -> float:
    return (result != expected).float().mean().item()


def _operands(shape: tuple[int, int], pattern: str | None, device: str) -> Operands:
    torch.manual_seed(0)
    n_out, n_in = shape
    weight = (torch.randn(n_out, n_in, device=device) * 0.02).bfloat16()
    hessian = correlated_hessian(n_in, device)
    mask = torch.empty(n_out, -(-n_in // 8), dtype=torch.uint8, device=device)
    _prune(weight.clone(), hessian.diagonal().contiguous(), pattern, mask)
    return weight, ~wanda_kernels.unpack_bits(mask, n_in), hessian


def _prune(weight: Tensor, sq_norm: Tensor, pattern: str | None, mask: Tensor) -> None:
    if pattern:
        wanda_kernels.prune_nm_(weight, sq_norm, *map(int, pattern.split(":")), mask=mask)
    else:
        wanda_kernels.prune_rows_(weight, sq_norm, int(weight.shape[1] * RATIO), mask=mask)


BENCHMARK = Benchmark("refine_mask_", workloads, [])

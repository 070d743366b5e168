"""admm_step_: projection and dual update of one iteration, behind its product.

Bytes: fp32 `primal`, `dual` and `dense` and the mask are read; all but `dense` are written.
"""

import torch
from torch import Tensor

from benchmarks.core.providers import PUBLISHED, Provider
from benchmarks.core.suite import Benchmark
from benchmarks.core.workloads import Operands, Workload, differing_weights, hessian_shapes

PATTERNS = ("2:4", 0.5)
BYTES_A_WEIGHT = 3 * 4 + 1 + 2 * 4 + 1
# leaves the dual 0, as it was, so that calls on the same operands do the same
RATIO = 0.0
SLACK = 1e-3  # equal squares: any column


def published(
    primal: Tensor, dual: Tensor, dense: Tensor, pruned: Tensor, pattern: int | str, ratio: float
) -> Tensor:
    """ALPS's projection, `topk` of squares and a scatter of zeros, a row or group at a time."""
    u = primal + dual
    n, m = map(int, pattern.split(":")) if isinstance(pattern, str) else (0, u.shape[1])
    z = u.clone().view(-1, m)
    lowest = torch.topk(-(z**2), m - n if n else pattern, dim=1).indices
    z = z.scatter_(1, lowest, 0).view(u.shape)
    changed = ((z == 0) != pruned).sum()
    pruned.copy_(z == 0)
    dual.copy_(ratio * (u - z))
    primal.copy_(dense - z + dual)
    return changed


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
    by_groups = isinstance(pattern, str)
    return Workload(
        operation="admm_step_",
        linear=name,
        shape=f"{n_out}x{n_in}",
        dtype=torch.float32,
        setting=pattern if by_groups else f"{pattern:.0%}",
        make_operands=lambda: _operands(shape, device),
        params=(pattern if by_groups else int(n_in * pattern), RATIO),
        n_bytes=BYTES_A_WEIGHT * n_out * n_in,
        n_flops=4 * n_out * n_in,
        bound="bytes",
        error=differing_weights,
        tolerance=0.0,
        headline=headline,
    )


def _operands(shape: tuple[int, int], device: str) -> Operands:
    torch.manual_seed(0)
    primal, dense = (torch.randn(shape, device=device) * 0.02 for _ in range(2))
    return primal, torch.zeros_like(primal), dense, torch.zeros_like(primal, dtype=torch.bool)


BENCHMARK = Benchmark("admm_step_", workloads, [Provider(PUBLISHED, published, slack=SLACK)])

"""sparsegpt_: selection and update, given the factor of the Hessian; and both together, from the Hessian.

FLOP: two for each weight and each column to its left.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

import wanda_kernels
from benchmarks import shapes
from benchmarks.providers import PUBLISHED, Provider
from benchmarks.suite import Benchmark
from benchmarks.workloads import Operands, Workload

PATTERNS = ("2:4", 0.5)
WIDEST = 14_336  # its Hessian is 0.8 GB, the next one's 3.3
TOKENS_PER_INPUT = 2
SHARED_DIRECTIONS = 32  # of the inputs: what makes weights stand in for each other
# fp32 in another order: where two scores all but tie, the other weight goes, and all to its right follow
SLACK = 2e-2


@dataclass(frozen=True)
class Shared(wanda_kernels.Factor):
    """A factor, and its Hessian, that all of the ring's slots share: no call changes them."""

    hessian: Tensor
    nbytes: int = 0

    def clone(self) -> "Shared":
        return self


def published_factor(hessian: Tensor) -> Tensor:
    """Cholesky, inverse, Cholesky."""
    dampened = hessian.clone()
    diagonal = dampened.diagonal()
    diagonal += 0.01 * diagonal.mean()
    inverse = torch.cholesky_inverse(torch.linalg.cholesky(dampened))
    return torch.linalg.cholesky(inverse, upper=True)


def published_loop(weight: Tensor, upper: Tensor, pattern: str | float) -> None:
    """A Python loop over columns, which sums up losses, too. SparseGPT's published code."""
    n, m = map(int, pattern.split(":")) if isinstance(pattern, str) else (0, 0)
    w = weight.float()
    losses = torch.zeros(len(w), device=w.device)
    for start in range(0, w.shape[1], 128):
        stop = min(start + 128, w.shape[1])
        u = upper[start:stop, start:stop]
        block, diagonal = w[:, start:stop].clone(), u.diag()
        kept, errors, lost = (torch.zeros_like(block) for _ in range(3))
        mask = torch.zeros_like(block, dtype=torch.bool)
        if not m:
            scores = block**2 / diagonal.reshape(1, -1) ** 2
            mask = scores <= torch.sort(scores.flatten())[0][int(scores.numel() * pattern)]
        for i in range(stop - start):
            column, d = block[:, i], u[i, i]
            if m and i % m == 0:
                scores = block[:, i : i + m] ** 2 / diagonal[i : i + m].reshape(1, -1) ** 2
                mask.scatter_(1, i + torch.topk(scores, m - n, dim=1, largest=False)[1], True)
            left = column.clone()
            left[mask[:, i]] = 0
            kept[:, i] = left
            lost[:, i] = (column - left) ** 2 / d**2
            error = (column - left) / d
            block[:, i:] -= error.unsqueeze(1).matmul(u[i, i:].unsqueeze(0))
            errors[:, i] = error
        w[:, start:stop] = kept
        losses += lost.sum(1) / 2
        w[:, stop:] -= errors.matmul(upper[start:stop, stop:])
    weight.copy_(w)


def published(weight: Tensor, factor: Shared, pattern: str | float) -> None:
    published_loop(weight, factor.upper, pattern)


def published_from_hessian(weight: Tensor, factor: Shared, pattern: str | float) -> None:
    published_loop(weight, published_factor(factor.hessian), pattern)


def from_hessian(backend: str) -> Callable[..., None]:
    def call(weight: Tensor, factor: Shared, pattern: str | float) -> None:
        factor = wanda_kernels.factor_hessian(factor.hessian)
        wanda_kernels.sparsegpt_(weight, factor, pattern, backend=backend, check_finite=False)

    return call


def workloads(device: str, quick: bool) -> list[Workload]:
    return [
        _workload(shape, pattern, device, headline=index == 0)
        for index, shape in enumerate(_shapes(device, quick))
        for pattern in PATTERNS
    ]


def _shapes(device: str, quick: bool) -> list[tuple[int, int]]:
    if device == "cuda" and not quick:
        return [shape for shape in shapes.weights(device, quick) if shape[1] <= WIDEST]
    return list(shapes.QUICK_SHAPES if quick else shapes.SMOLLM2.linears().values())


def _workload(shape: tuple[int, int], pattern: str | float, device: str, headline: bool) -> Workload:
    n_out, n_in = shape
    names = shapes.names() | {shape: f"SmolLM2 {name}" for name, shape in shapes.SMOLLM2.linears().items()}
    return Workload(
        operation="sparsegpt_",
        linear=names.get(shape, "quick"),
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


def relative_norm(result: Tensor, expected: Tensor) -> float:
    return ((result - expected).float().norm() / expected.float().norm()).item()


def _operands(shape: tuple[int, int], device: str) -> Operands:
    torch.manual_seed(0)
    n_out, n_in = shape
    weight = (torch.randn(n_out, n_in, device=device) * 0.02).bfloat16()
    shared = torch.randn(SHARED_DIRECTIONS, n_in, device=device)
    hessian = torch.zeros(n_in, n_in, device=device)
    for _ in range(TOKENS_PER_INPUT):
        x = torch.randn(n_in, n_in, device=device)
        x += torch.randn(n_in, SHARED_DIRECTIONS, device=device) @ shared / SHARED_DIRECTIONS**0.5
        wanda_kernels.add_hessian_(hessian, x)
    factor = wanda_kernels.factor_hessian(hessian)
    return weight, Shared(factor.upper, factor.dead, factor.dampening, hessian)


BENCHMARK = Benchmark(
    "sparsegpt_",
    workloads,
    [
        Provider(PUBLISHED, published, slack=SLACK),
        Provider("published, with its factor", published_from_hessian, slack=SLACK),
        *(Provider(f"{name}, with the factor", from_hessian(name), needs=name) for name in ("triton", "cpu")),
    ],
    not_compiled="the torch path is a loop over columns, which would be unrolled",
)

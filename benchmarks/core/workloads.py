"""A workload: one problem of one shape, the same for every provider, and how its result is judged."""

import math
from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch import Tensor

import wanda_kernels
from benchmarks.core import shapes

TOKENS_PER_INPUT = 2
SHARED_DIRECTIONS = 32  # correlated inputs, so that one weight can make up for another
WIDEST_HESSIAN = 14_336  # 0.8 GB, the next one's 3.3

Operands = tuple[Tensor, ...]


@dataclass(frozen=True)
class Workload:
    operation: str
    linear: str  # the model and linear that have this shape
    shape: str
    dtype: torch.dtype
    setting: str
    make_operands: Callable[[], Operands]
    params: tuple  # a provider is called as call(*operands, *params)
    n_bytes: int  # the least that must move
    n_flops: int
    bound: str  # "bytes" or "flops": which roof limits it
    error: Callable[[Tensor, Tensor], float]
    tolerance: float  # on error; 0: every bit
    headline: bool = False
    peers: tuple = ()  # providers of this workload alone
    changed: int = 0  # the position of the operand that is changed in place
    experts: int = 0  # more than 0: of a stack, which other providers prune one matrix at a time


def differing_weights(result: Tensor, expected: Tensor) -> float:
    """Fraction of elements whose bits are not the same."""
    bits = {2: torch.int16, 4: torch.int32}[result.element_size()]
    return (result.view(bits) != expected.view(bits)).float().mean().item()


def relative_norm(result: Tensor, expected: Tensor) -> float:
    return ((result - expected).float().norm() / expected.float().norm()).item()


def relative_error(result: Tensor, expected: Tensor) -> float:
    """Largest relative error; infinite where a result is not finite."""
    error = ((result - expected).abs() / expected.abs().clamp(min=1e-30)).max().item()
    return error if error == error else float("inf")


def selections(
    operation: str,
    device: str,
    quick: bool,
    setting: str,
    params: Callable[[tuple[int, int]], tuple],
    scale: str | None = "vector",
    headline_only: bool = False,
) -> list[Workload]:
    """Workloads of a selection on every shape: bf16, and the other dtypes on the headline shapes.

    Args:
        params: from a shape to what the operation takes after weight and scale.
        scale: "vector", "matrix" or None.
    """
    return [
        _selection(operation, device, setting, shape, dtype, params(shape), scale, headline)
        for shape in shapes.weights(device, quick)
        for headline in [shapes.is_headline(shape, device, quick)]
        for dtype in dtypes(headline)
        if headline or not headline_only
    ]


def experts(operation: str, device: str, quick: bool, setting: str, params: tuple) -> Workload:
    """A selection in a stack of experts, one row of scales for each."""
    shape = shapes.QUICK_EXPERTS if quick else shapes.EXPERTS
    workload = _selection(operation, device, setting, shape, torch.bfloat16, params, "vector", False)
    return replace(workload, linear=f"{shape[0]} experts", experts=shape[0])


def dtypes(headline: bool) -> tuple[torch.dtype, ...]:
    return (torch.bfloat16, torch.float16, torch.float32) if headline else (torch.bfloat16,)


def _selection(operation, device, setting, shape, dtype, params, scale, headline) -> Workload:
    numel = math.prod(shape)
    n_scales = {"vector": numel // shape[-2], "matrix": numel, None: 0}[scale]
    return Workload(
        operation=operation,
        linear=shapes.names().get(shape, "quick"),
        shape="x".join(map(str, shape)),
        dtype=dtype,
        setting=setting,
        make_operands=lambda: _weight_and_scale(shape, dtype, scale, device),
        params=params,
        n_bytes=2 * numel * dtype.itemsize + 4 * n_scales,  # read and write every weight, read the scale
        n_flops=numel,  # one score a weight
        bound="bytes",
        error=differing_weights,
        tolerance=0.0,
        headline=headline and dtype == torch.bfloat16,
    )


def _weight_and_scale(shape, dtype, scale, device) -> Operands:
    """Normal weights; scales over a few powers of ten, as activations with outlier features have."""
    torch.manual_seed(0)
    weight = (torch.randn(shape, device=device) * 0.02).to(dtype)
    if scale is None:
        return weight, None
    vector = (*shape[:-2], shape[-1])
    return weight, torch.randn(shape if scale == "matrix" else vector, device=device).mul(2).exp()


def hessian_shapes(device: str, quick: bool) -> dict[tuple[int, int], str]:
    """Shapes of weights whose inputs have a Hessian, and their names: SmolLM2's on a CPU."""
    if quick:
        return dict.fromkeys(shapes.QUICK_SHAPES, "quick")
    if device == "cuda":
        names = shapes.names()
        return {shape: names[shape] for shape in shapes.weights(device, quick) if shape[1] <= WIDEST_HESSIAN}
    return {shape: f"SmolLM2 {name}" for name, shape in shapes.SMOLLM2.linears().items()}


def correlated_hessian(n_in: int, device: str) -> Tensor:
    """Of more tokens than inputs, fp32 `[in, in]`."""
    shared = torch.randn(SHARED_DIRECTIONS, n_in, device=device)
    hessian = torch.zeros(n_in, n_in, device=device)
    for _ in range(TOKENS_PER_INPUT):
        x = torch.randn(n_in, n_in, device=device)
        x += torch.randn(n_in, SHARED_DIRECTIONS, device=device) @ shared / SHARED_DIRECTIONS**0.5
        wanda_kernels.add_hessian_(hessian, x)
    return hessian

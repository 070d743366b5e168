"""A workload: one problem of one shape, the same for every provider, and how its result is judged."""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from benchmarks.core import shapes

Operands = tuple[Tensor, ...]  # the one that is changed in place comes first


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


def differing_weights(result: Tensor, expected: Tensor) -> float:
    """Fraction of elements whose bits are not the same."""
    bits = {2: torch.int16, 4: torch.int32}[result.element_size()]
    return (result.view(bits) != expected.view(bits)).float().mean().item()


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


def dtypes(headline: bool) -> tuple[torch.dtype, ...]:
    return (torch.bfloat16, torch.float16, torch.float32) if headline else (torch.bfloat16,)


def _selection(operation, device, setting, shape, dtype, params, scale, headline) -> Workload:
    numel = shape[0] * shape[1]
    n_scales = {"vector": shape[1], "matrix": numel, None: 0}[scale]
    return Workload(
        operation=operation,
        linear=shapes.names().get(shape, "quick"),
        shape=f"{shape[0]}x{shape[1]}",
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
    return weight, torch.randn(shape if scale == "matrix" else shape[1], device=device).mul(2).exp()

"""Inputs on which a selection can go wrong, and a bit-for-bit comparison with the reference."""

import pytest
import torch
from torch import Tensor

from wanda_kernels import reference
from wanda_kernels.native import library
from wanda_kernels.native import ops as native

DTYPES = (torch.float32, torch.float16, torch.bfloat16)
# One column, less than a vector, odd, whole vectors, whole vectors and one column, a real row.
SHAPES = ((1, 1), (3, 7), (37, 129), (4, 96), (2, 257), (2, 4096))
RECIPES = ("normal", "ties", "zeros", "dead", "outliers", "overflow", "subnormal", "signed zeros", "equal")
SCALES = ("vector", "matrix", None)

needs_cpu = pytest.mark.skipif(bool(library.why_not("cpu")), reason=library.why_not("cpu"))
# The instruction sets that this machine can run.
ISAS = () if library.why_not("cpu") else library.cpu_isas()


def make(recipe: str, shape: tuple[int, int], dtype: torch.dtype, scale: str | None, seed: int = 0):
    """(weight, scale) of a recipe. All values are finite."""
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(shape, generator=generator)
    statistic = torch.rand(shape if scale == "matrix" else shape[1:], generator=generator) + 0.01
    chosen = torch.rand(shape, generator=generator) < 0.5
    if recipe == "ties":
        weight, statistic = (weight * 2).round() / 2, (statistic * 3).ceil()
    elif recipe == "zeros":
        weight[chosen] = 0.0
    elif recipe == "dead":
        statistic[torch.rand(statistic.shape, generator=generator) < 0.5] = 0.0
    elif recipe == "outliers":
        statistic[..., 0] = 1e20
        weight[:, -1] = 6e4
    elif recipe == "overflow":  # the product becomes infinity
        weight = torch.where(chosen, weight * (1e38 if dtype != torch.float16 else 1e4), weight)
        statistic = torch.full_like(statistic, 3e38)
    elif recipe == "subnormal":  # weights, roots and products below the smallest normal number
        weight *= 1e-6 if dtype == torch.float16 else 1e-39
        statistic *= torch.where(torch.rand(statistic.shape, generator=generator) < 0.5, 1e-44, 1.0)
    elif recipe == "signed zeros":
        weight = torch.where(chosen, torch.zeros(shape), -torch.zeros(shape))
    elif recipe == "equal":
        weight, statistic = torch.ones(shape), torch.ones_like(statistic)
    weight = weight.clamp(-torch.finfo(dtype).max, torch.finfo(dtype).max).to(dtype)
    return weight, None if scale is None else statistic


def bits(tensor: Tensor) -> Tensor:
    """The same memory as integers, which compare bit for bit, NaN included."""
    return tensor.view(torch.int32 if tensor.element_size() == 4 else torch.int16)


def assert_same(operation: str, weight: Tensor, scale: Tensor | None, *args) -> None:
    """Native and reference give the same weights, mask and result. No memory around the weight is written."""
    expected, expected_mask = weight.clone(), empty_mask(weight)
    returned = getattr(reference, operation)(expected, scale, *args, expected_mask)
    padded = torch.full((weight.shape[0] + 2, weight.shape[1] + 3), 7.0, dtype=weight.dtype)
    pruned, mask = padded[1:-1, : weight.shape[1]], empty_mask(weight)
    pruned.copy_(weight)
    result = getattr(native, operation)(pruned, scale, *args, mask)
    said = f"{operation}{args} on {list(weight.shape)} {weight.dtype}"
    assert torch.equal(bits(pruned.contiguous()), bits(expected)), said
    assert torch.equal(mask, expected_mask), said
    assert (padded[:, weight.shape[1] :] == 7.0).all() and (padded[[0, -1]] == 7.0).all(), said
    assert result == returned, said


def empty_mask(weight: Tensor) -> Tensor:
    return torch.full((weight.shape[0], -(-weight.shape[1] // 8)), 0xA5, dtype=torch.uint8)

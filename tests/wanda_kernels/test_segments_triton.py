"""The Triton kernels of segments: slabs and parts that experts straddle, whole tiles, unchecked offsets."""

import pytest
import torch

from tests.wanda_kernels.cases import random_weight
from tests.wanda_kernels.conftest import GPU
from wanda_kernels.triton_ops import add_hessian, add_sq_norm, grouped_product

OFFSETS = (3, 3, 33, 64, 64, 190)  # one token in a slab of 32, and an end at the next one


def experts(offsets, x: torch.Tensor) -> list[torch.Tensor]:
    bounds = [min(max(each, 0), len(x)) for each in offsets]
    return [x[first:end].double() for first, end in zip(bounds, bounds[1:], strict=False)]


@pytest.mark.parametrize("slab_tokens", (32, 128))
def test_slabs_of_several_experts_and_experts_of_several_slabs(monkeypatch, slab_tokens):
    monkeypatch.setattr(add_sq_norm, "TOKENS_PER_SLAB", slab_tokens)
    x = random_weight(200, 130, torch.float16) * 20
    acc = torch.zeros(5, 130, device=GPU)
    add_sq_norm.add_sq_norm_(acc, x.to(GPU), torch.tensor(OFFSETS, device=GPU))
    expected = torch.stack([own.square().sum(0) for own in experts(OFFSETS, x)])
    torch.testing.assert_close(acc.cpu().double(), expected, rtol=2e-6, atol=0)


@pytest.mark.parametrize("offsets", ((-5, 20, 900), (60, 20, 10), (300, 400, 500)))
def test_offsets_that_nothing_has_checked_are_clamped(offsets):
    """On a GPU the host does not see them; the kernels read and write within their operands."""
    x = random_weight(70, 40, torch.float32) * 20
    around = torch.full((4, 40), -7.0, device=GPU)
    acc = around[1:3].zero_()
    add_sq_norm.add_sq_norm_(acc, x.to(GPU), torch.tensor(offsets, device=GPU))
    expected = torch.stack([own.square().sum(0) for own in experts(offsets, x)])
    torch.testing.assert_close(acc.cpu().double(), expected, rtol=2e-6, atol=0)
    hessians = torch.zeros(2, 40, 40, device=GPU)
    add_hessian.add_hessian_(hessians, x.to(GPU), torch.tensor(offsets, device=GPU))
    expected = torch.stack([own.T @ own for own in experts(offsets, x)])
    torch.testing.assert_close(hessians.cpu().double(), expected, rtol=0, atol=1e-3)
    assert (around[[0, 3]] == -7).all()


@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16))
def test_products_of_experts_with_more_tokens_than_a_launch_adds(monkeypatch, dtype):
    monkeypatch.setattr(grouped_product, "MOST_TOKENS", 48)
    a, b = (random_weight(200, width, dtype, seed=width) * 20 for width in (33, 70))
    acc = torch.zeros(5, 33, 70, device=GPU)
    grouped_product.add_grouped_product_(acc, a.to(GPU), b.to(GPU), torch.tensor(OFFSETS, device=GPU))
    expected = [left.T @ right for left, right in zip(experts(OFFSETS, a), experts(OFFSETS, b), strict=True)]
    torch.testing.assert_close(acc.cpu().double(), torch.stack(expected), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("upper", (False, True))
def test_wide_tiles(upper):
    """More than one tile of 128 x 256 in both directions, the last ones partial; wider than 512."""
    n_a, n_b = (520, 520) if upper else (300, 900)
    a, b = (random_weight(70, width, torch.bfloat16, seed=width) * 20 for width in (n_a, n_b))
    around = torch.full((2 * n_a * n_b + 16,), -7.0, device=GPU)
    acc = around[8:-8].view(2, n_a, n_b).zero_()
    b = a if upper else b
    grouped_product.add_grouped_product_(
        acc, a.to(GPU), b.to(GPU), torch.tensor([0, 67, 67], device=GPU), upper
    )
    expected = a[:67].double().T @ b[:67].double()
    got = acc[0].cpu().double()
    off = (got - expected).abs()
    assert (off.triu() if upper else off).max() < 1e-4
    assert not acc[1].any() and (around[:8] == -7).all() and (around[-8:] == -7).all()

"""The two paths of `add_hessian_` on a GPU: the choice between them, and the Triton matmul's own cases."""

import pytest
import torch

from tests.wanda_kernels.cases import random_weight
from tests.wanda_kernels.conftest import GPU
from wanda_kernels.triton_ops import add_hessian
from wanda_kernels.triton_ops.add_hessian import BLOCK_K, BLOCK_M, BLOCK_N

# fp32 sums of exact products, in tiles of tokens: rounding of some 100 terms, on the scale of the diagonal
TOLERANCE = {"rtol": 1e-5, "atol": 1e-5}


def exact(x: torch.Tensor) -> torch.Tensor:
    return (x.double().t() @ x.double()).float()


@pytest.mark.parametrize("dtype", (torch.bfloat16, torch.float16))
def test_tiles_above_the_diagonal_are_mirrored(dtype):
    """Several tiles in both directions, the last ones partial; memory around acc must not change."""
    n_cols = BLOCK_N + BLOCK_M + 5
    x = random_weight(BLOCK_K + 3, n_cols, dtype) * 20
    around = torch.full((n_cols * n_cols + 8,), -7.0, device=GPU)
    acc = around[4:-4].view(n_cols, n_cols)
    acc.copy_(exact(random_weight(50, n_cols, dtype, seed=1)))
    expected = acc.cpu() + exact(x)
    add_hessian.add_symmetric_(acc, x.to(GPU))
    add_hessian.mirror_(acc)
    torch.testing.assert_close(acc.cpu(), expected, **TOLERANCE)
    assert torch.equal(acc, acc.t())
    assert (around[:4] == -7).all() and (around[-4:] == -7).all()


def test_mirror_leaves_the_upper_triangle():
    acc = torch.randn(130, 130, device=GPU)
    upper = acc.triu()
    add_hessian.mirror_(acc)
    assert torch.equal(acc.triu(), upper) and torch.equal(acc, acc.t())


def test_tokens_are_added_in_parts(monkeypatch):
    monkeypatch.setattr(add_hessian, "MOST_TOKENS", 30)
    x = random_weight(71, 20, torch.bfloat16) * 20
    acc = torch.zeros(20, 20, device=GPU)
    add_hessian.add_hessian_(acc, x.to(GPU))
    torch.testing.assert_close(acc.cpu(), exact(x), **TOLERANCE)


def test_few_columns_and_old_chips_have_a_path():
    assert add_hessian.path((8, 0), 4096) == add_hessian.path((8, 6), 2048) == "symmetric"
    assert add_hessian.path((8, 0), 576) == add_hessian.path((9, 0), 4096) == "addmm"
    assert add_hessian.path((9, 0), 11008) == add_hessian.path((7, 5), 64) == "symmetric"


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", (torch.bfloat16, torch.float16))
@pytest.mark.parametrize("n_cols", (4096, 4104, 11008))
def test_both_paths_agree(n_cols, dtype):
    x = torch.randn(16_384, n_cols, device="cuda").to(dtype)
    sums = torch.zeros(2, n_cols, n_cols, device="cuda")
    add_hessian.add_symmetric_(sums[0], x)
    add_hessian.mirror_(sums[0])
    add_hessian.add_addmm_(sums[1], x)
    # both truncate their sums: 2^-24 * 1024 of the terms' magnitudes, 16,384 * 2 / pi on average
    torch.testing.assert_close(sums[0], sums[1], rtol=1e-4, atol=1.0)

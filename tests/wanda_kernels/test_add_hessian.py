import pytest
import torch

import wanda_kernels
from tests.wanda_kernels.cases import DTYPES, random_weight

OPERATION = "add_hessian_"
# fp32 sums of up to 1,300 exact products of both signs, relative to the largest sum
TOLERANCE = 1e-6


def exact(acc, x):
    x = x.double().flatten(0, -2)
    return acc.double() + x.t() @ x


def assert_sums(acc, expected):
    acc = acc.cpu()
    assert torch.equal(acc, acc.t()), "both triangles hold the same bits"
    torch.testing.assert_close(acc.double(), expected, rtol=0, atol=TOLERANCE * expected.abs().max().item())


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("n_tokens, width", ((1, 1), (5, 3), (33, 65), (130, 128), (70, 200)))
def test_adds_the_sum_of_outer_products(backend, device, n_tokens, width, dtype):
    x = random_weight(n_tokens, width, dtype) * 40
    around = torch.full((width * width + 8,), -7.0, device=device)
    acc = around[4:-4].view(width, width)
    before = torch.rand(width, width)
    before = before + before.t()
    acc.copy_(before)
    wanda_kernels.add_hessian_(acc, x.to(device), backend=backend)
    assert_sums(acc, exact(before, x))
    assert (around[:4] == -7).all() and (around[-4:] == -7).all()


@pytest.mark.parametrize("dtype", DTYPES)
def test_strides_and_leading_dimensions(backend, device, dtype):
    x = random_weight(24, 56, dtype).view(2, 12, 56)[:, 1:9, 8:30] * 40
    acc = torch.zeros(22, 22, device=device)
    wanda_kernels.add_hessian_(acc, x.to(device), backend=backend)
    assert_sums(acc, exact(torch.zeros(22, 22), x))


def test_sixteen_bit_products_are_not_rounded(backend, device):
    """The square of 1 + 2^-7 needs 15 bits, which bf16 sums would lose."""
    x = torch.full((1, 3), 1 + 2**-7, dtype=torch.bfloat16)
    acc = torch.zeros(3, 3, device=device)
    wanda_kernels.add_hessian_(acc, x.to(device), backend=backend)
    assert (acc.cpu() == (1 + 2**-7) ** 2).all()


def test_squares_beyond_fp16(backend, device):
    x = torch.full((3, 4), 300.0, dtype=torch.float16)
    acc = torch.zeros(4, 4, device=device)
    wanda_kernels.add_hessian_(acc, x.to(device), backend=backend)
    assert (acc.cpu() == 3 * 300.0**2).all()


def test_split_tokens_add_up_and_no_tokens_add_nothing(backend, device):
    x = (random_weight(100, 30, torch.float32) * 40).to(device)
    whole, parts = torch.zeros(30, 30, device=device), torch.zeros(30, 30, device=device)
    wanda_kernels.add_hessian_(whole, x, backend=backend)
    for cut in (slice(0, 17), slice(17, 17), slice(17, 100)):
        wanda_kernels.add_hessian_(parts, x[cut], backend=backend)
    torch.testing.assert_close(parts, whole, rtol=0, atol=TOLERANCE * whole.max().item())


def test_an_infinite_activation_shows(backend, device):
    x = torch.ones(4, 70, device=device)
    x[2, 66] = float("inf")
    acc = torch.zeros(70, 70, device=device)
    wanda_kernels.add_hessian_(acc, x, backend=backend)
    assert acc[66, 66] == float("inf") and acc[0, 66] == float("inf") and acc[66, 0] == float("inf")
    assert (acc[:66, :66] == 4).all()


def test_refuses_wrong_operands(backend, device):
    x = torch.ones(4, 6, device=device)
    with pytest.raises(ValueError, match=r"contiguous float32 \[6, 6\], got torch.float32 \[6, 5\]"):
        wanda_kernels.add_hessian_(torch.zeros(6, 5, device=device), x, backend=backend)
    with pytest.raises(ValueError, match="float32, float16 or bfloat16"):
        wanda_kernels.add_hessian_(torch.zeros(6, 6, device=device), x.int(), backend=backend)


def test_more_columns_and_tokens_than_one_block():
    """With the backend that auto chooses here; interpreted Triton would need a minute."""
    x = random_weight(1300, 600, torch.bfloat16) * 40
    acc = torch.zeros(600, 600)
    wanda_kernels.add_hessian_(acc, x)
    assert_sums(acc, exact(torch.zeros(600, 600), x))

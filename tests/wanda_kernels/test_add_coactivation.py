import pytest
import torch
import torch.nn.functional as F

import wanda_kernels
from tests.wanda_kernels.cases import DTYPES, random_weight

OPERATION = "add_coactivation_"
# fp32: sums of positive terms in another order, and an approximate exp. 16-bit operands are rounded to the
# input's dtype, twice a term: 2^-11 in fp16, 2^-8 in bf16. Squares are rounded to bf16: fp16 would overflow.
RTOL = {torch.float32: 1e-5, torch.float16: 2**-10, torch.bfloat16: 2**-7}
ACTIVATIONS = {
    None: lambda g: g,
    "silu": F.silu,
    "gelu": F.gelu,
    "gelu_tanh": lambda g: F.gelu(g, approximate="tanh"),
    "relu": F.relu,
}


def exact(acc, gate, x, activation, power):
    gate = ACTIVATIONS[activation](gate.double()).abs() ** power
    return (acc.double() + gate.flatten(0, -2).t() @ (x.double().abs() ** power).flatten(0, -2)).float()


def operands(n_tokens, n_out, n_in, dtype):
    return random_weight(n_tokens, n_out, dtype, seed=1) * 40, random_weight(
        n_tokens, n_in, dtype, seed=2
    ) * 40


@pytest.mark.parametrize("power", (1, 2))
@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_adds_the_sum_of_products(backend, device, dtype, activation, power):
    gate, x = operands(37, 70, 129, dtype)
    acc, sq_norm = torch.rand(70, 129), torch.rand(129)
    expected, expected_norm = exact(acc, gate, x, activation, power), sq_norm + x.float().square().sum(0)
    acc, sq_norm = acc.to(device), sq_norm.to(device)
    wanda_kernels.add_coactivation_(
        acc, gate.to(device), x.to(device), activation, power, sq_norm=sq_norm, backend=backend
    )
    rtol = RTOL[torch.bfloat16 if power == 2 and dtype == torch.float16 else dtype]
    torch.testing.assert_close(acc.cpu(), expected, rtol=rtol, atol=1e-5)
    torch.testing.assert_close(sq_norm.cpu(), expected_norm, rtol=2e-6, atol=0)


@pytest.mark.parametrize("dtype", DTYPES)
def test_odd_shapes_and_untouched_surroundings(backend, device, dtype):
    for n_tokens, n_out, n_in in ((1, 1, 1), (33, 64, 65), (5, 129, 3), (70, 200, 140)):
        gate, x = operands(n_tokens, n_out, n_in, dtype)
        around = torch.full((n_out * n_in + 8,), -7.0, device=device)
        acc = around[4:-4].view(n_out, n_in)
        acc.zero_()
        wanda_kernels.add_coactivation_(acc, gate.to(device), x.to(device), backend=backend)
        expected = exact(torch.zeros(n_out, n_in), gate, x, "silu", 1)
        torch.testing.assert_close(acc.cpu(), expected, rtol=RTOL[dtype], atol=1e-5)
        assert (around[:4] == -7).all() and (around[-4:] == -7).all()


def test_strides_and_leading_dimensions(backend, device):
    gate, x = operands(24, 40, 56, torch.bfloat16)
    gate, x = gate.view(2, 12, 40)[:, 1:9, 4:20], x.view(2, 12, 56)[:, 1:9, 8:30]
    acc = torch.zeros(16, 22)
    expected = exact(acc, gate, x, "silu", 1)
    acc = acc.to(device)
    wanda_kernels.add_coactivation_(acc, gate.to(device), x.to(device), backend=backend)
    torch.testing.assert_close(acc.cpu(), expected, rtol=RTOL[torch.bfloat16], atol=1e-5)


def test_squares_beyond_fp16(backend, device):
    gate = torch.full((3, 4), 300.0, dtype=torch.float16)
    acc = torch.zeros(4, 4, device=device)
    wanda_kernels.add_coactivation_(acc, gate.to(device), gate.to(device), None, 2, backend=backend)
    torch.testing.assert_close(acc.cpu(), torch.full((4, 4), 3 * 300.0**4), rtol=RTOL[torch.bfloat16], atol=0)


def test_every_run_gives_the_same_bits(backend, device):
    gate, x = (t.to(device) for t in operands(150, 20, 30, torch.bfloat16))
    sums = [torch.zeros(20, 30, device=device) for _ in range(2)]
    for acc in sums:
        wanda_kernels.add_coactivation_(acc, gate, x, backend=backend)
    assert torch.equal(*sums)


def test_split_tokens_add_up(backend, device):
    gate, x = (t.to(device) for t in operands(100, 20, 30, torch.float32))
    whole, parts = torch.zeros(20, 30, device=device), torch.zeros(20, 30, device=device)
    wanda_kernels.add_coactivation_(whole, gate, x, backend=backend)
    for cut in (slice(0, 17), slice(17, 17), slice(17, 100)):
        wanda_kernels.add_coactivation_(parts, gate[cut], x[cut], backend=backend)
    torch.testing.assert_close(parts, whole, rtol=1e-5, atol=1e-6)

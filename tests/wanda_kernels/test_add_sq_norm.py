import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import wanda_kernels
from tests.wanda_kernels.cases import DTYPES, random_weight
from tests.wanda_kernels.conftest import device_of

OPERATION = "add_sq_norm_"
# sums of positive fp32 terms in another order: 2^-24 for each addition on the longest path to the total
RTOL = 2e-6
SHAPES = (
    (1, 1),
    (1, 129),
    (37, 130),
    (128, 64),
    (129, 64),
    (300, 33),
)  # slabs are 128 tokens, tiles 32 x 128


def exact(acc, x):
    return (acc.double() + x.reshape(-1, x.shape[-1]).double().square().sum(0)).float()


@pytest.mark.parametrize("dtype", DTYPES)
def test_adds_the_sums_of_squares(backend, device, dtype):
    for n_tokens, n_cols in SHAPES:
        x = random_weight(n_tokens, n_cols, dtype) * 30
        around = torch.full((n_cols + 8,), -7.0, device=device)
        acc = around[4:-4]
        acc.copy_(torch.arange(n_cols))
        expected = exact(acc.cpu(), x)
        wanda_kernels.add_sq_norm_(acc, x.to(device), backend=backend)
        torch.testing.assert_close(acc.cpu(), expected, rtol=RTOL, atol=0)
        assert (around[:4] == -7).all() and (around[-4:] == -7).all()


def test_strides_and_leading_dimensions(backend, device):
    whole = random_weight(60, 96, torch.bfloat16).to(device).reshape(3, 20, 96)
    for x in (whole, whole[:, 3:17, 8:72], whole[:, ::2], whole.transpose(1, 2)):
        acc = torch.zeros(x.shape[-1], device=device)
        wanda_kernels.add_sq_norm_(acc, x, backend=backend)
        torch.testing.assert_close(acc.cpu(), exact(torch.zeros(x.shape[-1]), x.cpu()), rtol=RTOL, atol=0)


def test_every_run_gives_the_same_bits(backend, device):
    x = random_weight(700, 40, torch.float16).to(device)
    sums = [torch.zeros(40, device=device) for _ in range(3)]
    for acc in sums:
        wanda_kernels.add_sq_norm_(acc, x, backend=backend)
    assert torch.equal(sums[0], sums[1]) and torch.equal(sums[0], sums[2])


def test_large_fp16_and_nonfinite_values(backend, device):
    x = torch.full((40, 4), 60_000.0, dtype=torch.float16)
    x[3, 1], x[5, 2] = float("inf"), float("nan")
    acc = torch.zeros(4, device=device)
    wanda_kernels.add_sq_norm_(acc, x.to(device), backend=backend)
    torch.testing.assert_close(acc.cpu(), exact(torch.zeros(4), x), rtol=RTOL, atol=0, equal_nan=True)


def test_no_tokens(backend, device):
    acc = torch.ones(5, device=device)
    wanda_kernels.add_sq_norm_(acc, torch.empty(0, 5, device=device), backend=backend)
    assert (acc == 1).all()


@settings(max_examples=10, deadline=None)
@given(cut=st.integers(0, 200), dtype=st.sampled_from(DTYPES))
def test_the_sum_does_not_depend_on_how_tokens_are_split(backend, cut, dtype):
    x = random_weight(200, 9, dtype).to(device_of(backend))
    whole, parts = torch.zeros(9, device=x.device), torch.zeros(9, device=x.device)
    wanda_kernels.add_sq_norm_(whole, x, backend=backend)
    wanda_kernels.add_sq_norm_(parts, x[:cut], backend=backend)
    wanda_kernels.add_sq_norm_(parts, x[cut:], backend=backend)
    torch.testing.assert_close(parts, whole, rtol=RTOL, atol=0)

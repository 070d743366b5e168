"""`factor_hessian` against an fp64 inverse, and on unusual and broken Hessians."""

import pytest
import torch

import wanda_kernels
from tests.wanda_kernels.conftest import GPU
from wanda_kernels import Factor, NotPositiveDefiniteError, factor_hessian


def hessian_of(n_tokens: int, width: int, seed: int = 0) -> torch.Tensor:
    x = torch.randn(n_tokens, width, generator=torch.Generator().manual_seed(seed))
    x = x * torch.logspace(-1, 1, width)
    return (x.t() @ x).to(GPU)


def damped(hessian: torch.Tensor, dampening: float) -> torch.Tensor:
    """fp64, dead inputs and dampening as published."""
    h = hessian.double().clone()
    dead = h.diagonal() == 0
    h[dead, dead] = 1
    return h + torch.eye(len(h), device=h.device) * dampening * h.diagonal().mean()


def assert_factors(factor: Factor, hessian: torch.Tensor) -> None:
    """U in fp64 by the three published steps: Cholesky, inverse, Cholesky."""
    upper = factor.upper
    assert upper.dtype == torch.float32 and upper.is_contiguous() and torch.equal(upper, upper.triu())
    exact = damped(hessian, factor.dampening)
    expected = torch.linalg.cholesky(torch.linalg.inv(exact), upper=True)
    bound = 2**-24 * (torch.linalg.cond(exact) + 10) * expected.max()
    torch.testing.assert_close(upper.double(), expected, rtol=0, atol=bound.item())


@pytest.mark.parametrize("width", (1, 2, 63, 64, 65, 200, 321))
def test_equals_the_published_factor_in_fp64(width):
    hessian = hessian_of(2 * width + 3, width)
    before = hessian.clone()
    factor = factor_hessian(hessian)
    assert_factors(factor, hessian)
    assert factor.dampening == 0.01 and not factor.dead.any()
    assert torch.equal(hessian, before)


def test_dead_inputs():
    hessian = hessian_of(300, 130)
    hessian[[0, 77], :] = 0
    hessian[:, [0, 77]] = 0
    factor = factor_hessian(hessian)
    assert factor.dead.nonzero().flatten().tolist() == [0, 77]
    assert_factors(factor, hessian)
    assert factor.upper[77].count_nonzero() == 1 and factor.upper[:, 77].count_nonzero() == 1


def test_fewer_tokens_than_inputs_and_rank_one():
    for hessian in (hessian_of(20, 150), hessian_of(1, 90)):
        factor = factor_hessian(hessian)
        assert factor.dampening == 0.01
        assert_factors(factor, hessian)


def test_all_zero_is_all_dead():
    factor = factor_hessian(torch.zeros(70, 70, device=GPU))
    assert factor.dead.all()
    torch.testing.assert_close(factor.upper, torch.eye(70, device=GPU) / 1.01**0.5)


@pytest.mark.parametrize("shift, dampening", ((0.05, 0.1), (0.5, 1.0), (5.0, 10.0)))
def test_dampening_grows_tenfold_until_it_helps(shift, dampening):
    """The lowest eigenvalue is -shift times the mean diagonal."""
    hessian = torch.eye(80, device=GPU)
    coupling = 1 + shift
    hessian[0, 1] = hessian[1, 0] = coupling
    factor = factor_hessian(hessian)
    assert factor.dampening == pytest.approx(dampening)
    assert_factors(factor, hessian)


def test_indefinite_beyond_every_dampening():
    hessian = torch.eye(80, device=GPU)
    hessian[3, 9] = hessian[9, 3] = -20.0
    hessian[5, 5] = 4.0
    with pytest.raises(NotPositiveDefiniteError) as caught:
        factor_hessian(hessian)
    assert isinstance(caught.value, ValueError)
    for part in ("80 x 80", "even with 10 of its mean diagonal", "from 1 to 4", "0 dead inputs"):
        assert part in str(caught.value)


def test_one_infinite_activation_is_refused_with_its_place():
    x = torch.randn(50, 40, device=GPU)
    x[7, 12] = float("inf")
    acc = torch.zeros(40, 40, device=GPU)
    wanda_kernels.add_hessian_(acc, x)
    with pytest.raises(ValueError, match=r"hessian holds (-?inf|nan) at \[0, 12\]"):
        factor_hessian(acc)


def test_at_the_end_of_fp32():
    factor = factor_hessian(torch.eye(4, device=GPU) * 3e38)  # the diagonal's sum overflows fp32
    assert_factors(factor, torch.eye(4, device=GPU) * 3e38)
    with pytest.raises(NotPositiveDefiniteError):  # the dampened diagonal overflows fp32
        factor_hessian(torch.eye(4, device=GPU) * 3.4e38)


def test_refuses_wrong_operands():
    for wrong in (torch.zeros(3, 4), torch.zeros(9), torch.zeros(3, 3, dtype=torch.float64)):
        with pytest.raises(ValueError, match=r"hessian must be float32 \[in, in\]"):
            factor_hessian(wrong)
    with pytest.raises(ValueError, match="dampening must be positive, got 0"):
        factor_hessian(torch.eye(3), dampening=0)

"""Inside an operation fp32 matmuls have full precision; outside they have the caller's."""

import pytest
import torch

import wanda_kernels
from wanda_kernels import hessian_factor, host_hessian
from wanda_kernels.dispatch import backends
from wanda_kernels.dispatch.precision import tf32_on_gpus


@pytest.fixture(params=["high", "medium", "of a device"])
def lower_precision(request):
    """Set less than full precision, and return a function that reads the setting."""
    cuda, cpu = torch.backends.cuda.matmul, torch.backends.mkldnn.matmul
    if request.param == "of a device":
        cuda.fp32_precision = "tf32"
        yield lambda: (cuda.fp32_precision, cpu.fp32_precision)
    else:
        torch.set_float32_matmul_precision(request.param)
        yield torch.get_float32_matmul_precision
    torch.set_float32_matmul_precision("highest")


def test_operations_run_in_full_precision(lower_precision, monkeypatch):
    inside = []
    spy = lambda *operands: inside.append(torch.get_float32_matmul_precision())  # noqa: E731
    monkeypatch.setitem(backends.TABLE, "add_hessian_", dict.fromkeys(backends.BACKENDS, spy))
    before = lower_precision()
    wanda_kernels.add_hessian_(torch.zeros(4, 4), torch.ones(3, 4))
    torch.ops.wanda_kernels.add_hessian_(torch.zeros(4, 4), torch.ones(3, 4), None, "auto")
    assert inside == ["highest"] * 2 and lower_precision() == before


@pytest.mark.parametrize("backend", ["torch", "auto"])
def test_autocast_does_not_reach_an_operation(backend):
    def summed():
        acc = torch.zeros(24, 24)
        wanda_kernels.add_hessian_(acc, x, backend=backend)
        factor = wanda_kernels.factor_hessian(acc)
        pruned = weight.clone()
        wanda_kernels.sparsegpt_(pruned, factor, 0.5, backend=backend)
        return acc, factor.upper, pruned

    generator = torch.Generator().manual_seed(0)
    x, weight = (torch.randn(n, 24, generator=generator) for n in (64, 5))
    expected = summed()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert all(map(torch.equal, summed(), expected))
        assert torch.is_autocast_enabled("cpu")


def test_hessians_on_the_host_are_summed_in_full_precision(lower_precision, monkeypatch):
    inside = []
    spy = lambda *operands: inside.append(torch.get_float32_matmul_precision())  # noqa: E731
    monkeypatch.setattr(host_hessian, "add_product_", spy)
    before = lower_precision()
    host_hessian.add_hessian_on_host_(torch.zeros(4, 4), torch.ones(3, 4))
    assert inside == ["highest"] and lower_precision() == before


def test_hessians_are_factored_in_full_precision(lower_precision, monkeypatch):
    inside = []
    invert = hessian_factor._invert_lower_

    def spy(*operands):
        inside.append(torch.get_float32_matmul_precision())
        invert(*operands)

    monkeypatch.setattr(hessian_factor, "_invert_lower_", spy)
    before = lower_precision()
    wanda_kernels.factor_hessian(torch.eye(4))
    assert inside == ["highest"] and lower_precision() == before


def test_the_callers_precision_returns_after_an_error(lower_precision):
    before = lower_precision()
    with pytest.raises(wanda_kernels.NotPositiveDefiniteError):
        wanda_kernels.factor_hessian(-torch.eye(4))
    assert lower_precision() == before


def test_tf32_is_for_gpus_alone_and_ends_with_the_context():
    before = torch.backends.cuda.matmul.fp32_precision
    with pytest.raises(ZeroDivisionError), tf32_on_gpus():
        assert torch.backends.cuda.matmul.fp32_precision == "tf32"
        assert torch.backends.mkldnn.matmul.fp32_precision != "tf32"
        raise ZeroDivisionError
    assert torch.backends.cuda.matmul.fp32_precision == before

import pytest
import torch

import wanda_kernels
from tests.wanda_kernels.cases import random_weight
from tests.wanda_kernels.native_cases import needs_cpu
from wanda_kernels import OPERATIONS
from wanda_kernels.dispatch.backends import call


def arguments(operation: str, backend: str) -> tuple:
    torch.manual_seed(0)
    weight, scale = random_weight(3, 16, torch.float32), torch.rand(16)
    mask = torch.zeros(3, 2, dtype=torch.uint8)
    x, gate = torch.rand(5, 16), torch.rand(5, 3)
    dense, pruned = random_weight(3, 16, torch.float32, seed=1), weight > 0
    hessian = torch.eye(16) + 0.1
    factor = torch.rand(16, 16).triu() + torch.eye(16), scale < 0.1
    return {
        "add_sq_norm_": (scale, x, None, backend),
        "add_coactivation_": (weight, gate, x, "silu", 1, scale, None, backend),
        "add_hessian_": (torch.zeros(16, 16), x, None, backend),
        "add_gated_coactivation_": (weight, weight.clone(), gate, gate + 1, x, "silu", scale, None, backend),
        "prune_rows_": (weight, scale, 7, mask, backend),
        "prune_nm_": (weight, scale, 2, 4, mask, backend),
        "prune_matrix_": (weight, None, 20, None, backend),
        "prune_variant_": (weight, scale, 0.5, mask, backend),
        "sparsegpt_": (weight, *factor, 0.5, 0, 0, "wanda", scale, None, mask, backend),
        "refine_mask_": (weight, pruned, hessian, 0, 0, 2, backend),
        "polish_": (weight, dense, pruned, hessian, 2, backend),
        "packed_linear": (x, *wanda_kernels.pack_rows(weight * pruned), weight[:, 0].clone(), backend),
        "unpack_rows": (weight, *wanda_kernels.pack_rows(weight * pruned), backend),
        "admm_step_": (weight, weight.clone(), dense, pruned, 0, 2, 4, 0.7, backend),
    }[operation]


@pytest.mark.parametrize("operation", OPERATIONS)
def test_opcheck(operation):
    """Schema, aliasing, fake tensors and tracing agree with the operation's declaration."""
    result = torch.library.opcheck(
        getattr(torch.ops.wanda_kernels, operation).default, arguments(operation, "torch")
    )
    assert len(result) == 4 and set(result.values()) == {"SUCCESS"}


@pytest.mark.parametrize("operation", ["add_sq_norm_", "add_hessian_"])
def test_opcheck_with_offsets(operation):
    acc, offsets = torch.zeros(2, *(16,) * (1 + (operation == "add_hessian_"))), torch.tensor([0, 2, 5])
    run = getattr(torch.ops.wanda_kernels, operation).default
    result = torch.library.opcheck(run, (acc, torch.rand(5, 16), offsets, "torch"))
    assert len(result) == 4 and set(result.values()) == {"SUCCESS"}


BACKENDS = ["torch", pytest.param("cpu", marks=needs_cpu)]


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("operation", OPERATIONS)
def test_parameters_are_changed_as_other_tensors_are(operation, backend):
    expected, given = arguments(operation, backend), arguments(operation, backend)
    floats = [each for each in given if torch.is_tensor(each) and each.is_floating_point()]
    for tensor in floats:
        tensor.requires_grad_()
    with torch.no_grad():
        call(operation, *expected)
    call(operation, *given)
    for right, got in zip(expected, given, strict=True):
        assert torch.equal(got, right) if torch.is_tensor(right) else got == right
    assert all(tensor.is_leaf for tensor in floats)


@pytest.mark.parametrize("backend", BACKENDS)
def test_sums_of_activations_keep_no_graph(backend):
    acc, x = torch.zeros(16, 16), torch.rand(5, 16, requires_grad=True)
    wanda_kernels.add_hessian_(acc, x * 2, backend=backend)
    assert not acc.requires_grad and acc.grad_fn is None
    assert not wanda_kernels.factor_hessian(acc.requires_grad_()).upper.requires_grad


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_models_own_weight_is_pruned(backend):
    linear = torch.nn.Linear(16, 3)
    wanda_kernels.prune_rows_(linear.weight, torch.ones(16), 7, backend=backend)
    assert (linear.weight == 0).sum() == 21 and linear.weight.is_leaf


def test_compiled_without_a_graph_break():
    def prune(weight, scale):
        wanda_kernels.prune_nm_(weight, scale, 2, 4, check_finite=False)
        return weight.sum()

    weight, scale = random_weight(3, 16, torch.float32), torch.rand(16)
    expected = weight.clone()
    total = prune(expected, scale)
    compiled = torch.compile(prune, fullgraph=True, backend="aot_eager")
    assert torch.equal(compiled(weight, scale), total)
    assert torch.equal(weight, expected) and (weight == 0).sum() == 24

import pytest
import torch

import wanda_kernels
from tests.wanda_kernels.cases import random_weight
from wanda_kernels.registration import OPERATIONS


def arguments(operation: str, backend: str) -> tuple:
    weight, scale = random_weight(3, 16, torch.float32), torch.rand(16)
    mask = torch.zeros(3, 2, dtype=torch.uint8)
    x, gate = torch.rand(5, 16), torch.rand(5, 3)
    factor = torch.rand(16, 16).triu() + torch.eye(16), scale < 0.1
    return {
        "add_sq_norm_": (scale, x, backend),
        "add_coactivation_": (weight, gate, x, "silu", 1, scale, backend),
        "add_hessian_": (torch.zeros(16, 16), x, backend),
        "add_gated_coactivation_": (weight, weight.clone(), gate, gate + 1, x, "silu", scale, backend),
        "prune_rows_": (weight, scale, 7, mask, backend),
        "prune_nm_": (weight, scale, 2, 4, mask, backend),
        "prune_matrix_": (weight, None, 20, None, backend),
        "prune_variant_": (weight, scale, 0.5, mask, backend),
        "sparsegpt_": (weight, *factor, 0.5, 0, 0, "wanda", scale, None, mask, backend),
    }[operation]


@pytest.mark.parametrize("operation", OPERATIONS)
def test_opcheck(operation):
    """Schema, aliasing, fake tensors and tracing are as the operation declares them."""
    result = torch.library.opcheck(OPERATIONS[operation], arguments(operation, "torch"))
    assert len(result) == 4 and set(result.values()) == {"SUCCESS"}


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

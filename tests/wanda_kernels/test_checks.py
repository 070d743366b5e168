"""Every operand is asked where it lies before any of them is touched."""

import pytest
import torch

import wanda_kernels
from tests.wanda_kernels.cases import poisoned_mask, random_weight
from wanda_kernels import Factor

# operation -> its operands by name, the first of which says where it runs; then what is no tensor
OPERATIONS = {
    "add_sq_norm_": (("acc", "x"), {}),
    "add_coactivation_": (("acc", "gate", "x", "sq_norm"), {}),
    "add_hessian_": (("acc", "x"), {}),
    "add_gated_coactivation_": (("acc_gate", "acc_up", "gate", "up", "x", "sq_norm"), {}),
    "prune_rows_": (("weight", "scale", "mask"), {"num_pruned": 7}),
    "prune_nm_": (("weight", "scale", "mask"), {"n": 2, "m": 4}),
    "prune_matrix_": (("weight", "scale", "mask"), {"rank": 20}),
    "prune_variant_": (("weight", "scale", "mask"), {"ratio": 0.5}),
    "sparsegpt_": (("weight", "factor.upper", "factor.dead", "pruned", "mask"), {"pattern": None}),
}
CASES = [(operation, name) for operation, (names, _) in OPERATIONS.items() for name in names[1:]]


def operands(operation: str) -> dict[str, torch.Tensor]:
    n_out, n_in, n_tokens = 3, 16, 5
    acc = {"add_sq_norm_": (n_in,), "add_hessian_": (n_in, n_in)}.get(operation, (n_out, n_in))
    every = {
        "acc": torch.zeros(acc),
        "acc_gate": torch.zeros(acc),
        "acc_up": torch.zeros(acc),
        "gate": torch.rand(n_tokens, n_out),
        "up": torch.rand(n_tokens, n_out),
        "x": torch.rand(n_tokens, n_in),
        "sq_norm": torch.zeros(n_in),
        "weight": random_weight(n_out, n_in, torch.float32),
        "scale": torch.rand(n_in),
        "mask": poisoned_mask(n_out, n_in, "cpu"),
        "factor.upper": torch.eye(n_in),
        "factor.dead": torch.zeros(n_in, dtype=torch.bool),
        "pruned": torch.ones(n_out, n_in, dtype=torch.bool),
    }
    return {name: every[name] for name in OPERATIONS[operation][0]}


def run(operation: str, tensors: dict[str, torch.Tensor]) -> None:
    named = dict(tensors)
    if operation == "sparsegpt_":
        named["factor"] = Factor(named.pop("factor.upper"), named.pop("factor.dead"), 0.01)
    getattr(wanda_kernels, operation)(**named, **OPERATIONS[operation][1])


@pytest.mark.parametrize(("operation", "name"), CASES)
def test_an_operand_on_another_device_is_named(operation, name):
    tensors = operands(operation)
    run(operation, tensors)
    tensors = operands(operation)
    tensors[name] = tensors[name].to("meta")
    before = {each: tensor.clone() for each, tensor in tensors.items()}
    with pytest.raises(ValueError, match=f"{name} is on meta, the first operand on cpu"):
        run(operation, tensors)
    for each in set(tensors) - {name}:
        assert torch.equal(tensors[each], before[each])

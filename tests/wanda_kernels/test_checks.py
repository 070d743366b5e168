"""Operands on a wrong device or with bad values are refused before any operand is changed."""

import pytest
import torch

import wanda_kernels
from tests.wanda_kernels.cases import poisoned_mask, random_weight
from wanda_kernels import Factor

# operation -> the names of its tensors, the first of which decides the device; its other arguments
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


LABELS = ("weight", "scale", "input statistics, as a scale", "not a scale at all")


@pytest.mark.parametrize("label", LABELS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])  # on the CPU by the library, and by torch
def test_the_call_and_not_the_label_says_what_must_not_be_negative(label, dtype):
    negative = torch.tensor([[1.0, 2.0, -3.0]], dtype=dtype)
    wanda_kernels.require_finite({label: negative})
    assert wanda_kernels.first_not_finite({label: negative}) is None
    with pytest.raises(ValueError) as refusal:
        wanda_kernels.require_finite({label: negative}, non_negative={label: negative})
    assert str(refusal.value) == f"{label} holds -3.0 at [0, 2]"
    assert wanda_kernels.first_not_finite({}, {label: negative}) == label
    with pytest.raises(ValueError, match=f"{label} holds inf at .0, 1."):
        wanda_kernels.require_finite({}, {label: torch.tensor([[1.0, torch.inf]], dtype=dtype)})


def test_the_first_bad_tensor_is_named():
    good, bad = torch.ones(3), torch.tensor([1.0, torch.nan])
    assert wanda_kernels.first_not_finite({"a": good, "b": None, "c": bad}, {"d": bad}) == "c"
    assert wanda_kernels.first_not_finite({"a": good, "b": torch.empty(0)}, {"d": -good}) == "d"
    assert wanda_kernels.first_not_finite({}) is None
    wanda_kernels.require_finite({"a": good, "b": None}, {"c": torch.zeros(2)})

"""Selections in stacks of experts and in any storage equal a loop over single matrices, bit for bit."""

from functools import partial
from unittest.mock import MagicMock

import pytest
import torch

import wanda_kernels
from tests.wanda_kernels.cases import DTYPES, bits, edge_weight, make_scale, poisoned_mask, random_weight
from tests.wanda_kernels.conftest import device_of
from tests.wanda_kernels.stack_cases import (
    LAYOUTS,
    OPERATIONS,
    SCALES,
    TRANSPOSED,
    assert_equals_a_loop,
    random_stack,
    stack_scale,
    stored,
)
from wanda_kernels import Factor
from wanda_kernels.dispatch import backends

SERVED = [
    (operation, backend)
    for operation in OPERATIONS
    for backend in backends.BACKENDS
    if not backends.why_not(operation, device_of(backend), backend)
]
RULES = {"prune_rows_": lambda n_cols: (n_cols // 2,), "prune_nm_": lambda n_cols: (2, 4)}
# one expert, one row, odd sizes, one row and one column more than a tile of the CPU kernels
SHAPES = ((1, 1, 4), (3, 5, 12), (2, 33, 36))
# interpreted, a program of one row takes as long as one of many
FEW_ROWS = ((1, 1, 4), (2, 2, 12))
# every layout in every dtype where that is fast, and in one where kernels are interpreted
STORED = [
    (operation, backend, dtype, layout)
    for operation, backend in SERVED
    for number, layout in enumerate(LAYOUTS)
    for dtype in (DTYPES if backend != "triton" else DTYPES[number % 3 :][:1])
]


def assert_same(operation, backend, weight, scale, *rule, layout):
    device = device_of(backend)
    scale = None if scale is None else scale.to(device)
    if backend == "cuda" and (layout in TRANSPOSED or layout == "experts innermost"):
        backend = "auto"  # the CUDA kernel needs contiguous rows
    run = partial(getattr(wanda_kernels, operation), backend=backend)
    assert_equals_a_loop(run, operation, weight.to(device), scale, *rule, layout=layout)


@pytest.mark.parametrize(("operation", "backend", "dtype", "layout"), STORED)
def test_a_stack_equals_a_loop_over_experts(operation, backend, dtype, layout):
    interpreted = backend == "triton" and device_of(backend) == "cpu"
    has_rows = layout not in TRANSPOSED and layout != "experts innermost"
    for number, shape in enumerate(FEW_ROWS if interpreted and has_rows else SHAPES):
        turn = (number + list(LAYOUTS).index(layout)) % len(SCALES)
        for kind in SCALES[turn:][:1] if interpreted else SCALES:
            weight, scale = random_stack(*shape, dtype), stack_scale(kind, *shape)
            assert_same(operation, backend, weight, scale, *RULES[operation](shape[2]), layout=layout)


@pytest.mark.parametrize(
    ("operation", "backend", "dtype", "layout"), [each for each in STORED if each[3] in TRANSPOSED]
)
def test_ties_zeros_subnormals_and_overflow(operation, backend, dtype, layout):
    weight = edge_weight(76, dtype).view(2, 3, 76)
    scale = make_scale("matrix", 2, 76)  # one row for each expert
    rule = (31,) if operation == "prune_rows_" else (2, 4)
    assert_same(operation, backend, weight, scale, *rule, layout=layout)


@pytest.mark.parametrize(("operation", "backend"), [each for each in SERVED if each[0] == "prune_rows_"])
def test_rows_of_every_count(operation, backend):
    for num_pruned in (0, 1, 36, 37):
        weight, scale = random_stack(2, 3, 37, torch.bfloat16), stack_scale("vector", 2, 3, 37)
        assert_same(operation, backend, weight, scale, num_pruned, layout="transposed")


# one for each number of rows of a Triton program, and one too long for its registers
@pytest.mark.parametrize("n_cols", [500, 520, 1030, 2050, 4100, 8200])
@pytest.mark.parametrize(("operation", "backend"), [each for each in SERVED if each[0] == "prune_rows_"])
def test_transposed_rows_of_every_length(operation, backend, n_cols):
    weight = random_stack(1, 3, n_cols, torch.bfloat16)
    weight[0, 1] = (torch.arange(n_cols) % 5 - 2.0).to(weight.dtype)
    scale = stack_scale("vector", 1, 3, n_cols)
    assert_same(operation, backend, weight, scale, int(n_cols * 0.6), layout="transposed")


# short and long groups, by extraction, and an m that is no power of two
@pytest.mark.parametrize(("n", "m"), [(1, 2), (4, 8), (8, 16), (31, 32), (2, 3), (9, 12)])
@pytest.mark.parametrize(("operation", "backend"), [each for each in SERVED if each[0] == "prune_nm_"])
def test_groups_of_every_size(operation, backend, n, m):
    for layout in ("contiguous", "transposed"):
        weight, scale = random_stack(2, 2, 7 * m, torch.float16), stack_scale("vector", 2, 2, 7 * m)
        weight[1, 1] = weight[1, 1].sign()
        assert_same(operation, backend, weight, scale, n, m, layout=layout)


def factor_of(n_cols: int, device: str) -> Factor:
    upper = torch.rand(n_cols, n_cols).triu() + torch.eye(n_cols)
    return Factor(upper.to(device), (torch.arange(n_cols) == 2).to(device), 0.01)


WHOLE = {  # operations on one matrix: what they take after the weight
    "prune_matrix_": lambda n_cols, device: (torch.rand(n_cols).to(device), 40),
    "prune_variant_": lambda n_cols, device: (torch.rand(n_cols).to(device), 0.5),
    "sparsegpt_": lambda n_cols, device: (factor_of(n_cols, device), 0.5),
}
WHOLE_SERVED = [
    (operation, backend)
    for operation in WHOLE
    for backend in backends.BACKENDS
    if not backends.why_not(operation, device_of(backend), backend)
]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("operation", "backend"), WHOLE_SERVED)
def test_operations_on_one_matrix_take_any_storage(operation, backend, dtype):
    device, run = device_of(backend), getattr(wanda_kernels, operation)
    for layout in ("transposed", "experts innermost"):
        expected = random_weight(5, 16, dtype).to(device)
        parameter, view = stored(expected[None], layout)
        arguments = WHOLE[operation](16, device)
        masks = [poisoned_mask(5, 16, device) for _ in range(2)]
        first = run(expected, *arguments, mask=masks[0], backend=backend)
        second = run(view[0], *arguments, mask=masks[1], backend=backend)
        assert torch.equal(bits(view[0].contiguous()), bits(expected)) and torch.equal(*masks)
        assert first is None or first.item() == second.item()
        view.fill_(7.0)
        assert (parameter == 7.0).all()


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", [*DTYPES, torch.float64])  # by the library, and by torch
def test_values_are_checked_and_counted_in_any_storage(dtype, layout):
    for shape in SHAPES:
        weight = torch.where(torch.arange(shape[0] * shape[1] * shape[2]) % 3 == 0, -0.0, 1.0).view(shape)
        parameter, view = stored(weight.to(dtype), layout)
        assert wanda_kernels.count_zeros(view).item() == (weight == 0).sum().item()
        assert wanda_kernels.count_zeros(view[0]).item() == (weight[0] == 0).sum().item()
        parameter[parameter == 7.0] = torch.nan  # around the stack
        wanda_kernels.require_finite({"a": view}, {"b": view})
        last = tuple(size - 1 for size in shape)
        view[last] = torch.inf
        with pytest.raises(ValueError) as refusal:
            wanda_kernels.require_finite({"a": view})
        assert str(refusal.value) == f"a holds inf at {list(last)}"
        view[last] = -2.0
        assert wanda_kernels.first_not_finite({"a": view}, {"b": view}) == "b"


def test_values_of_any_dimensions_are_checked_and_counted():
    weight = torch.arange(120.0).view(2, 3, 4, 5)
    for view in (weight, weight.permute(3, 0, 2, 1), weight[:, 1:, ::2], weight[0, 0, 0], weight[0, 0, :, 0]):
        assert wanda_kernels.count_zeros(view).item() == (view == 0).sum().item()
        wanda_kernels.require_finite({"a": view}, {"b": view})
        assert wanda_kernels.first_not_finite({}, {"b": -view - 1}) == "b"
    assert wanda_kernels.count_zeros(torch.zeros(3, 1).expand(3, 4)).item() == 12


STACK = (3, 4, 16)
REFUSED = [
    ({"weight": torch.ones(2, *STACK)}, r"\[out, in\] or \[experts, out, in\], got shape \[2, 3, 4, 16\]"),
    ({"scale": torch.ones(16)}, r"scale must have shape \[3, 16\] or \[3, 4, 16\] .* got \[16\]"),
    ({"scale": torch.ones(12, 16)}, r"scale must have shape \[3, 16\] or \[3, 4, 16\] .* got \[12, 16\]"),
    ({"scale": torch.ones(1, 4, 16)}, r"\[3, 16\] or \[3, 4, 16\] for this weight, got \[1, 4, 16\]"),
    ({"scale": torch.full((3, 16), torch.nan)}, r"scale holds nan at \[0, 0\]; this weight was not changed"),
    ({"mask": torch.zeros(12, 2, dtype=torch.uint8)}, r"uint8 \[3, 4, 2\], got torch.uint8 \[12, 2\]"),
    ({"mask": torch.zeros(3, 4, 3, dtype=torch.uint8)}, r"uint8 \[3, 4, 2\], got torch.uint8 \[3, 4, 3\]"),
    (
        {"weight": torch.ones(1, 4, 16).expand(STACK)},
        r"of its own, got shape \[3, 4, 16\] with strides \[0, 16, 1\]",
    ),
    ({"weight": torch.ones(64).as_strided(STACK, (8, 8, 1))}, r"memory of its own, .* strides \[8, 8, 1\]"),
]


@pytest.mark.parametrize(("wrong", "sentence"), REFUSED)
@pytest.mark.parametrize("operation", OPERATIONS)
def test_wrong_operands_are_refused_in_one_sentence(operation, wrong, sentence):
    operands = {"weight": torch.ones(STACK), "scale": torch.ones(3, 16)} | wrong
    before = operands["weight"].clone()
    rule = {"num_pruned": 7} if operation == "prune_rows_" else {"n": 2, "m": 4}
    with pytest.raises(ValueError, match=sentence) as refusal:
        getattr(wanda_kernels, operation)(**operands, **rule)
    assert "\n" not in str(refusal.value) and torch.equal(operands["weight"], before)


@pytest.mark.parametrize("operation", WHOLE)
def test_operations_on_one_matrix_refuse_a_stack(operation):
    with pytest.raises(ValueError, match=r"weight must be \[out, in\], got shape \[3, 4, 16\]"):
        getattr(wanda_kernels, operation)(torch.ones(STACK), *WHOLE[operation](16, "cpu"))


def test_transposed_rows_go_past_the_cuda_kernel(monkeypatch):
    """As on a GPU: the first backend needs contiguous rows, the next one takes every storage."""
    cuda = MagicMock()
    monkeypatch.setitem(backends.TABLE["prune_rows_"], "cuda", cuda)
    monkeypatch.setattr(backends, "choose_backend", lambda *_: "cuda")
    expected = torch.tensor([[0.0, 2.0, 0.0], [4.0, 0.0, 0.0]])
    view = torch.tensor([[1.0, 4.0], [2.0, 3.0], [1.0, 2.0]]).t()
    wanda_kernels.prune_rows_(view, None, 2)
    assert torch.equal(view, expected) and not cuda.called
    sentence = r"'cuda' cannot serve prune_rows_ on this weight: .* got strides \[1, 2\]"
    with pytest.raises(wanda_kernels.BackendError, match=sentence):
        wanda_kernels.prune_rows_(view, None, 2, backend="cuda")
    wanda_kernels.prune_rows_(torch.ones(2, 3)[:, :2], None, 1)
    assert cuda.called


@pytest.mark.parametrize("layout", ["contiguous", "transposed"])
@pytest.mark.parametrize(("operation", "rule"), [("prune_rows_", (9,)), ("prune_nm_", (2, 4))])
def test_triton_launches_once_for_all_experts(monkeypatch, operation, rule, layout):
    modules = [pytest.importorskip(f"wanda_kernels.triton_ops.{operation.rstrip('_')}")]
    modules += [pytest.importorskip(f"wanda_kernels.triton_ops.prune_strided_{operation.split('_')[1]}")]
    kernel = MagicMock()
    for module in modules:
        for name in [each for each in vars(module) if each.endswith("_kernel")]:
            monkeypatch.setattr(module, name, kernel)
    parameter = torch.empty(LAYOUTS[layout](128, 768, 2048)[0], device="meta", dtype=torch.bfloat16)
    view = LAYOUTS[layout](128, 768, 2048)[1](parameter)
    getattr(modules[0], operation)(view, torch.empty(128, 2048, device="meta"), *rule, None)
    (grid,) = kernel.__getitem__.call_args.args
    assert kernel.__getitem__.call_count == 1 and grid[0] % 128 == 0
    tensors = [each for each in kernel.__getitem__.return_value.call_args.args if torch.is_tensor(each)]
    assert max(each.numel() for each in tensors if each.dtype == torch.float32) == 128 * 2048

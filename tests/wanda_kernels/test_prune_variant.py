import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.wanda_kernels.cases import (
    DTYPES,
    SCALES,
    assert_only_view_changes,
    assert_refuses_nonfinite,
    assert_same_selection,
    edge_weight,
    make_scale,
    random_weight,
)
from tests.wanda_kernels.conftest import device_of

OPERATION = "prune_variant_"


@pytest.mark.parametrize("kind", SCALES)
@pytest.mark.parametrize("dtype", DTYPES)
def test_equals_reference_bit_for_bit(backend, device, dtype, kind):
    weight, scale = random_weight(2, 37, dtype), make_scale(kind, 2, 37)
    assert_same_selection(OPERATION, backend, device, weight, scale, 0.5)


@pytest.mark.parametrize("ratio", (0.0, 0.999))
def test_ratios_at_the_ends_of_the_search(backend, device, ratio):
    weight = random_weight(1, 129, torch.float32)
    assert_same_selection(OPERATION, backend, device, weight, None, ratio)


@pytest.mark.parametrize(
    "dtype, kind", ((torch.float32, "none"), (torch.float16, "vector"), (torch.bfloat16, "none"))
)
def test_ties_zeros_subnormals_and_overflow(backend, device, dtype, kind):
    weight = edge_weight(40, dtype)
    assert_same_selection(OPERATION, backend, device, weight, make_scale(kind, *weight.shape), 0.5)


def test_more_than_one_block_of_columns(backend, device):
    weight = random_weight(1, 2100, torch.bfloat16)
    assert_same_selection(OPERATION, backend, device, weight, make_scale("vector", 1, 2100), 0.5)


def test_settles_early(backend, device):
    """A middle alpha reaches the sparsity: later rounds of the bisection must not change it."""
    weight = torch.linspace(0.1, 1.0, 1000).reshape(1, -1)
    assert_same_selection(OPERATION, backend, device, weight, None, 0.4)


def test_one_column(backend, device):
    assert_same_selection(OPERATION, backend, device, torch.tensor([[0.5], [0.0]]), None, 0.5)


def test_only_the_given_slice_changes(backend, device):
    assert_only_view_changes(OPERATION, backend, device, torch.bfloat16, 0.5)


def test_nonfinite_operands_raise(backend, device):
    assert_refuses_nonfinite(OPERATION, backend, device, 0.5)


@settings(max_examples=4, deadline=None)
@given(
    st.lists(st.sampled_from([0.0, 0.1, 0.25, 0.5, 1.0, 7.0]), min_size=1, max_size=30),
    st.floats(0, 0.99, allow_subnormal=False),
)
def test_any_row_and_ratio(backend, row, ratio):
    assert_same_selection(OPERATION, backend, device_of(backend), torch.tensor([row]), None, ratio)

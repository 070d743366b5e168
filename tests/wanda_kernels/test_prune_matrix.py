import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import wanda_kernels
from tests.wanda_kernels.cases import (
    DTYPES,
    SCALES,
    SHAPES,
    assert_empty_is_nothing,
    assert_only_view_changes,
    assert_refuses_nonfinite,
    assert_same_selection,
    bits,
    edge_weight,
    make_scale,
    random_weight,
)
from tests.wanda_kernels.conftest import device_of
from wanda_kernels import reference

OPERATION = "prune_matrix_"


@pytest.mark.parametrize("kind", SCALES)
@pytest.mark.parametrize("dtype", DTYPES)
def test_equals_reference_bit_for_bit(backend, device, dtype, kind):
    for n_rows, n_cols in SHAPES:
        weight, scale = random_weight(n_rows, n_cols, dtype), make_scale(kind, n_rows, n_cols)
        for rank in sorted({0, weight.numel() // 2, weight.numel() - 1}):
            assert_same_selection(OPERATION, backend, device, weight, scale, rank)


@pytest.mark.parametrize("kind", SCALES)
@pytest.mark.parametrize("dtype", DTYPES)
def test_ties_zeros_subnormals_and_overflow(backend, device, dtype, kind):
    weight = edge_weight(75, dtype)
    for rank in (100, 300):
        assert_same_selection(OPERATION, backend, device, weight, make_scale(kind, *weight.shape), rank)


@pytest.mark.parametrize("dtype", DTYPES)
def test_more_than_one_tile(backend, device, dtype):
    assert_same_selection(OPERATION, backend, device, random_weight(3, 4200, dtype), None, 7000)


@pytest.mark.parametrize("dtype", DTYPES)
def test_only_the_given_slice_changes(backend, device, dtype):
    assert_only_view_changes(OPERATION, backend, device, dtype, 50)


def test_nonfinite_operands_raise(backend, device):
    assert_refuses_nonfinite(OPERATION, backend, device, 20)


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_nan_threshold_prunes_nothing(backend, device, dtype):
    """With check_finite=False, which takes weights that the check would refuse."""
    for scale in (None, torch.ones(40)):
        weight = random_weight(3, 40, dtype)
        weight[1] = float("nan")
        for rank in (79, 80, 119):  # the highest number, the lowest and the highest of the NaNs
            expected, got = weight.clone(), weight.to(device, copy=True)
            reference.prune_matrix_(expected, scale, rank, None)
            scale_there = None if scale is None else scale.to(device)
            wanda_kernels.prune_matrix_(got, scale_there, rank, backend=backend, check_finite=False)
            assert torch.equal(bits(got), bits(expected)) and (expected == 0).any() == (rank == 79)


def test_empty(backend, device):
    assert_empty_is_nothing(OPERATION, backend, device, 0)


@settings(max_examples=15, deadline=None)
@given(data=st.data())
def test_prunes_up_to_the_ranked_value(backend, data):
    n_cols = data.draw(st.integers(1, 40), "n_cols")
    finite = st.floats(-4.0, 4.0, width=16)
    rows = data.draw(st.lists(st.lists(finite, min_size=n_cols, max_size=n_cols), min_size=1, max_size=3))
    weight = torch.tensor(rows, dtype=torch.float16)
    rank = data.draw(st.integers(0, weight.numel() - 1), "rank")
    device = device_of(backend)
    got = weight.to(device, copy=True)
    wanda_kernels.prune_matrix_(got, None, rank, backend=backend)
    threshold = sorted(abs(w) for row in weight.tolist() for w in row)[rank]
    expected = torch.where(weight.abs() <= threshold, 0.0, weight)
    torch.testing.assert_close(got.cpu(), expected, rtol=0, atol=0)

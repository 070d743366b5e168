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

OPERATION = "prune_rows_"


@pytest.mark.parametrize("kind", SCALES)
@pytest.mark.parametrize("dtype", DTYPES)
def test_equals_reference_bit_for_bit(backend, device, dtype, kind):
    for n_rows, n_cols in SHAPES:
        weight, scale = random_weight(n_rows, n_cols, dtype), make_scale(kind, n_rows, n_cols)
        for num_pruned in sorted({0, 1, n_cols // 2, n_cols - 1, n_cols}):
            assert_same_selection(OPERATION, backend, device, weight, scale, num_pruned)


@pytest.mark.parametrize("kind", SCALES)
@pytest.mark.parametrize("dtype", DTYPES)
def test_ties_zeros_subnormals_and_overflow(backend, device, dtype, kind):
    weight = edge_weight(75, dtype)
    assert_same_selection(OPERATION, backend, device, weight, make_scale(kind, *weight.shape), 31)


# one for each row of the Triton table of segments, and two longer ones
LENGTHS = (
    250,
    500,
    1000,
    2048,
    2500,
    4095,
    5000,
    6000,
    8190,
    11008,
    14336,
    16383,
    18944,
    28672,
    32768,
    65_536,
)


@pytest.mark.parametrize("n_cols", LENGTHS)
def test_every_length(backend, device, n_cols):
    weight = random_weight(1, n_cols, torch.bfloat16)
    assert_same_selection(
        OPERATION, backend, device, weight, make_scale("vector", 1, n_cols), int(n_cols * 0.6)
    )


@pytest.mark.parametrize("dtype", DTYPES)
def test_long_rows_with_ties(backend, device, dtype):
    weight = (torch.arange(30_000) % 5 - 2.0).to(dtype).repeat(2, 1)
    weight[1, ::7] = 0.0
    assert_same_selection(OPERATION, backend, device, weight, None, 20_123)


@pytest.mark.parametrize("dtype", DTYPES)
def test_only_the_given_slice_changes(backend, device, dtype):
    assert_only_view_changes(OPERATION, backend, device, dtype, 17)


def test_nonfinite_operands_raise(backend, device):
    assert_refuses_nonfinite(OPERATION, backend, device, 5)


def test_empty(backend, device):
    assert_empty_is_nothing(OPERATION, backend, device, 0)


@settings(max_examples=15, deadline=None)
@given(data=st.data())
def test_prunes_the_lowest_and_the_leftmost_of_equals(backend, data):
    """Count, order and ties agree with their definitions; a second run changes nothing."""
    n_cols = data.draw(st.integers(1, 70), "n_cols")
    values = st.sampled_from([0.0, -0.0, 0.5, -0.5, 1.0, -2.0, 3.0])
    weight = torch.tensor([data.draw(st.lists(values, min_size=n_cols, max_size=n_cols), "row")])
    scale = torch.tensor(
        data.draw(st.lists(st.sampled_from([0.0, 1.0, 4.0]), min_size=n_cols, max_size=n_cols))
    )
    num_pruned = data.draw(st.integers(0, n_cols), "num_pruned")
    device = device_of(backend)
    got, mask = (
        weight.to(device, copy=True),
        torch.empty(1, -(-n_cols // 8), dtype=torch.uint8, device=device),
    )
    wanda_kernels.prune_rows_(got, scale.to(device), num_pruned, mask=mask, backend=backend)
    kept = wanda_kernels.unpack_bits(mask.cpu(), n_cols)[0].tolist()
    assert kept.count(False) == num_pruned
    scores = reference.score(weight, scale)[0].tolist()
    order = sorted(range(n_cols), key=lambda j: (scores[j], j))
    assert [j for j in range(n_cols) if not kept[j]] == sorted(order[:num_pruned])
    expected = torch.where(torch.tensor([kept]), weight, 0.0)
    torch.testing.assert_close(bits(got), bits(expected), rtol=0, atol=0)
    wanda_kernels.prune_rows_(got, None, sum(w == 0 for w in got[0].tolist()), backend=backend)
    torch.testing.assert_close(got.cpu(), expected)

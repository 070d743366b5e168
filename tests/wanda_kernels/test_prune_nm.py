from unittest.mock import MagicMock

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import wanda_kernels
from tests.wanda_kernels.cases import (
    DTYPES,
    SCALES,
    assert_empty_is_nothing,
    assert_only_view_changes,
    assert_refuses_nonfinite,
    assert_same_selection,
    edge_weight,
    make_scale,
    random_weight,
)
from tests.wanda_kernels.conftest import device_of

OPERATION = "prune_nm_"
# by rank in one thread, by extraction of the lowest or the highest, and an m that is no power of two
PATTERNS = (
    (1, 2),
    (2, 4),
    (1, 4),
    (3, 4),
    (4, 8),
    (7, 8),
    (8, 16),
    (1, 32),
    (16, 32),
    (31, 32),
    (2, 3),
    (2, 5),
    (9, 12),
)


@pytest.mark.parametrize("kind", SCALES)
@pytest.mark.parametrize("dtype", DTYPES)
def test_equals_reference_bit_for_bit(backend, device, dtype, kind):
    for n, m in PATTERNS:
        for n_cols in (m, m * 37):
            weight, scale = random_weight(3, n_cols, dtype), make_scale(kind, 3, n_cols)
            assert_same_selection(OPERATION, backend, device, weight, scale, n, m)


@pytest.mark.parametrize("kind", SCALES)
@pytest.mark.parametrize("dtype", DTYPES)
def test_ties_zeros_subnormals_and_overflow(backend, device, dtype, kind):
    for n, m in ((2, 4), (5, 8), (8, 16), (2, 5)):
        weight = edge_weight(m * 10, dtype)
        assert_same_selection(OPERATION, backend, device, weight, make_scale(kind, *weight.shape), n, m)


@pytest.mark.parametrize("dtype", DTYPES)
def test_more_than_one_tile_of_rows_and_columns(backend, device, dtype):
    for n_rows, n_cols in ((9, 1032), (17, 264)):
        weight = random_weight(n_rows, n_cols, dtype)
        assert_same_selection(OPERATION, backend, device, weight, make_scale("vector", n_rows, n_cols), 2, 4)


@pytest.mark.parametrize("dtype", DTYPES)
def test_only_the_given_slice_changes(backend, device, dtype):
    assert_only_view_changes(OPERATION, backend, device, dtype, 2, 4)


def test_nonfinite_operands_raise(backend, device):
    assert_refuses_nonfinite(OPERATION, backend, device, 2, 4)


def test_empty(backend, device):
    assert_empty_is_nothing(OPERATION, backend, device, 2, 4)


@pytest.mark.parametrize(("n", "m"), [(2, 4), (8, 16), (2, 5)])
def test_triton_grid_holds_the_rows_of_a_large_vocabulary(monkeypatch, n, m):
    triton_nm = pytest.importorskip("wanda_kernels.triton_ops.prune_nm")
    kernel = MagicMock()
    for name in ("_prune_nm_kernel", "_prune_short_groups_kernel", "_prune_long_groups_kernel"):
        monkeypatch.setattr(triton_nm, name, kernel)
    weight = torch.empty(128_256, 4080, dtype=torch.bfloat16, device="meta")
    triton_nm.prune_nm_(weight, None, n, m, None)
    (grid,) = kernel.__getitem__.call_args.args
    assert grid[0] < 2**31 and grid[1] <= 65_535


@settings(max_examples=25, deadline=None)
@given(data=st.data())
def test_keeps_the_highest_and_the_rightmost_of_equals(backend, data):
    m = data.draw(st.integers(2, 32), "m")
    n = data.draw(st.integers(1, m - 1), "n")
    values = st.sampled_from([0.0, -0.0, 0.5, -0.5, 1.0, -2.0, 3.0])
    weight = torch.tensor([data.draw(st.lists(values, min_size=2 * m, max_size=2 * m), "row")])
    device = device_of(backend)
    got, mask = weight.to(device, copy=True), torch.empty(1, -(-2 * m // 8), dtype=torch.uint8, device=device)
    wanda_kernels.prune_nm_(got, None, n, m, mask=mask, backend=backend)
    kept = wanda_kernels.unpack_bits(mask.cpu(), 2 * m)[0].tolist()
    for group in (range(m), range(m, 2 * m)):
        order = sorted(group, key=lambda j: (abs(weight[0, j].item()), j))
        assert [j for j in group if kept[j]] == sorted(order[m - n :])
    torch.testing.assert_close(got.cpu(), torch.where(torch.tensor([kept]), weight, 0.0), rtol=0, atol=0)
    wanda_kernels.prune_nm_(got, None, n, m, backend=backend)
    torch.testing.assert_close(got.cpu(), torch.where(torch.tensor([kept]), weight, 0.0), rtol=0, atol=0)

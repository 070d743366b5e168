"""Triton's `mark_lowest` and `sparsegpt_block` against the reference's, bit for bit.

Interpreted Triton takes about 3 ms a column of 16 rows, so most blocks here are narrow.
"""

import pytest
import torch

from tests.wanda_kernels.cases import bits, edge_weight, random_weight
from tests.wanda_kernels.conftest import GPU
from wanda_kernels.loops.sparsegpt import SELECTORS
from wanda_kernels.reference import sparsegpt_block as reference_sparsegpt
from wanda_kernels.triton_ops import sparsegpt_block

POISON = -7.0
SHAPES = ((1, 24), (17, 24), (5, 72))  # 17 rows are one more than an interpreted program takes


def view_of(tensor: torch.Tensor, poison: float) -> torch.Tensor:
    """A copy on the device with distance between its rows, as in a block, and `poison` all around."""
    n_rows, n_cols = tensor.shape
    around = torch.full((n_rows + 2, n_cols + 13), poison, device=GPU).to(tensor.dtype)
    around[1:-1, 5:-8] = tensor.to(GPU)
    return around[1:-1, 5:-8]


def upper(width: int) -> torch.Tensor:
    """Upper triangular with a positive diagonal; what is below it must not be read as anything else."""
    generator = torch.Generator().manual_seed(3)
    u = torch.randn(width, width, generator=generator).triu(1) * 0.2
    return u + torch.diag(torch.rand(width, generator=generator) + 0.1)


def weights(n_rows: int, width: int) -> torch.Tensor:
    """Ties, zeros of both signs, few values, outliers, subnormals, then random rows; a dead column."""
    rows = [edge_weight(width, torch.float16).float(), random_weight(n_rows, width, torch.float32)]
    w = torch.cat(rows)[:n_rows]
    w[:, width // 3] = 0.0
    return w


def surroundings(view: torch.Tensor) -> torch.Tensor:
    """The view's storage without the view, in order."""
    whole = view._base.clone()
    whole[1:-1, 5:-8] = whole[0, 0]
    return whole


def assert_same_block(w, u, pruned, selector, root, n, m):
    errors = torch.empty_like(w)
    expected, expected_pruned = w.clone(), pruned.clone()
    reference_sparsegpt.sparsegpt_block(expected, u, expected_pruned, selector, root, n, m, errors)
    got, chosen = view_of(w, POISON), view_of(pruned, True)
    got_errors = torch.full(w.shape, float("nan"), device=GPU)
    root = None if root is None else root.to(GPU)
    sparsegpt_block.sparsegpt_block(got, view_of(u, POISON), chosen, selector, root, n, m, got_errors)
    assert torch.equal(chosen.cpu(), expected_pruned)
    for found, right in ((got, expected), (got_errors, errors)):
        torch.testing.assert_close(bits(found.contiguous()), bits(right), rtol=0, atol=0)
    assert (surroundings(got) == POISON).all() and surroundings(chosen).all()


@pytest.mark.parametrize("selector", SELECTORS)
@pytest.mark.parametrize(
    "n_rows, width, n, m", ((1, 24, 2, 4), (17, 24, 1, 8), (5, 72, 12, 24), (3, 25, 3, 5))
)
def test_chooses_each_group_at_its_first_column(n_rows, width, n, m, selector):
    w, pruned = weights(n_rows, width), torch.ones(n_rows, width, dtype=torch.bool)
    root = torch.rand(width, generator=torch.Generator().manual_seed(4)).round(decimals=1)
    assert_same_block(w, upper(width), pruned, selector, root, n, m)


def test_the_widest_block():
    assert_same_block(weights(18, 128), upper(128), torch.ones(18, 128, dtype=torch.bool), "obs", None, 2, 4)


@pytest.mark.parametrize("n_rows, width", (*SHAPES, (2, 1), (33, 7)))
def test_subtracts_the_errors_of_a_given_choice(n_rows, width):
    w = weights(n_rows, width)
    pruned = torch.rand(n_rows, width, generator=torch.Generator().manual_seed(5)) < 0.6
    pruned[0] = True
    pruned[-1] = False
    assert_same_block(w, upper(width), pruned, "magnitude", None, 0, 0)


@pytest.mark.parametrize("selector", SELECTORS)
def test_marks_up_to_the_ranked_score_and_its_ties(selector):
    for n_rows, width in (*SHAPES, (35, 128)):
        w, u, root = weights(n_rows, width), upper(width), torch.rand(width)
        for rank in (0, w.numel() // 2, w.numel() - 1):
            expected = torch.zeros(n_rows, width, dtype=torch.bool)
            reference_sparsegpt.mark_lowest(w, u, expected, selector, root, rank)
            pruned = view_of(~expected, True)
            operands = view_of(w, POISON), view_of(u, POISON), pruned, selector, root.to(GPU), rank
            sparsegpt_block.mark_lowest(*operands)
            assert torch.equal(pruned.cpu(), expected) and surroundings(pruned).all()


@pytest.mark.parametrize("selector", SELECTORS)
def test_a_nan_score_at_the_rank_marks_nothing(selector):
    w, u, root = weights(5, 24), upper(24), torch.ones(24)
    w[2] = float("nan")
    for rank in (95, 96):  # the highest number, the lowest of the NaNs
        expected = torch.zeros(5, 24, dtype=torch.bool)
        reference_sparsegpt.mark_lowest(w, u, expected, selector, root, rank)
        pruned = view_of(~expected, True)
        operands = view_of(w, POISON), view_of(u, POISON), pruned, selector, root.to(GPU), rank
        sparsegpt_block.mark_lowest(*operands)
        assert torch.equal(pruned.cpu(), expected) and expected.any() == (rank == 95)

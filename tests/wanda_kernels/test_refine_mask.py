"""`refine_mask_` against every other mask, or every swap, in float64."""

import itertools

import pytest
import torch

import wanda_kernels
from tests.wanda_kernels.cases import random_weight
from wanda_kernels import refine_mask_

UNTIL_IT_STOPS = 50
# of a row's error: an improvement that fp32 rounding may hide
ROUNDING = 1e-5


@pytest.fixture(params=["torch", "auto"])
def backend(request):
    """Elsewhere every backend is compared with torch, to the bit."""
    return request.param


def correlated_hessian(width: int, n_tokens: int = 0, seed: int = 0) -> torch.Tensor:
    """Columns of unequal size, a few of them ten times as large, that depend on each other."""
    generator = torch.Generator().manual_seed(width + seed)
    mixing = torch.eye(width) + torch.randn(width, width, generator=generator) / width**0.5
    x = torch.randn(n_tokens or 2 * width, width, generator=generator) @ mixing
    x[:, ::7] *= 10
    return x.t() @ x


def poor_mask(weight: torch.Tensor, pattern: str | float) -> torch.Tensor:
    """A mask of the right counts that knows nothing of the weights: a random one."""
    n, m = map(int, pattern.split(":")) if isinstance(pattern, str) else (0, weight.shape[1])
    n_pruned = m - n if n else int(m * pattern)
    scores = torch.rand(weight.numel() // m, m, generator=torch.Generator().manual_seed(5))
    lowest = scores.argsort(dim=1)[:, :n_pruned]
    return torch.zeros_like(scores, dtype=torch.bool).scatter(1, lowest, True).view(weight.shape)


def row_errors(weight: torch.Tensor, pruned: torch.Tensor, hessian: torch.Tensor) -> torch.Tensor:
    """r H r^T of each row, fp64."""
    removed = weight.double() * pruned
    return ((removed @ hessian.double()) * removed).sum(dim=1)


def refine(weight, pruned, hessian, pattern, sweeps, backend="torch"):
    """A refined copy; counts and weights are checked on the way."""
    got, before = pruned.clone(), weight.clone()
    refine_mask_(weight, got, hessian, pattern, sweeps, backend=backend)
    assert torch.equal(weight, before)
    m = int(pattern.split(":")[1]) if pattern else weight.shape[1]
    counts = [mask.reshape(-1, m).sum(dim=1) for mask in (got, pruned)]
    assert torch.equal(*counts)
    return got


def exchanges(pruned: torch.Tensor, columns: range):
    """All masks of one row that swap a kept and a pruned column of `columns`."""
    for u, p in itertools.permutations(columns, 2):
        if not pruned[u] and pruned[p]:
            other = pruned.clone()
            other[u], other[p] = True, False
            yield other


def other_groups(pruned: torch.Tensor, first: int, n: int, m: int):
    """All masks of one row in which another choice is made in the group at `first`."""
    for columns in itertools.combinations(range(first, first + m), m - n):
        other = pruned.clone()
        other[first : first + m] = False
        other[list(columns)] = True
        yield other


def assert_best(weight, pruned, hessian, others_of):
    """No row has a lower error with one of the masks that `others_of` yields for its mask."""
    errors = row_errors(weight, pruned, hessian)
    for row, error in enumerate(errors):
        others = torch.stack(list(others_of(pruned[row])))
        lowest = row_errors(weight[row].expand(others.shape), others, hessian).min()
        assert lowest >= error * (1 - ROUNDING), (row, error.item(), lowest.item())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("pattern", "width"), [("2:4", 12), ("3:5", 15), ("4:8", 16), ("1:2", 6)])
def test_no_group_has_a_better_mask(pattern, width, dtype, backend):
    n, m = map(int, pattern.split(":"))
    weight, hessian = random_weight(5, width, dtype), correlated_hessian(width)
    start = poor_mask(weight, pattern)
    pruned = refine(weight, start, hessian, pattern, UNTIL_IT_STOPS, backend)
    assert row_errors(weight, pruned, hessian).sum() < 0.8 * row_errors(weight, start, hessian).sum()
    for first in range(0, width, m):
        assert_best(weight, pruned, hessian, lambda mask, first=first: other_groups(mask, first, n, m))


@pytest.mark.parametrize("ratio", [0.3, 0.5, 0.8])
@pytest.mark.parametrize("width", [2, 13, 20])
def test_no_swap_in_a_short_row_lowers_the_error(width, ratio, backend):
    weight, hessian = random_weight(6, width, torch.float32), correlated_hessian(width)
    start = poor_mask(weight, ratio)
    pruned = refine(weight, start, hessian, None, UNTIL_IT_STOPS, backend)
    assert_best(weight, pruned, hessian, lambda mask: itertools.chain([mask], exchanges(mask, range(width))))
    if width > 2:
        assert row_errors(weight, pruned, hessian).sum() < 0.8 * row_errors(weight, start, hessian).sum()


def test_no_swap_in_a_group_of_many_masks_lowers_the_error(backend):
    weight, hessian = random_weight(3, 64, torch.float32), correlated_hessian(64)
    pruned = refine(weight, poor_mask(weight, "16:32"), hessian, "16:32", UNTIL_IT_STOPS, backend)
    for group in (range(32), range(32, 64)):
        assert_best(weight, pruned, hessian, lambda mask, group=group: exchanges(mask, group))


def test_no_swap_in_a_block_of_a_long_row_lowers_the_error():
    """Blocks have 128 columns, the last one the rest; an error of one block would show in the others."""
    weight, hessian = random_weight(2, 150, torch.float32), correlated_hessian(150)
    pruned = refine(weight, poor_mask(weight, 0.9), hessian, None, UNTIL_IT_STOPS, "auto")
    for block in (range(128), range(128, 150)):
        assert_best(weight, pruned, hessian, lambda mask, block=block: exchanges(mask, block))


@pytest.mark.parametrize(("pattern", "width"), [("2:4", 140), ("6:12", 132), (None, 150)])
def test_the_error_never_rises(pattern, width):
    """Sweep by sweep until nothing changes; blocks are 128 columns, or 120 for 12."""
    weight, hessian = random_weight(4, width, torch.float32), correlated_hessian(width, n_tokens=100)
    start = pruned = poor_mask(weight, pattern or 0.5)
    errors = [row_errors(weight, pruned, hessian)]
    for _ in range(UNTIL_IT_STOPS):
        pruned = refine(weight, pruned, hessian, pattern, 1, "auto")
        errors.append(row_errors(weight, pruned, hessian))
        assert (errors[-1] <= errors[-2] * (1 + ROUNDING)).all()
        if torch.equal(errors[-1], errors[-2]):
            break
    assert torch.equal(pruned, refine(weight, start, hessian, pattern, UNTIL_IT_STOPS, "auto"))
    assert 2 < len(errors) < UNTIL_IT_STOPS and errors[-1].sum() < 0.7 * errors[0].sum()


def test_a_whole_group_can_be_exchanged_where_no_swap_helps(backend):
    """Two pairs of inputs that cancel: each pruned pair costs nothing, every single swap costs."""
    pair = torch.tensor([[1.0, -0.99], [-0.99, 1.0]])
    hessian = torch.block_diag(1.1 * pair, pair).contiguous()
    weight = torch.ones(1, 4)
    start = torch.tensor([[True, True, False, False]])
    assert_best(weight, start, hessian, lambda mask: exchanges(mask, range(4)))
    assert torch.equal(refine(weight, start, hessian, "2:4", 1, backend), ~start)
    assert torch.equal(refine(weight, start, hessian, None, 1, backend), start)


@pytest.mark.parametrize("pattern", ["2:4", "16:32", None])
def test_a_tie_keeps_the_mask(pattern, backend):
    weight = torch.full((4, 32), 0.5) * torch.tensor([1.0, -1.0]).repeat(16)
    for start in (poor_mask(weight, pattern or 0.5), ~poor_mask(weight, pattern or 0.5)):
        assert torch.equal(refine(weight, start, torch.eye(32), pattern, 3, backend), start)
        assert torch.equal(refine(torch.zeros(4, 32), start, torch.eye(32), pattern, 3, backend), start)


def test_of_equal_masks_the_first_is_taken(backend):
    """Candidates in lexicographic order of their pruned columns; swaps by the lowest kept, then pruned."""
    weight = torch.tensor([[1.0, 2.0, 1.0, 1.0], [2.0, 1.0, 1.0, 1.0]])
    hessian = torch.eye(4)
    start = torch.tensor([[False, True, False, True], [True, False, False, True]])
    expected = torch.tensor([[True, False, True, False], [False, True, True, False]])
    assert torch.equal(refine(weight, start, hessian, "2:4", 1, backend), expected)
    swapped = torch.tensor([[True, False, False, True], [False, True, False, True]])
    assert torch.equal(refine(weight, start, hessian, None, 1, backend), swapped)


def test_no_sweeps_no_columns_to_choose_and_views(backend):
    weight, hessian = random_weight(5, 16, torch.float32), correlated_hessian(16)
    start = poor_mask(weight, "2:4")
    assert torch.equal(refine(weight, start, hessian, "2:4", 0, backend), start)
    for full in (torch.zeros_like(start), torch.ones_like(start)):
        assert torch.equal(refine(weight, full, hessian, None, 3, backend), full)
    expected = refine(weight, start, hessian, "2:4", 3, backend)
    assert not torch.equal(expected, start)
    whole = torch.ones(5, 24, dtype=torch.bool)
    inner = whole[:, 4:20]
    inner.copy_(start)
    wide_weight = torch.full((5, 20), torch.nan)
    wide_weight[:, 2:18] = weight
    refine_mask_(wide_weight[:, 2:18], inner, hessian, "2:4", backend=backend)
    assert torch.equal(inner, expected) and whole[:, :4].all() and whole[:, 20:].all()
    assert torch.equal(refine(weight.t().contiguous().t(), start, hessian, "2:4", 3, backend), expected)


def test_bad_input_changes_nothing_and_is_named():
    weight, hessian = random_weight(6, 16, torch.float32), correlated_hessian(16)
    start = poor_mask(weight, "2:4")
    wrong = start.clone()
    wrong[3, 8:12] = torch.tensor([True, True, True, False])
    infinite = weight.clone()
    infinite[1, 2] = torch.inf
    operands = dict(weight=weight, pruned=start, hessian=hessian, pattern="2:4")
    cases = [
        (dict(pruned=wrong), "must mark 2 of every 4 .* for 2:4, but marks 3 of columns 8 to 11 of row 3"),
        (dict(pattern="1:4"), "must mark 3 of every 4 .* but marks 2 of columns 0 to 3 of row 0"),
        (dict(pattern="2:5"), "16 is not a multiple of m = 5"),
        (dict(pattern="4:4"), "1 <= n < m <= 32, got 4:4"),
        (dict(pattern="half"), "'n:m', got 'half'"),
        (dict(sweeps=-1), "sweeps must be at least 0, got -1"),
        (dict(pruned=start[:5]), r"bool \[6, 16\], got torch.bool \[5, 16\]"),
        (dict(pruned=start.int()), r"bool \[6, 16\], got torch.int32 \[6, 16\]"),
        (dict(pruned=start.t().contiguous().t()), r"pruned's rows must be contiguous.*\[1, 6\]"),
        (dict(weight=weight.double()), "got torch.float64"),
        (dict(weight=weight[0]), r"\[out, in\], got shape \[16\]"),
        (dict(hessian=hessian[:15]), r"float32 \[16, 16\], got torch.float32 \[15, 16\]"),
        (dict(hessian=hessian.half()), r"float32 \[16, 16\], got torch.float16"),
        (dict(weight=infinite), r"weight holds inf at \[1, 2\]"),
    ]
    for change, sentence in cases:
        masks = start.clone(), wrong.clone()
        with pytest.raises(ValueError, match=sentence):
            refine_mask_(**(operands | change))
        assert torch.equal(start, masks[0]) and torch.equal(wrong, masks[1])
    with pytest.raises(wanda_kernels.BackendError, match="unknown backend 'fpga'"):
        refine_mask_(**operands, backend="fpga")


def test_nothing_to_do():
    for shape in ((0, 16), (3, 0)):
        pruned = torch.zeros(shape, dtype=torch.bool)
        for pattern in ("2:4", None):
            refine_mask_(torch.empty(shape), pruned, torch.eye(shape[1]), pattern)
        assert pruned.shape == shape

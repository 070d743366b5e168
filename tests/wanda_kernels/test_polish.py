"""`polish_` against the exact solution of each row's support in float64."""

import pytest
import torch

import wanda_kernels
from tests.published_admm import layer_error
from tests.wanda_kernels.cases import bits, random_weight
from wanda_kernels import polish_

MANY = 200
# relative; the fp32 systems below have condition numbers up to some hundred
TOLERANCE = 1e-4


@pytest.fixture(params=["torch", "auto"])
def backend(request):
    """Elsewhere every backend is compared with torch."""
    return request.param


def definite_hessian(width: int, seed: int = 0) -> torch.Tensor:
    """Correlated inputs, some ten times as large as others; the diagonal is raised as in a pruning run."""
    generator = torch.Generator().manual_seed(width + seed)
    mixing = torch.eye(width) + torch.randn(width, width, generator=generator) / width**0.5
    x = torch.randn(3 * width, width, generator=generator) @ mixing
    x[:, ::5] *= 10
    hessian = x.t() @ x
    return wanda_kernels.damped_hessian(hessian)


def problem(n_rows: int, width: int, dtype: torch.dtype = torch.float32):
    """(weight, dense, pruned, hessian): rows lose from none to all of their weights."""
    dense, hessian = random_weight(n_rows, width, dtype), definite_hessian(width)
    share = torch.linspace(0, 1, n_rows)[:, None]
    pruned = torch.rand(n_rows, width, generator=torch.Generator().manual_seed(1)) < share
    return torch.where(pruned, 0.0, dense), dense, pruned, hessian


def exact(dense, pruned, hessian):
    """Of each row the z with (dense - z) H = 0 on its support."""
    w, h = dense.double(), hessian.double()
    solution = torch.zeros_like(w)
    for row, kept in enumerate(~pruned):
        if kept.any():
            solution[row, kept] = torch.linalg.solve(h[kept][:, kept], h[kept] @ w[row])
    return solution


def assert_pruned_are_zero(weight, pruned):
    """+0.0, not -0.0."""
    assert (bits(weight)[pruned] == 0).all()


@pytest.mark.parametrize(("n_rows", "width"), [(1, 1), (1, 7), (5, 37), (9, 129)])
def test_many_steps_give_the_exact_solution(n_rows, width, backend):
    weight, dense, pruned, hessian = problem(n_rows, width)
    expected = exact(dense, pruned, hessian)
    operands = [each.clone() for each in (dense, pruned, hessian)]
    polish_(weight, dense, pruned, hessian, MANY, backend=backend)
    torch.testing.assert_close(weight.double(), expected, rtol=0, atol=TOLERANCE * dense.abs().max().item())
    assert_pruned_are_zero(weight, pruned)
    assert all(map(torch.equal, operands, (dense, pruned, hessian)))


def test_the_solution_is_a_least_squares_fit_of_the_outputs():
    """From the inputs themselves: X w is fitted with the columns that a row keeps."""
    x = torch.randn(90, 24) @ (torch.eye(24) + torch.randn(24, 24) / 5)
    dense = torch.randn(4, 24)
    pruned = torch.rand(4, 24) < 0.5
    weight = torch.where(pruned, 0.0, dense)
    polish_(weight, dense, pruned, x.t() @ x, MANY)
    for row, kept in enumerate(~pruned):
        inputs = x.double()[:, kept]
        expected = torch.linalg.lstsq(inputs, (x.double() @ dense[row].double())[:, None]).solution[:, 0]
        torch.testing.assert_close(weight[row, kept].double(), expected, rtol=TOLERANCE, atol=TOLERANCE)


def test_n_steps_solve_n_kept_weights_and_each_step_lowers_the_error(backend):
    """The defining property of conjugate gradients, in every row: not of steepest descent."""
    start, dense, pruned, hessian = problem(6, 40)
    solution = exact(dense, pruned, hessian)
    gaps = [_gaps(start, solution, hessian)]
    for steps in range(1, 13):
        weight = start.clone()
        polish_(weight, dense, pruned, hessian, steps, backend=backend)
        gaps.append(_gaps(weight, solution, hessian))
        assert (gaps[-1] <= gaps[-2] * (1 + TOLERANCE) + 1e-9 * gaps[0]).all()
    assert gaps[4].sum() < 0.1 * gaps[0].sum() and gaps[12].sum() < 1e-3 * gaps[0].sum()

    few = torch.ones(3, 40, dtype=torch.bool)
    for row, columns in enumerate(([4], [0, 9], [7, 8, 30])):
        few[row, columns] = False
    solution = exact(dense[:3], few, hessian)
    weight = torch.where(few, 0.0, dense[:3])
    polish_(weight, dense[:3], few, hessian, 3, backend=backend)
    torch.testing.assert_close(weight.double(), solution, rtol=TOLERANCE, atol=0)


def _gaps(weight, solution, hessian):
    """How far each row is from its lowest error."""
    difference = weight.double() - solution
    return ((difference @ hessian.double()) * difference).sum(dim=1)


def test_rows_have_step_lengths_of_their_own(backend):
    """A row gives the same numbers beside rows a million times as large."""
    start, dense, pruned, hessian = problem(5, 32)
    size = torch.tensor([1.0, 2.0**20, 1.0, 2.0**-20, 1.0])[:, None]
    weight, scaled = start.clone(), start * size
    polish_(weight, dense, pruned, hessian, 4, backend=backend)
    polish_(scaled, dense * size, pruned, hessian, 4, backend=backend)
    torch.testing.assert_close(scaled / size, weight, rtol=1e-5, atol=1e-7)


def test_the_start_counts_and_full_support_gives_dense_back(backend):
    _, dense, _, hessian = problem(4, 33)
    nothing = torch.zeros(4, 33, dtype=torch.bool)
    weight = dense.clone()
    polish_(weight, dense, nothing, hessian, 10, backend=backend)
    assert torch.equal(weight, dense)
    weight = torch.randn(4, 33)
    polish_(weight, dense, nothing, hessian, MANY, backend=backend)
    torch.testing.assert_close(weight, dense, rtol=0, atol=TOLERANCE * dense.abs().max().item())
    weight = torch.randn(4, 33)
    polish_(weight, dense, ~nothing, hessian, 3, backend=backend)
    assert (bits(weight) == 0).all()


def test_no_steps_zero_the_pruned_and_change_nothing_else(backend):
    _, dense, pruned, hessian = problem(5, 20)
    weight = -dense
    expected = torch.where(pruned, 0.0, weight)
    polish_(weight, dense, pruned, hessian, 0, backend=backend)
    assert torch.equal(bits(weight), bits(expected))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_the_result_is_rounded_once(dtype, backend):
    """The numbers of fp32, rounded; dense may have another dtype."""
    start, dense, pruned, hessian = problem(6, 48)
    start = start.to(dtype)
    expected, weight = start.float(), start.clone()
    polish_(expected, dense, pruned, hessian, 6, backend=backend)
    polish_(weight, dense, pruned, hessian, 6, backend=backend)
    assert weight.dtype == dtype and torch.equal(bits(weight), bits(expected.to(dtype)))
    assert layer_error(dense - weight, hessian) < 0.9 * layer_error(dense - start, hessian)
    rounded = dense.to(dtype)
    polish_(expected.copy_(start), rounded.float(), pruned, hessian, 6, backend=backend)
    polish_(weight.copy_(start), rounded, pruned, hessian, 6, backend=backend)
    assert torch.equal(bits(weight), bits(expected.to(dtype)))


def test_a_singular_hessian_and_a_row_of_zeros_stay_finite(backend):
    """Two inputs that are equal, one of weight 0: no direction of no curvature is divided by."""
    x = torch.randn(50, 12)
    x[:, 3] = x[:, 2]
    dense = torch.randn(3, 12)
    dense[1] = 0
    pruned = torch.zeros(3, 12, dtype=torch.bool)
    pruned[:, ::2] = True
    weight = torch.where(pruned, 0.0, dense)
    before = layer_error(dense - weight, x.t() @ x)
    polish_(weight, dense, pruned, x.t() @ x, 60, backend=backend)
    assert weight.isfinite().all() and (weight[1] == 0).all()
    assert layer_error(dense - weight, x.t() @ x) < before


def test_views_and_nothing_to_do(backend):
    start, dense, pruned, hessian = problem(4, 19)
    expected = start.clone()
    polish_(expected, dense, pruned, hessian, 5, backend=backend)
    whole = torch.full((4, 30), torch.nan)
    weight, marks = whole[:, 5:24], torch.ones(4, 25, dtype=torch.bool)
    weight.copy_(start)
    marks[:, 3:22] = pruned
    polish_(weight, dense.t().contiguous().t(), marks[:, 3:22], hessian, 5, backend=backend)
    torch.testing.assert_close(weight, expected, rtol=1e-5, atol=1e-7)
    assert whole[:, :5].isnan().all() and whole[:, 24:].isnan().all()
    transposed = start.t().contiguous().t()
    polish_(transposed, dense, pruned, hessian, 5, backend=backend)
    torch.testing.assert_close(transposed, expected, rtol=1e-5, atol=1e-7)
    for shape in ((0, 16), (3, 0)):
        empty = torch.empty(shape)
        polish_(empty, empty, torch.zeros(shape, dtype=torch.bool), torch.eye(shape[1]), 2, backend=backend)


def test_bad_input_changes_nothing_and_is_named():
    start, dense, pruned, hessian = problem(6, 16)
    infinite, dead = dense.clone(), hessian.clone()
    infinite[1, 2] = torch.inf
    dead[5, 5] = 0
    operands = dict(weight=start, dense=dense, pruned=pruned, hessian=hessian)
    cases = [
        (dict(dense=dense[:5]), r"dense must be float \[6, 16\].*got torch.float32 \[5, 16\]"),
        (dict(dense=dense.double()), r"dense must be float \[6, 16\].*got torch.float64 \[6, 16\]"),
        (dict(dense=infinite), r"dense holds inf at \[1, 2\]"),
        (dict(weight=infinite), r"weight holds inf at \[1, 2\]"),
        (dict(hessian=dead), "diagonal must be positive, got 0 at 5"),
        (dict(hessian=-hessian), "diagonal must be positive, got -.* at 0"),
        (dict(hessian=hessian[:, :15]), r"float32 \[16, 16\], got torch.float32 \[16, 15\]"),
        (dict(pruned=pruned[:, :15]), r"bool \[6, 16\], got torch.bool \[6, 15\]"),
        (dict(pruned=pruned.float()), r"bool \[6, 16\], got torch.float32"),
        (dict(steps=-2), "steps must be at least 0, got -2"),
    ]
    for change, sentence in cases:
        before = start.clone()
        with pytest.raises(ValueError, match=sentence):
            polish_(**(operands | change))
        assert torch.equal(start, before)
    with pytest.raises(wanda_kernels.BackendError, match="unknown backend 'fpga'"):
        polish_(**operands, backend="fpga")

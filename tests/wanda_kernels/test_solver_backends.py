"""The solvers on every backend that can serve here, and Triton's block functions, against the reference.

Masks and ADMM steps are compared bit for bit, sums by a tolerance. Where an operation contains a product, its
operands are small integers, so that every order of the sums gives the same product; they also give many ties.
Interpreted Triton takes milliseconds a column: all shapes are tiny.
"""

import pytest
import torch
from torch import Tensor

import wanda_kernels
from tests.wanda_kernels.cases import bits, edge_weight, random_weight
from tests.wanda_kernels.conftest import GPU, device_of
from wanda_kernels import reference
from wanda_kernels.dispatch import backends
from wanda_kernels.loops import mask_descent
from wanda_kernels.loops.mask_descent import candidates_of
from wanda_kernels.reference import polish_step as reference_polish
from wanda_kernels.reference.prune_nm import lowest_of_groups
from wanda_kernels.reference.refine_groups import refine_groups
from wanda_kernels.reference.refine_swaps import refine_swaps
from wanda_kernels.triton_ops import admm_step, polish_step
from wanda_kernels.triton_ops import refine_groups as triton_groups
from wanda_kernels.triton_ops import refine_swaps as triton_swaps


def on_each_backend(operation: str):
    served = [b for b in backends.BACKENDS if not backends.why_not(operation, device_of(b), b)]
    return pytest.mark.parametrize("backend", served)


def view_of(tensor: Tensor, poison: float) -> Tensor:
    """A copy on the device with distance between its rows, as in a block, and `poison` all around."""
    n_rows, n_cols = tensor.shape
    around = torch.full((n_rows + 2, n_cols + 13), poison, device=GPU).to(tensor.dtype)
    around[1:-1, 5:-8] = tensor.to(GPU)
    return around[1:-1, 5:-8]


def surroundings(view: Tensor) -> Tensor:
    whole = view._base.clone()
    whole[1:-1, 5:-8] = whole[0, 0]
    return whole


def integers(*shape: int, most: int = 3) -> Tensor:
    return torch.randint(-most, most + 1, shape).float()


def integer_hessian(n_cols: int) -> Tensor:
    """Of integers, with a dead column and two that are alike."""
    x = integers(n_cols + 3, n_cols, most=2)
    x[:, n_cols // 3] = 0.0
    x[:, n_cols // 2] = x[:, 0]
    return x.T @ x


def some_mask(n_rows: int, n_cols: int, n: int, m: int) -> Tensor:
    scores = torch.rand(n_rows, n_cols)
    return lowest_of_groups(scores, n, m) if m else scores < 0.5


def block_of(n_rows: int, n_cols: int, n: int, m: int, exact: bool) -> tuple[Tensor, ...]:
    """(w, pruned, c, h) with ties and a zero column; not exact: sums in c lose all but their highest bits."""
    w, h = integers(n_rows, n_cols), integer_hessian(n_cols)
    w[:, n_cols // 4] = 0.0
    pruned = some_mask(n_rows, n_cols, n, m)
    if exact:
        return w, pruned, torch.where(pruned, w, 0.0) @ h + integers(n_rows, n_cols, most=9), h
    signs = torch.where(torch.rand(n_rows, n_cols) < 0.5, 1.0, -1.0)
    return torch.where(w == 0, w, w.sign()), pruned, signs * 2**22, h + torch.rand(n_cols, n_cols)


def assert_same_choice(function, expected_of, w, pruned, c, h, *rule):
    expected = pruned.clone()
    expected_of(w, expected, c.clone(), h, *rule)
    w_view, h_view, got = view_of(w, float("nan")), view_of(h, float("nan")), view_of(pruned, True)
    function(w_view, got, c.to(GPU, copy=True), h_view, *rule)
    assert torch.equal(got.cpu(), expected) and surroundings(got).all()
    assert torch.equal(bits(w_view.contiguous()), bits(w))
    return expected


@pytest.mark.parametrize("exact", (True, False))
@pytest.mark.parametrize(
    "n_rows, n_cols, n, m", ((33, 12, 2, 4), (2, 16, 4, 8), (5, 6, 1, 2), (2, 15, 3, 5), (1, 8, 1, 4))
)
def test_triton_takes_the_best_mask_of_each_group(n_rows, n_cols, n, m, exact):
    block = block_of(n_rows, n_cols, n, m, exact)
    chosen = assert_same_choice(triton_groups.refine_groups, refine_groups, *block, n, m)
    assert not torch.equal(chosen, block[1])


@pytest.mark.parametrize("n_rows, n_cols, n, m", ((33, 8, 2, 4), (2, 10, 3, 5)))
def test_triton_takes_the_best_mask_of_wide_groups(n_rows, n_cols, n, m, monkeypatch):
    monkeypatch.setattr(triton_groups, "UNROLLED", 1)
    for exact in (True, False):
        block = block_of(n_rows, n_cols, n, m, exact)
        assert_same_choice(triton_groups.refine_groups, refine_groups, *block, n, m)


@pytest.mark.parametrize("n, m", ((1, 2), (2, 4), (3, 5), (4, 8), (1, 8), (7, 8)))
def test_triton_unrolls_the_candidates_in_order(n, m):
    columns = [tuple(triton_groups._pruned_columns(i, m - n, m)) for i in range(len(candidates_of(n, m)))]
    assert columns == candidates_of(n, m)


@pytest.mark.parametrize("n, m", ((10, 12), (1, 32), (31, 32)))
def test_triton_packs_the_candidates_of_wide_groups(n, m):
    packed = triton_groups._candidates(n, m, torch.device(GPU)).tolist()
    unpacked = [tuple(i for i in range(32) if (each >> i) & 1) for each in packed]
    assert unpacked == candidates_of(n, m)


@pytest.mark.parametrize("exact", (True, False))
@pytest.mark.parametrize("n_rows, n_cols, m", ((3, 20, 10), (2, 37, 128), (1, 26, 13), (2, 1, 128)))
def test_triton_makes_the_best_swaps(n_rows, n_cols, m, exact):
    assert_same_choice(triton_swaps.refine_swaps, refine_swaps, *block_of(n_rows, n_cols, 0, 0, exact), m)


def test_triton_takes_the_lowest_columns_of_equal_swaps():
    """All swaps are equal; the rows have more kept than pruned weights, and fewer."""
    pruned = torch.arange(24).view(2, 12) % 12 >= torch.tensor([[9], [3]])
    pruned = torch.stack([row[torch.randperm(12)] for row in pruned])
    block = torch.ones(2, 12), pruned, torch.where(pruned, 3.0, -3.0), torch.eye(12)
    assert_same_choice(triton_swaps.refine_swaps, refine_swaps, *block, 128)


def test_triton_swaps_nothing_in_rows_that_are_all_pruned_or_all_kept():
    w, pruned, c, h = block_of(3, 12, 0, 0, exact=True)
    pruned[0], pruned[1] = True, False
    chosen = assert_same_choice(triton_swaps.refine_swaps, refine_swaps, w, pruned, c, h, 128)
    assert chosen[0].all() and not chosen[1].any()


@on_each_backend("refine_mask_")
@pytest.mark.parametrize(
    "n_rows, n_cols, pattern, dtype",
    (
        (3, 40, "2:4", torch.float32),
        (3, 16, "4:8", torch.bfloat16),
        (1, 12, "10:12", torch.float32),
        (2, 32, "8:16", torch.float16),
        (2, 35, None, torch.float32),
        (3, 21, None, torch.bfloat16),
        (1, 1, None, torch.float32),
    ),
)
def test_refine_mask_chooses_as_the_reference(n_rows, n_cols, pattern, dtype, backend, monkeypatch):
    """In blocks of 16 columns, or as many whole groups."""
    monkeypatch.setattr(mask_descent, "block_width", lambda m: max(16 // m * m, m) if m else 16)
    n, m = (int(each) for each in pattern.split(":")) if pattern else (0, 0)
    weight, pruned = integers(n_rows, n_cols).to(dtype), some_mask(n_rows, n_cols, n, m)
    weight[:, n_cols // 4] = 0.0
    hessian = integer_hessian(n_cols)
    expected, got = pruned.clone(), pruned.to(device_of(backend), copy=True)
    reference.refine_mask_(weight, expected, hessian, n, m, 2)
    operands = weight.to(got.device, copy=True), got, hessian.to(got.device)
    wanda_kernels.refine_mask_(*operands, pattern, 2, backend=backend)
    assert torch.equal(got.cpu(), expected)
    assert torch.equal(operands[0].cpu(), weight) and (n_cols == 1 or not torch.equal(expected, pruned))


@on_each_backend("polish_")
@pytest.mark.parametrize("n_rows, n_cols, dtype", ((5, 37, torch.float32), (3, 130, torch.bfloat16)))
def test_polish_moves_the_kept_weights_as_the_reference(n_rows, n_cols, dtype, backend):
    x = torch.randn(2 * n_cols, n_cols)
    hessian = x.T @ x / n_cols + torch.eye(n_cols)
    dense, pruned = random_weight(n_rows, n_cols, dtype), torch.rand(n_rows, n_cols) < 0.5
    # a row with nothing to solve, one with nothing to change, one that has its solution
    pruned[0], pruned[1] = True, False
    expected = torch.where(pruned, 0.0, dense)
    got = expected.to(device_of(backend), copy=True)
    reference.polish_(expected, dense, pruned, hessian, 4)
    operands = [each.to(got.device) for each in (dense, pruned, hessian)]
    wanda_kernels.polish_(got, *operands, 4, backend=backend)
    tolerance = 1e-5 if dtype == torch.float32 else 2**-7  # the sums' order; a rounding to bf16
    torch.testing.assert_close(got.cpu(), expected, rtol=tolerance, atol=1e-6)
    assert torch.equal(got[1].cpu(), dense[1]) and not torch.equal(expected[2], dense[2])
    assert (bits(got.contiguous())[pruned] == 0).all()


def test_triton_takes_a_step_of_each_row_in_chunks_of_columns():
    """More columns than a chunk; one row has no curvature, one a rho of 0."""
    shape = (4, 1030)
    z, residual, direction, product = (torch.randn(shape) for _ in range(4))
    product[1:] = direction[1:] * torch.rand(shape[1])  # positive curvature
    product[0] = -direction[0]
    rho, inverse, pruned = torch.rand(4) + 0.5, torch.rand(shape[1]) + 0.1, torch.rand(shape) < 0.5
    rho[1] = 0.0
    expected = [z, residual, direction, product, rho]
    got = [each.to(GPU, copy=True) for each in expected]
    reference_polish.polish_step(*expected, inverse, pruned)
    polish_step.polish_step(*got, inverse.to(GPU), pruned.to(GPU))
    for found, right in zip(got, expected, strict=True):
        torch.testing.assert_close(found.cpu(), right, rtol=1e-5, atol=1e-5)
    assert (got[1].cpu()[pruned] == 0).all()


def edge_operands(n_rows: int, n_cols: int) -> list[Tensor]:
    """(primal, dual, dense); their sums have ties, zeros of both signs, subnormals and outliers."""
    rows = [edge_weight(n_cols, torch.float16).float(), random_weight(n_rows, n_cols, torch.float32)]
    primal = torch.cat(rows)[:n_rows]
    primal[n_rows // 2 :, n_cols // 2 :] = 0.25
    dual = torch.where(torch.rand(n_rows, n_cols) < 0.5, -0.0, integers(n_rows, n_cols) / 4)
    return [primal, dual, torch.randn(n_rows, n_cols)]


def assert_same_step(step, device: str, n_rows: int, n_cols: int, pattern: int | str, ratio: float):
    num_pruned, n, m = wanda_kernels.operations.solver.pattern_numbers(pattern, n_cols)
    expected, expected_pruned = edge_operands(n_rows, n_cols), torch.rand(n_rows, n_cols) < 0.5
    got, pruned = [each.to(device, copy=True) for each in expected], expected_pruned.to(device, copy=True)
    count = reference.admm_step_(*expected, expected_pruned, num_pruned, n, m, ratio)
    found = step(*got, pruned)
    assert torch.equal(pruned.cpu(), expected_pruned)
    assert found.dtype == torch.int64 and found.shape == () and found.item() == count.item()
    for one, other in zip(got, expected, strict=True):
        assert torch.equal(bits(one), bits(other))


@on_each_backend("admm_step_")
@pytest.mark.parametrize(
    "n_rows, n_cols, pattern",
    (
        *((2, 37, count) for count in (0, 1, 37)),
        *((1, 1, count) for count in (0, 1)),
        *((7, 37, 18), (1, 130, 65), (1, 600, 200)),
        *((7, 40, pattern) for pattern in ("1:2", "2:4", "4:8", "1:4", "3:5", "7:8")),
        *((3, 64, "16:32"), (1, 30, "7:15"), (2, 1040, "2:4")),
    ),
)
def test_admm_step_gives_the_bits_of_the_reference(n_rows, n_cols, pattern, backend):
    ratio = 1.0 if n_cols == 130 else 0.7

    def step(*operands):
        return wanda_kernels.admm_step_(*operands, pattern, ratio, backend=backend)

    assert_same_step(step, device_of(backend), n_rows, n_cols, pattern, ratio)


@pytest.mark.parametrize("pattern", (0, 50, 129))
def test_triton_takes_a_row_that_does_not_fit_the_registers_in_parts(pattern, monkeypatch):
    monkeypatch.setattr(admm_step, "SEGMENTS", ())
    monkeypatch.setattr(admm_step, "IN_PARTS", 64)

    def step(*operands):
        return admm_step.admm_step_(*operands, pattern, 0, 0, 0.7)

    assert_same_step(step, GPU, 2, 129, pattern, 0.7)


@pytest.mark.parametrize("segments", ((64, 32, 0), (64, 32, 64)))
def test_triton_takes_a_row_of_several_segments(segments, monkeypatch):
    monkeypatch.setattr(admm_step, "SEGMENTS", ((sum(segments), segments, 1),))

    def step(*operands):
        return admm_step.admm_step_(*operands, 40, 0, 0, 0.7)

    assert_same_step(step, GPU, 2, sum(segments) - 3, 40, 0.7)

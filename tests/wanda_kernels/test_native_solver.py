"""The CPU library's solvers equal the reference on each instruction set: to the bit, but for `polish_step`.

The reference takes longest here, so that most tests compute it once for all instruction sets.
"""

import pytest
import torch

from tests.wanda_kernels.native_cases import ISAS, bits, needs_cpu
from wanda_kernels import reference
from wanda_kernels.native import ops as native
from wanda_kernels.operations import admm, solver
from wanda_kernels.reference import admm_step as reference_admm
from wanda_kernels.reference import polish_step as reference_polish
from wanda_kernels.reference.refine_groups import refine_groups
from wanda_kernels.reference.refine_swaps import refine_swaps

pytestmark = needs_cpu
HESSIANS = ("correlated", "identity", "integers", "any")
REFERENCE = {"refine_groups": refine_groups, "refine_swaps": refine_swaps}
WEIGHTS = ("normal", "equal", "zeros")
PATTERNS = [(1, 2), (2, 3), (2, 4), (3, 5), (4, 8), (8, 16), (15, 16), (16, 32)]


@pytest.fixture(params=ISAS)
def isa(request, monkeypatch):
    monkeypatch.setenv("WANDA_KERNELS_CPU_ISA", request.param)
    return request.param


def generator_of(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def hessian_of(kind: str, width: int, generator: torch.Generator) -> torch.Tensor:
    """[width, width], a view. "any" is not symmetric: the operations read the elements that they document."""
    x = torch.randn(3 * width, width, generator=generator) + torch.randn(3 * width, 1, generator=generator)
    h = x.t() @ x / (3 * width)
    if kind == "identity":
        h = torch.eye(width)
    elif kind == "integers":  # exact sums, so that many errors are equal
        h = (h * 2).round()
        h[:, width // 2] = h[width // 2] = 0.0  # a dead column
    elif kind == "any":
        h = torch.randn(width, width, generator=generator)
    padded = torch.full((width + 2, width + 7), float("nan"))
    padded[:width, 3 : width + 3] = h
    return padded[:width, 3 : width + 3]


def weights_of(kind: str, shape: tuple[int, int], generator: torch.Generator) -> torch.Tensor:
    w = torch.randn(shape, generator=generator)
    if kind == "equal":
        w = torch.where(w < 0, -1.0, 1.0)
    elif kind == "zeros":
        w = (w * 1.5).round()
        w[:, ::5] *= -0.0
    return w


def within(matrix: torch.Tensor, filler: float | bool) -> torch.Tensor:
    """The matrix as a view of a wider one."""
    wide = torch.full((len(matrix) + 2, matrix.shape[1] + 9), filler, dtype=matrix.dtype)
    view = wide[1:-1, 5 : matrix.shape[1] + 5]
    view.copy_(matrix)
    return view


def block_of(n_rows: int, width: int, n: int, m: int, weights: str, hessian: str, seed: int):
    """(w, pruned, c, h). n:m: every group has m - n pruned columns; 0:0: any number of them."""
    generator = generator_of(seed)
    h = hessian_of(hessian, width, generator)
    w = weights_of(weights, (n_rows, width), generator)
    order = torch.rand(n_rows, width, generator=generator)
    if m:
        pruned = (order.view(-1, m).argsort(dim=1) < m - n).view(n_rows, width)
    else:
        pruned = order < torch.rand(n_rows, 1, generator=generator)
    c = torch.where(pruned, w, 0.0) @ h
    if hessian != "identity":
        c += torch.randn(n_rows, width, generator=generator).round()  # other blocks
    return within(w, float("nan")), within(pruned, True), c, h


def assert_same_block(monkeypatch, operation: str, block, *args) -> int:
    """Returns how many elements of `pruned` changed."""
    w, pruned, c, h = block
    expected = within(pruned, True)
    REFERENCE[operation](w, expected, c.clone(), h, *args)
    for isa in ISAS:
        monkeypatch.setenv("WANDA_KERNELS_CPU_ISA", isa)
        got = within(pruned, True)
        getattr(native, operation)(w, got, c.clone(), h, *args)
        assert torch.equal(got._base, expected._base), (isa, list(w.shape), *args)
    return (expected != pruned).sum()


@pytest.mark.parametrize("hessian", HESSIANS)
@pytest.mark.parametrize("weights", WEIGHTS)
def test_groups(monkeypatch, weights, hessian):
    changed = 0
    for seed, (n, m) in enumerate(((1, 2), (2, 3), (2, 4), (1, 4), (3, 5))):
        for n_rows, width in ((1, m), (19, 3 * m)):
            block = block_of(n_rows, width, n, m, weights, hessian, seed)
            changed += assert_same_block(monkeypatch, "refine_groups", block, n, m)
    assert changed or (weights, hessian) == ("equal", "identity")


@pytest.mark.parametrize("nm", ((2, 4), (4, 8), (1, 8), (2, 11), (1, 32), (31, 32)))
def test_wide_groups(monkeypatch, nm):
    n, m = nm
    block = block_of(9, 128 if m == 4 else max(m, 16 // m * m), n, m, "normal", "correlated", m)
    assert assert_same_block(monkeypatch, "refine_groups", block, n, m)


def test_groups_of_every_number_of_rows(monkeypatch):
    for n_rows in range(1, 19):
        block = block_of(n_rows, 8, 2, 4, "normal", "correlated", n_rows)
        assert_same_block(monkeypatch, "refine_groups", block, 2, 4)


@pytest.mark.parametrize("hessian", HESSIANS)
@pytest.mark.parametrize("weights", WEIGHTS)
def test_swaps(monkeypatch, weights, hessian):
    changed = 0
    for seed, width in enumerate((1, 2, 7, 8, 9, 33)):
        block = block_of(4, width, 0, 0, weights, hessian, seed)
        changed += assert_same_block(monkeypatch, "refine_swaps", block, 128)
    for seed, (n, m) in enumerate(PATTERNS):
        block = block_of(3, max(m, 24 // m * m), n, m, weights, hessian, seed)
        changed += assert_same_block(monkeypatch, "refine_swaps", block, m)
    assert changed or (weights, hessian) == ("equal", "identity")


@pytest.mark.parametrize("width", (127, 128))
def test_swaps_in_wide_blocks(monkeypatch, width):
    block = block_of(2, width, 0, 0, "normal" if width == 128 else "zeros", "correlated", width)
    assert assert_same_block(monkeypatch, "refine_swaps", block, 128)


@pytest.mark.parametrize("scale", (1e-25, 1e-15, 1e10, 1e18, 1e25))
def test_numbers_near_the_ends_of_fp32(monkeypatch, scale):
    """Products underflow, or overflow to infinity and NaN. Columns differ in their sizes."""
    for hessian in ("correlated", "any"):
        w, pruned, c, h = block_of(5, 40, 0, 0, "normal", hessian, 1)
        w[:, ::3] *= scale
        c *= scale
        h[::2] *= 1e-18
        h[:, ::2] *= 1e-18
        assert_same_block(monkeypatch, "refine_swaps", (w, pruned, c, h), 128)
        w, pruned, c, h = block_of(9, 16, 4, 8, "normal", hessian, 1)
        w[:, ::3] *= scale
        assert_same_block(monkeypatch, "refine_groups", (w, pruned, c, h), 4, 8)


def test_rows_without_a_better_mask_stay(monkeypatch):
    """All weights are equal and the Hessian is the identity: every mask has the same error."""
    for n, m in ((2, 4), (4, 8)):
        w, pruned, c, h = block_of(9, 16, n, m, "equal", "identity", 0)
        assert not assert_same_block(monkeypatch, "refine_groups", (w, pruned, c, h), n, m)
        assert not assert_same_block(monkeypatch, "refine_swaps", (w, pruned, c, h), m)


@pytest.mark.parametrize("pattern", (None, "2:4", "8:16"))
def test_refine_mask_over_blocks(isa, pattern):
    """130 columns have a last block of 2. The product before a block is the same one for both backends."""
    shape = (9, {None: 130, "2:4": 132, "8:16": 144}[pattern])
    generator = generator_of(4)
    h = hessian_of("correlated", shape[1], generator).contiguous()
    weight = torch.randn(shape, generator=generator).bfloat16()
    n, m = (0, 0) if pattern is None else map(int, pattern.split(":"))
    pruned = torch.zeros(shape, dtype=torch.bool)
    scores = weight.float().abs() * h.diagonal().sqrt()

    def groups_of(matrix):
        return matrix.unflatten(1, (-1, m or shape[1]))

    lowest = groups_of(scores).argsort(dim=2, stable=True)[..., : (m - n) or shape[1] // 2]
    groups_of(pruned).scatter_(2, lowest, True)
    masks, before = [within(pruned, True) for _ in range(2)], pruned.clone()
    for backend, mask in zip(("torch", "cpu"), masks, strict=True):
        solver.refine_mask_(weight, mask, h, pattern, 3, backend=backend)
    assert torch.equal(*masks)
    assert torch.equal(groups_of(masks[1]).sum(2), groups_of(before).sum(2))
    removed = [torch.where(mask, weight, 0.0).double() for mask in (before, masks[1])]
    errors = [((each @ h.double()) * each).sum(dim=1) for each in removed]
    assert (errors[1] <= errors[0]).all() and errors[1].sum() < 0.95 * errors[0].sum()


@pytest.mark.parametrize("recipe", ("normal", "ties", "signed zeros", "huge"))
def test_admm_step(isa, recipe):
    cases = [
        (shape, (num_pruned, 0, 0))
        for shape in ((1, 1), (3, 7), (5, 127), (9, 130))
        for num_pruned in sorted({0, 1, shape[1] // 2, shape[1]})
    ]
    cases += [((5, m * 9), (0, n, m)) for n, m in [*PATTERNS, (3, 7)]]
    for seed, (shape, pattern) in enumerate(cases):
        generator = generator_of(seed)
        primal, dual, dense = torch.randn(3, *shape, generator=generator)
        if recipe == "ties":
            primal, dual = primal.round(), dual.round()
        elif recipe == "signed zeros":
            primal, dual, dense = primal * 0.0, dual * -0.0, torch.where(dense < 0, -0.0, 0.0)
        elif recipe == "huge":
            primal[primal > 1], dual[dual < -1], dense[dense > 1] = torch.inf, -torch.inf, 3e38
        pruned = torch.rand(shape, generator=generator) < 0.5
        expected = [each.clone() for each in (primal, dual, dense, pruned)]
        got = [each.clone() for each in (primal, dual, dense, pruned)]
        counts = [reference_admm.admm_step_(*expected, *pattern, 0.7), native.admm_step_(*got, *pattern, 0.7)]
        assert counts[0] == counts[1] and counts[1].dtype == torch.int64 and counts[1].dim() == 0
        assert torch.equal(expected[3], got[3]), (shape, pattern)
        for ours, theirs in zip(got[:3], expected[:3], strict=True):
            same = bits(ours) == bits(theirs)
            assert (same | (ours.isnan() & theirs.isnan())).all(), (shape, pattern)


def test_admm_step_on_any_number_of_threads(isa):
    threads = torch.get_num_threads()
    generator = generator_of(0)
    operands = [*torch.randn(3, 300, 257, generator=generator), torch.zeros(300, 257, dtype=torch.bool)]
    results = []
    try:
        for n_threads in (1, 2, 5):
            torch.set_num_threads(n_threads)
            copies = [each.clone() for each in operands]
            results.append([native.admm_step_(*copies, 100, 0, 0, 1.0), *copies])
    finally:
        torch.set_num_threads(threads)
    assert results[0][0] == 300 * 100
    for other in results[1:]:
        assert all(map(torch.equal, results[0], other))


@pytest.mark.parametrize("shape", ((1, 1), (3, 7), (5, 127), (33, 130), (4, 1000)))
def test_polish_step(isa, shape):
    generator = generator_of(shape[1])
    z, residual, direction, product = torch.randn(4, *shape, generator=generator)
    product += 2 * direction  # a positive curvature in most rows
    if len(z) > 3:
        product[1] = -direction[1]
        direction[2] = product[2] = 0.0
    inverse_diagonal = torch.rand(shape[1], generator=generator) + 0.1
    pruned = torch.rand(shape, generator=generator) < 0.5
    rho = torch.rand(shape[0], generator=generator)
    rho[0] = 0.0
    operands = z, residual, direction, product, rho
    expected, got = [each.double() for each in operands], [each.clone() for each in operands]
    reference_polish.polish_step(*expected, inverse_diagonal.double(), pruned)
    native.polish_step(*got, inverse_diagonal, pruned)
    for ours, theirs in zip(got, expected, strict=True):
        torch.testing.assert_close(ours.double(), theirs, rtol=2e-4, atol=2e-5)
    assert not got[1][pruned].any() and torch.equal(got[3], product)


def test_polish_follows_the_reference(isa):
    generator = generator_of(2)
    h = admm.damped_hessian(hessian_of("correlated", 70, generator))
    dense = torch.randn(9, 70, generator=generator)
    pruned = torch.rand(9, 70, generator=generator) < 0.5
    results = [dense.bfloat16(), dense.bfloat16()]
    reference.polish_(results[0], dense, pruned, h, 12)
    solver.polish_(results[1], dense, pruned, h, 12, backend="cpu")
    torch.testing.assert_close(results[1], results[0], rtol=1e-2, atol=1e-2)
    assert not results[1][pruned].any() and results[1].isfinite().all()


def test_auto_chooses_the_library():
    from wanda_kernels.dispatch.backends import choose_backend

    for operation in ("refine_mask_", "polish_", "admm_step_"):
        assert choose_backend(operation, "cpu", "auto") == "cpu"


def test_memory_is_checked_below_the_face():
    w, pruned, c, h = block_of(4, 16, 2, 4, "normal", "correlated", 0)
    for arguments, sentence in (
        ((w, pruned[:3], c, h, 2, 4), "pruned must be bool with w's shape"),
        ((w, pruned, c[:, :15], h, 2, 4), "c must be contiguous with 64 elements"),
        ((w, pruned, c, h[:15], 2, 4), r"h must be \[width, width\]"),
        ((w, pruned, c, h, 2, 5), "n:m does not fit"),
        ((w, pruned, c, h, 8, 16), "groups have 12870 masks, more than 70"),
    ):
        with pytest.raises(RuntimeError, match=sentence):
            native.refine_groups(*arguments)
    with pytest.raises(RuntimeError, match="m must be 1 to 128, got 0"):
        native.refine_swaps(w, pruned, c, h, 0)
    primal, mask = torch.zeros(4, 16), torch.zeros(4, 16, dtype=torch.bool)
    with pytest.raises(RuntimeError, match="dual must be contiguous with 64 elements"):
        native.admm_step_(primal, torch.zeros(63), primal.clone(), mask, 3, 0, 0, 1.0)
    with pytest.raises(RuntimeError, match="the pattern does not fit"):
        native.admm_step_(primal, primal.clone(), primal.clone(), mask, 17, 0, 0, 1.0)
    with pytest.raises(RuntimeError, match="rho must be contiguous with 4 elements"):
        native.polish_step(*(primal.clone() for _ in range(4)), torch.zeros(3), torch.zeros(16), mask)

"""`admm_` against the published ADMM in float64, and `admm_step_` against its formulas."""

import pytest
import torch

import wanda_kernels
from tests.published_admm import decompose, highest, layer_error, prune_admm_published
from tests.wanda_kernels.cases import bits, poisoned_mask, random_weight
from wanda_kernels import (
    Ladder,
    NotPositiveDefiniteError,
    admm,
    admm_,
    admm_step_,
    damped_hessian,
    factor_hessian,
    sparsegpt_,
    unpack_bits,
)

# on the published error: the ladder of rho is shorter than the published one
MOST_OVER_PUBLISHED = 1.01
PATTERNS = ("0.5", "0.6", "2:4", "4:8", "3:5")
WIDTH = 240  # of whole groups for every pattern


@pytest.fixture(params=["torch", "auto"])
def backend(request):
    """Elsewhere every backend is compared with torch, to the bit."""
    return request.param


def hessian_of(width: int, n_tokens: int, outliers: float = 20, dead: tuple[int, ...] = ()) -> torch.Tensor:
    """Correlated inputs; every 37th is `outliers` times as large."""
    generator = torch.Generator().manual_seed(width + n_tokens)
    mixing = torch.eye(width) + torch.randn(width, width, generator=generator) / width**0.5
    x = torch.randn(n_tokens, width, generator=generator) @ mixing
    x[:, ::37] *= outliers
    x[:, list(dead)] = 0
    return x.t() @ x


def as_argument(pattern: str) -> str | float:
    return pattern if ":" in pattern else float(pattern)


def assert_pattern(kept: torch.Tensor, pattern: str) -> None:
    """As many kept as the pattern says: in each row, or in each group."""
    n, m = map(int, pattern.split(":")) if ":" in pattern else (0, kept.shape[1])
    expected = n or m - int(m * float(pattern))
    assert (kept.reshape(-1, m).sum(dim=1) == expected).all()


@pytest.mark.parametrize(
    ("n_tokens", "outliers"),
    [(600, 1), (600, 20), (600, 100), (100, 20)],
    ids=["even", "outliers", "damped", "few tokens"],
)
def test_reaches_the_published_error(n_tokens, outliers):
    """With large outliers the dampening, a share of the mean, exceeds the other inputs' own squares."""
    dense = random_weight(64, WIDTH, torch.float32)
    hessian = damped_hessian(hessian_of(WIDTH, n_tokens, outliers))
    ladder, decomposed, ratios = Ladder(hessian), decompose(hessian), {}
    for pattern in PATTERNS:
        weight = dense.clone()
        iterations = admm_(weight, ladder, as_argument(pattern))
        assert iterations <= admm.RUNGS * admm.STEPS and iterations % admm.STEPS == 0
        assert_pattern(weight != 0, pattern)
        published = prune_admm_published(dense, decomposed, pattern)
        assert_pattern(published != 0, pattern)
        error, expected = layer_error(dense - weight, hessian), layer_error(dense - published, hessian)
        ratios[pattern] = error / expected
    assert max(ratios.values()) <= MOST_OVER_PUBLISHED, ratios


@pytest.mark.parametrize("pattern", PATTERNS)
def test_the_error_is_below_sparsegpts(pattern):
    dense, hessian = random_weight(32, WIDTH, torch.float32), hessian_of(WIDTH, 600)
    damped = damped_hessian(hessian)
    weight, updated = dense.clone(), dense.clone()
    admm_(weight, Ladder(damped), as_argument(pattern))
    sparsegpt_(updated, factor_hessian(hessian), as_argument(pattern))
    assert layer_error(dense - weight, damped) < 0.93 * layer_error(dense - updated, damped)


@pytest.mark.parametrize(
    ("n_rows", "width", "pattern"),
    [(1, 37, "0.5"), (3, 1, "0.5"), (2, 5, "3:5"), (5, 129, "0.9"), (1, 136, "2:4"), (4, 160, "16:32")],
)
def test_odd_shapes_and_the_mask(n_rows, width, pattern, backend):
    dense = random_weight(n_rows, width, torch.float32)
    hessian = damped_hessian(hessian_of(width, 2 * width + 3))
    weight, mask = dense.clone(), poisoned_mask(n_rows, width, "cpu")
    admm_(weight, Ladder(hessian), as_argument(pattern), mask=mask, backend=backend)
    assert_pattern(weight != 0, pattern)
    assert torch.equal(unpack_bits(mask, width), weight != 0)
    assert (bits(weight)[weight == 0] == 0).all()
    magnitude = dense * highest(dense * hessian.diagonal().sqrt(), pattern)
    assert layer_error(dense - weight, hessian) <= layer_error(dense - magnitude, hessian)


def test_zero_weights_are_marked_in_the_mask_alone(backend):
    """Rows of zeros have nothing to choose by; they keep the highest columns."""
    weight, mask = torch.zeros(2, 16), poisoned_mask(2, 16, "cpu")
    admm_(weight, Ladder(damped_hessian(hessian_of(16, 50))), "2:4", mask=mask, backend=backend)
    assert (bits(weight) == 0).all()
    assert torch.equal(unpack_bits(mask, 16), torch.tensor([False, False, True, True]).repeat(2, 4))


@pytest.mark.parametrize("pattern", ["0.5", "2:4"])
def test_dead_inputs(pattern, backend):
    """Inputs that are 0 in every token, in one case all of them."""
    for dead in ((0, 5, 6, 7, 63), tuple(range(64))):
        weight = random_weight(6, 64, torch.float32)
        ladder = Ladder(damped_hessian(hessian_of(64, 40, dead=dead)))
        admm_(weight, ladder, as_argument(pattern), backend=backend)
        assert weight.isfinite().all()
        assert_pattern(weight != 0, pattern)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_the_result_is_rounded_once(dtype, backend):
    dense = random_weight(8, 96, dtype)
    ladder = Ladder(damped_hessian(hessian_of(96, 200)))
    weight, expected = dense.clone(), dense.float()
    assert admm_(weight, ladder, "2:4", backend=backend) == admm_(expected, ladder, "2:4", backend=backend)
    assert weight.dtype == dtype and torch.equal(bits(weight), bits(expected.to(dtype)))


def test_ratio_0_keeps_every_weight(backend):
    dense = random_weight(4, 50, torch.float32)
    weight, mask = dense.clone(), poisoned_mask(4, 50, "cpu")
    ladder = Ladder(damped_hessian(hessian_of(50, 120)))
    iterations = admm_(weight, ladder, 0.0, mask=mask, backend=backend)
    assert iterations == admm.STEPS and unpack_bits(mask, 50).all()
    torch.testing.assert_close(weight, dense, rtol=1e-5, atol=1e-8)


def test_a_ladder_serves_weights_in_any_order():
    """Kept inverses or not, before or after another weight, in rows of another layout: the same bits."""
    hessian = damped_hessian(hessian_of(80, 200))
    before, dense = hessian.clone(), random_weight(6, 80, torch.float32)
    shared, results = Ladder(hessian), []
    admm_(random_weight(9, 80, torch.float32, seed=3), shared, 0.7)
    for ladder in (shared, shared, Ladder(hessian, keep=False)):
        weight = dense.t().contiguous().t() if results else dense.clone()
        admm_(weight, ladder, "2:4")
        results.append(weight)
    assert all(torch.equal(results[0], other) for other in results[1:])
    assert torch.equal(hessian, before)


def test_the_inverse_is_of_the_scaled_hessian():
    hessian = damped_hessian(hessian_of(70, 100))
    ladder, (_, scaled, *_) = Ladder(hessian), decompose(hessian)
    assert ladder.rho(1) > ladder.rho(0) > 0
    for rung in (0, 1):
        product = ladder.inverse(rung).double() @ (scaled + ladder.rho(rung) * torch.eye(70))
        torch.testing.assert_close(product, torch.eye(70, dtype=torch.float64), rtol=0, atol=1e-4)


def test_more_polish_lowers_the_error():
    dense, hessian = random_weight(8, 96, torch.float32), damped_hessian(hessian_of(96, 60))
    errors = []
    for polish in (0, 1, 4, 100):
        weight = dense.clone()
        admm_(weight, Ladder(hessian), 0.5, polish=polish)
        errors.append(layer_error(dense - weight, hessian))
    assert errors == sorted(errors, reverse=True) and errors[3] < errors[0]
    kept = weight != 0
    for row in range(8):  # the last one is the exact solution on its support
        h, columns = hessian.double(), kept[row]
        exact = torch.linalg.solve(h[columns][:, columns], h[columns] @ dense[row].double())
        bound = 1e-4 * exact.abs().max().item()
        torch.testing.assert_close(weight[row, columns].double(), exact, rtol=0, atol=bound)


def test_bad_input_changes_nothing_and_is_named():
    dense, hessian = random_weight(6, 16, torch.float32), damped_hessian(hessian_of(16, 40))
    indefinite, infinite = hessian.clone(), dense.clone()
    indefinite[0, 1] = indefinite[1, 0] = 3 * hessian.diagonal().max()
    infinite[4, 3] = -torch.inf
    operands = dict(weight=dense, ladder=Ladder(hessian), pattern="2:4")
    cases = [
        (dict(weight=dense[0]), r"\[out, in\], got shape \[16\]"),
        (dict(weight=dense.double()), "got torch.float64"),
        (dict(weight=dense[:, :12].clone()), r"float32 \[12, 12\], got torch.float32 \[16, 16\]"),
        (dict(weight=dense[:1].expand(6, 16)), r"memory of its own, got shape \[6, 16\]"),
        (dict(weight=infinite), r"weight holds -inf at \[4, 3\]"),
        (dict(pattern=1.0), r"ratio in \[0, 1\), or 'n:m', got 1.0"),
        (dict(pattern=-0.1), r"ratio in \[0, 1\), or 'n:m', got -0.1"),
        (dict(pattern=float("nan")), r"ratio in \[0, 1\), or 'n:m', got nan"),
        (dict(pattern="2:5"), "16 is not a multiple of m = 5"),
        (dict(pattern="4"), "'n:m', got '4'"),
        (dict(polish=-1), "steps must be at least 0, got -1"),
        (dict(mask=torch.empty(6, 3, dtype=torch.uint8)), r"uint8 \[6, 2\], got torch.uint8 \[6, 3\]"),
    ]
    for change, sentence in cases:
        before = dense.clone()
        with pytest.raises(ValueError, match=sentence):
            admm_(**(operands | change))
        assert torch.equal(dense, before)
    with pytest.raises(NotPositiveDefiniteError, match="the 16 x 16 Hessian is not positive definite"):
        admm_(dense, Ladder(indefinite), "2:4")
    assert torch.equal(dense, before)
    with pytest.raises(wanda_kernels.BackendError, match="unknown backend 'fpga'"):
        admm_(**operands, backend="fpga")


def test_damped_hessian():
    hessian = hessian_of(20, 50, dead=(3, 11))
    before = hessian.clone()
    for dampening in (0.01, 2.0):
        damped = damped_hessian(hessian, dampening)
        diagonal = before.double().diagonal().clone()
        diagonal[[3, 11]] = 1
        expected = before.double()
        expected.diagonal().copy_(diagonal + dampening * diagonal.mean())
        torch.testing.assert_close(damped.double(), expected, rtol=1e-6, atol=0)
    assert torch.equal(hessian, before)
    huge = torch.eye(400) * 3e36  # the sum of the diagonal overflows, its mean does not
    torch.testing.assert_close(damped_hessian(huge).diagonal(), huge.diagonal() * 1.01)
    for operands, sentence in (
        ((hessian[:5],), r"float32 \[in, in\], got torch.float32 \[5, 20\]"),
        ((hessian.double(),), r"float32 \[in, in\], got torch.float64 \[20, 20\]"),
        ((hessian, 0.0), "dampening must be positive, got 0.0"),
        ((hessian, float("nan")), "dampening must be positive, got nan"),
        ((torch.full((2, 2), torch.inf),), r"hessian holds inf at \[0, 0\]"),
    ):
        with pytest.raises(ValueError, match=sentence):
            damped_hessian(*operands)


@pytest.mark.parametrize("pattern", ["0.5", "0.0", "1:4", "4:8", "3:5"])
def test_a_step_is_the_published_one(pattern, backend):
    """In the published terms, V = rho * dual; the numbers are multiples of 1/64, so fp32 is exact."""
    generator = torch.Generator().manual_seed(7)
    b, dual, dense = (torch.randint(-64, 64, (6, 40), generator=generator) / 64 for _ in range(3))
    rho, next_rho = 0.5, 2.0
    kept = highest(b + dual, pattern)
    z = (b + dual) * kept
    v = rho * dual + rho * (b - z)
    pruned = torch.rand(6, 40, generator=generator) < 0.5
    n_changed = (pruned == kept).sum()
    argument = pattern if ":" in pattern else int(40 * float(pattern))
    changed = admm_step_(b, dual, dense, pruned, argument, rho / next_rho, backend=backend)
    assert torch.equal(pruned, ~kept)
    assert changed.shape == () and changed.dtype == torch.int64 and changed == n_changed
    assert torch.equal(dual, v / next_rho)
    assert torch.equal(b, dense - z + v / next_rho)


def test_of_equal_magnitudes_the_lower_columns_are_pruned(backend):
    u = torch.tensor([[1.0, -1.0, 1.0, -1.0], [0.0, -0.0, 0.0, 2.0], [-2.0, 1.0, -1.0, 1.0]])
    expected = {
        "2:4": [[1, 1, 0, 0], [1, 1, 0, 0], [0, 1, 1, 0]],
        1: [[1, 0, 0, 0], [1, 0, 0, 0], [0, 1, 0, 0]],
        4: [[1, 1, 1, 1]] * 3,
    }
    for pattern, marks in expected.items():
        pruned = torch.zeros(3, 4, dtype=torch.bool)
        changed = admm_step_(u.clone(), torch.zeros_like(u), u.clone(), pruned, pattern, backend=backend)
        assert pruned.int().tolist() == marks and changed == pruned.sum()


def test_a_steps_bad_input_changes_nothing_and_is_named():
    u, pruned = random_weight(4, 16, torch.float32), torch.zeros(4, 16, dtype=torch.bool)
    operands = dict(primal=u, dual=u.clone(), dense=u.clone(), pruned=pruned, pattern="2:4")
    cases = [
        (dict(primal=u.half()), r"contiguous float32 \[out, in\], got torch.float16 \[4, 16\]"),
        (dict(primal=u[:, 1:]), r"primal must be contiguous float32 \[out, in\]"),
        (dict(dual=u[:3]), r"dual must be contiguous float32 \[4, 16\], got torch.float32 \[3, 16\]"),
        (dict(dense=u.double()), r"dense must be contiguous float32 \[4, 16\], got torch.float64"),
        (dict(pruned=pruned.int()), r"pruned must be bool \[4, 16\], got torch.int32"),
        (dict(pruned=torch.zeros(4, 20, dtype=torch.bool)[:, :16]), r"pruned must be contiguous.*\[20, 1\]"),
        (dict(pattern=17), "num_pruned must be from 0 to in_features = 16, got 17"),
        (dict(pattern="3:5"), "16 is not a multiple of m = 5"),
        (dict(pattern="0.5"), "'n:m', got '0.5'"),
    ]
    for change, sentence in cases:
        before = u.clone()
        with pytest.raises(ValueError, match=sentence):
            admm_step_(**(operands | change))
        assert torch.equal(u, before) and not pruned.any()


def test_nothing_to_do(backend):
    for shape in ((0, 16), (3, 0)):
        weight, pruned = torch.empty(shape), torch.zeros(shape, dtype=torch.bool)
        changed = admm_step_(weight, weight.clone(), weight.clone(), pruned, "2:4", backend=backend)
        assert changed == 0 and changed.dtype == torch.int64
        admm_(weight, Ladder(torch.eye(shape[1])), "2:4", backend=backend)
        assert weight.shape == shape

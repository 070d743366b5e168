"""`sparsegpt_` against a plain loop over the columns, and every backend against the reference's bits."""

from itertools import product

import pytest
import torch

import wanda_kernels
from tests.wanda_kernels.cases import DTYPES, bits, make_scale, poisoned_mask, random_weight
from wanda_kernels import Factor, factor_hessian, unpack_bits

OPERATION = "sparsegpt_"
SELECTORS = ("obs", "wanda", "magnitude")
# kept weights: hundreds of fp32 subtractions, here in another order and with another factor
WEIGHT_TOLERANCE = 1e-4


def correlated_hessian(width: int, n_tokens: int | None = None, dead: tuple[int, ...] = ()) -> torch.Tensor:
    generator = torch.Generator().manual_seed(width)
    mixing = torch.eye(width) + torch.randn(width, width, generator=generator) / width**0.5
    x = torch.randn(n_tokens or 2 * width + 5, width, generator=generator) @ mixing
    x[:, list(dead)] = 0
    return x.t() @ x


def edge_weight(n_rows: int, width: int, dtype: torch.dtype) -> torch.Tensor:
    """Ties, zeros of both signs and a row of equal weights, among ordinary weights."""
    weight = random_weight(n_rows, width, torch.float32) * 20
    column = torch.arange(width)
    weight[:, column % 5 == 1] = weight[:, column % 5 == 1].round()
    weight[:, column % 7 == 3] = -0.0
    weight[-1] = 0.25
    return weight.to(dtype)


def is_interpreted(backend: str, device: str) -> bool:
    return backend == "triton" and device == "cpu"


def column_loop(weight, hessian, pattern, selector="obs", scale=None, given=None):
    """(weight, pruned) by the published algorithm in fp32, one column at a time over the whole width."""
    kept, group = map(int, pattern.split(":")) if isinstance(pattern, str) else (0, 0)
    block_width = 128 // group * group if group else 128
    w, h = weight.clone().float(), hessian.clone()
    dead = h.diagonal() == 0
    h[dead, dead] = 1
    w[:, dead] = 0
    h += 0.01 * h.diagonal().mean() * torch.eye(len(h))
    u = torch.linalg.cholesky(torch.cholesky_inverse(torch.linalg.cholesky(h)), upper=True)

    def scores(columns):
        if selector == "obs":
            return w[:, columns] ** 2 / u.diagonal()[columns] ** 2
        return w[:, columns].abs() * (scale[columns].sqrt() if selector == "wanda" else 1)

    pruned = torch.zeros_like(w, dtype=torch.bool) if given is None else given
    for i in range(w.shape[1]):
        if given is None and not group and i % block_width == 0:
            block = slice(i, i + block_width)
            threshold = scores(block).flatten().sort().values[int(scores(block).numel() * pattern)]
            pruned[:, block] = scores(block) <= threshold
        if given is None and group and i % block_width % group == 0:
            columns = slice(i, i + group)
            lowest = scores(columns).sort(dim=1, stable=True).indices[:, : group - kept]
            pruned[:, columns] = torch.zeros(len(w), group, dtype=torch.bool).scatter(1, lowest, True)
        gone = pruned[:, i]
        error = w[:, i] * gone / u[i, i]
        w[:, i + 1 :] -= error[:, None] * u[i, i + 1 :]
        w[gone, i] = 0
    return w, pruned


def run(backend, device, weight, factor, pattern, **options):
    """(weight, packed mask) on the CPU after `sparsegpt_`."""
    factor = Factor(factor.upper.to(device), factor.dead.to(device), factor.dampening)
    got, mask = weight.to(device, copy=True), poisoned_mask(*weight.shape, device)
    on_device = {name: value.to(device) for name, value in options.items() if isinstance(value, torch.Tensor)}
    options = options | on_device
    wanda_kernels.sparsegpt_(got, factor, pattern, **options, mask=mask, backend=backend)
    return got.cpu(), mask.cpu()


def assert_same_bits(backend, device, weight, factor, pattern, **options):
    expected, expected_mask = run("torch", device, weight, factor, pattern, **options)
    got, mask = run(backend, device, weight, factor, pattern, **options)
    assert torch.equal(mask, expected_mask)
    assert torch.equal(bits(got), bits(expected))
    return got, mask


@pytest.mark.parametrize(
    "n_rows, width, pattern",
    (
        (24, 136, 0.5),  # more rows than an interpreted program has, and more columns than a block
        (5, 200, 0.7),
        (24, 136, "2:4"),
        (5, 136, "4:8"),
        (9, 132, "1:4"),
        (6, 160, "16:32"),
        (5, 144, "12:24"),  # blocks of 120
        (1, 136, "2:4"),
        (7, 37, 0.5),
        (1, 1, 0.5),
    ),
)
def test_equals_the_column_loop(backend, device, n_rows, width, pattern):
    hessian = correlated_hessian(width)
    weight = random_weight(n_rows, width, torch.float32) * 20
    expected, pruned = column_loop(weight, hessian, pattern)
    got, mask = run(backend, device, weight, factor_hessian(hessian), pattern)
    assert torch.equal(unpack_bits(mask, width), ~pruned)
    assert (bits(got)[pruned] == 0).all(), "what is pruned is +0.0"
    torch.testing.assert_close(got, expected, rtol=WEIGHT_TOLERANCE, atol=WEIGHT_TOLERANCE)


@pytest.mark.parametrize("selector", ("wanda", "magnitude"))
@pytest.mark.parametrize("pattern", (0.6, "2:4"))
def test_the_published_ablations(backend, device, pattern, selector):
    hessian, weight = correlated_hessian(136), random_weight(8, 136, torch.float32) * 20
    scale = hessian.diagonal().clone() if selector == "wanda" else None
    expected, pruned = column_loop(weight, hessian, pattern, selector, scale)
    got, mask = run(backend, device, weight, factor_hessian(hessian), pattern, selector=selector, scale=scale)
    assert torch.equal(unpack_bits(mask, 136), ~pruned)
    torch.testing.assert_close(got, expected, rtol=WEIGHT_TOLERANCE, atol=WEIGHT_TOLERANCE)


def test_a_given_mask_is_pruned_exactly(backend, device):
    hessian, weight = correlated_hessian(150), random_weight(5, 150, torch.float32) * 20
    given = torch.rand(5, 150, generator=torch.Generator().manual_seed(3)) < 0.4
    expected, _ = column_loop(weight, hessian, None, given=given)
    got, mask = run(backend, device, weight, factor_hessian(hessian), None, pruned=given)
    assert torch.equal(unpack_bits(mask, 150), ~given)
    torch.testing.assert_close(got, expected, rtol=WEIGHT_TOLERANCE, atol=WEIGHT_TOLERANCE)
    assert_same_bits(backend, device, weight.bfloat16(), factor_hessian(hessian), None, pruned=given)


def test_a_threshold_prunes_all_ties_and_a_group_the_lower_columns(backend, device):
    factor = Factor(torch.eye(8), torch.zeros(8, dtype=torch.bool), 0.01)
    weight = torch.tensor([[1.0, -1, 1, 1, 2, -2, 2, 2], [3, 3, -3, 3, 1, 1, 1, 1]])
    got, _ = run(backend, device, weight, factor, 0.25)  # sorted position 4 of 16 holds a 1, as do 8
    assert (got != 0).tolist() == [[False] * 4 + [True] * 4, [True] * 4 + [False] * 4]
    got, _ = run(backend, device, weight, factor, "3:4")
    assert (got != 0).tolist() == [[False, True, True, True] * 2] * 2


@pytest.mark.parametrize("selector", SELECTORS)
def test_equals_reference_bit_for_bit(backend, device, selector):
    width = 136
    factor = factor_hessian(correlated_hessian(width, dead=(0, 64, 129)))
    assert factor.dead.sum() == 3
    scale = make_scale("vector", 5, width) if selector == "wanda" else None
    dtypes, patterns = DTYPES, (0.0, 0.5, "2:4", "4:8")
    if is_interpreted(backend, device):
        # half a second a pattern; the kernels read fp32, whatever the weight's dtype is
        dtypes, patterns = DTYPES[SELECTORS.index(selector) :][:1], (0.5, "4:8")
    for dtype, pattern in product(dtypes, patterns):
        weight, options = edge_weight(5, width, dtype), {"selector": selector, "scale": scale}
        got, mask = assert_same_bits(backend, device, weight, factor, pattern, **options)
        assert (got[:, factor.dead] == 0).all()
        assert (bits(got)[~unpack_bits(mask, width)] == 0).all()


@pytest.mark.parametrize(
    "width, pattern", ((12, "3:6"), (96, "16:32"), (144, "5:12"), (129, "1:3"), (129, 0.9))
)
def test_odd_patterns_bit_for_bit(backend, device, width, pattern):
    factor = factor_hessian(correlated_hessian(width))
    for n_rows in (3,) if is_interpreted(backend, device) else (1, 3):
        assert_same_bits(backend, device, edge_weight(n_rows, width, torch.bfloat16), factor, pattern)


@pytest.mark.parametrize("dtype", DTYPES)
def test_only_the_given_slice_changes(backend, device, dtype):
    factor = factor_hessian(correlated_hessian(36))
    whole = random_weight(5, 48, dtype)
    expected = whole.clone()
    expected[1:4, 5:41] = run("torch", device, whole[1:4, 5:41].clone(), factor, "2:4")[0]
    got = whole.to(device)
    factor = Factor(factor.upper.to(device), factor.dead.to(device), factor.dampening)
    wanda_kernels.sparsegpt_(got[1:4, 5:41], factor, "2:4", backend=backend)
    assert torch.equal(bits(got), bits(expected))


@pytest.mark.parametrize("pattern", (0.5, "2:4", "4:8"))
def test_less_error_than_the_same_pattern_without_update(backend, device, pattern):
    """||(W - W') X||^2 over the calibration inputs, compared with Wanda's choice and no update."""
    hessian, weight = correlated_hessian(160, 800), random_weight(16, 160, torch.float32)
    got, _ = run(backend, device, weight, factor_hessian(hessian), pattern)
    wanda = weight.clone()
    if isinstance(pattern, str):
        wanda_kernels.prune_nm_(wanda, hessian.diagonal().clone(), *map(int, pattern.split(":")))
    else:
        wanda_kernels.prune_rows_(wanda, hessian.diagonal().clone(), 80)
    errors = [torch.einsum("oi,ij,oj", weight - pruned, hessian, weight - pruned) for pruned in (got, wanda)]
    assert errors[0] < 0.9 * errors[1]


def test_torchs_default_dtype_does_not_matter(backend, device):
    hessian, weight = correlated_hessian(24), edge_weight(5, 24, torch.float32)
    expected = run(backend, device, weight, factor_hessian(hessian), "2:4")
    torch.set_default_dtype(torch.bfloat16)
    try:
        got = run(backend, device, weight, factor_hessian(hessian), "2:4")
    finally:
        torch.set_default_dtype(torch.float32)
    assert torch.equal(got[0], expected[0]) and torch.equal(got[1], expected[1])


def test_all_inputs_dead(backend, device):
    got, _ = run(backend, device, torch.ones(3, 8), factor_hessian(torch.zeros(8, 8)), "2:4")
    assert (got == 0).all()


def test_empty(backend, device):
    factor = Factor(torch.eye(8, device=device), torch.zeros(8, dtype=torch.bool, device=device), 0.01)
    wanda_kernels.sparsegpt_(torch.empty(0, 8, device=device), factor, 0.5, backend=backend)


WRONG = (
    ({"pattern": 1.0}, r"ratio in \[0, 1\)"),
    ({"pattern": None}, r"ratio in \[0, 1\)"),
    ({"pattern": "2-4"}, "ratio or 'n:m', got '2-4'"),
    ({"pattern": "4:2"}, "1 <= n < m <= 32, got 4:2"),
    ({"pattern": "2:5"}, "in_features = 8 is not a multiple of m = 5"),
    ({"selector": "random"}, "unknown selector 'random': choose obs, wanda, magnitude"),
    ({"selector": "wanda"}, r"needs a scale \[in\], got none"),
    ({"selector": "wanda", "scale": torch.ones(2, 8)}, r"needs a scale \[in\], got \[2, 8\]"),
    ({"pruned": torch.zeros(2, 8)}, r"pruned must be bool \[2, 8\]"),
    ({"pruned": torch.zeros(2, 9, dtype=torch.bool)}, r"got torch.bool \[2, 9\]"),
    ({"pruned": torch.zeros(8, 2, dtype=torch.bool).t()}, "pruned's rows must be contiguous"),
    (
        {"factor": Factor(torch.eye(7), torch.zeros(8, dtype=torch.bool), 0.01)},
        r"float32 \[8, 8\], got .*\[7, 7\]",
    ),
    ({"factor": Factor(torch.eye(8), torch.zeros(7, dtype=torch.bool), 0.01)}, r"bool \[8\], got .*\[7\]"),
    (
        {"weight": torch.full((2, 8), float("nan"))},
        r"weight holds nan at \[0, 0\]; this weight was not changed",
    ),
)


@pytest.mark.parametrize("wrong, sentence", WRONG)
def test_refuses_wrong_operands(wrong, sentence):
    arguments = {
        "weight": torch.ones(2, 8),
        "factor": Factor(torch.eye(8), torch.zeros(8, dtype=torch.bool), 0.01),
        "pattern": "2:4",
    } | wrong
    before = arguments["weight"].clone()
    with pytest.raises(ValueError, match=sentence):
        wanda_kernels.sparsegpt_(**arguments)
    assert torch.equal(bits(arguments["weight"]), bits(before))

"""The CPU library's statistics against fp64, and its checks for NaN, infinity and zeros."""

import pytest
import torch

import wanda_kernels
from tests.wanda_kernels.native_cases import DTYPES, ISAS, needs_cpu
from wanda_kernels import reference
from wanda_kernels.native import ops as native
from wanda_kernels.native.library import cpu_isa, native_op

pytestmark = needs_cpu
SUM_TOLERANCE = 2e-5  # 256 fp32 additions of squares, each off by 2^-24 at most, then fp64
PRODUCT_TOLERANCE = 2e-5  # fp32 matmul over tokens; the activations are good to 1e-6
BF16_TOLERANCE = 2**-7  # two operands rounded to 8 bits


@pytest.fixture(params=ISAS)
def isa(request, monkeypatch):
    monkeypatch.setenv("WANDA_KERNELS_CPU_ISA", request.param)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(1, 1), (3, 7), (513, 129), (1000, 576), (2, 300, 64), (260, 2050)])
def test_sq_norm(isa, shape, dtype):
    x = torch.randn(shape).to(dtype)
    acc = torch.rand(shape[-1])
    expected = acc.double() + x.double().square().flatten(0, -2).sum(0)
    native.add_sq_norm_(acc, x)
    torch.testing.assert_close(acc.double(), expected, rtol=SUM_TOLERANCE, atol=0)


def test_sq_norm_is_the_same_for_any_threads_and_layout(isa):
    wide = torch.randn(700, 1300).bfloat16()
    x = wide[:, 5:1205]
    sums = []
    threads = torch.get_num_threads()
    try:
        for n_threads in (1, 2, 7):
            torch.set_num_threads(n_threads)
            acc = torch.zeros(1200)
            native.add_sq_norm_(acc, x if n_threads == 1 else x.contiguous())
            sums.append(acc)
    finally:
        torch.set_num_threads(threads)
    assert torch.equal(sums[0], sums[1]) and torch.equal(sums[0], sums[2])


@pytest.mark.parametrize("n_cols", [5, 1100])
def test_sq_norm_of_128_segments(isa, n_cols):
    """Threads share experts of at most three tokens, and the columns of one that has most of them."""
    counts = torch.randint(0, 4, (128,), generator=torch.Generator().manual_seed(0))
    counts[77] = 900
    offsets = torch.cat([torch.zeros(1, dtype=torch.int64), counts.cumsum(0)])
    x = torch.randn(int(offsets[-1]), n_cols).bfloat16()
    expected = torch.zeros(128, n_cols, dtype=torch.float64)
    expected.index_add_(0, torch.arange(128).repeat_interleave(counts), x.double().square())
    sums, threads = [], torch.get_num_threads()
    try:
        for n_threads in (1, 3, 7):
            torch.set_num_threads(n_threads)
            sums.append(torch.zeros(128, n_cols))
            native.add_sq_norm_(sums[-1], x, offsets)
    finally:
        torch.set_num_threads(threads)
    torch.testing.assert_close(sums[0].double(), expected, rtol=SUM_TOLERANCE, atol=0)
    assert torch.equal(sums[0], sums[1]) and torch.equal(sums[0], sums[2])


@pytest.mark.parametrize("offsets", [[0, 5, 3], [-1, 3, 5], [0, 3, 6], []])
def test_segments_outside_of_x_are_refused(isa, offsets):
    acc = torch.zeros(max(len(offsets) - 1, 0), 4)
    with pytest.raises(RuntimeError, match="offsets must"):
        native.add_sq_norm_(acc, torch.ones(5, 4), torch.tensor(offsets, dtype=torch.int64))
    assert not acc.any()


def test_sq_norm_carries_infinity_and_nan(isa):
    x = torch.ones(9, 40)
    x[3, 7], x[8, 39] = float("inf"), float("nan")
    acc = torch.zeros(40)
    native.add_sq_norm_(acc, x)
    assert acc[7] == float("inf") and acc[39].isnan() and (acc[8:39] == 9).all()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("activation", list(reference.ACTIVATIONS))
@pytest.mark.parametrize("power", [1, 2])
def test_coactivation(isa, activation, power, dtype):
    gate, x = 3 * torch.randn(2, 601, 37), torch.randn(2, 601, 53)  # two blocks of tokens
    gate, x = gate.to(dtype), x.to(dtype)
    acc, sq_norm = torch.rand(37, 53), torch.rand(53)
    expected = acc.double(), sq_norm.double()
    gate64, x64 = reference.ACTIVATIONS[activation](gate.double()).flatten(0, 1), x.double().flatten(0, 1)
    expected[0].addmm_(gate64.abs().pow(power).t(), x64.abs().pow(power))
    expected[1].add_(x64.square().sum(0))
    native.add_coactivation_(acc, gate, x, activation, power, sq_norm)
    in_bf16 = dtype == torch.bfloat16 and "bf16" in native.products()
    tolerance = BF16_TOLERANCE if in_bf16 else PRODUCT_TOLERANCE
    torch.testing.assert_close(acc.double(), expected[0], rtol=tolerance, atol=0)
    torch.testing.assert_close(sq_norm.double(), expected[1], rtol=SUM_TOLERANCE, atol=0)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("activation", list(reference.ACTIVATIONS))
def test_gated_coactivation(isa, activation, dtype):
    gate, up, x = 3 * torch.randn(2, 601, 37), torch.randn(2, 601, 37), torch.randn(2, 601, 53)
    gate, up, x = gate.to(dtype), up.to(dtype), x.to(dtype)
    accs, sq_norm = torch.rand(2, 37, 53), torch.rand(53)
    expected = accs.double(), sq_norm.double()
    values = gate.double().flatten(0, 1).requires_grad_()
    activated = reference.ACTIVATIONS[activation](values)
    (effects,) = torch.autograd.grad(activated, values, up.double().flatten(0, 1))
    squares = x.double().flatten(0, 1).square()
    expected[0][0].addmm_(effects.square().t(), squares)
    expected[0][1].addmm_(activated.detach().square().t(), squares)
    expected[1].add_(squares.sum(0))
    native.add_gated_coactivation_(*accs, gate, up, x, activation, sq_norm)
    in_bf16 = dtype == torch.bfloat16 and "bf16" in native.products()
    tolerance = BF16_TOLERANCE if in_bf16 else PRODUCT_TOLERANCE
    torch.testing.assert_close(accs.double(), expected[0], rtol=tolerance, atol=0)
    torch.testing.assert_close(sq_norm.double(), expected[1], rtol=SUM_TOLERANCE, atol=0)


def test_only_the_widest_instruction_set_multiplies_in_bf16(isa):
    assert "bf16" not in native.squares() or cpu_isa() == "avx512"
    assert not native.products() or cpu_isa() == "avx512"
    assert not native.squares() or cpu_isa() != "portable"
    assert set(native.products()) <= set(native.squares())


def require(operands, own):
    if operands not in own:
        pytest.skip(f"the library leaves {operands} products to torch here")


@pytest.mark.parametrize("operands", ["bf16", "fp32"])
@pytest.mark.parametrize("shape", [(1, 1, 1), (2, 4, 16), (7, 5, 97), (33, 16, 96), (513, 37, 53)])
def test_product_over_tokens(isa, shape, operands):
    """Only the fp32 sums round (and bf16, its operands). The threads change no bit."""
    require(operands, native.products())
    n_tokens, n_out, n_in = shape
    a, b = torch.randn(n_tokens, 2 * n_out).square(), torch.randn(n_tokens, n_in + 3).square()[:, 1:-2]
    a = a[:, n_out:]
    a[0, 0], b[-1, -1] = 1e30, 1e-30
    before = torch.rand(n_out, n_in)
    rounded = (lambda x: x.bfloat16()) if operands == "bf16" else lambda x: x
    expected = before + rounded(a).double().t() @ rounded(b).double()
    around = torch.full((2, n_out + 2, n_in + 8), -7.0)  # acc is a view of a larger matrix
    threads = torch.get_num_threads()
    try:
        for n_threads, matrix in zip((1, 2), around, strict=True):
            torch.set_num_threads(n_threads)
            acc = matrix[1:-1, 4:-4].copy_(before)
            native_op("native_add_product_")(acc, a, b, operands == "bf16")
            torch.testing.assert_close(acc.double(), expected, rtol=PRODUCT_TOLERANCE, atol=0)
    finally:
        torch.set_num_threads(threads)
    assert torch.equal(*around)
    around[:, 1:-1, 4:-4] = -7
    assert (around == -7).all()


@pytest.mark.parametrize("operands", ["bf16", "fp32"])
def test_product_over_tokens_carries_infinity_and_nan(isa, operands):
    require(operands, native.products())
    a, b = torch.ones(5, 20), torch.ones(5, 40)
    a[3, 18], b[4, 39] = float("inf"), float("nan")
    acc = torch.zeros(20, 40)
    native_op("native_add_product_")(acc, a, b, operands == "bf16")
    assert (acc[18, :39] == float("inf")).all() and acc[:, 39].isnan().all()
    assert (acc[:18, :39] == 5).all() and (acc[19, :39] == 5).all()


@pytest.mark.parametrize("activation", ["silu", "gelu", "gelu_tanh", "relu"])
def test_activations_far_out(isa, activation):
    x = torch.cat([torch.linspace(-90, 90, 4001), torch.tensor([0.0, -0.0, 1e-30, -1e30, 1e30])])[None]
    expected = reference.ACTIVATIONS[activation](x.double()).abs()
    got = native._activated(x, activation, 1).double()
    # An absolute tolerance too: below it GELU's fp64 formulas cancel, and such terms vanish in every sum.
    torch.testing.assert_close(got, expected, rtol=2e-5, atol=1e-15)


@pytest.mark.parametrize("dtype", DTYPES)
def test_finiteness(isa, dtype):
    for shape in ((1, 1), (37, 129), (300, 257)):
        x = torch.randn(shape).to(dtype)
        x[0, 0] = torch.finfo(dtype).max
        assert native.all_finite(x, False)
        for bad in (float("inf"), -float("inf"), float("nan")):
            broken = x.clone()
            broken[-1, -1] = bad
            assert not native.all_finite(broken, False)
    assert native.all_finite(torch.tensor([0.0, -0.0, 1.0], dtype=dtype), True)
    smallest = torch.tensor([1], dtype=torch.int16 if dtype != torch.float32 else torch.int32).view(dtype)
    assert native.all_finite(-smallest, False) and not native.all_finite(-smallest, True)


@pytest.mark.parametrize("dtype", DTYPES)
def test_zeros_of_both_signs_are_counted(isa, dtype):
    for shape in ((1, 1), (37, 129), (300, 257)):
        generator = torch.Generator().manual_seed(7)
        x = torch.randint(0, 4, (shape[0], shape[1] + 5), generator=generator).to(dtype)[:, 2:-3]
        x[x == 1] = -0.0
        x[x == 2] = torch.finfo(dtype).smallest_normal / 2  # subnormal, not zero
        x[x == 3] = float("nan")
        counted = sum(value == 0 for value in x.flatten().tolist())
        assert native.count_zeros(x) == counted == wanda_kernels.count_zeros(x)
    assert wanda_kernels.count_zeros(torch.zeros(0, 4, dtype=dtype)) == 0


@pytest.mark.parametrize("n", [1, 15, 16, 17, 70, 257])
def test_mirror(isa, n):
    """The lower triangle is overwritten. Columns outside of the view stay as they are."""
    whole = torch.randn(n, n + 3, generator=torch.Generator().manual_seed(n))
    expected = whole[:, 2 : n + 2].triu() + whole[:, 2 : n + 2].triu(1).t()
    beside = whole[:, :2].clone(), whole[:, n + 2 :].clone()
    native_op("native_mirror_")(whole[:, 2 : n + 2])
    assert torch.equal(whole[:, 2 : n + 2], expected)
    assert torch.equal(whole[:, :2], beside[0]) and torch.equal(whole[:, n + 2 :], beside[1])


@pytest.mark.parametrize("operands", ["bf16", "fp32"])
@pytest.mark.parametrize("shape", [(1, 1), (5, 16), (33, 17), (70, 130), (130, 333)])
def test_square_over_tokens(isa, shape, operands):
    """Checks the upper triangle, whose bits must not depend on the number of threads."""
    require(operands, native.squares())
    x = torch.randn(shape)
    before, sums = torch.rand(shape[1], shape[1]), []
    rounded = x.bfloat16() if operands == "bf16" else x
    threads = torch.get_num_threads()
    try:
        for n_threads in (1, 2, 7):
            torch.set_num_threads(n_threads)
            sums.append(before.clone())
            native_op("native_add_square_")(sums[-1], x, operands == "bf16")
    finally:
        torch.set_num_threads(threads)
    x = rounded.double()
    off = (sums[0].double() - (before + x.t() @ x)).abs()
    # Each token rounds by at most 2^-24 of the sum, up or down. The bound is twice such a random walk.
    bound = 2 * len(x) ** 0.5 * 2**-24 * (before + x.abs().t() @ x.abs())
    assert (off.triu() <= bound).all()
    assert torch.equal(sums[0].triu(), sums[1].triu()) and torch.equal(sums[0].triu(), sums[2].triu())


@pytest.mark.parametrize("operands", ["bf16", "fp32"])
def test_square_over_tokens_carries_infinity_and_nan(isa, operands):
    require(operands, native.squares())
    x = torch.ones(5, 70)
    x[3, 60], x[4, 69] = float("inf"), float("nan")
    acc = torch.zeros(70, 70)
    native_op("native_add_square_")(acc, x, operands == "bf16")
    assert (acc[:61, 60] == float("inf")).all() and acc[:, 69].isnan().all()
    assert (acc[:60, :60].triu() == torch.full((60, 60), 5.0).triu()).all()

"""packed_linear against products in fp64, on every backend."""

from functools import partial

import pytest
import torch

import wanda_kernels
from tests.wanda_kernels.cases import DTYPES, bits
from tests.wanda_kernels.packed_cases import on, settings, weight_of
from wanda_kernels import PackedRows

# The rounding of a result.
HALF_STEP = {torch.float32: 2.0**-24, torch.float16: 2.0**-11, torch.bfloat16: 2.0**-8}


@pytest.fixture(params=settings("packed_linear"))
def backend(request, monkeypatch):
    name, isa = request.param
    monkeypatch.setenv("WANDA_KERNELS_CPU_ISA", isa)
    return name


def finite_weight(shape, dtype, kept_of_row=None, seed=0):
    return weight_of(shape, torch.float32, kept_of_row, seed).nan_to_num(1.0, 2.0, -3.0).to(dtype)


def random_x(n_rows, n_cols, dtype, seed=1):
    return torch.randn(n_rows, n_cols, generator=torch.Generator().manual_seed(seed)).to(dtype)


def product(x, packed, bias, backend, device):
    bias = None if bias is None else bias.to(device)
    return wanda_kernels.packed_linear(x.to(device), on(device, packed), bias, backend=backend).cpu()


@pytest.fixture
def assert_right(backend, device):
    """Within the bound of a sum in fp32 in any order, rounded once; Triton's interpreter truncates bf16."""
    return partial(assert_close, half_steps=2.0 if backend == "triton" and device == "cpu" else 1.0)


def assert_close(got, x, weight, bias=None, half_steps=1.0):
    exact, size = x.double() @ weight.double().t(), x.double().abs() @ weight.double().abs().t()
    if bias is not None:
        exact, size = exact + bias.double(), size + bias.double().abs()
    tiny = torch.finfo(x.dtype).smallest_normal
    bound = (x.shape[-1] + 2) * 2.0**-24 * size + half_steps * HALF_STEP[x.dtype] * exact.abs() + tiny
    assert got.dtype == x.dtype and got.shape == exact.shape
    assert ((got.double() - exact).abs() <= bound).all()


@pytest.mark.parametrize("dtype", DTYPES)
def test_odd_sizes(assert_right, backend, device, dtype):
    for n_rows, n_cols in ((1, 1), (2, 7), (3, 8), (4, 63), (5, 64), (6, 65), (8, 137)):
        weight, x = finite_weight((9, n_cols), dtype), random_x(n_rows, n_cols, dtype)
        bias = random_x(1, 9, dtype)[0]
        assert_right(product(x, wanda_kernels.pack_rows(weight), bias, backend, device), x, weight, bias)


@pytest.mark.gpu
def test_more_rows_than_a_grid_has_in_its_second_axis():
    weight, x = finite_weight((262_148, 8), torch.float16), random_x(2, 8, torch.float16)
    got = product(x, wanda_kernels.pack_rows(weight), None, "triton", "cuda")
    assert_close(got, x, weight)


def test_the_same_bits_with_and_without_gradients(backend, device):
    """On a CPU, calls without gradients take another way to the kernel."""
    for n_cols, kept in ((72, None), (137, [0, 137, 60])):
        weight, x = finite_weight((3, n_cols), torch.float32, kept), random_x(2, n_cols, torch.float32)
        packed, bias = wanda_kernels.pack_rows(weight), random_x(1, 3, torch.float32)[0]
        recorded = product(x.requires_grad_(), packed, bias, backend, device)
        with torch.no_grad():
            assert torch.equal(product(x, packed, bias, backend, device), recorded)
        assert not recorded.requires_grad


def test_a_hundred_thousand_rows(assert_right, backend, device):
    """The first row of each product is checked; 8 rows of x at once have their own tests."""
    n_rows = 60 if backend == "triton" and device == "cpu" else 33_334
    for dtype in DTYPES:
        weight, x = finite_weight((n_rows, 72), dtype), random_x(1, 72, dtype)
        assert_right(product(x, wanda_kernels.pack_rows(weight), None, backend, device), x, weight)


@pytest.mark.parametrize("dtype", DTYPES)
def test_uneven_empty_and_full_rows(assert_right, backend, device, dtype):
    counts = [0, 200, 1, 100, 0, 200, 37, 0]
    weight, x = finite_weight((8, 200), dtype, counts), random_x(3, 200, dtype)
    packed = wanda_kernels.pack_rows(weight)
    assert packed.offsets is not None
    assert_right(product(x, packed, None, backend, device), x, weight)
    band = PackedRows(packed.bits[2:7], packed.values, packed.offsets[2:8])
    assert_right(product(x, band, None, backend, device), x, weight[2:7])
    for full in (torch.zeros(3, 200, dtype=dtype), torch.ones(3, 200, dtype=dtype)):
        assert_right(product(x, wanda_kernels.pack_rows(full), None, backend, device), x, full)


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_pruned_weight_contributes_nothing(backend, device, dtype):
    weight = finite_weight((5, 41), dtype, [20, 0, 41, 1, 20])
    x = random_x(4, 41, dtype)
    expected = product(x, wanda_kernels.pack_rows(weight), None, backend, device)
    pruned = (weight == 0) & ~weight.signbit()
    for row, value in ((1, torch.inf), (2, -torch.inf), (3, torch.nan)):
        for column in (3, 40):
            bad = x.clone()
            bad[row, column] = value
            got = product(bad, wanda_kernels.pack_rows(weight), None, backend, device)
            keeps = pruned[:, column]
            assert torch.equal(bits(got[:, keeps]), bits(expected[:, keeps]))
            assert not got[row, ~keeps].isfinite().any()
            others = [each for each in range(4) if each != row]
            assert torch.equal(bits(got[others]), bits(expected[others]))


@pytest.mark.parametrize("dtype", DTYPES)
def test_special_values(backend, device, dtype):
    """-0.0 and zeros have a product; infinities and NaN spread within their row alone."""
    weight, x = torch.ones(5, 19, dtype=dtype), torch.ones(2, 19, dtype=dtype)
    weight[1, 4], weight[2, 18], weight[3, 0] = torch.inf, torch.nan, -0.0
    weight[4] = -0.0
    x[1, 0] = torch.inf
    got = product(x, wanda_kernels.pack_rows(weight), None, backend, device)
    assert got[0, :2].tolist() == [19.0, torch.inf] and got[0, 2].isnan()
    assert got[0, 3:].tolist() == [18.0, 0.0]
    assert got[1, :2].tolist() == [torch.inf, torch.inf] and got[1, 2:].isnan().all()


@pytest.mark.parametrize("dtype", DTYPES)
def test_rows_of_x_do_not_change_each_other(backend, device, dtype):
    # not all in whole blocks; Triton's interpreter is slow
    n_rows = 4 if backend == "triton" else 11
    weight, x = finite_weight((n_rows, 100), dtype), random_x(8, 100, dtype)
    packed, bias = wanda_kernels.pack_rows(weight), random_x(1, n_rows, dtype)[0]
    alone = torch.cat([product(row[None], packed, bias, backend, device) for row in x])
    for n_x in range(2, 9):
        got = product(x[:n_x], packed, bias, backend, device)
        assert torch.equal(bits(got), bits(alone[:n_x]))


def test_threads_change_no_bits(backend, device):
    weight, x = finite_weight((700, 200), torch.bfloat16), random_x(3, 200, torch.bfloat16)
    if backend == "triton":
        weight = weight[:20]
    packed, before = wanda_kernels.pack_rows(weight), torch.get_num_threads()
    try:
        results = []
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            results.append(product(x, packed, None, backend, device))
    finally:
        torch.set_num_threads(before)
    assert all(torch.equal(bits(each), bits(results[0])) for each in results)


def test_any_dimensions_and_strides_of_x(assert_right, backend, device):
    weight, x = finite_weight((6, 24), torch.float32), random_x(6, 48, torch.float32)
    packed = wanda_kernels.pack_rows(weight)
    for view in (
        x[:, ::2],
        x[0, :24],
        x[:, 24:].view(3, 2, 24).transpose(0, 1),
        x[:4].view(2, 1, 2, 48)[..., 3:27],
    ):
        got = product(view, packed, None, backend, device)
        assert_right(got.reshape(-1, 6), view.reshape(-1, 24), weight)
        assert got.shape == (*view.shape[:-1], 6) and got.is_contiguous()


def test_nothing(backend, device):
    packed = wanda_kernels.pack_rows(torch.zeros(3, 16))
    assert product(torch.ones(2, 16), packed, None, backend, device).tolist() == [[0.0] * 3] * 2
    assert product(torch.ones(0, 16), packed, None, backend, device).shape == (0, 3)
    bias = torch.tensor([1.0, 2.0, 3.0])
    no_columns = wanda_kernels.pack_rows(torch.zeros(3, 0))
    assert product(torch.ones(2, 0), no_columns, bias, backend, device).tolist() == [[1.0, 2.0, 3.0]] * 2
    no_rows = wanda_kernels.pack_rows(torch.zeros(0, 16))
    assert product(torch.ones(2, 16), no_rows, None, backend, device).shape == (2, 0)


def test_bad_operands():
    packed = wanda_kernels.pack_rows(finite_weight((3, 16), torch.float32))
    x = torch.ones(2, 16)

    def refused(sentence, x=x, packed=packed, bias=None):
        with pytest.raises(ValueError) as error:
            wanda_kernels.packed_linear(x, packed, bias)
        assert str(error.value) == sentence

    refused("x must have at most 8 rows, got 9 in [3, 3, 16]", torch.ones(3, 3, 16))
    refused("values must have x's dtype, got torch.float32 and torch.float16", x.half())
    refused("bits must have 3 bytes a row for 17 columns, got shape [3, 2]", torch.ones(2, 17))
    stack = wanda_kernels.pack_rows(torch.ones(2, 3, 16))
    refused("packed must be one weight, with bits [out, bytes], got shape [2, 3, 2]", packed=stack)
    refused("bias must be torch.float32 [3], got torch.float32 [2]", bias=torch.ones(2))
    refused("bias must be torch.float32 [3], got torch.float16 [3]", bias=torch.ones(3).half())
    refused("bias is on meta, the first operand on cpu", bias=torch.ones(3, device="meta"))
    needed = "bits, values and offsets must be on meta, the first operand's, got cpu, cpu"
    refused(needed, x.to("meta"))
    got = "got torch.float64 [2, 16]"
    refused(f"x must be [..., features] in float32, float16 or bfloat16, {got}", x.double())


def test_compiled_without_a_graph_break():
    weight, x = finite_weight((5, 33), torch.bfloat16), random_x(2, 33, torch.bfloat16)
    packed = wanda_kernels.pack_rows(weight)

    def run(x):
        return wanda_kernels.packed_linear(x, packed).relu() + wanda_kernels.unpack_rows(packed, 33).sum()

    compiled = torch.compile(run, fullgraph=True, backend="aot_eager")
    assert torch.equal(compiled(x), run(x))

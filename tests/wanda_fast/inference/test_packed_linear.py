"""`PackedLinear` against the dense linear: any number of rows, bias, odd widths, uneven rows, dtypes."""

import re

import pytest
import torch
from torch import nn

import wanda_kernels
from wanda_fast.errors import PackedModelError
from wanda_fast.inference import packed_linear
from wanda_fast.inference.packed_linear import PackedLinear
from wanda_kernels import pack_rows

# One band has 2 MiB: bands of 5 rows of 203 columns make several here, and a last one of 4 rows.
BAND = 5 * 203 * 4
ROWS = (1, 8, 9, 300)
# fp32 sums of 203 products of either order; 16-bit results are rounded once.
TOLERANCE = {torch.float32: 2e-6, torch.bfloat16: 2**-8, torch.float16: 2**-11}


def dense_linear(out=24, columns=203, bias=True, dtype=torch.float32, uneven=False, seed=0):
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        linear = nn.Linear(columns, out, bias=bias).to(dtype).requires_grad_(False)
        scores = torch.rand(out, columns)
    ranks = scores.argsort(1).argsort(1)
    linear.weight[scores < 0.6 if uneven else ranks < columns // 2] = 0
    if uneven:
        linear.weight[3] = 0
    return linear


def packed_of(linear):
    return PackedLinear(wanda_kernels.pack_rows(linear.weight), linear.in_features, linear.bias)


def inputs(*shape, dtype=torch.float32):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(1)).to(dtype)


@pytest.mark.parametrize("rows", ROWS)
@pytest.mark.parametrize("uneven", [False, True])
@pytest.mark.parametrize("dtype", list(TOLERANCE), ids=str)
def test_product_is_that_of_the_dense_linear(rows, uneven, dtype, monkeypatch):
    monkeypatch.setitem(packed_linear.BAND_BYTES, "cpu", BAND)
    linear = dense_linear(dtype=dtype, uneven=uneven)
    packed = packed_of(linear)
    assert (packed.offsets is not None) == uneven
    x = inputs(rows, 203, dtype=dtype)
    exact = x.double() @ linear.weight.double().T + linear.bias.double()
    # What a sum of the absolute values bounds, not the result: it may cancel.
    size = x.double().abs() @ linear.weight.double().abs().T + linear.bias.double().abs()
    got = packed(x)
    assert got.dtype == dtype and got.shape == (rows, 24)
    assert ((got.double() - exact).abs() <= TOLERANCE[dtype] * size).all()


@pytest.mark.parametrize("shape", [(203,), (2, 3, 203), (2, 150, 203), (0, 203)])
def test_input_of_any_number_of_dimensions(shape):
    linear = dense_linear(bias=False)
    x = inputs(*shape)
    got = packed_of(linear)(x)
    assert got.shape == (*shape[:-1], 24)
    torch.testing.assert_close(got, linear(x), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("rows", [1, 20])
def test_input_that_does_not_fit(rows):
    weight = torch.randn(4, 16)
    packed = PackedLinear(pack_rows(weight), 16)
    for x, got in (
        (torch.randn(rows, 13), f"got torch.float32 [{rows}, 13]"),
        (torch.randn(rows, 16).bfloat16(), f"got torch.bfloat16 [{rows}, 16]"),
    ):
        with pytest.raises(ValueError, match=re.escape(f"x must be torch.float32 [..., 16], {got}")):
            packed(x)


def test_strided_input():
    linear = dense_linear()
    x = inputs(203, 40).T
    torch.testing.assert_close(packed_of(linear)(x), linear(x), rtol=1e-5, atol=1e-5)


def test_weight_has_the_same_bytes():
    linear = dense_linear(dtype=torch.bfloat16, uneven=True)
    assert torch.equal(packed_of(linear).weight, linear.weight)


def test_only_one_band_of_the_weight_is_dense(monkeypatch):
    monkeypatch.setitem(packed_linear.BAND_BYTES, "cpu", BAND)
    heights = []
    unpack = packed_linear.unpack_rows

    def recorded(packed, *args, **kwargs):
        heights.append(len(packed.bits))
        return unpack(packed, *args, **kwargs)

    monkeypatch.setattr(packed_linear, "unpack_rows", recorded)
    packed_of(dense_linear())(inputs(9, 203))
    assert heights == [5, 5, 5, 5, 4]


def test_to_another_dtype():
    linear = dense_linear()
    packed = packed_of(linear).to(torch.bfloat16)
    assert packed.values.dtype == torch.bfloat16 and packed.bits.dtype == torch.uint8
    assert torch.equal(packed.weight, linear.weight.bfloat16())


def test_repr_says_what_is_kept():
    assert repr(packed_of(dense_linear(columns=200))) == (
        "PackedLinear(in_features=200, out_features=24, bias=True, kept=0.50, dtype=torch.float32)"
    )


def test_compiled_without_a_break_and_for_any_number_of_rows():
    linear = dense_linear()
    packed = packed_of(linear)
    compiled = torch.compile(packed, fullgraph=True, backend="aot_eager", dynamic=True)
    for rows in (2, 9):
        assert torch.equal(compiled(inputs(rows, 203)), packed(inputs(rows, 203)))


def test_operation_is_registered_with_a_fake():
    linear = dense_linear(uneven=True)
    args = (inputs(2, 203), *packed_of(linear).packed, linear.bias)
    torch.library.opcheck(torch.ops.wanda_fast.packed_product.default, args)


def test_no_gradient_passes_through():
    x = inputs(3, 203).requires_grad_()
    with pytest.raises(PackedModelError, match="cannot be trained.*dequantize"):
        packed_of(dense_linear())(x).sum().backward()


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")
@pytest.mark.parametrize("uneven", [False, True])
@pytest.mark.parametrize("rows", ROWS)
def test_on_a_gpu(rows, uneven, monkeypatch):
    monkeypatch.setitem(packed_linear.BAND_BYTES, "cuda", BAND)
    linear = dense_linear(dtype=torch.bfloat16, uneven=uneven).cuda()
    x = inputs(rows, 203, dtype=torch.bfloat16).cuda()
    torch.testing.assert_close(packed_of(linear)(x), linear(x), rtol=2**-7, atol=2**-6)

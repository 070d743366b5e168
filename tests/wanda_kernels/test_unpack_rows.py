"""unpack_rows gives back the bits that pack_rows took, on every backend."""

import pytest
import torch

import wanda_kernels
from tests.wanda_kernels.cases import bits
from tests.wanda_kernels.packed_cases import on, settings, weight_of
from wanda_kernels import PackedRows

DTYPES = (torch.float32, torch.float16, torch.bfloat16, torch.float64, torch.float8_e4m3fn)
WIDTHS = (1, 7, 8, 9, 63, 64, 65, 200)


@pytest.fixture(params=settings("unpack_rows"))
def backend(request, monkeypatch):
    name, isa = request.param
    monkeypatch.setenv("WANDA_KERNELS_CPU_ISA", isa)
    return name


def unpacked(packed, n_cols, backend, device, out=None):
    return wanda_kernels.unpack_rows(on(device, packed), n_cols, out=out, backend=backend)


def raw(tensor):
    return tensor.cpu().contiguous().view(torch.uint8)


@pytest.mark.parametrize("dtype", DTYPES)
def test_gives_the_same_bits(backend, device, dtype):
    for n_cols in WIDTHS:
        weight = weight_of((5, n_cols), dtype)
        got = unpacked(wanda_kernels.pack_rows(weight), n_cols, backend, device)
        assert got.dtype == dtype and torch.equal(raw(got), raw(weight)), n_cols


@pytest.mark.parametrize("n_cols", [9, 64, 257])
def test_uneven_rows(backend, device, n_cols):
    weight = weight_of((6, n_cols), torch.bfloat16, [0, n_cols, 1, n_cols // 2, 0, n_cols])
    packed = wanda_kernels.pack_rows(weight)
    assert packed.offsets is not None
    assert torch.equal(bits(unpacked(packed, n_cols, backend, device)), bits(weight))
    band = PackedRows(packed.bits[1:4], packed.values, packed.offsets[1:5])
    assert torch.equal(bits(unpacked(band, n_cols, backend, device)), bits(weight[1:4]))


@pytest.mark.parametrize("kept", [None, [0, 20, 3, 7, 20, 1] * 2])
def test_stacks_into_memory_of_the_caller(backend, device, kept):
    weight = weight_of((12, 20), torch.float16, kept).view(3, 4, 20)
    around = torch.full((5, 4, 20), 7.0, dtype=torch.float16, device=device)
    packed = wanda_kernels.pack_rows(weight)
    assert (packed.offsets is None) == (kept is None)
    assert unpacked(packed, 20, backend, device, out=around[1:4]).data_ptr() == around[1:4].data_ptr()
    assert torch.equal(bits(around[1:4]), bits(weight)) and (around[[0, 4]] == 7.0).all()


@pytest.mark.parametrize("shape", [(0, 8), (3, 0), (2, 0, 5)])
def test_nothing(backend, device, shape):
    packed = wanda_kernels.pack_rows(torch.zeros(shape))
    assert unpacked(packed, shape[-1], backend, device).shape == shape


def test_rows_of_zeros_alone(backend, device):
    packed = wanda_kernels.pack_rows(torch.zeros(3, 70))
    assert packed.values.numel() == 0
    out = torch.full((3, 70), 7.0, device=device)
    assert not unpacked(packed, 70, backend, device, out=out).any()


def refused(sentence, packed, n_cols=16, **named):
    with pytest.raises(ValueError) as error:
        wanda_kernels.unpack_rows(packed, n_cols, **named)
    assert str(error.value) == sentence


def test_bad_operands():
    packed = wanda_kernels.pack_rows(weight_of((3, 16), torch.float32))
    uneven = wanda_kernels.pack_rows(weight_of((3, 160), torch.float32, [0, 160, 1]))
    refused("bits must have 3 bytes a row for 17 columns, got shape [3, 2]", packed, 17)
    shapes = "[out, bytes] or [experts, out, bytes]"
    refused(
        f"bits must be contiguous uint8 {shapes}, got torch.int8 [3, 2]",
        packed._replace(bits=packed.bits.char()),
    )
    refused(
        f"bits must be contiguous uint8 {shapes}, got torch.uint8 [2]", packed._replace(bits=packed.bits[0])
    )
    even = "values must be [3, kept] without offsets, got"
    refused(f"{even} [2, 8] for 16 columns", packed._replace(values=packed.values[:2]))
    refused(f"{even} [3, 17] for 16 columns", packed._replace(values=torch.zeros(3, 17)))
    got = "got torch.float32 [3, 8] with strides [1, 3]"
    strided = packed._replace(values=packed.values.t().contiguous().t())
    refused(f"values must be contiguous elements of 1, 2, 4 or 8 bytes, {got}", strided)
    beside = "values must have 1 dimension beside offsets, got shape [3, 8]"
    refused(beside, packed._replace(offsets=uneven.offsets))
    needed = "offsets must be contiguous int64 [4] for bits [3, 20], got"
    refused(f"{needed} torch.int64 [3]", uneven._replace(offsets=uneven.offsets[:3]), 160)
    refused(f"{needed} torch.int32 [4]", uneven._replace(offsets=uneven.offsets.int()), 160)
    out = torch.zeros(3, 16, dtype=torch.float16)
    refused("out must be contiguous torch.float32 [3, 16], got torch.float16 [3, 16]", packed, out=out)
    refused("out is on meta, the first operand on cpu", packed, out=torch.zeros(3, 16, device="meta"))
    away = packed._replace(values=packed.values.to("meta"))
    refused("values is on meta, the first operand on cpu", away)

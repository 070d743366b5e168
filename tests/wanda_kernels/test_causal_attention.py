"""Causal attention in C++ against a softmax in fp64, and the operands that it must refuse."""

import pytest
import torch

from tests.wanda_kernels.native_cases import ISAS, needs_cpu
from wanda_kernels.native import forward as native_forward

pytestmark = needs_cpu
# The result is rounded to its dtype. In bf16 the softmax's numerators are too, as in torch's own kernel.
TOLERANCE = {torch.float32: 2e-5, torch.bfloat16: 2e-2}
# batch, heads, heads of key and value, tokens, head_dim. Blocks have 64 or 48 queries, chunks 512 keys.
SHAPES = [
    (1, 1, 1, 1, 32),
    (2, 4, 2, 7, 64),
    (1, 3, 1, 64, 96),
    (2, 2, 2, 65, 64),
    (1, 2, 1, 511, 32),
    (1, 1, 1, 1100, 128),
]


@pytest.fixture(params=ISAS)
def isa(request, monkeypatch):
    if request.param not in ISAS:
        pytest.skip(f"this machine runs no {request.param}")
    monkeypatch.setenv("WANDA_KERNELS_CPU_ISA", request.param)


def operands(shape, dtype, size=1.0):
    batch, heads, shared, tokens, head_dim = shape
    generator = torch.Generator().manual_seed(0)
    made = [
        torch.randn(batch, tokens, n, head_dim, generator=generator).mul(size).to(dtype).transpose(1, 2)
        for n in (heads, shared, shared)
    ]
    if not native_forward.attends(*made):
        pytest.skip("no kernel: portable, or bf16 with AVX-512 but without AVX-512-BF16 or with AMX")
    return made


def expected(query, key, value, scale):
    query, key, value = query.double(), key.double(), value.double()
    key, value = (each.repeat_interleave(query.shape[1] // each.shape[1], 1) for each in (key, value))
    scores = query @ key.transpose(2, 3) * scale
    later = torch.ones(scores.shape[-2:], dtype=torch.bool).triu(1)
    return scores.masked_fill(later, float("-inf")).softmax(-1) @ value


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
def test_equals_the_formula(isa, shape, dtype):
    query, key, value = operands(shape, dtype)
    for scale in (None, 0.7):
        found = native_forward.causal_attention(query, key, value, scale)
        assert found.dtype == dtype and found.transpose(1, 2).is_contiguous()
        wanted = expected(query, key, value, shape[-1] ** -0.5 if scale is None else scale)
        torch.testing.assert_close(found.double(), wanted, atol=TOLERANCE[dtype], rtol=TOLERANCE[dtype])


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
def test_large_scores_and_equal_scores(isa, dtype):
    query, key, value = operands((1, 2, 2, 600, 64), dtype, size=8.0)
    wanted = expected(query, key, value, 0.125)
    found = native_forward.causal_attention(query, key, value)
    torch.testing.assert_close(found.double(), wanted, atol=50 * TOLERANCE[dtype], rtol=TOLERANCE[dtype])
    mean = native_forward.causal_attention(torch.zeros_like(query), key, value)
    sums = value.double().cumsum(2) / torch.arange(1, 601).view(-1, 1)
    torch.testing.assert_close(mean.double(), sums, atol=50 * TOLERANCE[dtype], rtol=TOLERANCE[dtype])


def test_a_later_token_changes_nothing_before_it(isa):
    query, key, value = operands((1, 2, 1, 130, 64), torch.float32)
    before = native_forward.causal_attention(query, key, value)
    key[:, :, 100:], value[:, :, 100:] = float("inf"), float("nan")
    assert torch.equal(native_forward.causal_attention(query, key, value)[:, :, :64], before[:, :, :64])


def test_threads_and_batches_change_no_bit(isa):
    query, key, value = operands((3, 4, 2, 150, 64), torch.float32)
    whole = native_forward.causal_attention(query, key, value)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    parts = [
        native_forward.causal_attention(*(each[i : i + 1] for each in (query, key, value))) for i in range(3)
    ]
    torch.set_num_threads(threads)
    assert torch.equal(torch.cat(parts), whole)


def test_what_it_leaves_to_torch(isa):
    query, key, value = operands((1, 4, 2, 8, 64), torch.float32)
    refused = [
        (query, key[:, :, :6], value[:, :, :6]),  # a cache
        (query.half(), key.half(), value.half()),
        (query[..., :40], key[..., :40], value[..., :40]),
        (query[:, :3], key, value),  # three heads on two
        (query.transpose(2, 3), key.transpose(2, 3), value.transpose(2, 3)),
        (query[:, :, :0], key[:, :, :0], value[:, :, :0]),
        (query, key.bfloat16(), value.bfloat16()),
    ]
    assert not any(native_forward.attends(*each) for each in refused)


def test_the_portable_kernels_have_none(monkeypatch):
    query = torch.randn(1, 1, 8, 64)
    monkeypatch.setenv("WANDA_KERNELS_CPU_ISA", "portable")
    assert not native_forward.attends(query, query, query)
    if "avx2" in ISAS:
        monkeypatch.setenv("WANDA_KERNELS_CPU_ISA", "avx2")
        assert native_forward.attends(query, query, query)
        assert native_forward.attends(*3 * [query.bfloat16()])


@pytest.mark.parametrize("isa", ["avx2"], indirect=True)
def test_bf16_without_its_instructions_is_rounded_once(isa):
    query, key, value = operands((2, 3, 1, 200, 64), torch.bfloat16)
    found = native_forward.causal_attention(query, key, value, 0.3)
    single = native_forward.causal_attention(query.float(), key.float(), value.float(), 0.3)
    assert torch.equal(found, single.bfloat16())

"""RMSNorm, the gated product, the rotary embedding and products with a weight in C++.

They are compared with formulas in fp64 or with torch's own operations. Operands that they do not take must be
refused."""

import pytest
import torch
import torch.nn.functional as F
from transformers.models.llama.modeling_llama import LlamaRMSNorm, apply_rotary_pos_emb

from tests.wanda_kernels.native_cases import ISAS, needs_cpu
from wanda_kernels import reference
from wanda_kernels.native import forward as native_forward

pytestmark = needs_cpu
DTYPES = (torch.float32, torch.bfloat16)
TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 2e-2}  # bf16: two roundings of 2^-9
SUM_TOLERANCE = 2e-4  # absolute, for fp32 sums of a thousand products that cancel
SHAPES = ((1, 1), (3, 7), (2, 64), (5, 65), (2, 3, 576))


@pytest.fixture(params=ISAS)
def isa(request, monkeypatch):
    monkeypatch.setenv("WANDA_KERNELS_CPU_ISA", request.param)
    return request.param


def pruned(weight: torch.Tensor, kept: int, group: int) -> torch.Tensor:
    """Keep the `kept` largest of every `group` columns. Columns that fill no group become zero."""
    whole = weight.shape[1] // group * group
    groups = weight[:, :whole].reshape(len(weight), -1, group)
    groups.scatter_(2, groups.abs().topk(group - kept, 2, largest=False).indices, 0)
    return torch.cat([groups.flatten(1), torch.zeros_like(weight[:, whole:])], 1)


def require_sparse(x, weight, bias=None):
    if not native_forward.multiplies(x, weight, bias, sparse=True):
        pytest.skip("no sparse product: portable, or AVX-512 without an AMD processor, BF16 and VBMI2")


def require_dense(x, weight, bias=None):
    if not native_forward.multiplies(x, weight, bias, sparse=False):
        pytest.skip("only AVX2 on AMD has a dense product")


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES)
def test_rms_norm(isa, shape, dtype):
    norm, x = LlamaRMSNorm(shape[-1], eps=1e-5).to(dtype), 3 * torch.randn(shape).to(dtype)
    norm.weight.data.normal_()
    found = native_forward.rms_norm(x, norm.weight.data, norm.variance_epsilon)
    wanted = norm(x).detach()
    torch.testing.assert_close(found, wanted, rtol=TOLERANCE[dtype], atol=0)
    # fp32 sums may differ in their last bit, which few bf16 results show. A missing rounding shows in many.
    if dtype == torch.bfloat16:
        assert (found != wanted).float().mean() < 0.1


@pytest.mark.parametrize("dtype", DTYPES)
def test_rms_norm_of_zeros_and_of_what_overflows(isa, dtype):
    x = torch.zeros(3, 40, dtype=dtype)
    x[1], x[2, 3] = 3e38, float("nan")
    found = native_forward.rms_norm(x, torch.ones(40, dtype=dtype), 1e-6)
    assert (found[:2] == 0).all() and found[2].isnan().all()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("activation", list(reference.ACTIVATIONS))
@pytest.mark.parametrize("shape", SHAPES)
def test_gated_product(isa, activation, shape, dtype):
    gate, up = 3 * torch.randn(shape).to(dtype), torch.randn(shape).to(dtype)
    wanted = reference.ACTIVATIONS[activation](gate.double()) * up.double()
    found = native_forward.gated_product(gate, up, activation)
    torch.testing.assert_close(found.double(), wanted, rtol=TOLERANCE[dtype], atol=1e-6)
    assert found.dtype == dtype and found.shape == gate.shape
    for index in (0, 1):
        operands = [gate.clone(), up.clone()]
        assert native_forward.gated_product(*operands, activation, out=operands[index]) is operands[index]
        assert torch.equal(operands[index], found)


def test_gated_product_carries_infinity_and_nan(isa):
    special = torch.tensor([[float("inf"), float("-inf"), float("nan"), 0.0, -200.0]])
    for dtype in DTYPES:
        gate, up = special.to(dtype), torch.full((1, 5), 2.0, dtype=dtype)
        found, wanted = native_forward.gated_product(gate, up, "silu"), F.silu(gate) * up
        finite = [0, 2, 3, 4]  # silu(-inf) is NaN in torch: -inf / (1 + inf)
        torch.testing.assert_close(found[:, finite], wanted[:, finite], equal_nan=True)


def heads(batch, n_heads, n_tokens, head_dim):
    return torch.randn(batch, n_tokens, n_heads, head_dim).transpose(1, 2)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("turns", ["shared", "own", "of a wider tensor"])
@pytest.mark.parametrize(
    "shape", [(1, 1, 1, 2), (2, 3, 5, 6), (2, 1, 70, 40), (3, 9, 33, 64), (2, 2, 7, 128)]
)
def test_rotary_is_torchs_bit_for_bit(isa, shape, turns, dtype):
    """With infinity and NaN; x has the strides of a projection, or is contiguous."""
    batch, _, n_tokens, head_dim = shape
    cos, sin = torch.randn(2, 1 if turns == "shared" else batch, n_tokens, 2 * head_dim).to(dtype)
    width = slice(head_dim, None) if turns == "of a wider tensor" else slice(head_dim)
    cos, sin = (
        each[..., width] if "wider" in turns else each[..., width].contiguous() for each in (cos, sin)
    )
    x = heads(*shape).to(dtype)
    x[0, 0, 0, 0], x[-1, -1, -1, -1] = float("inf"), float("nan")
    for each in (x, x.contiguous()):
        assert native_forward.rotates(each, cos, sin)
        wanted, _ = apply_rotary_pos_emb(each, each, cos, sin)
        torch.testing.assert_close(
            native_forward.rotary(each, cos, sin), wanted, rtol=0, atol=0, equal_nan=True
        )


def test_rotary_of_another_kind_is_left_alone():
    x, cos = heads(2, 3, 5, 6), torch.randn(1, 5, 6)
    assert native_forward.rotates(x, cos, cos)
    assert not native_forward.rotates(x, cos[..., :4], cos[..., :4])  # rotates part of a head
    assert not native_forward.rotates(x, cos[0], cos[0]) and not native_forward.rotates(x[0], cos, cos)
    assert not native_forward.rotates(x.half(), cos.half(), cos.half())
    assert not native_forward.rotates(x.bfloat16(), cos, cos) and not native_forward.rotates(
        x, cos, cos[:, :4]
    )
    odd = torch.randn(1, 5, 3)
    assert not native_forward.rotates(heads(2, 3, 5, 3), odd, odd)
    three = torch.randn(3, 5, 6)
    assert not native_forward.rotates(x, three, three)


def test_rows_of_another_kind_are_left_alone():
    x = torch.randn(2, 3)
    assert native_forward.takes_rows(x, x)
    assert not native_forward.takes_rows(x.half()) and not native_forward.takes_rows(x[:0])
    assert not native_forward.takes_rows(x, x.bfloat16()) and not native_forward.takes_rows(x.to("meta"))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("pattern", [(2, 4), (1, 4), (4, 8), (8, 16)])
@pytest.mark.parametrize("shape", [(1, 8, 64), (5, 64, 65), (33, 100, 70), (192, 576, 513), (17, 7, 100)])
def test_sparse_linear(isa, shape, pattern, dtype):
    n_out, n_in, n_tokens = shape
    x = torch.randn(n_tokens, 2 * n_in)[:, n_in:].to(dtype)
    weight, bias = pruned(torch.randn(n_out, n_in), *pattern).to(dtype), torch.randn(n_out).to(dtype)
    require_sparse(x, weight, bias)
    for b in (None, bias):
        found = native_forward.sparse_linear(x, weight, b)
        wanted = x.double() @ weight.double().t() + (0 if b is None else b.double())
        torch.testing.assert_close(found.double(), wanted, rtol=TOLERANCE[dtype], atol=SUM_TOLERANCE)


@pytest.mark.parametrize("dtype", DTYPES)
def test_sparse_linear_of_panels_of_rows(isa, dtype):
    """The weight is larger than what is prepared at once: 16 MiB with AVX2, 4 MiB with AVX-512."""
    x, weight = torch.randn(2, 33, 1024).to(dtype), pruned(torch.randn(2900, 1024), 2, 4).to(dtype)
    require_sparse(x, weight)
    found = native_forward.sparse_linear(x, weight)
    wanted = x.double() @ weight.double().t()
    torch.testing.assert_close(found.double(), wanted, rtol=TOLERANCE[dtype], atol=SUM_TOLERANCE)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("ratio", [0.3, 0.5, 0.9, 1.0])
def test_sparse_linear_of_an_unstructured_weight(isa, ratio, dtype):
    x, weight = torch.randn(100, 200).to(dtype), torch.randn(150, 200).to(dtype)
    weight[torch.rand(150, 200) < ratio] = 0
    require_sparse(x, weight)
    found = native_forward.sparse_linear(x, weight)
    if found is None:
        # More than half of the elements in some 64 bytes are not zero.
        assert isa == "avx512" and ratio < 1
        return
    torch.testing.assert_close(
        found.double(), x.double() @ weight.double().t(), rtol=TOLERANCE[dtype], atol=SUM_TOLERANCE
    )


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("n_rows", [40, 136])
def test_one_weight_too_many_is_left_to_torch(isa, n_rows, dtype):
    kept = {"avx2": 3, "avx512": 2}.get(isa, 0)  # out of 4
    x, weight = torch.randn(64, 128).to(dtype), pruned(torch.randn(n_rows, 128), kept, 4).to(dtype)
    require_sparse(x, weight)
    assert native_forward.sparse_linear(x, weight) is not None
    weight[-1, 96:128][(weight[-1, 96:128] == 0).nonzero()[0]] = 1e-30
    assert native_forward.sparse_linear(x, weight) is None
    assert native_forward.sparse_linear(x, torch.randn(n_rows, 128).to(dtype)) is None


def test_negative_zeros_count_as_zeros_and_nan_does_not(isa):
    weight = torch.full((16, 32), -0.0)
    weight[3, 5] = float("nan")
    x = torch.randn(64, 32)
    require_sparse(x, weight)
    found = native_forward.sparse_linear(x, weight)
    assert found[:, 3].isnan().all() and (found[:, :3] == 0).all() and (found[:, 4:] == 0).all()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    "shape", [(1, 1, 64), (5, 64, 65), (24, 577, 64), (33, 100, 70), (192, 1160, 513), (50, 7, 131)]
)
def test_dense_linear(isa, shape, dtype):
    n_out, n_in, n_tokens = shape
    x = torch.randn(n_tokens, 2 * n_in)[:, n_in:].to(dtype)
    weight, bias = torch.randn(n_out + 1, n_in + 3)[1:, 3:].to(dtype), torch.randn(n_out).to(dtype)
    require_dense(x, weight, bias)
    for b in (None, bias):
        found = native_forward.dense_linear(x, weight, b)
        wanted = x.double() @ weight.double().t() + (0 if b is None else b.double())
        torch.testing.assert_close(found.double(), wanted, rtol=TOLERANCE[dtype], atol=SUM_TOLERANCE)


def test_dense_linear_of_panels_of_rows(isa):
    """The weight is larger than what is prepared at once: 8 MiB."""
    x, weight = torch.randn(2, 33, 1024), torch.randn(2100, 1024)
    require_dense(x, weight)
    wanted = x.double() @ weight.double().t()
    found = native_forward.dense_linear(x, weight).double()
    torch.testing.assert_close(found, wanted, rtol=TOLERANCE[x.dtype], atol=SUM_TOLERANCE)


def test_dense_linear_carries_infinity_and_nan_within_their_token(isa):
    x, weight = torch.randn(70, 40).abs(), torch.randn(30, 40).abs()
    x[3, 5], x[69, 0] = float("inf"), float("nan")
    require_dense(x, weight)
    found = native_forward.dense_linear(x, weight)
    assert found[3].isinf().all() and found[69].isnan().all()
    assert found.isfinite().all(dim=1).sum() == 68


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("kind", ["sparse", "dense"])
def test_threads_and_batches_change_no_bit_of_a_product(isa, kind, dtype):
    x, weight = torch.randn(600, 1312).to(dtype), pruned(torch.randn(50, 1312), 2, 4).to(dtype)
    require, product = {
        "sparse": (require_sparse, native_forward.sparse_linear),
        "dense": (require_dense, native_forward.dense_linear),
    }[kind]
    require(x, weight)
    whole, threads = product(x, weight), torch.get_num_threads()
    torch.set_num_threads(1)
    parts = [product(part, weight) for part in x.split(75)]
    torch.set_num_threads(threads)
    assert torch.equal(torch.cat(parts), whole)


def test_operands_that_no_product_takes():
    x, weight = torch.randn(64, 32), torch.zeros(4, 32)
    refused = (
        (x.half(), weight.half()),
        (x, weight.bfloat16()),
        (x, weight, torch.zeros(4).bfloat16()),
        (x[:63], weight),
        (x[:0], weight),
        (x, weight[:0]),
        (x, torch.zeros(32, 4).t()),
        (x.to("meta"), weight.to("meta")),
    )
    for sparse in (True, False):
        assert not any(native_forward.multiplies(*each, sparse=sparse) for each in refused)

"""RMSNorm, the gated product and the rotary embedding in Triton, against torch's own operations."""

from functools import partial

import pytest
import torch
import torch.nn.functional as F
from transformers.models.llama.modeling_llama import LlamaRMSNorm, apply_rotary_pos_emb

from tests.wanda_kernels.conftest import GPU
from wanda_kernels import reference

pytest.importorskip("triton")
from wanda_kernels import column_squares
from wanda_kernels.triton_ops import forward as triton_forward  # noqa: E402  (needs triton)

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 2e-2, torch.float16: 2e-3}
SHAPES = ((1, 1), (3, 7), (2, 3, 576), (2, 1030))


def draw(*shape, dtype, scale=1.0):
    return scale * torch.randn(shape, device=GPU).to(dtype)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES)
def test_rms_norm(shape, dtype):
    norm, x = LlamaRMSNorm(shape[-1], eps=1e-5).to(GPU, dtype), draw(*shape, dtype=dtype, scale=3)
    norm.weight.data.normal_()
    found = triton_forward.rms_norm(x, norm.weight.data, norm.variance_epsilon)
    torch.testing.assert_close(found, norm(x).detach(), rtol=TOLERANCE[dtype], atol=0)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("activation", list(reference.ACTIVATIONS))
def test_gated_product_in_memory_of_its_own_or_an_operands(activation, dtype):
    gate, up = draw(5, 1030, dtype=dtype, scale=3), draw(5, 1030, dtype=dtype)
    wanted = reference.ACTIVATIONS[activation](gate.double()) * up.double()
    found = triton_forward.gated_product(gate, up, activation)
    torch.testing.assert_close(found.double(), wanted, rtol=TOLERANCE[dtype], atol=1e-6)
    for index in (0, 1):
        operands = [gate.clone(), up.clone()]
        assert triton_forward.gated_product(*operands, activation, out=operands[index]) is operands[index]
        assert torch.equal(operands[index], found)


def test_gated_product_of_the_halves_of_a_fused_projection():
    both = draw(2, 3, 80, dtype=torch.float32)
    gate, up = both.chunk(2, dim=-1)
    torch.testing.assert_close(triton_forward.gated_product(gate, up, "silu"), F.silu(gate) * up)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("own_turns", [False, True])
@pytest.mark.parametrize("shape", [(1, 1, 1, 2), (2, 3, 5, 6), (2, 1, 7, 80), (1, 40, 3, 128)])
def test_rotary(shape, own_turns, dtype):
    """fp32 bit for bit; 16-bit dtypes too on a GPU (the interpreter truncates bf16)."""
    batch, n_heads, n_tokens, head_dim = shape
    cos, sin = draw(2, batch if own_turns else 1, n_tokens, head_dim, dtype=dtype)
    x = draw(batch, n_tokens, n_heads, head_dim, dtype=dtype).transpose(1, 2)
    exact = dtype == torch.float32 or GPU == "cuda"
    for each in (x, x.contiguous()):
        wanted, _ = apply_rotary_pos_emb(each, each, cos, sin)
        found = triton_forward.rotary(each, cos, sin)
        tolerance = 0 if exact else TOLERANCE[dtype]
        torch.testing.assert_close(found, wanted, rtol=tolerance, atol=3 * tolerance)
        assert found.transpose(1, 2).is_contiguous()


def test_what_lies_on_a_cpu_or_is_too_long_is_left_alone():
    x = torch.randn(2, 6)
    assert not triton_forward.takes_rows(x)
    cos = torch.randn(1, 5, 6)
    assert not triton_forward.rotates(torch.randn(2, 5, 3, 6).transpose(1, 2), cos, cos)


# one token, a whole tile of them, and two tiles and one token
@pytest.mark.parametrize(
    ("n_tokens", "dtype"),
    [(1, torch.float32), (32, torch.float32), *((65, dtype) for dtype in DTYPES)],
)
def test_column_squares_saved_with_an_output(n_tokens, dtype):
    """They sum the rounded values, each token once; the output is the same with and without them."""
    x, weight = draw(n_tokens, 300, dtype=dtype), draw(300, dtype=dtype)
    gate, up = draw(n_tokens, 300, dtype=dtype), draw(n_tokens, 300, dtype=dtype)
    calls = [
        partial(triton_forward.rms_norm, x, weight, 1e-5),
        partial(triton_forward.gated_product, gate, up, "silu"),
    ]
    for call in calls:
        alone = call()
        with column_squares.saving_column_squares():
            found = call()
        assert torch.equal(found, alone) and column_squares.saved_column_squares(alone) is None
        wanted = found.double().square().sum(0)
        torch.testing.assert_close(
            column_squares.saved_column_squares(found).sum(0).double(), wanted, rtol=1e-6, atol=0
        )
        found *= 2
        assert column_squares.saved_column_squares(found) is None  # it was changed since


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    ("hidden", "inner", "n_heads"), [(4096, 11008, 32), (8192, 28672, 8), (576, 1536, 9)]
)
def test_real_shapes(hidden, inner, n_heads, dtype):
    """Llama-2-7B, Llama-3-70B and SmolLM2: the same bits except for a sum's order and exp's last bit."""
    x, norm = draw(2, 1024, hidden, dtype=dtype), LlamaRMSNorm(hidden).to("cuda", dtype)
    norm.weight.data.normal_()
    gate, up = draw(2, 1024, inner, dtype=dtype), draw(2, 1024, inner, dtype=dtype)
    assert triton_forward.takes_rows(x, norm.weight.data)
    pairs = [
        (triton_forward.rms_norm(x, norm.weight.data, norm.variance_epsilon), norm(x).detach()),
        (triton_forward.gated_product(gate, up, "silu"), F.silu(gate) * up),
    ]
    for found, wanted in pairs:
        torch.testing.assert_close(found, wanted, rtol=TOLERANCE[dtype], atol=1e-6)
        if dtype != torch.float32:
            assert (found != wanted).float().mean() < 0.01
    q = draw(2, 1024, n_heads, 128, dtype=dtype).transpose(1, 2)
    cos, sin = draw(2, 1, 1024, 128, dtype=dtype)
    assert triton_forward.rotates(q, cos, sin)
    assert torch.equal(triton_forward.rotary(q, cos, sin), apply_rotary_pos_emb(q, q, cos, sin)[0])

"""Replaced attention and matrix products: the same results up to rounding, and only inside the context."""

import pytest
import torch
import torch.nn.functional as F

import wanda_fast
from tests.tiny_models import FAMILIES, token_ids
from tests.wanda_fast.pruning.test_sequential_linear import zeros_in_common
from wanda_fast.model import block_forward
from wanda_kernels import forward

CPU = torch.device("cpu")


def test_replacements_are_used_inside_and_nowhere_else(monkeypatch):
    calls = []
    silu = lambda x, inplace: calls.append("silu") or x + 1  # noqa: E731
    own = {F.linear: lambda *_: calls.append("linear"), F.silu: silu}
    monkeypatch.setattr(block_forward, "_of_this_machine", lambda: own)
    x = torch.randn(2, 3)
    with block_forward.faster_forward(CPU):
        # The replacement returns None, so torch computes it.
        assert torch.equal(F.linear(x, x), x @ x.t())
        assert torch.equal(F.silu(x), x + 1)
    assert calls == ["linear", "silu"]
    assert torch.allclose(F.silu(x), x * x.sigmoid())
    modules = ["gated_product", "rms_norm", "rotary"] if forward.has_cpu_kernels() else []
    for asked in ("", "auto", "cpu"):
        monkeypatch.setenv("WANDA_KERNELS_BACKEND", asked)
        assert block_forward.described(CPU) == sorted(["linear", "silu", *modules])
    monkeypatch.setenv("WANDA_KERNELS_BACKEND", "torch")
    with block_forward.faster_forward(CPU):
        assert torch.allclose(F.silu(x), x * x.sigmoid())
    assert block_forward.described(CPU) == [] == block_forward.described(torch.device("cuda"))


@pytest.mark.parametrize("bias", [None, torch.randn(5)])
@pytest.mark.parametrize("shape", [(7,), (3, 7), (2, 3, 7)])
def test_onednns_linear(monkeypatch, bias, shape):
    """Tested on every x86 processor, though it is used only on AMD's with AVX-512."""
    if not hasattr(torch.ops.mkldnn, "_linear_pointwise"):
        pytest.skip("this torch is built without oneDNN")
    monkeypatch.setattr(block_forward, "_onednn_is_faster", lambda: True)
    x, weight = torch.randn(shape), torch.randn(5, 7)
    found = block_forward._linear(x, weight, bias)
    wanted = F.linear(x.double(), weight.double(), None if bias is None else bias.double())
    torch.testing.assert_close(found.double(), wanted, atol=1e-5, rtol=1e-5)
    transposed = torch.randn(7, 4).t()
    torch.testing.assert_close(block_forward._linear(transposed, weight), transposed @ weight.t())
    assert block_forward._linear(torch.randn(0, 7), weight) is None


@pytest.mark.parametrize("bias", [None, torch.randn(5).bfloat16()])
def test_bf16_without_instructions_for_it(monkeypatch, bias):
    """The product is in fp32 with one rounding at the end. With the instructions it is torch's own."""
    x, weight = torch.randn(2, 9, 7).bfloat16(), torch.randn(5, 7).bfloat16()
    monkeypatch.setattr(block_forward, "multiplies_bf16", lambda: True)
    assert torch.equal(block_forward._linear(x, weight, bias), F.linear(x, weight, bias))
    monkeypatch.setattr(block_forward, "multiplies_bf16", lambda: False)
    # x has 18 tokens.
    monkeypatch.setattr(block_forward, "WIDENED_TOKENS", 5)
    # Two rows of the weight at a time.
    monkeypatch.setattr(block_forward, "WIDENED_WEIGHTS", 15)
    assert block_forward._linear(x[:0], weight, bias) is None
    found = block_forward._linear(x, weight, bias)
    wanted = F.linear(x.double(), weight.double(), None if bias is None else bias.double())
    assert found.dtype == torch.bfloat16
    torch.testing.assert_close(found.double(), wanted, rtol=2**-8, atol=1e-6)


def test_attention_of_another_kind_is_left_to_torch():
    q = torch.randn(1, 2, 8, 64)
    assert block_forward._causal_attention(q, q, q) is None
    assert block_forward._causal_attention(q, q, q, attn_mask=torch.ones(8, 8).bool()) is None
    assert block_forward._causal_attention(q, q, q, dropout_p=0.1, is_causal=True) is None
    if forward.attends(q, q, q):
        found = block_forward._causal_attention(q, q, q, is_causal=True, scale=0.3, enable_gqa=True)
        torch.testing.assert_close(found, F.scaled_dot_product_attention(q, q, q, is_causal=True, scale=0.3))


@pytest.mark.parametrize("sequential", ["block", "linear"])
@pytest.mark.parametrize("name", ["llama3", "gemma2", "opt"])
def test_masks_are_those_of_torchs_forward(monkeypatch, name, sequential):
    ours, plain = FAMILIES[name](), FAMILIES[name]()
    ids = token_ids(ours, 4, 40)
    wanda_fast.prune(ours, dataset=ids, sequential=sequential)
    monkeypatch.setattr(block_forward, "_of_this_machine", dict)
    wanda_fast.prune(plain, dataset=ids, sequential=sequential)
    assert zeros_in_common(ours, plain) > 0.9995

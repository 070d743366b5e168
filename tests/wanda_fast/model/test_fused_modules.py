"""Norms, MLPs and rotary embeddings by kernels: only if their code is Llama's, with the same results."""

from types import FunctionType

import pytest
import torch

from tests.tiny_models import FAMILIES
from wanda_fast.model.fused_modules import _fusion, _rotates_as, fused_modules
from wanda_kernels.native import forward as native_forward
from wanda_kernels.native import library


def fused_names(model):
    with fused_modules(model):
        return sorted({type(module).__name__ for module in model.modules() if "forward" in vars(module)})


def names_of_calls(kernels, monkeypatch):
    """A list to which each call of a kernel of this module adds the kernel's name."""
    used = []
    for kernel in ("rms_norm", "gated_product", "rotary"):
        own = getattr(kernels, kernel)
        monkeypatch.setattr(
            kernels, kernel, lambda *a, k=kernel, own=own, **o: used.append(k) or own(*a, **o)
        )
    return used


def test_only_modules_whose_code_is_llamas():
    assert fused_names(FAMILIES["llama3"]()) == ["LlamaAttention", "LlamaMLP", "LlamaRMSNorm"]
    # GPT-NeoX has another rotary embedding.
    assert fused_names(FAMILIES["gpt_neox"]()) == []
    assert [name for name in fused_names(FAMILIES["qwen2"]()) if "RMSNorm" in name] == ["Qwen2RMSNorm"]
    assert fused_names(FAMILIES["opt"]()) == []
    # Gemma's norm multiplies by (1 + weight).
    assert not any("RMSNorm" in name for name in fused_names(FAMILIES["gemma2"]()))


@pytest.mark.parametrize("name", ["llama3", "gemma2", "qwen2", "qwen3", "phi"])
def test_the_results_are_the_models_own(name, monkeypatch):
    model, ids = FAMILIES[name](), torch.arange(40).view(2, 20)
    used = names_of_calls(native_forward, monkeypatch)
    with torch.no_grad():
        wanted = model(ids).logits
        with fused_modules(model):
            found = model(ids).logits
            # The kernels do not support fp16.
            half = model.half()(ids).logits
        assert "forward" not in {key for module in model.modules() for key in vars(module)}
    torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-5)
    assert half.isfinite().all()
    without = {"gemma2": {"rms_norm"}, "phi": {"rms_norm", "gated_product"}}
    expected = {"gated_product", "rms_norm", "rotary"} - without.get(name, set())
    assert set(used) == (set() if library.why_not("cpu") else expected)


@pytest.mark.parametrize("seen_by", [("gate_proj",), ("up_proj",), ("gate_proj", "up_proj")])
def test_an_output_that_a_hook_has_is_not_overwritten(seen_by):
    """The product overwrites the output of gate or up only if no hook has received it."""
    model, ids = FAMILIES["llama3"](), torch.arange(40).view(2, 20)
    seen = []
    with torch.no_grad():
        wanted = model(ids).logits
        handles = [
            getattr(model.model.layers[0].mlp, name).register_forward_hook(
                lambda _module, _args, output: seen.append((output, output.clone()))
            )
            for name in seen_by
        ]
        with fused_modules(model):
            torch.testing.assert_close(model(ids).logits, wanted, rtol=1e-4, atol=1e-5)
        for handle in handles:
            handle.remove()
    assert len(seen) == len(seen_by) and all(torch.equal(*each) for each in seen)


def test_another_rotary_embedding_is_the_models_own(monkeypatch):
    """The code decides, not the name. It is checked on every call, so a later monkey patch takes effect."""
    from transformers.models.llama import modeling_llama as llama

    own, ids = llama.apply_rotary_pos_emb, torch.arange(40).view(2, 20)
    model = FAMILIES["llama3"]()
    assert "LlamaAttention" in fused_names(model)
    half_of_another = FunctionType(own.__code__, {"rotate_half": lambda x: -x}, argdefs=own.__defaults__)
    for other in (lambda q, k, cos, sin: (q, k), half_of_another):
        monkeypatch.setattr(llama, "apply_rotary_pos_emb", other)
        assert "LlamaAttention" not in fused_names(model)
        assert not _rotates_as(own, llama.LlamaAttention.forward)
        with torch.no_grad():
            wanted = model(ids).logits
            with fused_modules(model):
                torch.testing.assert_close(model(ids).logits, wanted, rtol=1e-4, atol=1e-5)


def test_a_norm_replaced_in_its_class_is_kept(monkeypatch):
    from transformers.models.llama import modeling_llama as llama

    monkeypatch.setattr(llama.LlamaRMSNorm, "forward", lambda self, x: x)
    assert "LlamaRMSNorm" not in fused_names(FAMILIES["llama3"]())


def test_nothing_is_fused_with_the_torch_backend(monkeypatch):
    monkeypatch.setenv("WANDA_KERNELS_BACKEND", "torch")
    assert fused_names(FAMILIES["llama3"]()) == []


def test_a_forward_set_on_an_instance_is_kept():
    model = FAMILIES["llama3"]()
    norm = model.model.norm
    norm.forward = own = lambda x: x
    with fused_modules(model):
        assert norm.forward is own
    assert norm.forward is own and _fusion(type(norm)) is not None

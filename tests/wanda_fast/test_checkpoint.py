"""What is written keeps each tensor's dtype, and leaves the model that was written as it was."""

import json

import pytest
import torch
from safetensors.torch import load_file
from transformers import LlamaForCausalLM

import wanda_fast
from tests.tiny_models import FAMILIES, save_checkpoint, token_ids

pytestmark = pytest.mark.usefixtures("one_thread")


def with_fp32_norms(model):
    for name, parameter in model.named_parameters():
        if "norm" in name:
            parameter.data = parameter.data.float() + 2**-20  # more than 16 bits hold
    return model


def tensors_of(model):
    return dict([*model.named_parameters(), *model.named_buffers()])


def test_a_live_model_keeps_what_16_bits_cannot_hold(tmp_path):
    """The rotary frequencies, which are never saved, and a buffer of the user's own, which is."""
    model, own = FAMILIES["llama2"]().bfloat16(), torch.tensor([1 + 2**-20])
    model.model.rotary_emb.inv_freq = FAMILIES["llama2"]().model.rotary_emb.inv_freq
    model.register_buffer("own", own.clone())
    before = {name: tensor.clone() for name, tensor in tensors_of(model).items()}
    wanda_fast.prune(model, dataset=token_ids(model, 2, 32), save_model=tmp_path / "out")
    for name, tensor in tensors_of(model).items():
        assert tensor.dtype == before[name].dtype
        assert "_proj" in name or torch.equal(tensor, before[name]), name
    assert torch.equal(load_file(tmp_path / "out" / "model.safetensors")["own"], own)


@pytest.mark.parametrize("family", ["smollm", "llama2"])
def test_what_transformers_keeps_in_fp32_is_written_so(family, tmp_path, pydoc_text, monkeypatch):
    """As DeepseekV3's correction bias; 16-bit weights are widened for the computation, and come back."""
    monkeypatch.setattr(LlamaForCausalLM, "_keep_in_fp32_modules_strict", ["norm"])
    folder, out = tmp_path / "dense", tmp_path / "out"
    save_checkpoint(with_fp32_norms(FAMILIES[family]().half()), folder, pydoc_text[:20000])
    report = wanda_fast.prune(
        str(folder), dataset="pydoc", nsamples=2, seqlen=24, eval_dataset=None, device="cpu", save_model=out
    )
    dense, pruned = (load_file(path / "model.safetensors") for path in (folder, out))
    assert report.sparsity == 0.5 and dense.keys() == pruned.keys()
    for name, tensor in dense.items():
        assert pruned[name].dtype == tensor.dtype == (torch.float32 if "norm" in name else torch.float16)
        kept = pruned[name] != 0
        assert torch.equal(pruned[name][kept], tensor[kept]), name
    assert json.loads((out / "config.json").read_text())["dtype"] == "float16"

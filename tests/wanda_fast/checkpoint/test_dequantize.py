"""Quantised checkpoints are refused without `--dequantize`, and become plain 16-bit ones with it."""

import json

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

import wanda_fast
from tests.every_architecture import save_tiny
from wanda_fast import errors
from wanda_fast.run import inputs

pytestmark = pytest.mark.usefixtures("one_thread")

BLOCK = 16
FP8 = dict(quant_method="fp8", activation_scheme="dynamic", weight_block_size=[BLOCK, BLOCK], fmt="e4m3")
MXFP4 = dict(quant_method="mxfp4", modules_to_not_convert=["model.layers.*.self_attn", "lm_head"])
# The values of the 16 codes of four bits: a sign, two bits of exponent, one of mantissa.
E2M1 = torch.tensor([0.0, 0.5, 1, 1.5, 2, 3, 4, 6])
E2M1 = torch.cat([E2M1, -E2M1])
MTP = "model.layers.2.mtp_proj.weight"


def to_fp8(weight):
    """(weight in fp8, fp32 scale of each 16 x 16 block, the bf16 weight that they stand for)."""
    rows, columns = (size // BLOCK for size in weight.shape)
    blocks = weight.float().view(rows, BLOCK, columns, BLOCK)
    scale = blocks.abs().amax((1, 3), keepdim=True) / 448
    small = (blocks / scale).to(torch.float8_e4m3fn)
    plain = (small.float() * scale).bfloat16()
    return small.reshape(weight.shape), scale[:, 0, :, 0].contiguous(), plain.reshape(weight.shape)


def in_fp8(name, folder):
    """Save a family with its linears in block fp8. Returns the tensors that they stand for."""
    save_tiny(name, folder)
    tensors = load_file(folder / "model.safetensors")
    # The model takes neither of these: one is a quantised weight, the other is not.
    tensors |= {MTP: torch.randn(32, 16).bfloat16(), "model.layers.2.norm.weight": torch.ones(3).half()}
    plain, stored = {}, {}
    for key, tensor in tensors.items():
        plain[key] = stored[key] = tensor
        if key.endswith(("_proj.weight", "w1.weight", "w2.weight", "w3.weight")):
            stored[key], stored[f"{key}_scale_inv"], plain[key] = to_fp8(tensor)
    finish(folder, stored, FP8)
    return plain


def in_mxfp4(folder):
    """Save gpt-oss with its experts in MXFP4. Returns the tensors that they stand for."""
    save_tiny("gpt_oss", folder)
    plain, stored = load_file(folder / "model.safetensors"), {}
    for key, tensor in plain.items():
        if not key.endswith(("experts.gate_up_proj", "experts.down_proj")):
            stored[key] = tensor
            continue
        experts, inputs_, outputs = tensor.shape
        groups = (experts, outputs, inputs_ // 32)
        codes, exponents = torch.randint(16, (*groups, 32)), torch.randint(118, 124, groups)
        stored[f"{key}_blocks"] = (codes[..., 0::2] | codes[..., 1::2] << 4).to(torch.uint8)
        stored[f"{key}_scales"] = exponents.to(torch.uint8)
        values = E2M1[codes] * torch.exp2(exponents[..., None] - 127.0)
        plain[key] = values.view(experts, outputs, inputs_).mT.bfloat16().contiguous()
    finish(folder, stored, MXFP4)
    return plain


def finish(folder, stored, about):
    save_file(stored, folder / "model.safetensors", metadata={"format": "pt"})
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"quantization_config": about}, indent=2))


def prune(folder, out=None, **options):
    ids = torch.randint(3, 300, (3, 16), generator=torch.Generator().manual_seed(0))
    options = dict(dataset=ids, seqlen=16, eval_dataset=ids, batch_size=2, device="cpu") | options
    return wanda_fast.prune(str(folder), save_model=out, **options)


def tensors_of(folder):
    return {name: tensor for file in folder.glob("*.safetensors") for name, tensor in load_file(file).items()}


SAVED = {
    "llama": lambda folder: in_fp8("llama", folder),
    "mixtral": lambda folder: in_fp8("mixtral", folder),
    "deepseek_v3": lambda folder: in_fp8("deepseek_v3", folder),
    "gpt_oss": in_mxfp4,
}


@pytest.mark.parametrize("name", SAVED)
def test_dequantised_pruned_and_saved_without_the_format(name, tmp_path):
    folder, out = tmp_path / "in", tmp_path / "out"
    plain = SAVED[name](folder)
    report = prune(folder, out, sparsity_type="2:4", dequantize=True)
    written = tensors_of(out)
    assert written.keys() == plain.keys()
    zeros = 0
    for key, tensor in plain.items():
        assert written[key].dtype == tensor.dtype, key
        assert ((written[key] == tensor) | (written[key] == 0)).all(), key
        zeros += int(((written[key] == 0) & (tensor != 0)).sum())
    assert zeros > 1000 and report.sparsity > 0.45
    before, after = (json.loads((each / "config.json").read_text()) for each in (folder, out))
    assert before.pop("quantization_config") and after == before
    loaded = AutoModelForCausalLM.from_pretrained(out, dtype="auto")
    assert loaded.dtype == torch.bfloat16
    assert prune(out, prune_method="dense").perplexity["dense"] == report.perplexity["pruned"]


@pytest.mark.parametrize("name", ["mixtral", "gpt_oss"])
def test_loaded_as_a_whole(name, tmp_path, monkeypatch):
    def refuse(*_args):
        raise errors.NotStreamableError("the test says so")

    folder = tmp_path / "in"
    SAVED[name](folder)
    streamed = prune(folder, tmp_path / "streamed", dequantize=True)
    monkeypatch.setattr(inputs, "open_meta_model", refuse)
    whole = prune(folder, tmp_path / "whole", dequantize=True)
    assert whole.perplexity["pruned"] == pytest.approx(streamed.perplexity["pruned"], rel=1e-4)
    states = [
        AutoModelForCausalLM.from_pretrained(tmp_path / kind).state_dict() for kind in ("whole", "streamed")
    ]
    assert all(torch.equal(tensor, states[1][key]) for key, tensor in states[0].items())
    assert "quantization_config" not in json.loads((tmp_path / "whole" / "config.json").read_text())


def test_resumed_in_plain_tensors(tmp_path, monkeypatch):
    folder = tmp_path / "in"
    in_fp8("mixtral", folder)
    prune(folder, tmp_path / "once", dequantize=True)
    write_block = wanda_fast.output.streamed.StreamedOutput.write_block

    def killed(self, index, *rest):
        write_block(self, index, *rest)
        self.writer.wait()
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(wanda_fast.output.streamed.StreamedOutput, "write_block", killed)
        with pytest.raises(KeyboardInterrupt):
            prune(folder, tmp_path / "twice", dequantize=True)
    prune(folder, tmp_path / "twice", dequantize=True, resume=True)
    once, twice = tensors_of(tmp_path / "once"), tensors_of(tmp_path / "twice")
    assert once.keys() == twice.keys() and all(torch.equal(once[key], twice[key]) for key in once)


@pytest.mark.parametrize(("about", "said"), [(FP8, "fp8"), (MXFP4, "mxfp4")])
def test_without_the_flag_the_sentence_names_it(about, said, tmp_path):
    save_tiny("llama", tmp_path)
    finish(tmp_path, load_file(tmp_path / "model.safetensors"), about)
    with pytest.raises(
        errors.QuantizedModelError, match=rf"\({said}.*pass --dequantize to prune them in 16 bits"
    ):
        prune(tmp_path)


@pytest.mark.parametrize("method", ["gptq", "compressed-tensors", "unheard_of"])
def test_what_is_not_dequantised_is_refused(method, tmp_path):
    save_tiny("llama", tmp_path)
    finish(tmp_path, load_file(tmp_path / "model.safetensors"), dict(quant_method=method, bits=4))
    with pytest.raises(errors.QuantizedModelError, match=f"{method}: .*prune the 16-bit original") as caught:
        prune(tmp_path, dequantize=True)
    assert "--dequantize" not in str(caught.value)


def test_a_scale_of_no_fitting_shape(tmp_path):
    in_fp8("llama", tmp_path)
    name = "model.layers.0.mlp.up_proj.weight_scale_inv"
    stored = load_file(tmp_path / "model.safetensors")
    finish(tmp_path, stored | {name: torch.ones(5, 5)}, FP8)
    with pytest.raises(
        errors.QuantizedModelError, match="up_proj.weight cannot be dequantised: .* divisible"
    ):
        prune(tmp_path, tmp_path / "out", dequantize=True)


def test_plain_checkpoints_are_as_without_the_flag(tmp_path):
    save_tiny("llama", tmp_path / "in")
    prune(tmp_path / "in", tmp_path / "without")
    prune(tmp_path / "in", tmp_path / "with", dequantize=True)
    files = [tmp_path / kind / "model.safetensors" for kind in ("without", "with")]
    assert files[0].read_bytes() == files[1].read_bytes()

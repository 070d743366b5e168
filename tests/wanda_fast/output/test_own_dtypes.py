"""Checkpoints of several dtypes, or of float64: tensors keep their dtype, and what stays keeps its bits."""

import json

import pytest
import torch
from safetensors.torch import load_file, save_file
from typer.testing import CliRunner

import wanda_fast
from tests.tiny_models import FAMILIES, save_checkpoint
from tests.wanda_fast.output.resume.runs import stop_in
from wanda_fast import errors
from wanda_fast.cli.main import app
from wanda_fast.output import streamed
from wanda_fast.run import inputs

pytestmark = pytest.mark.usefixtures("one_thread")

TEXT = "The quick brown fox jumps over the lazy dog while a river runs past the old stone mill. " * 60
QUICK = dict(nsamples=2, seqlen=24, sparsity_type="2:4", eval_dataset=None, device="cpu")
BF16, F32, F64 = torch.bfloat16, torch.float32, torch.float64
# Main dtype of the configuration, and the dtype of each tensor on disk.
KINDS = {
    "float64": (F64, lambda name: F64),
    "fp32 norms": (BF16, lambda name: F32 if "norm" in name else BF16),
    "fp32 linears and embeddings": (BF16, lambda name: F32 if "v_proj" in name or "embed" in name else BF16),
    "bf16 under an fp32 configuration": (F32, lambda name: BF16),
}


@pytest.fixture(params=KINDS)
def checkpoint(request, tmp_path):
    """(folder, its tensors); no value is one of the next narrower dtype."""
    main, dtype_of = KINDS[request.param]
    folder, generator = tmp_path / "dense", torch.Generator().manual_seed(0)
    save_checkpoint(FAMILIES["llama3"](), folder, TEXT)
    (folder / "text.txt").write_text(TEXT)
    tensors = {
        name: (tensor.double() * (1 + 1e-12) + torch.rand(tensor.shape, generator=generator) * 1e-3).to(
            dtype_of(name)
        )
        for name, tensor in load_file(folder / "model.safetensors").items()
    }
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    config = json.loads((folder / "config.json").read_text()) | {"dtype": str(main).removeprefix("torch.")}
    (folder / "config.json").write_text(json.dumps(config))
    return folder, tensors


def prune(folder, out, **options):
    report = wanda_fast.prune(folder, dataset=folder / "text.txt", save_model=out, **QUICK | options)
    return report, load_file(out / "model.safetensors")


def require_own_dtypes(report, dense, pruned, updates=False):
    assert pruned.keys() == dense.keys() and report.sparsity == 0.5
    for name, tensor in dense.items():
        assert pruned[name].dtype == tensor.dtype, name
        if name.removesuffix(".weight") not in report.linears:
            assert torch.equal(pruned[name], tensor), name
        elif not updates:
            assert torch.equal(pruned[name], torch.where(pruned[name] == 0, 0, tensor)), name


def load_whole(monkeypatch):
    """Make every checkpoint one that is not streamed."""

    def refuse(*_arguments):
        raise errors.NotStreamableError("the test says so")

    monkeypatch.setattr(inputs, "open_meta_model", refuse)


@pytest.mark.parametrize("whole", [False, True], ids=["streamed", "whole"])
@pytest.mark.parametrize("method", ["wanda", "sparsegpt"])
def test_each_tensor_keeps_its_dtype(checkpoint, method, whole, tmp_path, monkeypatch):
    folder, dense = checkpoint
    if whole:
        load_whole(monkeypatch)
    report, pruned = prune(folder, tmp_path / "out", prune_method=method)
    require_own_dtypes(report, dense, pruned, updates=method == "sparsegpt")


@pytest.mark.parametrize("method", ["wanda", "sparsegpt"])
def test_a_resumed_run_has_the_same_bytes(checkpoint, method, tmp_path, monkeypatch):
    folder, _ = checkpoint
    _, expected = prune(folder, tmp_path / "whole", prune_method=method)
    with monkeypatch.context() as patch:
        write_block = streamed.StreamedOutput.write_block
        patch.setattr(streamed.StreamedOutput, "write_block", stop_in(0, write_block))
        with pytest.raises(errors.InterruptedRunError):
            prune(folder, tmp_path / "out", prune_method=method)
    _, resumed = prune(folder, tmp_path / "out", prune_method=method, resume=True)
    assert all(torch.equal(resumed[name], tensor) for name, tensor in expected.items())


@pytest.mark.parametrize("whole", [False, True], ids=["streamed", "whole"])
def test_a_dtype_that_is_asked_for_is_that_of_every_tensor(checkpoint, whole, tmp_path, monkeypatch):
    folder, dense = checkpoint
    if whole:
        load_whole(monkeypatch)
    _, pruned = prune(folder, tmp_path / "out", dtype="float16")
    assert {tensor.dtype for tensor in pruned.values()} == {torch.float16}
    assert torch.equal(pruned["model.norm.weight"], dense["model.norm.weight"].half())


def test_a_mask_that_is_applied_leaves_the_same_bytes(checkpoint, tmp_path):
    folder, _ = checkpoint
    _, pruned = prune(folder, tmp_path / "out", save_mask=tmp_path / "mask")
    words = ["apply-mask", str(folder), "--mask", str(tmp_path / "mask"), "--save-model", str(tmp_path / "m")]
    assert CliRunner().invoke(app, words).exit_code == 0
    applied = load_file(tmp_path / "m" / "model.safetensors")
    assert applied.keys() == pruned.keys()
    for name, tensor in pruned.items():
        assert applied[name].dtype == tensor.dtype and torch.equal(applied[name], tensor), name

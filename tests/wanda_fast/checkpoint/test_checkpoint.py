"""Saving keeps each tensor's dtype, does not change the model, and is not undone by a later failure."""

import json
import os
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file
from transformers import LlamaForCausalLM

import wanda_fast
from tests.tiny_models import FAMILIES, save_checkpoint, token_ids
from wanda_fast import errors
from wanda_fast.run import in_memory, job, prune_model

pytestmark = pytest.mark.usefixtures("one_thread", "short_pydoc")

TASKS = dict(eval_zero_shot=True, tokenizer=SimpleNamespace(save_pretrained=lambda *_: None))
EVALUATION = dict(eval_dataset=torch.arange(64), seqlen=32)


def with_fp32_norms(model):
    for name, parameter in model.named_parameters():
        if "norm" in name:
            # Not representable in 16 bits.
            parameter.data = parameter.data.float() + 2**-20
    return model


def tensors_of(model):
    return dict([*model.named_parameters(), *model.named_buffers()])


def test_fp32_tensors_of_a_live_16_bit_model_are_unchanged(tmp_path):
    """The rotary frequencies, which are not saved, and a buffer of the user's, which is."""
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
def test_tensors_kept_in_fp32_by_transformers_are_written_in_fp32(family, tmp_path, pydoc_text, monkeypatch):
    """As DeepseekV3's correction bias. 16-bit weights are widened for the computation, not in the file."""
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


def prune(out, **options):
    """Prune and save a live model."""
    model = FAMILIES["smollm"]()
    return wanda_fast.prune(model, dataset=token_ids(model, 2, 32), save_model=out, **options)


def measuring(monkeypatch, measure):
    """Tasks are measured by this function, without lm-evaluation-harness."""
    monkeypatch.setattr(prune_model, "read_tasks", lambda *_: SimpleNamespace(digest=None, measure=measure))


def fail(*_args, **_options):
    raise RuntimeError("the test says so")


@pytest.mark.parametrize("what", ["masks", "perplexity", "zero-shot"])
def test_a_failure_after_the_save_keeps_the_model(what, tmp_path, monkeypatch):
    """All of these steps come after the model is saved."""
    if what == "perplexity":
        monkeypatch.setattr(in_memory, "scores_of_hidden", fail)
    found = [fail, lambda *_: {}]
    measuring(monkeypatch, lambda *args: found.pop()(*args))
    if what == "masks":
        monkeypatch.setattr(job, "write_masks", fail)
    with pytest.raises(RuntimeError, match="the test says so"):
        prune(
            tmp_path / "out",
            save_mask=tmp_path / "masks",
            **TASKS,
            **EVALUATION,
        )
    pruned = LlamaForCausalLM.from_pretrained(tmp_path / "out")
    assert (pruned.model.layers[1].mlp.up_proj.weight == 0).float().mean() == 0.5
    assert not (tmp_path / "out.partial").exists()


def test_the_saved_report_has_what_was_measured_after_the_save(tmp_path, monkeypatch):
    found = [{"boolq": {"acc": 0.5}}, {"boolq": {"acc": 0.75}}]
    measuring(monkeypatch, lambda *_: found.pop())
    report = prune(tmp_path / "out", **TASKS, **EVALUATION)
    written = json.loads((tmp_path / "out" / "wanda_fast.json").read_text())
    assert written["zero_shot"] == {"boolq": {"dense": {"acc": 0.75}, "pruned": {"acc": 0.5}}}
    assert written["peak_memory"]
    assert written["perplexity"] == report.perplexity and "pruned" in report.perplexity


@pytest.fixture
def old(tmp_path):
    """A folder that is not empty."""
    out = tmp_path / "out"
    out.mkdir()
    (out / "kept").touch()
    return out


def test_overwrite_leaves_the_new_model_alone(old):
    prune(old, overwrite=True)
    assert (old / "model.safetensors").is_file() and not (old / "kept").exists()
    assert list(old.parent.iterdir()) == [old]


def test_a_rename_that_fails_loses_neither_model(old, monkeypatch):
    replace = os.replace

    def last_fails(source, target):
        if Path(target) == old and Path(source).name == "model":
            raise OSError("no rename today")
        replace(source, target)

    monkeypatch.setattr(os, "replace", last_fails)
    with pytest.raises(errors.OutputError, match="no rename today; the model is kept in .*out.partial/model"):
        prune(old, overwrite=True)
    assert list(old.iterdir()) == [old / "kept"]
    LlamaForCausalLM.from_pretrained(old.with_name("out.partial") / "model")


def test_a_folder_set_aside_by_a_killed_run_is_restored(old):
    aside = old.with_name("out.partial") / "replaced"
    aside.parent.mkdir()
    old.rename(aside)
    with pytest.raises(errors.OutputError, match="not empty"):
        prune(old)
    assert list(old.iterdir()) == [old / "kept"]
    prune(old, overwrite=True)
    assert list(old.parent.iterdir()) == [old]


@pytest.mark.parametrize("kind", ["a symbolic link", "a mount point"])
def test_a_folder_that_no_rename_can_replace_is_refused_before_the_work(kind, tmp_path, monkeypatch):
    real, out = tmp_path / "real", tmp_path / "out"
    real.mkdir()
    if kind == "a symbolic link":
        out.symlink_to(real)
    else:
        monkeypatch.setattr(os.path, "ismount", lambda path: path == out)
    monkeypatch.setattr(job, "prune_blocks", fail)
    with pytest.raises(errors.OutputError, match=f"out is {kind}"):
        prune(out, overwrite=True)

"""Mask files: saved by a run, applied to the dense model, and verified."""

import os
import sys

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

import wanda_fast
from tests.tiny_models import FAMILIES, save_checkpoint, token_ids
from wanda_fast import errors
from wanda_fast.cli import main as cli
from wanda_fast.output import masks

pytestmark = pytest.mark.usefixtures("short_pydoc")

CASES = [("wanda", "unstructured"), ("connect", "2:4"), ("magnitude", "unstructured"), ("wanda", "1:4")]


@pytest.fixture
def run(monkeypatch, capsys):
    """Run `wanda-fast`; returns (exit code, standard output, standard error)."""

    def run(*words):
        monkeypatch.setattr(sys, "argv", ["wanda-fast", *map(str, words)])
        with pytest.raises(SystemExit) as exit:
            cli.main()
        return exit.value.code or 0, *capsys.readouterr()

    return run


@pytest.fixture
def folders(tmp_path, pydoc_text, run):
    """(dense model, the same model pruned to 2:4, mask file of that run)."""
    dense, pruned, mask = tmp_path / "dense", tmp_path / "pruned", tmp_path / "mask.safetensors"
    save_checkpoint(FAMILIES["smollm"](), dense, pydoc_text[:20000])
    words = ["--dataset", "pydoc", "--nsamples", "2", "--seqlen", "32", "--eval-dataset", "none"]
    words += ["--sparsity_type", "2:4", "--save_model", pruned, "--save_mask", mask]
    code, _, _ = run("prune", "--model", dense, *words)
    assert code == 0
    return dense, pruned, mask


@pytest.mark.parametrize(("method", "pattern"), CASES)
@pytest.mark.parametrize("use_variant", [False, True])
def test_the_file_holds_the_kept_weights_as_little_endian_bits(method, pattern, use_variant, tmp_path):
    model, file = FAMILIES["opt_350m"](), tmp_path / "mask.safetensors"
    report = wanda_fast.prune(
        model, prune_method=method, sparsity_type=pattern, dataset=token_ids(model, 2, 32),
        use_variant=use_variant, save_mask=file,
    )  # fmt: skip
    packed = load_file(file)
    assert packed.keys() == {f"{name}.weight" for name in report.linears}
    for name, bits in packed.items():
        weight = model.get_parameter(name)
        expected = np.packbits((weight != 0).numpy(), axis=1, bitorder="little")
        assert np.array_equal(bits.numpy(), expected), name


def test_a_mask_file_is_replaced_as_a_whole_or_not_at_all(tmp_path, monkeypatch):
    model, file = FAMILIES["smollm"](), tmp_path / "mask.safetensors"
    options = dict(dataset=token_ids(model, 2, 32), save_mask=file, save_log=tmp_path / "log")
    wanda_fast.prune(model, **options)
    before, save_file = file.read_bytes(), masks.save_file

    def half_full(tensors, path, metadata):
        save_file(tensors, path, metadata)
        os.truncate(path, 100)
        raise OSError("no space left")

    with monkeypatch.context() as patch:
        patch.setattr(masks, "save_file", half_full)
        with pytest.raises(errors.OutputError, match="mask.safetensors cannot be written: no space left"):
            wanda_fast.prune(model, overwrite=True, sparsity_ratio=0.75, **options)
    assert file.read_bytes() == before and sorted(tmp_path.iterdir()) == [tmp_path / "log", file]
    report = wanda_fast.prune(model, overwrite=True, sparsity_ratio=0.75, **options)
    assert (
        file.read_bytes() != before and "0.75" in (tmp_path / "log").read_text() and report.sparsity == 0.75
    )


@pytest.mark.parametrize(
    "name", ["out/mask.safetensors", "out/masks/mask", "out.partial/mask", "log/../out/m"]
)
@pytest.mark.parametrize("streamed", [True, False])
def test_a_mask_file_in_the_models_folder_is_refused(name, streamed, tmp_path, pydoc_text, monkeypatch):
    """The folder is replaced as a whole, and its *.safetensors files would be read as weights."""
    monkeypatch.chdir(tmp_path)
    model = FAMILIES["smollm"]()
    if streamed:
        save_checkpoint(model, "dense", pydoc_text[:20000])
    there = sorted(tmp_path.iterdir())
    options = dict(dataset=token_ids(model, 2, 32), save_model="out", save_mask=name)
    with pytest.raises(errors.OutputError, match=f"mask file {name} is in out"):
        wanda_fast.prune("dense" if streamed else model, **options)
    assert sorted(tmp_path.iterdir()) == there
    wanda_fast.prune("dense" if streamed else model, **options | dict(save_mask="out.mask"))
    assert {"out", "out.mask"} == {path.name for path in tmp_path.iterdir()} - {"dense"}


def test_a_mask_applied_to_the_dense_model_gives_the_pruned_one(folders, run, tmp_path):
    dense, pruned, mask = folders
    again = tmp_path / "again"
    code, said, _ = run("apply-mask", dense, "--mask", mask, "--save_model", again)
    expected, got = load_file(pruned / "model.safetensors"), load_file(again / "model.safetensors")
    zeros = sum(int((expected[name] == 0).sum()) for name in load_file(mask))
    assert code == 0 and f"{zeros:,} weights set to zero" in said
    for name, weight in expected.items():
        assert torch.equal(got[name], weight), name


def test_an_output_that_a_kill_had_set_aside_is_not_replaced(folders, run, tmp_path):
    dense, _, mask = folders
    aside = tmp_path / "again.partial" / "replaced"
    aside.mkdir(parents=True)
    (aside / "file").touch()
    code, _, said = run("apply-mask", dense, "--mask", mask, "--save_model", tmp_path / "again")
    assert code == 2 and "is not empty (1 entries)" in said
    assert [path.name for path in (tmp_path / "again").iterdir()] == ["file"]


def test_verify(folders, run):
    dense, pruned, mask = folders
    assert run("verify", pruned, "--mask", mask)[0] == 0
    assert run("verify", pruned, "--pattern", "2:4")[0] == 0
    assert run("verify", pruned, "--pattern", "4:8")[0] == 0
    code, said, _ = run("verify", pruned, "--pattern", "1:4")
    assert code == 1 and "model.layers.0.self_attn.q_proj" in said and "groups over 1 of 4" in said
    code, said, _ = run("verify", dense, "--mask", mask)
    assert code == 1 and "model.layers.1.mlp.down_proj: 3,840 weights not zero" in said


def test_bad_masks_end_as_one_sentence(folders, run, tmp_path, pydoc_text):
    dense, _, mask = folders
    other, broken = tmp_path / "other", tmp_path / "broken.safetensors"
    save_checkpoint(FAMILIES["llama2"](), other, pydoc_text[:20000])
    broken.write_bytes(b"not a mask")
    for words, expected in (
        (("verify", dense, "--mask", broken), "broken.safetensors cannot be read"),
        (("verify", dense, "--mask", tmp_path / "none"), "none cannot be read"),
        (("verify", other, "--mask", mask), "the model needs uint8"),
        (("verify", dense), "either --mask FILE or --pattern N:M"),
        (("verify", dense, "--pattern", "unstructured"), "only N:M patterns can be verified"),
    ):
        code, _, said = run(*words)
        assert code == 2 and expected in said and "Traceback" not in said

"""Packing is lossless, what is packed reads as the dense model, and a broken file is one sentence."""

import json
import os
import re
import shutil
import signal
import subprocess
import sys

import numpy as np
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

import wanda_fast
from tests.wanda_fast.checkpoint.packed_folders import (
    contents,
    pruned,
    saved,
    saved_fused,
)
from wanda_fast import errors
from wanda_fast.checkpoint.load import load, tensor_files
from wanda_fast.checkpoint.meta_model import open_meta_model
from wanda_fast.checkpoint.packed import packing, writer

pytestmark = pytest.mark.usefixtures("one_thread")

UP = "model.layers.1.mlp.up_proj.weight"
INTEGERS = {2: np.uint16, 4: np.uint32}
CASES = [
    ("smollm", torch.bfloat16, "rows", 1),
    ("smollm", torch.float16, "2:4", 1),
    ("smollm", torch.float32, "uneven", 3),
    ("odd widths", torch.bfloat16, "rows", 1),
    ("odd widths", torch.float32, "uneven", 1),
    ("mixtral", torch.bfloat16, "rows", 4),
    ("gpt2", torch.float16, "rows", 1),
]


@pytest.mark.parametrize(("family", "dtype", "pattern", "shards"), CASES)
def test_unpacking_gives_the_same_bytes(family, dtype, pattern, shards, tmp_path):
    """Of every file: config.json, index, and headers of the weights with their order and padding too."""
    model = pruned(family, dtype, pattern)
    source = saved(model, tmp_path / "dense", shards)
    (source / "wanda_fast.json").write_text("{}")
    (source / "extra").mkdir()
    (source / "extra" / "notes.txt").write_bytes(b"\xff\x00\r\n")
    before = contents(source)
    sizes = wanda_fast.pack(source, tmp_path / "packed")
    wanda_fast.unpack(tmp_path / "packed", tmp_path / "again")
    assert contents(tmp_path / "again") == before == contents(source)
    assert {path.name for path in tmp_path.iterdir()} == {"dense", "packed", "again"}
    weights = len(list(source.glob("*.safetensors")))
    assert weights == 1 or shards > 1
    assert len(list((tmp_path / "packed").glob("packed*.safetensors"))) == weights
    assert not list((tmp_path / "packed").glob("model*"))
    assert sizes.packed == sizes.prunable > 0 and sizes.packed_bytes < 0.62 * sizes.dense_bytes


def test_a_packed_file_has_bits_and_values_and_all_else_as_it_was(tmp_path):
    for pattern in ("rows", "uneven"):
        source = saved(pruned("odd widths", torch.bfloat16, pattern), tmp_path / pattern)
        wanda_fast.pack(source, tmp_path / f"{pattern}-packed")
        dense = load_file(source / "model.safetensors")
        stored = load_file(tmp_path / f"{pattern}-packed" / "packed.safetensors")
        entry = json.loads((tmp_path / f"{pattern}-packed" / "config.json").read_text())[
            "quantization_config"
        ]
        assert (entry["quant_method"], entry["version"]) == ("wanda_packed", 1)
        assert set(entry["weights"]) == {name for name in dense if name.endswith("proj.weight")}
        for name, tensor in dense.items():
            if name not in entry["weights"]:
                assert torch.equal(stored.pop(name), tensor)
                continue
            words = tensor.view(torch.int16).numpy()
            counts = (words != 0).sum(-1)
            bits = stored.pop(f"{name}.bits").numpy()
            kept = np.unpackbits(bits, axis=-1, bitorder="little")[:, : words.shape[1]].astype(bool)
            values = stored.pop(f"{name}.values")
            assert entry["weights"][name] == {
                "shape": list(tensor.shape),
                "values": list(values.shape),
                "dtype": "bfloat16",
            }
            assert (values.view(torch.int16).numpy().ravel() == words[kept]).all()
            assert not words[~kept].any()
            if values.dim() == 1:
                offsets = stored.pop(f"{name}.offsets")
                assert offsets.tolist() == [0, *counts.cumsum()]
            else:
                assert (kept.sum(-1) == values.shape[1]).all()
        assert not stored


@pytest.mark.parametrize("family", ["mixtral", "qwen3_moe"])
def test_experts_that_are_one_tensor_are_packed_as_one(family, tmp_path):
    source = saved_fused(pruned(family, torch.bfloat16, "rows"), tmp_path / "dense")
    wanda_fast.pack(source, tmp_path / "packed")
    wanda_fast.unpack(tmp_path / "packed", tmp_path / "again")
    assert contents(tmp_path / "again") == contents(source)
    stored = load_file(tmp_path / "packed" / "packed.safetensors")
    experts = [name for name in stored if "experts" in name]
    assert len(experts) == 2 * 2 * 2 and {name.rpartition(".")[2] for name in experts} == {"bits", "values"}
    assert all(stored[name].dim() == 3 for name in experts)


def test_negative_zeros_and_nans_keep_their_bits(tmp_path):
    model = pruned("smollm", torch.bfloat16, "rows")
    words = model.model.layers[1].mlp.up_proj.weight.data.view(torch.int16)
    words[0, :3] = torch.tensor([-(2**15), 0x7FC1, -0x7F])
    source = saved(model, tmp_path / "dense")
    wanda_fast.pack(source, tmp_path / "packed")
    wanda_fast.unpack(tmp_path / "packed", tmp_path / "again")
    assert contents(tmp_path / "again") == contents(source)
    read = tensor_files(str(tmp_path / "packed"), None).read([UP])[UP]
    assert torch.equal(read.view(torch.int16), words)


def test_a_weight_that_would_get_no_smaller_stays(tmp_path):
    """One without zeros, and one with so few that the bits take as much as the zeros did."""
    model = pruned("smollm", torch.bfloat16, "rows")
    layers = model.model.layers
    layers[0].mlp.up_proj.weight.data.fill_(1.0)
    layers[1].mlp.up_proj.weight.data.fill_(1.0)[:, :3] = 0.0  # 3 of 48 columns: 6.25%
    layers[1].mlp.gate_proj.weight.data.fill_(1.0)[:, :4] = 0.0
    source = saved(model, tmp_path / "dense")
    sizes = wanda_fast.pack(source, tmp_path / "packed")
    stored = load_file(tmp_path / "packed" / "packed.safetensors")
    assert (sizes.packed, sizes.prunable) == (12, 14)
    assert {"model.layers.0.mlp.up_proj.weight", UP, "model.layers.1.mlp.gate_proj.weight.bits"} <= set(
        stored
    )


def test_sizes_are_those_of_the_files(tmp_path):
    model = pruned("smollm", torch.bfloat16, "rows")
    source = saved(model, tmp_path / "dense")
    sizes = wanda_fast.pack(source, tmp_path / "packed")
    weights = sum(p.numel() for name, p in model.named_parameters() if "_proj" in name)
    assert (sizes.dense_bytes, sizes.packed_bytes) == (2 * weights, weights + weights // 8)
    assert (sizes.prunable_bytes, sizes.prunable_numel) == (2 * weights, weights)
    assert sizes.before == (source / "model.safetensors").stat().st_size
    assert sizes.after == (tmp_path / "packed" / "packed.safetensors").stat().st_size
    assert sizes.quantised(8.5) == sizes.before - 2 * weights + weights * 8.5 / 8


@pytest.mark.parametrize("whole", [False, True])
def test_a_packed_model_is_pruned_and_saved_as_the_dense_one(whole, tmp_path, monkeypatch):
    """With other weights pruned than before: packed ones are read, restored and written dense."""
    source = saved(pruned("mixtral", torch.bfloat16, "uneven"), tmp_path / "dense", shards=2)
    wanda_fast.pack(source, tmp_path / "packed")
    if whole:
        monkeypatch.setattr("wanda_fast.run.inputs.open_meta_model", refuse_to_stream)
    for name in ("dense", "packed"):
        wanda_fast.prune(
            str(tmp_path / name),
            prune_method="magnitude",
            sparsity_ratio=0.7,
            eval_dataset=torch.arange(64),
            seqlen=16,
            device="cpu",
            save_model=tmp_path / f"{name}-pruned",
        )
    one, other = (contents(tmp_path / f"{name}-pruned") for name in ("dense", "packed"))
    assert one.keys() == other.keys() and "quantization_config" not in other["config.json"].decode()
    reports = [json.loads(files.pop("wanda_fast.json")) for files in (one, other)]
    assert one == other
    assert reports[0]["perplexity"] == reports[1]["perplexity"]
    assert reports[0]["digests"]["calibration"] == reports[1]["digests"]["calibration"]


def refuse_to_stream(*_):
    raise errors.NotStreamableError("the test says so")


@pytest.mark.parametrize("named", [True, False])
def test_a_packed_model_loads_whole_with_the_same_bits(named, tmp_path):
    """Whether config.json names a class of transformers, or the class follows from model_type."""
    source = saved(pruned("qwen3_moe", torch.float16, "rows"), tmp_path / "dense")
    if not named:
        config = json.loads((source / "config.json").read_text()) | {"architectures": ["OwnForCausalLM"]}
        (source / "config.json").write_text(json.dumps(config))
    wanda_fast.pack(source, tmp_path / "packed")
    one, other = (load(str(folder), device="any").model for folder in (source, tmp_path / "packed"))
    assert "quantization_config" not in other.config.to_dict()
    state = other.state_dict()
    for name, tensor in one.state_dict().items():
        assert torch.equal(tensor, state[name]) and tensor.dtype == state[name].dtype, name


def test_transformers_loads_what_pack_has_written_in_several_files(tmp_path):
    model = pruned("smollm", torch.float32, "rows")
    wanda_fast.pack(saved(model, tmp_path / "dense", 3), tmp_path / "packed")
    assert json.loads((tmp_path / "packed" / "config.json").read_text())["quantization_config"]["sharded"]
    loaded, ids = AutoModelForCausalLM.from_pretrained(tmp_path / "packed"), torch.arange(3, 12)[None]
    with torch.no_grad():
        torch.testing.assert_close(loaded(ids).logits, model(ids).logits, rtol=0, atol=1e-4)


def test_a_config_with_a_null_in_the_entrys_place_comes_back(tmp_path):
    source = saved(pruned("smollm", torch.bfloat16, "rows"), tmp_path / "dense")
    config = json.loads((source / "config.json").read_text())
    (source / "config.json").write_text(json.dumps(config | {"quantization_config": None}, indent=4))
    wanda_fast.pack(source, tmp_path / "packed")
    wanda_fast.unpack(tmp_path / "packed", tmp_path / "again")
    assert contents(tmp_path / "again") == contents(source)


def test_a_config_that_was_written_again_unpacks_with_its_keys(even, tmp_path):
    """As a program does that adds a setting: the other keys are not lost."""
    folder = shutil.copytree(even, tmp_path / "packed")
    config = json.loads((folder / "config.json").read_text())
    before = json.loads((even.parent / "dense" / "config.json").read_text())
    for text in (
        json.dumps(config),
        json.dumps(config, indent=2),
        json.dumps(dict(reversed(config.items()))),
    ):
        (folder / "config.json").write_text(text)
        wanda_fast.unpack(folder, tmp_path / "again", overwrite=True)
        assert json.loads((tmp_path / "again" / "config.json").read_text()) == before


@pytest.mark.parametrize("moment", range(3))
def test_a_killed_pack_leaves_nothing_and_starts_again(moment, tmp_path):
    """In a file, between two files, before the rename."""
    source = saved(pruned("smollm", torch.bfloat16, "rows"), tmp_path / "dense", shards=2)
    wanda_fast.pack(source, tmp_path / "unbroken")
    out = tmp_path / "out"
    pid = os.fork()
    if not pid:
        try:
            if moment == 0:
                writer.bytes_of = kill
            elif moment == 1:
                writer.TensorWriter.finish = kill
            else:
                packing.copy_surroundings = kill
            wanda_fast.pack(source, out)
        finally:
            os._exit(1)
    assert os.waitpid(pid, 0)[1] == signal.SIGKILL
    assert not out.exists() and (tmp_path / "out.partial").exists()
    wanda_fast.pack(source, out)
    assert contents(out) == contents(tmp_path / "unbroken")
    assert {path.name for path in tmp_path.iterdir()} == {"dense", "unbroken", "out"}


def kill(*_):
    os.kill(os.getpid(), signal.SIGKILL)


def test_overwrite_replaces_an_earlier_folder(even, tmp_path):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "old").touch()
    wanda_fast.pack(even.parent / "dense", tmp_path / "out", overwrite=True)
    assert contents(tmp_path / "out") == contents(even)


PLAIN = """
import sys, transformers
assert "wanda_fast" not in sys.modules
try:
    model = transformers.AutoModelForCausalLM.from_pretrained(sys.argv[1])
except OSError as error:
    print("refused:", error)
"""


def test_plain_transformers_refuses_a_packed_folder(even):
    """It skips the unknown format with a warning, so weights under its own file name would be made up."""
    ran = subprocess.run([sys.executable, "-c", PLAIN, even], capture_output=True, text=True)
    assert ran.returncode == 0, ran.stderr
    assert re.match("refused: .*model.safetensors", ran.stdout), (ran.stdout, ran.stderr)


def test_headers_of_packed_files_are_valid(even, tmp_path):
    """The library that everyone reads safetensors with opens them, and the room for the header is small."""
    file = even / "packed.safetensors"
    with safe_open(file, "pt") as opened:
        metadata, names = opened.metadata(), list(opened.keys())
    assert metadata["format"] == "pt" and metadata["source_file"] == "model.safetensors"
    save_file(load_file(file), tmp_path / "other.safetensors", metadata)
    assert set(load_file(tmp_path / "other.safetensors")) == set(names)
    assert file.stat().st_size < (tmp_path / "other.safetensors").stat().st_size + 4096


def test_the_meta_model_of_a_packed_folder_has_dense_shapes(even):
    files = open_meta_model(str(even)).files
    assert files.on_meta([UP])[UP].shape == (57, 44) and files.dtypes()[UP] == "BF16"
    assert not any(name.endswith((".bits", ".values")) for name in files.location)


def test_other_weights_in_the_folder_are_named(tmp_path, caplog):
    source = saved(pruned("smollm", torch.bfloat16, "rows"), tmp_path / "dense")
    shutil.copyfile(source / "model.safetensors", source / "consolidated.safetensors")
    wanda_fast.pack(source, tmp_path / "packed")
    assert "consolidated.safetensors is not copied to the output" in caplog.text
    assert not (tmp_path / "packed" / "consolidated.safetensors").exists()

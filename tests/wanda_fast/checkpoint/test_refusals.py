"""Checkpoints that are refused as they are opened: one sentence that names the file and what is wrong."""

import json
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file

from tests.tiny_models import FAMILIES, save_checkpoint
from wanda_fast import api, errors
from wanda_fast.checkpoint.load import load
from wanda_fast.cli.inspection import inspect

pytestmark = pytest.mark.usefixtures("short_pydoc")

BLOCK_FP8 = {"quant_method": "fp8", "fmt": "e4m3", "weight_block_size": [128, 128]}
LINEAR = "model.layers.1.mlp.up_proj"


@pytest.fixture(scope="module")
def llama(tmp_path_factory, pydoc_text):
    folder = tmp_path_factory.mktemp("llama")
    save_checkpoint(FAMILIES["llama2"](), folder, pydoc_text[:20000])
    return folder


@pytest.fixture
def folder(llama, tmp_path):
    return shutil.copytree(llama, tmp_path / "model")


def edit(file, **changes):
    content = json.loads(file.read_text()) if file.exists() else {}
    file.write_text(json.dumps(content | changes))


def edit_tensors(folder, **changes):
    file = folder / "model.safetensors"
    tensors = load_file(file) | {LINEAR + name: tensor for name, tensor in changes.items()}
    save_file(tensors, file, metadata={"format": "pt"})


def refused(folder, error, *words):
    """prune, eval, inspect and what apply-mask and verify load refuse the folder with the same sentence."""
    out, said = folder.with_name("out"), set()
    text = dict(dataset="pydoc", seqlen=32)
    for run in (
        lambda: api.prune(folder, **text, nsamples=2, eval_dataset=None, save_model=out),
        lambda: api.evaluate(str(folder), **text, eval_windows=1),
        lambda: inspect(str(folder)),
        lambda: load(str(folder), device="any"),
    ):
        with pytest.raises(error) as refusal:
            run()
        said.add(str(refusal.value))
    assert len(said) == 1, said
    sentence = said.pop()
    assert "\n" not in sentence and all(str(word) in sentence for word in words), sentence
    assert not out.exists() and not folder.with_name("out.partial").exists()


METHODS = ("fp8", "mxfp4", "gptq", "awq", "bitsandbytes", "compressed-tensors", "torchao", "unheard-of")


@pytest.mark.parametrize("method", METHODS)
def test_every_quantisation_config(method, folder):
    edit(folder / "config.json", quantization_config={"quant_method": method, "bits": 4})
    refused(folder, errors.QuantizedModelError, folder, method, "quantization_config in config.json")


def test_a_quantisation_config_of_another_place(folder):
    edit(folder / "config.json", text_config={"quantization_config": BLOCK_FP8})
    refused(folder, errors.QuantizedModelError, "fp8", "quantization_config in text_config of config.json")


def test_mlx_names_its_bits(folder):
    edit(folder / "config.json", quantization={"group_size": 64, "bits": 4})
    refused(folder, errors.QuantizedModelError, "4 bits", "quantization in config.json")


def test_a_quantisation_file_beside_the_configuration(folder):
    edit(folder / "hf_quant_config.json", quantization={"quant_algo": "NVFP4"})
    refused(folder, errors.QuantizedModelError, "NVFP4", "hf_quant_config.json")


@pytest.mark.parametrize("dtype", [torch.float8_e4m3fn, torch.float8_e5m2, torch.uint8, torch.int8])
def test_weights_of_eight_bits_without_a_configuration(dtype, folder):
    weight = load_file(folder / "model.safetensors")[f"{LINEAR}.weight"]
    edit_tensors(folder, **{".weight": weight.to(dtype)})
    refused(folder, errors.QuantizedModelError, f"{LINEAR}.weight in model.safetensors")


@pytest.mark.parametrize(
    "name", [".weight_scale", ".weight_scale_inv", ".qzeros", "_scales", ".weight.absmax"]
)
def test_scales_that_the_model_does_not_take(name, folder):
    edit_tensors(folder, **{name: torch.ones(4)})
    refused(folder, errors.QuantizedModelError, folder, f"{LINEAR}{name}", "does not use")


@pytest.mark.parametrize("name", [".bias_table", ".logit_scale", ".layer_scale"])
def test_other_tensors_that_the_model_does_not_take_are_no_reason(name, folder):
    edit_tensors(folder, **{name: torch.ones(4)})
    assert inspect(str(folder)).blocks == ["model.layers.0", "model.layers.1"]


def test_a_mask_buffer_of_bytes_is_no_weight(folder):
    """Old GPT checkpoints hold their causal masks."""
    edit_tensors(folder, **{".bias": torch.ones(1, 1, 8, 8, dtype=torch.uint8)})
    assert inspect(str(folder)).blocks == ["model.layers.0", "model.layers.1"]


def test_the_folder_of_an_adapter(tmp_path):
    adapter = tmp_path / "adapter"
    adapter.mkdir()
    edit(adapter / "adapter_config.json", peft_type="LORA", base_model_name_or_path="org/base")
    save_file({"base_model.lora_A.weight": torch.ones(4, 4)}, adapter / "adapter_model.safetensors")
    words = (
        "LORA adapter of org/base",
        "adapter_config.json",
        "merge the adapter first",
        "merge_and_unload()",
    )
    refused(adapter, errors.AdapterError, adapter, *words)


def test_an_adapter_beside_a_model(folder):
    edit(folder / "adapter_config.json", peft_type="LORA")
    refused(folder, errors.AdapterError, "LORA adapter", "merge the adapter first")


def test_a_model_that_was_saved_with_its_adapter_in_it(folder):
    edit_tensors(folder, **{".lora_A.default.weight": torch.ones(4, 64)})
    refused(folder, errors.AdapterError, f"{LINEAR}.lora_A.default.weight", "merge the adapter first")


def test_a_model_whose_weights_are_under_an_adapters_names(folder):
    """`save_pretrained` of the model inside of a PeftModel."""
    tensors = load_file(folder / "model.safetensors")
    tensors[f"{LINEAR}.base_layer.weight"] = tensors.pop(f"{LINEAR}.weight")
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    refused(folder, errors.AdapterError, f"{LINEAR}.base_layer.weight", "merge the adapter first")


def test_code_of_the_repository_is_neither_run_nor_asked_about(folder, monkeypatch):
    monkeypatch.setattr("builtins.input", lambda *_: pytest.fail("asked"))
    classes = {"AutoConfig": "own.Config", "AutoModelForCausalLM": "own.Model"}
    edit(folder / "config.json", model_type="own", auto_map=classes)
    (folder / "own.py").write_text("raise SystemExit('the code was run')\n")
    words = ("own.Model", "never runs", "trust_remote_code=True", "wanda_fast.prune(model")
    refused(folder, errors.CheckpointError, folder, *words)


def test_a_known_model_that_also_brings_code_is_loaded_by_transformers_own(folder):
    edit(folder / "config.json", auto_map={"AutoModelForCausalLM": "own.Model"})
    assert inspect(str(folder)).model == "LlamaForCausalLM"


ODD = {
    "padding beyond the vocabulary": (
        dict(pad_token_id=320),
        ["pad_token_id", "is 320", "vocabulary of 320"],
    ),
    "padding below the vocabulary": (dict(pad_token_id=-321), ["is -321", "vocabulary of 320"]),
    "no such dtype": (dict(dtype="bfloat17"), ["dtype in config.json is 'bfloat17'"]),
    "a function's name for a dtype": (dict(dtype="load"), ["'load'"]),
    "a dtype of integers": (dict(dtype="int8"), ["'int8'"]),
    "a dtype with its module": (dict(dtype="torch.bfloat16"), ["'torch.bfloat16'"]),
    "no such activation": (dict(hidden_act="nonesuch"), ["KeyError: 'nonesuch'"]),
    "no heads": (dict(num_attention_heads=0), ["cannot be loaded"]),
    "a negative size": (dict(intermediate_size=-1), ["cannot be loaded"]),
    "a size that is text": (dict(hidden_size="many"), ["cannot be loaded"]),
    "a list for a number": (dict(num_key_value_heads=[2]), ["cannot be loaded"]),
    "layers of an unknown kind": (dict(layer_types=["x", "y"]), ["validate_layer_type", "full_attention"]),
    "no such model": (dict(model_type="nonesuch"), ["nonesuch"]),
}


@pytest.mark.parametrize("case", ODD)
def test_a_configuration_that_no_model_can_be_made_of(case, folder):
    changes, words = ODD[case]
    edit(folder / "config.json", **changes)
    refused(folder, errors.CheckpointError, folder, *words)


def test_a_padding_token_beyond_the_vocabulary_of_a_model_that_does_not_look_it_up(tmp_path, pydoc_text):
    folder = tmp_path / "model"
    save_checkpoint(FAMILIES["gpt_neox"](), folder, pydoc_text[:20000])
    edit(folder / "config.json", pad_token_id=320)
    assert len(inspect(str(folder)).blocks) == 2


def shards(folder):
    """The folder's tensors in two shards; returns the second."""
    tensors = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    names = {"model-00001-of-00002.safetensors": [], "model-00002-of-00002.safetensors": []}
    for index, name in enumerate(sorted(tensors)):
        list(names.values())[index * 2 // len(tensors)].append(name)
    for file, held in names.items():
        save_file({name: tensors[name] for name in held}, folder / file, metadata={"format": "pt"})
    weight_map = {name: file for file, held in names.items() for name in held}
    edit(folder / "model.safetensors.index.json", metadata={}, weight_map=weight_map)
    return folder / "model-00002-of-00002.safetensors"


@pytest.mark.parametrize("lost", [1, 4000])
def test_a_truncated_shard_is_found_before_the_work(lost, folder):
    shard = shards(folder)
    size = shard.stat().st_size
    with shard.open("r+b") as opened:
        opened.truncate(size - lost)
    refused(folder, errors.CheckpointError, shard, "truncated", f"{size - lost} bytes", size)


@pytest.mark.parametrize("header", ["[1]", '{"a": 1}', '{"a": {"dtype": "F32"}}', "{"])
def test_a_header_of_another_form(header, folder):
    file = folder / "model.safetensors"
    file.write_bytes(len(header).to_bytes(8, "little") + header.encode())
    refused(folder, errors.CheckpointError, file, "not a safetensors file")


@pytest.mark.parametrize("name", ["model-00002-of-00002.safetensors", "tokenizer.json", "config.json"])
def test_a_git_lfs_pointer(name, folder):
    shards(folder)
    (folder / name).write_text("version https://git-lfs.github.com/spec/v1\noid sha256:12\nsize 34\n")
    refused(folder, errors.CheckpointError, folder / name, "git-lfs pointer", "git lfs pull")

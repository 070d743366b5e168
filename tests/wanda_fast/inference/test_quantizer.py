"""`from_pretrained` of a packed folder against the dense model: logits, tokens, memory, refusals."""

import json
import shutil
import subprocess
import sys

import pytest
import torch
import transformers as hf
from safetensors.torch import load_file, save_file
from torch import nn
from transformers.quantizers import auto

import wanda_fast  # noqa: F401, registers the quantizer
from tests import tiny_models
from tests.wanda_fast.inference import packed_by_hand
from wanda_fast.errors import CheckpointError, PackedModelError, QuantizedModelError
from wanda_fast.inference.packed_linear import PackedLinear
from wanda_fast.inference.registration import METHOD, register_with_transformers

pytestmark = pytest.mark.usefixtures("one_thread")

AUTO = hf.AutoModelForCausalLM
Q_PROJ = "model.layers.0.self_attn.q_proj.weight"


def packed_folder(name, tmp_path, dtype=torch.float32, uneven=(), **save):
    """A family's pruned model, dense, and a folder with the same model packed."""
    model = packed_by_hand.prune_(tiny_models.build(name), uneven=uneven).to(dtype)
    model.save_pretrained(tmp_path / "dense", **save)
    packed_by_hand.pack(tmp_path / "dense", tmp_path / "packed")
    return model, tmp_path / "packed"


def in_cache(folder, cache, name, revision):
    """Copy a folder to where the hub's client keeps a repository's files."""
    home = cache / f"models--{name.replace('/', '--')}"
    shutil.copytree(folder, home / "snapshots" / ("0" * 40))
    (home / "refs").mkdir()
    (home / "refs" / revision).write_text("0" * 40)


def packed_linears(model):
    return [module for module in model.modules() if isinstance(module, PackedLinear)]


def require_same(loaded, dense, atol=1e-4):
    ids = tiny_models.token_ids(dense, 2, 9)
    with torch.no_grad():
        for each in (ids, ids[:1, :3]):  # more rows than the packed product takes, and fewer
            torch.testing.assert_close(loaded(each).logits, dense(each).logits, rtol=0, atol=atol)


# Untied and tied heads, bias, gate and up in one linear, projections of the embedding.
@pytest.mark.parametrize("name", ["llama2", "smollm", "qwen2", "phi3", "opt_350m"])
def test_every_linear_of_the_blocks_stays_packed(name, tmp_path):
    dense, folder = packed_folder(name, tmp_path)
    loaded = AUTO.from_pretrained(folder)
    linears = [
        name for name, module in dense.named_modules() if isinstance(module, nn.Linear) and "layers." in name
    ]
    assert len(packed_linears(loaded)) == len(linears)
    require_same(loaded, dense)
    ids = tiny_models.token_ids(dense, 2, 5)
    greedy = dict(max_new_tokens=8, do_sample=False, pad_token_id=2)
    assert torch.equal(loaded.generate(ids, **greedy), dense.generate(ids, **greedy))


def test_uneven_rows_in_several_files(tmp_path):
    dense, folder = packed_folder("llama2", tmp_path, uneven=("q_proj", "down_proj"), max_shard_size="100KB")
    assert len(list(folder.glob("packed-*.safetensors"))) > 2
    loaded = AUTO.from_pretrained(folder)
    assert loaded.get_submodule(Q_PROJ.removesuffix(".weight")).offsets is not None
    require_same(loaded, dense)
    require_same(AUTO.from_pretrained(tmp_path, subfolder="packed"), dense)
    in_cache(folder, tmp_path / "cache", "me/packed", revision="v2")
    require_same(AUTO.from_pretrained("me/packed", cache_dir=tmp_path / "cache", revision="v2"), dense)


@pytest.mark.parametrize(("stored", "asked"), [(torch.bfloat16, None), (torch.bfloat16, torch.float32)])
def test_values_have_the_models_dtype(stored, asked, tmp_path):
    dense, folder = packed_folder("llama2", tmp_path, dtype=stored)
    loaded = AUTO.from_pretrained(folder, **{"dtype": asked} if asked else {})
    assert {module.values.dtype for module in packed_linears(loaded)} == {asked or stored}
    if asked:
        require_same(loaded, AUTO.from_pretrained(tmp_path / "dense", dtype=asked))
    else:
        states = loaded.dequantize().state_dict()
        assert all(torch.equal(states[name], tensor) for name, tensor in dense.state_dict().items())


def test_a_dtype_without_packed_products_is_refused(tmp_path):
    _, folder = packed_folder("llama2", tmp_path)
    with pytest.raises(PackedModelError, match="multiply in float32, float16, bfloat16, not torch.float64"):
        AUTO.from_pretrained(folder, dtype=torch.float64)


@pytest.mark.parametrize("name", ["mixtral", "qwen3_moe"])
def test_experts_in_one_parameter_are_unpacked_with_a_warning(name, tmp_path, caplog):
    dense, folder = packed_folder(name, tmp_path, uneven=("experts.down_proj",))
    loaded = AUTO.from_pretrained(folder)
    assert len(packed_linears(loaded)) == 8
    assert len([record for record in caplog.records if "8 weights stay packed" in record.message]) == 1
    assert loaded.config.quantization_config.weights.keys() == {
        f"model.layers.{layer}.self_attn.{which}_proj.weight" for layer in (0, 1) for which in "qkvo"
    }
    require_same(loaded, dense)


def test_transposed_weights_are_unpacked(tmp_path):
    dense = tiny_models.build("gpt2")
    for block in dense.transformer.h:
        block.mlp.c_fc.weight.data[::2] = 0
    dense.save_pretrained(tmp_path / "dense")
    packed_by_hand.pack(tmp_path / "dense", tmp_path / "packed")
    loaded = AUTO.from_pretrained(tmp_path / "packed")
    assert not packed_linears(loaded)
    require_same(loaded, dense)


def test_the_model_without_its_head(tmp_path):
    dense, folder = packed_folder("llama2", tmp_path)
    loaded = hf.AutoModel.from_pretrained(folder)
    ids = tiny_models.token_ids(dense, 1, 9)
    with torch.no_grad():
        expected, got = dense.model(ids).last_hidden_state, loaded(ids).last_hidden_state
    assert len(packed_linears(loaded)) == 14
    torch.testing.assert_close(got, expected, rtol=0, atol=1e-4)


def test_a_pruned_head_stays_packed(tmp_path):
    dense = packed_by_hand.prune_(tiny_models.build("llama2"))
    dense.lm_head.weight.data[:, ::2] = 0
    dense.save_pretrained(tmp_path / "dense")
    packed_by_hand.pack(tmp_path / "dense", tmp_path / "packed")
    loaded = AUTO.from_pretrained(tmp_path / "packed")
    assert isinstance(loaded.lm_head, PackedLinear)
    require_same(loaded, dense)


def test_device_map(tmp_path):
    dense, folder = packed_folder("llama2", tmp_path)
    loaded = AUTO.from_pretrained(folder, device_map="auto")
    assert len(packed_linears(loaded)) == 14
    if not torch.cuda.is_available():
        require_same(loaded, dense)


def test_dequantized_model_is_the_dense_one_and_can_be_saved(tmp_path):
    dense, folder = packed_folder("mixtral", tmp_path)
    loaded = AUTO.from_pretrained(folder).dequantize()
    assert not packed_linears(loaded) and all(each.requires_grad for each in loaded.parameters())
    loaded.save_pretrained(tmp_path / "again")
    before, after = (load_file(tmp_path / each / "model.safetensors") for each in ("dense", "again"))
    assert before.keys() == after.keys() and all(torch.equal(before[name], after[name]) for name in before)
    assert "quantization_config" not in json.loads((tmp_path / "again" / "config.json").read_text())


def test_dequantized_weights_keep_the_dtype_that_they_have(tmp_path):
    _, folder = packed_folder("qwen2", tmp_path, dtype=torch.bfloat16)
    loaded = AUTO.from_pretrained(folder).to(torch.float32).dequantize()
    assert {parameter.dtype for parameter in loaded.parameters()} == {torch.float32}
    require_same(loaded, AUTO.from_pretrained(tmp_path / "dense", dtype=torch.float32))
    asked = AUTO.from_pretrained(folder).dequantize(dtype=torch.float16)
    linears = [module for name, module in asked.named_modules() if name.endswith("_proj")]
    assert {each.dtype for linear in linears for each in linear.parameters()} == {torch.float16}


def test_saving_is_refused_before_a_file_is_written(tmp_path):
    loaded = AUTO.from_pretrained(packed_folder("llama2", tmp_path)[1])
    with pytest.raises(PackedModelError, match="copy its folder, or save model.dequantize"):
        loaded.save_pretrained(tmp_path / "again")
    assert not (tmp_path / "again").exists()


def test_training_is_refused(tmp_path):
    loaded = AUTO.from_pretrained(packed_folder("llama2", tmp_path)[1])
    assert not any(parameter.requires_grad for parameter in loaded.parameters())
    arguments = hf.TrainingArguments(tmp_path / "out", report_to=[], use_cpu=True)
    with pytest.raises(ValueError, match="quantized"):
        hf.Trainer(loaded, arguments)
    ids = tiny_models.token_ids(loaded, 1, 12)
    loaded.requires_grad_(True).train()
    with pytest.raises(PackedModelError, match="a packed model cannot be trained"):
        loaded(ids, labels=ids).loss.backward()


def test_a_packed_model_in_memory_is_pruned_when_it_is_dense_again(tmp_path):
    dense, folder = packed_folder("llama2", tmp_path)
    loaded = AUTO.from_pretrained(folder)
    options = dict(prune_method="magnitude", sparsity_ratio=0.75, eval_dataset=None)
    with pytest.raises(QuantizedModelError, match="LlamaForCausalLM has packed weights: model.dequantize"):
        wanda_fast.prune(loaded, **options)
    wanda_fast.prune(loaded.dequantize(), **options)
    wanda_fast.prune(dense, **options)
    assert all(
        torch.equal(one, other) for one, other in zip(loaded.parameters(), dense.parameters(), strict=True)
    )


def edited(folder, edit):
    """Change the tensors of a packed file."""
    tensors = load_file(folder / "packed.safetensors")
    edit(tensors)
    save_file(tensors, folder / "packed.safetensors", metadata={"format": "pt"})


def drop(tensors):
    del tensors[f"{Q_PROJ}.bits"]


def narrow(tensors):
    tensors[f"{Q_PROJ}.values"] = tensors[f"{Q_PROJ}.values"][:, 1:].clone()


def flip(tensors):
    tensors[f"{Q_PROJ}.bits"][5, 1] ^= 16


@pytest.mark.parametrize(
    ("edit", "sentence"),
    [
        (drop, "q_proj.weight.bits is absent"),
        (narrow, r"values is F32 \[64, 31\]"),
        (flip, "row 5 has 3[13] ones"),
    ],
)
def test_a_damaged_file_is_one_sentence(edit, sentence, tmp_path):
    _, folder = packed_folder("llama2", tmp_path)
    edited(folder, edit)
    with pytest.raises(CheckpointError, match=sentence):
        AUTO.from_pretrained(folder)


def test_a_truncated_file_is_one_sentence(tmp_path):
    _, folder = packed_folder("llama2", tmp_path)
    file = folder / "packed.safetensors"
    file.write_bytes(file.read_bytes()[:-8])
    with pytest.raises(CheckpointError, match="is truncated"):
        AUTO.from_pretrained(folder)


def test_a_damaged_expert_is_one_sentence(tmp_path):
    _, folder = packed_folder("mixtral", tmp_path)
    expert = "model.layers.1.block_sparse_moe.experts.2.w1.weight"
    edited(folder, lambda tensors: tensors[f"{expert}.bits"][3, 0].bitwise_xor_(1))
    with pytest.raises(CheckpointError, match=f"{expert} is broken: row 3 has 3[13] ones"):
        AUTO.from_pretrained(folder)


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        ({"version": 2}, "version 2"),
        ({"weights": None}, "describes no packed weight"),
        ({"weights": {Q_PROJ: {"shape": [64]}}}, "describes"),
    ],
)
def test_a_configuration_that_says_something_else_is_one_sentence(change, sentence, tmp_path):
    _, folder = packed_folder("llama2", tmp_path)
    about = json.loads((folder / "config.json").read_text())["quantization_config"]
    packed_by_hand.configure(folder, about | change)
    with pytest.raises(CheckpointError, match=sentence):
        AUTO.from_pretrained(folder)


def test_a_model_of_other_sizes_is_one_sentence(tmp_path):
    _, folder = packed_folder("llama2", tmp_path)
    config = json.loads((folder / "config.json").read_text()) | {"intermediate_size": 168}
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(CheckpointError, match=r"down_proj.weight is \[64, 160\] by config.json, \[64, 168\]"):
        AUTO.from_pretrained(folder)


def test_experts_packed_in_part_are_refused(tmp_path):
    dense = packed_by_hand.prune_(tiny_models.build("mixtral"))
    dense.model.layers[0].mlp.experts.down_proj.data[1] = 1.5
    dense.save_pretrained(tmp_path / "dense")
    packed_by_hand.pack(tmp_path / "dense", tmp_path / "packed")
    with pytest.raises(PackedModelError, match="merges .*which is not: unpack .*wanda-fast unpack"):
        AUTO.from_pretrained(tmp_path / "packed")


@pytest.fixture
def unregistered(monkeypatch):
    for mapping in (auto.AUTO_QUANTIZATION_CONFIG_MAPPING, auto.AUTO_QUANTIZER_MAPPING):
        monkeypatch.delitem(mapping, METHOD)


@pytest.mark.usefixtures("unregistered")
def test_without_this_package_the_folder_is_refused(tmp_path):
    _, folder = packed_folder("llama2", tmp_path)
    with pytest.raises(OSError, match="no file named model.safetensors"):
        AUTO.from_pretrained(folder)


@pytest.mark.usefixtures("unregistered")
def test_registered_after_transformers_was_imported(tmp_path):
    register_with_transformers()
    assert len(packed_linears(AUTO.from_pretrained(packed_folder("llama2", tmp_path)[1]))) == 14


def test_import_registers_without_importing_transformers():
    code = """
import sys, wanda_fast
assert "transformers" not in sys.modules
from transformers.quantizers import auto
assert "wanda_packed" in auto.AUTO_QUANTIZATION_CONFIG_MAPPING
assert "wanda_packed" in auto.AUTO_QUANTIZER_MAPPING
"""
    subprocess.run([sys.executable, "-c", code], check=True)

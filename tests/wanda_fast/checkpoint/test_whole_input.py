"""What goes in comes out: only pruned weights change. Tensors, names, dtypes and files around them stay."""

import json

import pytest
import torch
import transformers as hf
from safetensors.torch import load_file, save_file
from typer.testing import CliRunner

import wanda_fast
from tests.tiny_models import FAMILIES, GQA, save_checkpoint
from wanda_fast import errors
from wanda_fast.checkpoint.surroundings import config_with_dtype
from wanda_fast.cli.main import app
from wanda_fast.run import inputs

pytestmark = pytest.mark.usefixtures("one_thread")

# gpt_neox's names are converted as it loads, mixtral's experts are merged.
TEN = ("llama2", "smollm", "qwen3", "gemma2", "gemma3", "opt", "phi3", "glm4", "gpt_neox", "mixtral")
EXTRA = {
    "mtp.layers.0.mlp.up_proj.weight": torch.arange(6, dtype=torch.float16).view(2, 3),
    "model.layers.0.self_attn.rotary_emb.inv_freq": torch.arange(8) / 7,
    "vision.patch_embed.weight": torch.tensor([[1 + 2**-40]], dtype=torch.float64),
    "vision.position_ids": torch.arange(5),
    "score.weight": torch.full((1, 64), -0.0, dtype=torch.bfloat16),
}
SMALL_FILES = ("LICENSE", "NOTICE.txt", "README.md", "tokenizer.model", "special_tokens_map.json")
SMALL_FILES += ("added_tokens.json", "preprocessor_config.json", "chat_template.jinja", "modules.json")
SMALL_FILES += ("1_Pooling/config.json",)
WEIGHTS = ("model.safetensors", "pytorch_model.bin")


def tensors_of(folder):
    return {key: tensor for file in folder.glob("*.safetensors") for key, tensor in load_file(file).items()}


def files_in(folder):
    """All files but weights."""
    return [file for file in folder.rglob("*") if file.is_file() and file.name not in WEIGHTS]


def add_surroundings(folder):
    """Tensors of other parts, small files, a weight file of another format, a configuration of version 4."""
    file = next(iter(sorted(folder.glob("*.safetensors"))))
    save_file(load_file(file) | EXTRA, file, {"format": "pt"})
    for name in SMALL_FILES:
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_bytes(b"{}" if name.endswith("json") else b"\xff\x00\r\n")
    (folder / "pytorch_model.bin").write_bytes(b"dense")
    config = json.loads((folder / "config.json").read_text())
    config["torch_dtype"] = config.pop("dtype")
    config |= {"transformers_version": "4.45.0", "a key of the user's": "ü"}
    (folder / "config.json").write_text(json.dumps(config, ensure_ascii=False, indent=4), "utf-8")


def prune(folder, out, whole=False, **options):
    with pytest.MonkeyPatch.context() as patch:
        if whole:
            patch.setattr(inputs, "open_meta_model", refuse)
        options = dict(dataset=torch.arange(3, 99).view(2, 48), eval_dataset=None, device="cpu") | options
        return wanda_fast.prune(str(folder), save_model=out, **options)


def refuse(*_arguments):
    raise errors.NotStreamableError("the test says so")


def same_bits(one, other):
    return one.dtype == other.dtype and torch.equal(
        one.flatten().view(torch.uint8), other.flatten().view(torch.uint8)
    )


# What an expert's matrices are called in Mixtral's files.
MIXTRAL = {"gate_proj": "w1", "up_proj": "w3", "down_proj": "w2"}


def assert_only_zeros_differ(before, after, pruned):
    """`pruned`: names of linears."""
    assert after.keys() == before.keys()
    changed = {name for name in before if not same_bits(before[name], after[name])}
    kinds = {MIXTRAL.get(name.rpartition(".")[2], name.rpartition(".")[2]) for name in pruned}
    kinds |= {name.rpartition(".")[2] for name in pruned}
    assert changed and {name.rpartition(".")[0].rpartition(".")[2] for name in changed} <= kinds
    for name in changed:
        kept = after[name] != 0
        assert after[name].dtype == before[name].dtype
        assert same_bits(after[name][kept], before[name][kept]), name


@pytest.mark.parametrize("whole", [False, True], ids=["streamed", "whole"])
@pytest.mark.parametrize("family", TEN)
def test_only_zeros_are_new(family, whole, tmp_path, pydoc_text):
    folder, out = tmp_path / "in", tmp_path / "out"
    save_checkpoint(FAMILIES[family]().bfloat16(), folder, pydoc_text[:2000])
    add_surroundings(folder)
    report = prune(folder, out, whole, sparsity_type="2:4")
    assert_only_zeros_differ(tensors_of(folder), tensors_of(out), report.linears)
    files = {str(p.relative_to(folder)): p for p in files_in(folder)}
    for name, file in files.items():
        assert (out / name).read_bytes() == file.read_bytes(), name
    written = {str(p.relative_to(out)) for p in files_in(out)}
    assert written == files.keys() | {"wanda_fast.json"}
    assert sorted(report.copied["tensors"]) == sorted(EXTRA)
    assert set(report.copied["files"]) == files.keys() - {"config.json"}
    copied = json.loads((out / "wanda_fast.json").read_text())["copied"]
    assert copied == report.copied


def test_a_mask_is_applied_to_the_whole_input(tmp_path, pydoc_text):
    folder, out, mask = tmp_path / "in", tmp_path / "out", tmp_path / "mask"
    save_checkpoint(FAMILIES["smollm"]().bfloat16(), folder, pydoc_text[:2000])
    add_surroundings(folder)
    report = prune(folder, tmp_path / "pruned", sparsity_type="2:4", save_mask=mask)
    words = ["apply-mask", str(folder), "--mask", str(mask), "--save-model", str(out)]
    assert CliRunner().invoke(app, words).exit_code == 0
    assert_only_zeros_differ(tensors_of(folder), tensors_of(out), report.linears)
    assert (out / "tokenizer.model").read_bytes() == (folder / "tokenizer.model").read_bytes()
    assert (out / "config.json").read_bytes() == (folder / "config.json").read_bytes()


def text_and_images():
    """A vision tower beside a language model; AutoModelForCausalLM takes the latter alone."""
    text = dict(GQA, num_hidden_layers=2, head_dim=16, linear_num_key_heads=2, linear_num_value_heads=4)
    text |= dict(linear_key_head_dim=16, linear_value_head_dim=16)
    vision = dict(depth=1, hidden_size=32, intermediate_size=64, num_heads=2, out_hidden_size=64)
    vision |= dict(patch_size=14, num_position_embeddings=16)
    ids = dict(image_token_id=5, video_token_id=6, vision_start_token_id=7, vision_end_token_id=8)
    return hf.Qwen3_5ForConditionalGeneration(hf.Qwen3_5Config(text_config=text, vision_config=vision, **ids))


def reward_model(**options):
    return hf.LlamaForSequenceClassification(hf.LlamaConfig(**GQA, num_labels=1, **options))


@pytest.mark.parametrize("whole", [False, True], ids=["streamed", "whole"])
@pytest.mark.parametrize("make", [text_and_images, reward_model], ids=["images", "reward"])
def test_a_checkpoint_is_opened_as_the_class_that_it_names(make, whole, tmp_path):
    folder, out = tmp_path / "in", tmp_path / "out"
    model = make().bfloat16()
    model.save_pretrained(folder)
    evaluation = dict(eval_dataset=torch.arange(3, 99), seqlen=48)
    report = prune(folder, out, whole, **evaluation)
    assert_only_zeros_differ(tensors_of(folder), tensors_of(out), report.linears)
    assert all("vis" not in name for name in report.linears) and len(report.linears) > 8
    assert type(model).from_pretrained(out).config.architectures == [type(model).__name__]
    sentence = "LlamaForSequenceClassification predicts no tokens: it has no perplexity"
    assert (sentence in report.warnings) == (make is reward_model) == ("pruned" not in report.perplexity)
    if make is reward_model:
        with pytest.raises(errors.CalibrationError, match=sentence):
            prune(folder, None, prune_method="dense", **evaluation)


@pytest.mark.parametrize(
    "changes, message",
    [
        (
            dict(architectures=["NoSuchHead"]),
            "a NoSuchHead, a class that transformers .* does not have",
        ),
        (
            dict(architectures=["T5ForConditionalGeneration"], model_type="t5", is_encoder_decoder=True),
            "in is a T5ForConditionalGeneration, an encoder and a decoder",
        ),
    ],
    ids=["unknown", "encoder-decoder"],
)
def test_a_class_that_cannot_be_pruned_is_refused(changes, message, tmp_path):
    FAMILIES["smollm"]().save_pretrained(tmp_path / "in")
    config = json.loads((tmp_path / "in" / "config.json").read_text())
    (tmp_path / "in" / "config.json").write_text(json.dumps(config | changes))
    with pytest.raises(errors.CheckpointError, match=message):
        prune(tmp_path / "in", tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("whole", [False, True], ids=["streamed", "whole"])
def test_a_requested_dtype_is_all_that_changes_in_the_configuration(whole, tmp_path, pydoc_text):
    folder, out = tmp_path / "in", tmp_path / "out"
    save_checkpoint(FAMILIES["llama3"](), folder, pydoc_text[:2000])
    add_surroundings(folder)
    prune(folder, out, whole, dtype="bfloat16")
    before, after = (json.loads((path / "config.json").read_text("utf-8")) for path in (folder, out))
    assert list(after) == list(before) and after == before | {"torch_dtype": "bfloat16"}
    dense, pruned = tensors_of(folder), tensors_of(out)
    for name, tensor in pruned.items():
        kept = name in EXTRA or not tensor.is_floating_point()
        assert tensor.dtype == (dense[name].dtype if kept else torch.bfloat16), name


def test_the_dtype_of_a_configuration():
    config = b'{"b": 1, "text_config": {"dtype": "float32"}, "a": "x"}'
    assert config_with_dtype(config, None) == config
    changed = json.loads(config_with_dtype(config, torch.float16))
    assert changed == {
        "b": 1,
        "text_config": {"dtype": "float16"},
        "a": "x",
        "torch_dtype": "float16",
    }
    same = b'{ "dtype":"float16"}'
    assert config_with_dtype(same, torch.float16) == same


def test_tied_weights_under_two_names_keep_both(tmp_path, pydoc_text):
    folder = tmp_path / "in"
    save_checkpoint(FAMILIES["smollm"]().bfloat16(), folder, pydoc_text[:2000])
    stored = load_file(folder / "model.safetensors")
    stored["lm_head.weight"] = stored["model.embed_tokens.weight"].clone()
    save_file(stored, folder / "model.safetensors", {"format": "pt"})
    for whole in (False, True):
        report = prune(folder, tmp_path / f"out{whole}", whole)
        assert_only_zeros_differ(stored, tensors_of(tmp_path / f"out{whole}"), report.linears)
        assert report.copied["tensors"] == []


def test_tensors_of_other_dtypes_keep_their_bits_in_a_model_loaded_whole(tmp_path, pydoc_text):
    folder, out = tmp_path / "in", tmp_path / "out"
    save_checkpoint(FAMILIES["smollm"]().bfloat16(), folder, pydoc_text[:2000])
    stored = load_file(folder / "model.safetensors")
    for name in stored:
        if "norm" in name or "q_proj" in name:
            stored[name] = stored[name].float() + 2**-20
    save_file(stored, folder / "model.safetensors", {"format": "pt"})
    report = prune(folder, out, whole=True)
    assert_only_zeros_differ(stored, tensors_of(out), report.linears)

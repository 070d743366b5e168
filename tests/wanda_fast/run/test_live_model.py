"""Models in memory: wrapped and compiled ones are pruned; what is not whole is refused before the work."""

from types import SimpleNamespace

import pytest
import torch
from torch import nn

import wanda_fast
from tests.tiny_models import FAMILIES, token_ids
from wanda_fast import errors
from wanda_fast.model.architecture import find_blocks
from wanda_fast.model.block_source import LiveModel, on_device
from wanda_fast.timer import Clock

CONFIG = SimpleNamespace(quant_method=SimpleNamespace(value="gptq"))


def prune(model, **options):
    ids = token_ids(FAMILIES["llama2"](), 2, 16)
    return wanda_fast.prune(model, dataset=ids, seqlen=16, sparsity_type="2:4", **options)


def refused(model, error, *words, **options):
    """The model is refused with a sentence that has these words, and its weights are what they were."""
    before = {name: tensor.clone() for name, tensor in model.state_dict().items() if not tensor.is_meta}
    with pytest.raises(error) as refusal:
        prune(model, **options)
    assert all(word in str(refusal.value) for word in words), refusal.value
    assert "\n" not in str(refusal.value)
    state = model.state_dict()
    assert all(torch.equal(state[name], tensor) for name, tensor in before.items())


def test_an_encoder_of_text_is_pruned():
    import transformers

    sizes = dict(hidden_size=32, num_hidden_layers=2, num_attention_heads=4, vocab_size=320)
    config = transformers.BertConfig(**sizes, intermediate_size=64)
    model = transformers.BertForMaskedLM(config).eval()
    ids = token_ids(FAMILIES["llama2"](), 2, 16)
    query = model.bert.encoder.layer[0].attention.self.query
    scores = query.weight.abs() * model.bert.embeddings(ids).flatten(0, 1).norm(dim=0)
    report = prune(model)
    assert len(report.linears) == 12 and all(x.sparsity == 0.5 for x in report.linears.values())
    expected = scores.view(32, 8, 4).argsort(dim=-1).argsort(dim=-1) < 2
    assert torch.equal(query.weight == 0, expected.view(32, 32))


def test_encoders_whose_blocks_cannot_run_one_by_one_are_refused():
    import transformers

    config = transformers.T5Config(d_model=32, d_kv=8, d_ff=64, num_layers=2, num_heads=4, vocab_size=320)
    words = "takes more of an earlier block's output"
    refused(transformers.T5EncoderModel(config).eval(), errors.HiddenStatesError, words)
    words = "the model's forward fails on token ids alone: You must specify exactly one"
    refused(transformers.T5ForConditionalGeneration(config).eval(), errors.HiddenStatesError, words)


class Adapted(nn.Module):
    """A linear with a low-rank adapter, under PEFT's names."""

    def __init__(self, linear):
        super().__init__()
        self.base_layer = linear
        self.lora_A = nn.ModuleDict({"default": nn.Linear(linear.in_features, 4, bias=False)})
        self.lora_B = nn.ModuleDict({"default": nn.Linear(4, linear.out_features, bias=False)})

    def forward(self, x):
        return self.base_layer(x) + self.lora_B["default"](self.lora_A["default"](x))


def test_an_adapter_that_is_not_merged():
    model = FAMILIES["llama2"]()
    model.model.layers[1].mlp.up_proj = Adapted(model.model.layers[1].mlp.up_proj)
    refused(model, errors.AdapterError, "layers.1.mlp.up_proj.base_layer", "merge_and_unload()")


def test_a_model_with_prompt_tuning_has_no_adapter_in_its_blocks():
    model = FAMILIES["llama2"]()
    model.peft_config = {"default": object()}
    refused(model, errors.AdapterError, "peft_config", "merge the adapter first")


@pytest.mark.parametrize("dtype", [torch.uint8, torch.int8, torch.float8_e4m3fn])
def test_a_quantised_weight(dtype):
    model = FAMILIES["llama2"]()
    linear = model.model.layers[1].mlp.up_proj
    linear.weight = nn.Parameter(torch.zeros(linear.weight.shape, dtype=dtype), requires_grad=False)
    refused(model, errors.QuantizedModelError, "layers.1.mlp.up_proj.weight", str(dtype))


@pytest.mark.parametrize("about", [CONFIG, {"quant_method": "gptq"}])
def test_a_quantisation_config(about):
    model = FAMILIES["llama2"]()
    model.config.quantization_config = about
    refused(model, errors.QuantizedModelError, "quant_method gptq")


def test_parameters_on_the_meta_device():
    model = FAMILIES["llama2"]()
    model.model.layers[1].to("meta")
    refused(model, errors.LiveModelError, "9 of", "model.layers.1.", "device_map", "checkpoint's folder")


@pytest.mark.parametrize("device", [None, "cpu"])
def test_a_model_that_accelerate_offloads(device):
    from accelerate import cpu_offload

    model = FAMILIES["llama2"]()
    cpu_offload(model, execution_device=torch.device("cpu"))
    refused(model, errors.LiveModelError, "meta device", "accelerate", device=device)


def test_shards_of_deepspeed():
    model = FAMILIES["llama2"]()
    model.lm_head.weight.ds_id = 7
    refused(model, errors.LiveModelError, "lm_head.weight", "a shard of DeepSpeed")


def test_a_generation_config_that_cannot_be_written(tmp_path):
    model = FAMILIES["llama2"]()
    model.generation_config.temperature, model.generation_config.do_sample = 0.9, False
    refused(model, errors.OutputError, "generation_config", "temperature", save_model=tmp_path / "out")
    assert not list(tmp_path.iterdir())
    assert prune(model).sparsity == 0.5


def test_a_module_without_a_config():
    refused(nn.Sequential(FAMILIES["llama2"]()), errors.LiveModelError, "Sequential", "has no config")


class Plain(nn.Module):
    """A model's forward and config, without `device`, `dtype` and all else of transformers."""

    def __init__(self, model):
        super().__init__()
        self.model, self.lm_head, self.config = model.model, model.lm_head, model.config

    def forward(self, input_ids, use_cache=None):
        hidden = self.model(input_ids, use_cache=use_cache).last_hidden_state
        return SimpleNamespace(logits=self.lm_head(hidden))


def compiled_layers(model):
    model.model.layers[1] = torch.compile(model.model.layers[1], backend="eager")
    return model


def compiled_forward(model):
    layer = model.model.layers[0]
    layer.forward = torch.compile(layer.forward, backend="eager")
    return model


def compiled_in_place(model):
    model.compile(backend="eager")
    model.model.layers[0].compile(backend="eager")
    model(token_ids(model, 2, 16))
    return model


WRAPPED = {
    "DataParallel": nn.DataParallel,
    "torch.compile": lambda model: torch.compile(model, backend="eager"),
    "both": lambda model: nn.DataParallel(torch.compile(model, backend="eager")),
    "model.compile": compiled_in_place,
    "compiled layers": compiled_layers,
    "compiled forward": compiled_forward,
    "no device": Plain,
}


@pytest.mark.parametrize("how", WRAPPED)
def test_wrapped_and_compiled_models_are_pruned_as_the_model_itself(how):
    plain, model = FAMILIES["llama2"](), FAMILIES["llama2"]()
    wrapped = WRAPPED[how](model)
    layers = list(model.model.layers)
    ids = token_ids(plain, 2, 16, seed=1)
    expected, report = prune(plain, eval_dataset=ids), prune(wrapped, eval_dataset=ids)
    assert report.linears.keys() == expected.linears.keys()
    assert report.perplexity["pruned"] == expected.perplexity["pruned"]
    assert list(model.model.layers) == layers
    pruned = dict(model.named_parameters())
    for name, weight in plain.named_parameters():
        other = pruned.get(name)
        other = pruned[name.replace("layers.1.", "layers.1._orig_mod.")] if other is None else other
        assert torch.equal(other, weight)


def test_compiled_layers_are_saved_under_their_own_names(tmp_path):
    from safetensors import safe_open

    model = compiled_layers(FAMILIES["llama2"]())
    prune(model, save_model=tmp_path / "out")
    with safe_open(tmp_path / "out/model.safetensors", "pt") as written:
        assert set(written.keys()) == set(FAMILIES["llama2"]().state_dict())


def test_each_modules_mode_is_that_from_before():
    model = FAMILIES["llama2"]().train()
    model.model.layers[1].eval()
    before = {name: module.training for name, module in model.named_modules()}
    prune(model)
    assert {name: module.training for name, module in model.named_modules()} == before
    assert set(before.values()) == {True, False}


def test_a_block_that_does_not_fit_the_device_is_moved_back(monkeypatch):
    model, moves = FAMILIES["llama2"](), []

    def to(device):
        moves.append(str(device))
        if str(device) != "cpu":
            raise torch.OutOfMemoryError("no room")

    blocks = find_blocks(model)
    monkeypatch.setattr(blocks[0].module, "to", to, raising=False)
    source = LiveModel(model, blocks, torch.device("cuda"), Clock(torch.device("cpu")))
    with pytest.raises(torch.OutOfMemoryError), source.block(0):
        pass
    assert moves == ["cuda", "cpu"]
    monkeypatch.setattr(model, "to", to, raising=False)
    with pytest.raises(torch.OutOfMemoryError), on_device(model, torch.device("cuda")):
        pass
    assert moves == ["cuda", "cpu"] * 2

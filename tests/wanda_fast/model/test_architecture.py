"""Finding blocks, linears, gated MLPs and routers in a model; linears that share a statistic."""

from functools import partial

import pytest
import torch
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, MixtralConfig

import wanda_fast
from tests.tiny_models import EXPERTS, FAMILIES, GQA, MOE, OF_LINEARS, token_ids
from wanda_fast.model.architecture import find_blocks
from wanda_fast.model.offload import Offload
from wanda_fast.model.recorder import blocks_skipped, record_block_inputs
from wanda_fast.pruning.gathering import BlockStatistics
from wanda_fast.pruning.methods import make_method


@pytest.mark.parametrize("family", OF_LINEARS)
def test_every_linear_of_every_block_and_nothing_else(family):
    model = FAMILIES[family]()
    blocks = find_blocks(model)
    assert len(blocks) == model.config.num_hidden_layers
    found = {linear.name for block in blocks for linear in block.linears}
    prefix = blocks[0].name.rpartition(".")[0] + "."
    linears = {n for n, m in model.named_modules() if isinstance(m, nn.Linear) and n.startswith(prefix)}
    assert found == linears
    assert not any("lm_head" in name or "embed" in name for name in found)


@pytest.mark.parametrize("family", EXPERTS)
def test_experts_are_in_reach(family):
    model = FAMILIES[family]()
    report = wanda_fast.prune(model, dataset=token_ids(model, 2, 32))
    routers = sum(p.numel() for name, p in model.named_parameters() if name.endswith("mlp.gate.weight"))
    assert routers > 0 and report.reach.prunable == report.reach.blocks - routers
    assert not any("no prunable matrix" in warning for warning in report.warnings)


def test_weights_out_of_reach_are_counted_and_reported():
    model = FAMILIES["llama2"]()
    for layer in model.model.layers:
        layer.mlp.table = nn.Parameter(torch.zeros(64, 200))
    report = wanda_fast.prune(model, dataset=token_ids(model, 2, 32))
    assert report.reach.blocks - report.reach.prunable == 2 * 64 * 200
    assert report.reach.largest_out_of_reach == "model.layers.0.mlp.table"
    assert report.reach.model == sum(p.numel() for p in model.parameters())
    assert any("no prunable matrix" in warning and "mlp.table" in warning for warning in report.warnings)


def test_a_router_that_is_a_linear_is_not_prunable():
    model = FAMILIES["llama2"]()
    for layer in model.model.layers:
        layer.mlp.gate = nn.Linear(64, 4)
    assert any(linear.name.endswith("mlp.gate") for linear in find_blocks(model)[0].linears)
    model.config.num_experts = 4
    assert not any(linear.name.endswith("mlp.gate") for linear in find_blocks(model)[0].linears)


# Models with routers. Each router has 6 outputs, and no other linear has; Doge routes to 3 x 3 experts.
ROUTED = {
    "dbrx": dict(
        d_model=64, n_heads=4, attn_config=dict(kv_n_heads=2, rope_theta=1e4),
        ffn_config=dict(moe_num_experts=6),
    ),
    "doge": GQA | dict(is_moe=True, num_experts=9, num_experts_per_tok=2),
    "gemma4_text": MOE | dict(enable_moe_block=True, num_experts=6, top_k_experts=2),
    "hunyuan_v1_moe": GQA | dict(num_experts=6, moe_topk=2, head_dim=16),
    "jetmoe": GQA | dict(num_local_experts=6, kv_channels=16),
    "longcat_flash": dict(hidden_size=64, num_layers=1, n_routed_experts=6, zero_expert_num=0),
}  # fmt: skip


@pytest.mark.parametrize(("family", "sizes"), ROUTED.items(), ids=ROUTED)
def test_a_linear_inside_a_router_is_not_prunable(family, sizes):
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(AutoConfig.for_model(family, **sizes))
    block = find_blocks(model)[0]
    linears = {n: m for n, m in block.module.named_modules() if isinstance(m, nn.Linear)}
    routers = {name for name, linear in linears.items() if linear.out_features == 6}
    found = {linear.name.removeprefix(f"{block.name}.") for linear in block.dense}
    assert routers and found == linears.keys() - routers


@pytest.mark.parametrize(
    ("family", "method"),
    [("opt", "connect"), ("phi", "connect"), ("gpt_neox", "connect"), ("opt", "gated")],
)
def test_without_a_gated_mlp_connect_and_gated_warn_once_and_prune_as_wanda(family, method):
    model, wanda = FAMILIES[family](), FAMILIES[family]()
    ids = token_ids(model, 2, 32)
    report = wanda_fast.prune(model, dataset=ids, prune_method=method)
    wanda_fast.prune(wanda, dataset=ids)
    assert sum(f"no gated MLP: {method} prunes it as wanda" in w for w in report.warnings) == 1
    for name, weight in wanda.state_dict().items():
        assert torch.equal(model.state_dict()[name], weight), name


@pytest.mark.parametrize("family", ["llama2", "gemma2", "phi3", "glm4", "qwen2"])
def test_both_projections_of_a_gated_mlp_are_found(family):
    for index, block in enumerate(find_blocks(FAMILIES[family]())):
        found = {linear.name.rpartition(".mlp.")[2]: linear.gated for linear in block.linears if linear.gated}
        fused = family in ("phi3", "glm4")
        assert found.keys() == ({"gate_up_proj"} if fused else {"gate_proj", "up_proj"}), index
        # The projections share one object.
        (mlp,) = set(found.values())
        assert mlp.fused == fused


def test_a_fused_linear_of_another_shape_is_no_gated_mlp():
    model = FAMILIES["phi3"]()
    for layer in model.model.layers:
        layer.mlp.gate_up_proj = nn.Linear(64, 2 * 160 + 2, bias=False)
    assert not any(linear.gated for block in find_blocks(model) for linear in block.linears)


@pytest.mark.parametrize(
    ("family", "shared"),
    [("llama2", [3, 1, 2, 1]), ("opt", [3, 1, 1, 1]), ("phi", [4, 1, 1]), ("gpt_neox", [1, 1, 1, 1])],
)
def test_linears_that_read_one_tensor_share_one_statistic(family, shared):
    """The groups are q, k, v and gate, up; in Phi's parallel block q, k, v and fc1."""
    model = FAMILIES[family]()
    block = find_blocks(model)[0]
    statistics = BlockStatistics(block, make_method("wanda").statistic)
    inputs = {}
    for linear in block.linears:
        linear.module.register_forward_pre_hook(
            lambda _, args, name=linear.name: inputs.update({name: args[0]})
        )
    with statistics.gathering():
        model(token_ids(model, 2, 16))
    groups = [id(statistics.by_name[linear.name]) for linear in block.linears]
    assert sorted(groups.count(group) for group in set(groups)) == sorted(shared)
    for name, x in inputs.items():
        expected = x.flatten(0, -2).float().square().sum(0)
        torch.testing.assert_close(statistics.by_name[name].acc, expected, rtol=1e-6, atol=0)


def test_only_the_weights_are_changed():
    """No hook, patched forward or changed mode remains."""
    model = FAMILIES["llama2"]().train()
    wanda_fast.prune(model, dataset=token_ids(model, 2, 32))
    assert model.training
    for module in model.modules():
        assert "forward" not in vars(module)
        assert not module._forward_hooks and not module._forward_pre_hooks


def test_a_forward_set_on_an_instance_is_kept():
    """Forwards set on an instance, as accelerate's hooks do, are called and kept."""
    model, plain, watched, called = FAMILIES["llama2"](), FAMILIES["llama2"](), {}, set()
    for layer in model.model.layers:
        for module in (layer, layer.mlp.down_proj):
            module.forward = watched[module] = partial(watch, called, module, module.forward)
    ids = token_ids(model, 2, 32)
    for each in (model, plain):
        wanda_fast.prune(each, dataset=ids)
    assert all(vars(module).get("forward") is forward for module, forward in watched.items())
    # The dense pass ends at the last linear's input, and the last block has no pruned pass.
    assert called == watched.keys() - {model.model.layers[-1].mlp.down_proj}
    assert all(map(torch.equal, model.parameters(), plain.parameters()))


def watch(called, module, forward, *args, **kwargs):
    called.add(module)
    return forward(*args, **kwargs)


def test_one_module_that_is_several_blocks():
    model = FAMILIES["llama2"]()
    model.model.layers[1] = model.model.layers[0]
    ids, blocks = token_ids(model, 3, 16), find_blocks(model)
    expected = model(ids, use_cache=False).logits
    offload = Offload("device", torch.device("cpu"))
    inputs = record_block_inputs(partial(model, use_cache=False), blocks, ids, 2, offload)
    for index, block in enumerate(blocks):
        inputs.advance_(index, block.module)
    with blocks_skipped(blocks, inputs.hidden):
        torch.testing.assert_close(model(ids, use_cache=False).logits, expected)
    assert wanda_fast.prune(model, dataset=ids).sparsity == pytest.approx(0.5, abs=1e-3)


def test_an_expert_that_no_token_reaches_is_reported(caplog):
    config = MixtralConfig(
        vocab_size=64, hidden_size=32, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2,
        num_key_value_heads=2, num_local_experts=2,
    )  # fmt: skip
    model = AutoModelForCausalLM.from_config(config)
    model.model.layers[0].never_called = nn.Linear(8, 8)
    wanda_fast.prune(model, dataset=torch.randint(0, 64, (1, 8)))
    sentence = "1 linear was pruned by magnitude, since no calibration token reached"
    assert sentence in caplog.text and "model.layers.0.never_called" in caplog.text

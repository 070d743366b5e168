"""A part of SmolLM2 through the Triton kernels, interpreted without a GPU: the masks that torch finds."""

import copy

import pytest
import torch
from transformers import AutoModelForCausalLM

import wanda_fast

RECIPES = {
    "connect 2:4": dict(prune_method="connect", sparsity_type="2:4"),
    # rows are slow to interpret
    "wanda, q, k, v": dict(prune_method="wanda", ignore=["*.mlp.*", "*.o_proj"]),
}
EQUAL_MASKS = 0.9999  # selection is exact; the sums that it ranks by may differ in the last bit


@pytest.fixture(scope="module")
def one_block(smollm2_dense):
    """One block, three of its nine heads, a quarter of its MLP: all of it takes minutes to interpret."""
    model = AutoModelForCausalLM.from_pretrained(smollm2_dense, dtype=torch.float32)
    model.model.layers = model.model.layers[:1]
    model.config.update(dict(num_hidden_layers=1, num_attention_heads=3, num_key_value_heads=1, head_dim=64))
    model.config.intermediate_size = 384
    attention, mlp = model.model.layers[0].self_attn, model.model.layers[0].mlp
    for linear in (attention.q_proj, attention.k_proj, attention.v_proj):
        keep(linear, linear.out_features // 3, linear.in_features)
    for linear in (mlp.gate_proj, mlp.up_proj):
        keep(linear, 384, linear.in_features)
    keep(attention.o_proj, attention.o_proj.out_features, 192)
    keep(mlp.down_proj, mlp.down_proj.out_features, 384)
    return model


def keep(linear, rows, columns):
    linear.weight = torch.nn.Parameter(linear.weight[:rows, :columns].clone())
    linear.out_features, linear.in_features = rows, columns


@pytest.mark.parametrize("recipe", RECIPES)
def test_one_block_gets_the_same_masks(recipe, one_block, monkeypatch):
    ids = torch.randint(3, 49152, (2, 40), generator=torch.Generator().manual_seed(0))
    models = {}
    for backend in ("torch", "triton"):
        monkeypatch.setenv("WANDA_KERNELS_BACKEND", backend)
        models[backend] = copy.deepcopy(one_block)
        report = wanda_fast.prune(models[backend], dataset=ids, **RECIPES[recipe])
        assert set(report.backends.values()) == {backend}
    equal = total = 0
    for name in report.linears:
        zeros = [models[backend].get_submodule(name).weight == 0 for backend in models]
        equal += (zeros[0] == zeros[1]).sum().item()
        total += zeros[0].numel()
    assert equal >= EQUAL_MASKS * total

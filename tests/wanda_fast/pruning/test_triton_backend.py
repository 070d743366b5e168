"""One block of SmolLM2 through the Triton kernels, interpreted without a GPU: the masks that torch finds."""

import copy

import pytest
import torch
from transformers import AutoModelForCausalLM

import wanda_fast

RECIPES = {
    "connect 2:4": dict(prune_method="connect", sparsity_type="2:4"),
    "wanda, attention": dict(prune_method="wanda", ignore=["*.mlp.*"]),  # rows are slow to interpret
}
EQUAL_MASKS = 0.9999  # selection is exact; the sums that it ranks by may differ in the last bit


@pytest.fixture(scope="module")
def one_block(smollm2_folder):
    gguf = next(smollm2_folder.glob("*.gguf")).name
    model = AutoModelForCausalLM.from_pretrained(smollm2_folder, gguf_file=gguf, dtype=torch.float32)
    model.model.layers = model.model.layers[:1]
    model.config.num_hidden_layers = 1
    return model


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

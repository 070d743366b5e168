"""Zeros of a pruned model through an optimizer's steps, in docs/finetuning.md's own code."""

import re
from pathlib import Path

import pytest
import torch

import wanda_fast
from tests.tiny_models import FAMILIES, token_ids
from wanda_fast import errors
from wanda_fast.model.architecture import find_blocks
from wanda_fast.output import masks

pytestmark = pytest.mark.usefixtures("one_thread")

PAGE = Path(__file__).parents[3] / "docs" / "finetuning.md"
FULL, LORA = re.findall(r"```python\n(.*?)```", PAGE.read_text(encoding="utf-8"), flags=re.DOTALL)


def pruned(family, dtype=torch.float32, **options):
    model = FAMILIES[family]()
    wanda_fast.prune(model, dataset=token_ids(model, 2, 32), **options)
    return model.to(dtype).requires_grad_(True)


def linears_of(model):
    return {linear.name: linear for block in find_blocks(model) for linear in block.linears}


def zeros_of(model):
    return {name: linear.weight.detach() == 0 for name, linear in linears_of(model).items()}


def loss_of(model, ids):
    with torch.no_grad():
        return model(input_ids=ids, labels=ids).loss.item()


def train(model, ids, steps=6, code=FULL):
    scope = {"model": model, "batches": [ids] * steps, "torch": torch}
    exec(code, scope)
    return scope


@pytest.mark.parametrize(
    ("family", "dtype"),
    [("smollm", torch.float32), ("smollm", torch.bfloat16), ("phi3", torch.float32),
     ("gpt2", torch.float32), ("mixtral", torch.float32), ("qwen3_moe", torch.float32)],
)  # fmt: skip
def test_the_recipe_lowers_the_loss_and_keeps_every_zero(family, dtype, tmp_path, monkeypatch):
    """Tied heads, fused and transposed weights, experts in three dimensions."""
    monkeypatch.chdir(tmp_path)
    model = pruned(family, dtype)
    ids, zeros = token_ids(model, 4, 16, seed=1), zeros_of(model)
    weights = {name: linear.weight.detach().clone() for name, linear in linears_of(model).items()}
    before = loss_of(model, ids)
    train(model, ids)
    assert loss_of(model, ids) < 0.95 * before
    for name, now in zeros_of(model).items():
        assert zeros[name].float().mean() == pytest.approx(0.5, abs=0.02)
        assert now[zeros[name]].all(), name
    moved = [not torch.equal(linear.weight, weights[name]) for name, linear in linears_of(model).items()]
    assert sum(moved) > len(moved) // 2


def test_without_it_zeros_are_lost(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    model = pruned("smollm")
    zeros = zeros_of(model)
    code = FULL.replace("wanda_fast.keep_zeros(model)", "torch.enable_grad()")
    train(model, token_ids(model, 4, 16), 1, code)
    kept = [now[zeros[name]].float().mean().item() for name, now in zeros_of(model).items()]
    assert max(kept) < 0.05, kept


def test_momentum_of_before_brings_nothing_back():
    """SGD, made before the context, whose momentum reaches pruned weights."""
    dense = FAMILIES["smollm"]().requires_grad_(True)
    ids = token_ids(dense, 2, 16)
    optimizer = torch.optim.SGD(dense.parameters(), lr=0.05, momentum=0.9)
    dense(input_ids=ids, labels=ids).loss.backward()
    optimizer.step()
    wanda_fast.prune(dense, dataset=ids, sparsity_type="2:4")
    zeros = zeros_of(dense)
    with wanda_fast.keep_zeros(dense):
        optimizer.zero_grad()
        dense(input_ids=ids, labels=ids).loss.backward()
        weight = dense.model.layers[0].mlp.up_proj.weight
        assert not weight.grad[weight == 0].any() and weight.grad.any()
        optimizer.step()
    assert all(torch.equal(now, zeros[name]) for name, now in zeros_of(dense).items())
    optimizer.step()
    assert not torch.equal(weight == 0, zeros["model.layers.0.mlp.up_proj"])


def test_apply_by_hand():
    model = pruned("llama2")
    zeros, kept = zeros_of(model), wanda_fast.keep_zeros(model)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(1.0)
    kept.apply()
    assert all(torch.equal(now, zeros[name]) for name, now in zeros_of(model).items())


def test_the_trainers_callback(tmp_path):
    from transformers import Trainer, TrainingArguments

    model = pruned("smollm")
    ids, zeros = token_ids(model, 8, 16), zeros_of(model)
    arguments = TrainingArguments(
        tmp_path, max_steps=3, learning_rate=1e-2, report_to=[], save_strategy="no", use_cpu=True,
        disable_tqdm=True, per_device_train_batch_size=4,
    )  # fmt: skip
    data = [{"input_ids": row, "labels": row} for row in ids]
    before = model.model.layers[1].mlp.up_proj.weight.detach().clone()
    callback = wanda_fast.keep_zeros(model).callback()
    Trainer(model, arguments, train_dataset=data, callbacks=[callback]).train()
    assert not torch.equal(model.model.layers[1].mlp.up_proj.weight, before)
    assert all(now[zeros[name]].all() for name, now in zeros_of(model).items())


def test_a_dense_model_is_refused():
    with pytest.raises(errors.MaskError, match="LlamaForCausalLM has no zeros in its 14 prunable parameters"):
        wanda_fast.keep_zeros(FAMILIES["llama2"]())


def test_lora_is_merged_and_masked(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    mask = tmp_path / "mask.safetensors"
    model = pruned("llama2", sparsity_type="2:4", save_mask=mask)
    ids, zeros = token_ids(model, 4, 16), zeros_of(model)
    before = loss_of(model, ids)
    train(model, ids, code=LORA)
    merged = type(model).from_pretrained("out/merged")
    assert loss_of(merged, ids) < before
    assert masks.mask_violations(merged, mask)
    assert masks.apply_masks_(merged, mask) and not masks.mask_violations(merged, mask)
    assert all(now[zeros[name]].all() for name, now in zeros_of(merged).items())

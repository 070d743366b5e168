"""Ratios that differ from block to block, or from linear to linear."""

import json

import pytest
import torch

import wanda_fast
from tests.tiny_models import FAMILIES, token_ids
from wanda_fast import errors
from wanda_fast.pruning.allocation import patterns_with, ratios_by_outliers
from wanda_fast.pruning.patterns import NM, Unstructured


def blocks_of(model):
    return dict(enumerate(model.model.layers))


@torch.no_grad()
def published_owl(model, ids, ratio, outlier=5.0, spread=0.08):
    """The published code for OWL, by hand: the mean of a block is over all of its linears."""
    norms, handles = {}, []
    for name, module in model.model.layers.named_modules():
        if isinstance(module, torch.nn.Linear):

            def add(_module, inputs, name=name):
                norms[name] = norms.get(name, 0) + inputs[0].flatten(0, 1).square().sum(0)

            handles.append(module.register_forward_pre_hook(add))
    for sample in ids:
        model(sample[None])
    for handle in handles:
        handle.remove()
    shares = []
    for index, layer in blocks_of(model).items():
        scores = [
            module.weight.abs() * (norms[f"{index}.{name}"] / len(ids)).sqrt()
            for name, module in layer.named_modules()
            if isinstance(module, torch.nn.Linear)
        ]
        flat = torch.cat([each.flatten() for each in scores])
        shares.append((flat > outlier * flat.mean()).double().mean().item())
    shares = torch.tensor(shares)
    shares = (shares - shares.min()) * (2 * spread / (shares.max() - shares.min()))
    return (ratio + shares.mean() - shares).tolist()


@pytest.mark.parametrize("streamed", [True, False])
@pytest.mark.parametrize("family", ["gemma3", "mistral"])
def test_owl_gives_blocks_the_published_ratios(family, streamed, tmp_path):
    model, ratio = FAMILIES[family](), 0.6
    ids = token_ids(model, 3, 24)
    expected = published_owl(model, ids, ratio)
    model.save_pretrained(tmp_path / "model")
    report = wanda_fast.prune(
        tmp_path / "model" if streamed else model, dataset=ids, sparsity_ratio=ratio, allocation="owl"
    )
    found = list(report.block_sparsity().values())
    # A row of 64 inputs has no finer ratio.
    assert found == pytest.approx(expected, abs=1 / 64) and max(found) - min(found) > 0.1
    assert report.sparsity == pytest.approx(ratio, abs=1 / 64)


def test_masks_are_those_of_single_runs_with_the_blocks_ratio():
    model = FAMILIES["llama2"]()
    ids = token_ids(model, 3, 24)
    ratios = {"model.layers.0": 0.25, "re:.*layers.1.*": 0.75, "model.layers.1.mlp.down_proj": 0.5}
    report = wanda_fast.prune(model, dataset=ids, statistics="dense", allocation=ratios)
    for ratio in (0.25, 0.5, 0.75):
        alone = FAMILIES["llama2"]()
        wanda_fast.prune(alone, dataset=ids, statistics="dense", sparsity_ratio=ratio)
        same = [
            name
            for name in report.linears
            if torch.equal(model.get_submodule(name).weight, alone.get_submodule(name).weight)
        ]
        wanted = {0.25: "layers.0.", 0.5: "layers.1.mlp.down_proj", 0.75: "layers.1."}[ratio]
        assert same == [
            name for name in report.linears if wanted in name and (ratio == 0.5 or "1.mlp.down" not in name)
        ]


@pytest.mark.parametrize("method", ["magnitude", "sparsegpt", "admm"])
def test_every_method_takes_a_file_of_ratios(method, tmp_path):
    model = FAMILIES["llama2"]()
    (tmp_path / "ratios.json").write_text(json.dumps({"*.k_proj": 0.25, "*.mlp.*": 0.0}))
    options = dict(dataset=token_ids(model, 3, 24), allocation=tmp_path / "ratios.json")
    report = wanda_fast.prune(model, prune_method=method, **options)
    for name, linear in report.linears.items():
        wanted = 0.25 if "k_proj" in name else 0.0 if "mlp" in name else 0.5
        assert linear.sparsity == pytest.approx(wanted, abs=1e-3)


def test_experts_of_one_projection_with_different_ratios():
    model = FAMILIES["mixtral"]()
    report = wanda_fast.prune(
        model, dataset=token_ids(model, 4, 32), sparsity_type="4:8", allocation={"*.experts.1.*": 0.75}
    )
    for name, linear in report.linears.items():
        assert linear.sparsity == (0.75 if ".experts.1." in name else 0.5)


def test_ratios_follow_outliers_and_keep_the_mean():
    shares, weights = {"a": 0.01, "b": 0.03, "c": 0.02}, {"a": 100, "b": 100, "c": 200}
    found = ratios_by_outliers(shares, weights, 0.7)
    assert found["b"] < found["c"] < found["a"] and found["a"] - found["b"] == pytest.approx(0.16)
    assert sum(found[name] * weights[name] for name in found) / 400 == pytest.approx(0.7)
    assert ratios_by_outliers(dict.fromkeys("abc", 0.02), weights, 0.7) == pytest.approx(
        dict.fromkeys("abc", 0.7)
    )
    with pytest.raises(errors.AllocationError, match="a would have a ratio of 1.0"):
        ratios_by_outliers(shares, weights, 0.95)


def test_the_n_of_groups_keep_the_mean():
    ratios = {str(index): 0.5 + 0.02 * (index - 4.5) for index in range(10)}
    weights = dict.fromkeys(ratios, 64)
    found = patterns_with(ratios, NM(4, 8), weights)
    assert sum(pattern.n for pattern in found.values()) == 40
    kept = [pattern.n for pattern in found.values()]
    assert kept == sorted(kept, reverse=True) and set(kept) == {3, 4, 5}
    assert all(abs(pattern.ratio - ratios[name]) < 1 / 8 for name, pattern in found.items())
    layer = Unstructured(0.5)
    layer.granularity = "layer"
    changed = patterns_with({"a": 0.3}, layer, weights)["a"]
    assert (changed.ratio, changed.granularity, layer.ratio) == (0.3, "layer", 0.5)


def test_a_name_when_every_linear_is_ignored():
    model = FAMILIES["llama2"]()
    with pytest.raises(errors.AllocationError, match="matches none of the 0 linears$"):
        wanda_fast.prune(model, dataset=token_ids(model, 1, 8), ignore="*", allocation={"*": 0.5})


def test_other_ratios_are_another_run(tmp_path):
    model, file = FAMILIES["llama2"](), tmp_path / "ratios.json"
    model.save_pretrained(tmp_path / "model")
    options = dict(dataset=token_ids(model, 3, 24), allocation=file, save_model=tmp_path / "out")
    file.write_text('{"*.k_proj": 0.25}')
    wanda_fast.prune(tmp_path / "model", **options)
    wanda_fast.prune(tmp_path / "model", **options, resume=True)
    file.write_text('{"*.k_proj": 0.3}')
    with pytest.raises(errors.ResumeError, match="ratios by name differ"):
        wanda_fast.prune(tmp_path / "model", **options, resume=True)


@pytest.mark.parametrize(
    ("allocation", "others", "kind", "words"),
    [
        ({"*.nothing": 0.5}, {}, errors.AllocationError, "'\\*.nothing' matches none of the 14 linears"),
        ({"re:(": 0.5}, {}, errors.IgnorePatternError, "allocation pattern 're:\\(' is not a valid"),
        ({"*": 1.0}, {}, errors.AllocationError, "must be in \\[0, 1\\), got 1.0"),
        ({"*": "half"}, {}, errors.AllocationError, "got 'half'"),
        ({"*": 0.3}, dict(sparsity_type="2:4"), errors.AllocationError, "no N:4 has the ratio 0.3"),
        ("owl", dict(prune_method="magnitude"), errors.AllocationError, "owl needs a calibration"),
        ("none.json", {}, errors.PathError, "uniform, owl or a JSON file, and none.json cannot be read"),
    ],
)
def test_bad_allocations_are_refused_before_the_work(allocation, others, kind, words):
    model = FAMILIES["llama2"]()
    with pytest.raises(kind, match=words):
        wanda_fast.prune(model, dataset=token_ids(model, 2, 16), allocation=allocation, **others)
    assert model.model.layers[0].mlp.up_proj.weight.all()


@pytest.mark.parametrize("content", ["[0.5]", "{}", "{half"])
def test_bad_files_are_refused(content, tmp_path):
    model = FAMILIES["llama2"]()
    (tmp_path / "ratios.json").write_text(content)
    with pytest.raises(errors.AllocationError, match="allocation file .*ratios.json"):
        wanda_fast.prune(model, dataset=token_ids(model, 2, 16), allocation=str(tmp_path / "ratios.json"))


def test_blocks_without_weights_have_no_ratio_and_equal_ratios_share_a_pattern():
    shares, weights = {"a": 0.01, "b": 0.0, "c": 0.02}, {"a": 64, "b": 0, "c": 64}
    assert ratios_by_outliers(shares, weights, 0.6) == pytest.approx({"a": 0.68, "c": 0.52})
    assert ratios_by_outliers({"b": 0.0}, {"b": 0}, 0.6) == {}
    for pattern in (Unstructured(0.5), NM(4, 8)):
        found = patterns_with({"a": 0.25, "b": 0.25, "c": 0.5}, pattern, dict.fromkeys("abc", 64))
        assert found["a"] is found["b"] is not found["c"]

"""docs/extending.md's methods and pattern: short, run from Python and the command line."""

import re
import sys
from pathlib import Path

import pytest
import torch

import wanda_fast
from tests.tiny_models import FAMILIES, save_checkpoint, token_ids
from wanda_fast.cli import main as cli
from wanda_fast.pruning import registry

pytestmark = pytest.mark.usefixtures("short_pydoc")

PAGE = Path(__file__).parents[3] / "docs" / "extending.md"


@pytest.fixture
def examples(tmp_path):
    """Files with the page's Python blocks; what they register is forgotten afterwards."""
    before = dict(registry.METHODS), dict(registry.PATTERNS)
    blocks = re.findall(r"```python\n(.*?)```", PAGE.read_text(), flags=re.DOTALL)
    files = []
    for block in blocks:
        if "@wanda_fast.register_" in block:
            assert len(block.strip().splitlines()) < (25 if "Statistic" in block else 15)
            files.append(tmp_path / f"example_{len(files)}.py")
            files[-1].write_text(block)
    yield files
    for registered, known in zip((registry.METHODS, registry.PATTERNS), before, strict=True):
        registered.clear()
        registered.update(known)


def test_a_method_and_a_pattern_of_ones_own_from_python(examples):
    assert len(examples) == 3
    for file in examples:
        registry.load_plugin(str(file))
    model, dense = FAMILIES["llama2"](), FAMILIES["llama2"]()
    ids = token_ids(model, 4, 32)
    wanda_fast.prune(model, dataset=ids, prune_method="softer", sparsity_type="columns:16")
    seen = {}
    layer = dense.model.layers[0].self_attn.q_proj
    layer.register_forward_pre_hook(lambda _, args: seen.update(x=args[0]))
    dense(ids)
    scores = layer.weight.abs() * seen["x"].flatten(0, 1).square().sum(0).sqrt().sqrt()
    runs = scores.unflatten(1, (4, 16)).sum(2)
    lost = (model.model.layers[0].self_attn.q_proj.weight.unflatten(1, (4, 16)) == 0).all(2)
    assert torch.equal(lost.sum(1), torch.full((64,), 2))
    assert (runs.masked_fill(~lost, 0).amax(1) <= runs.masked_fill(lost, float("inf")).amin(1)).all()


def test_a_statistic_of_ones_own(examples):
    for file in examples:
        registry.load_plugin(str(file))
    model, dense = FAMILIES["llama2"](), FAMILIES["llama2"]()
    ids = token_ids(model, 4, 32)
    wanda_fast.prune(model, dataset=ids, prune_method="absolute", sparsity_type="2:4")
    seen = {}
    layer = dense.model.layers[0].self_attn.q_proj
    layer.register_forward_pre_hook(lambda _, args: seen.update(x=args[0]))
    dense(ids)
    groups = (layer.weight.abs() * seen["x"].flatten(0, 1).abs().sum(0)).unflatten(1, (-1, 4))
    kept = model.model.layers[0].self_attn.q_proj.weight.unflatten(1, (-1, 4)) != 0
    assert (kept.sum(2) == 2).all()
    assert (groups.masked_fill(kept, 0).amax(2) <= groups.masked_fill(~kept, float("inf")).amin(2)).all()


def test_they_work_with_the_built_in_ones(examples):
    for file in examples:
        registry.load_plugin(str(file))
    model = FAMILIES["qwen2"]()
    ids = token_ids(model, 2, 32)
    report = wanda_fast.prune(model, dataset=ids, prune_method="softer", sparsity_type="2:4")
    assert report.sparsity == 0.5
    report = wanda_fast.prune(
        FAMILIES["qwen2"](), dataset=ids, prune_method="connect", sparsity_type="columns:8"
    )
    assert report.sparsity == 0.5


def test_from_the_command_line(examples, tmp_path, monkeypatch, capsys, pydoc_text):
    save_checkpoint(FAMILIES["llama2"](), tmp_path / "model", pydoc_text[:20000])
    plugins = [word for file in examples for word in ("--plugin", str(file))]
    words = [
        "prune",
        "--model",
        str(tmp_path / "model"),
        "--dataset",
        "pydoc",
        "--nsamples",
        "2",
        "--seqlen",
        "32",
    ]
    words += ["--eval-dataset", "none", "--prune_method", "softer", "--sparsity_type", "columns:16", *plugins]
    monkeypatch.setattr(sys, "argv", ["wanda-fast", *words])
    with pytest.raises(SystemExit) as exit:
        cli.main()
    assert not exit.value.code
    assert "0.5000 over 14 linears" in capsys.readouterr().out

"""SparseGPT against the published pipeline, each block on the same inputs: what agrees, what would not."""

import copy
import os
import pydoc_data.topics
import subprocess
import sys

import pytest
import torch
import typer

import wanda_fast
from benchmarks import compare_sparsegpt, machine
from benchmarks.compare_sparsegpt import SameInputs, our_options, same_inputs
from benchmarks.published_pipeline import Stopwatch, prune_as_published
from tests.published import prune_published
from tests.tiny_models import FAMILIES, save_checkpoint, token_ids
from wanda_fast.data.evaluation import evaluation_set

pytestmark = pytest.mark.usefixtures("one_thread")

EQUAL_MASKS = 0.999
WEIGHT_TOLERANCE = 2e-5  # of the largest weight: two ways to one factor, in fp32
PATTERNS = ("2:4", "unstructured")


def compared(pattern, **options):
    """Our pruned model, by a recipe that differs from sparsegpt's by the options, on the same inputs."""
    dense = FAMILIES["llama3"]()
    ids = token_ids(dense, 8, 64)
    ours = copy.deepcopy(dense)
    wanda_fast.prune(ours, **our_options(ids, pattern) | options)
    return same_inputs(dense, ours, ids, pattern, evaluation_set(ids.flip(0), None, 64))


@pytest.mark.parametrize("pattern", PATTERNS)
def test_every_block_agrees_on_the_same_inputs(pattern):
    same = compared(pattern)
    assert len(same.masks) == len(same.weights) == 2
    assert min(same.masks) >= EQUAL_MASKS and max(same.weights) < WEIGHT_TOLERANCE
    assert same.agrees and abs(same.apart) < 1e-4
    assert "on the same inputs" in str(same) and f"{min(same.masks):.3%} in block" in str(same)


WRONG = [dict(prune_method="wanda"), dict(dampening=0.02)]


@pytest.mark.parametrize("options", WRONG, ids=["wanda", "twice the dampening"])
@pytest.mark.parametrize("pattern", PATTERNS)
def test_another_algorithm_does_not_agree(pattern, options):
    same = compared(pattern, **options)
    assert max(same.masks) < EQUAL_MASKS
    assert abs(same.apart) > compare_sparsegpt.PERPLEXITY and not same.agrees


@pytest.mark.parametrize(
    ("ours", "masks", "agrees"),
    [(100.4, 1.0, True), (99.6, 0.996, True), (100.6, 1.0, False), (99.4, 1.0, False), (100.0, 0.99, False)],
)
def test_agreement_is_of_perplexities_and_masks(ours, masks, agrees):
    assert SameInputs(100.0, ours, [masks, masks], [0.0, 0.0]).agrees is agrees


def test_a_followed_model_gives_the_inputs():
    """Both independent copies, following a model that wanda pruned to 70%; without it block 1 differs."""
    dense = FAMILIES["llama3"]()
    ids = token_ids(dense, 4, 32)
    other, model, alone = (copy.deepcopy(dense) for _ in range(3))
    wanda_fast.prune(other, prune_method="wanda", dataset=ids, sparsity_ratio=0.7)
    before = copy.deepcopy(other.state_dict())
    masks = prune_published(copy.deepcopy(dense), ids, "sparsegpt", "2:4", follow=other)
    for each, follow in ((model, other), (alone, None)):
        prune_as_published(each, ids, "sparsegpt", 2, 4, 0.5, Stopwatch(torch.device("cpu")), follow=follow)
    assert all(torch.equal(tensor, before[name]) for name, tensor in other.state_dict().items())
    equal = {
        (block, each is model): share_of_equal(each, masks, f"layers.{block}.")
        for block in (0, 1)
        for each in (model, alone)
    }
    assert equal[0, True] >= EQUAL_MASKS and equal[0, False] >= EQUAL_MASKS
    assert equal[1, True] >= EQUAL_MASKS and equal[1, False] < 0.95


def share_of_equal(model, masks, block):
    equal = [(model.get_submodule(name).weight == 0) == mask for name, mask in masks.items() if block in name]
    assert len(equal) == 7
    return torch.cat([each.flatten() for each in equal]).float().mean().item()


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Of a tiny model whose inputs are correlated, as real ones are: sparsegpt then errs less than wanda."""
    dense = FAMILIES["llama3"]()
    embedding = dense.get_input_embeddings().weight
    mixed = torch.randn(64, 64, generator=torch.Generator().manual_seed(0)) * torch.logspace(0, -2, 64)
    embedding.data.copy_(embedding @ mixed)
    path = tmp_path_factory.mktemp("correlated")
    save_checkpoint(dense, path, "\n\n".join(pydoc_data.topics.topics.values())[:20000])
    return path


@pytest.mark.parametrize(("wrong", "code"), [({}, 0), (dict(dampening=0.02), 1)])
def test_exit_code(folder, monkeypatch, capsys, wrong, code):
    right = our_options
    monkeypatch.setattr(compare_sparsegpt, "our_options", lambda *words: right(*words) | wrong)
    with pytest.raises(typer.Exit) as exit:
        compare_sparsegpt.compare(str(folder), "2:4", nsamples=8, seqlen=64, eval_windows=8, orders=1 - code)
    said = capsys.readouterr().out  # the wrong one's perplexity is 0.06% away, 3.6% of its masks differ
    assert exit.value.exit_code == code, said
    assert "2:4: on the same inputs, published" in said and "lower in 2 of 2" in said
    assert ("from end to end" in said) == (code == 0)


@pytest.mark.parametrize(
    ("program", "culprit"),
    [
        (["compare_sparsegpt"], "no/such/model"),
        (["compare_methods"], "no/such/model"),
        (["compare_sparsegpt", "--patterns", "2:4,0.7"], "'0.7'"),
    ],
)
def test_bad_input_is_one_sentence(program, culprit):
    command = [sys.executable, "-m", f"benchmarks.{program[0]}", *program[1:], "--model", "no/such/model"]
    paths = os.pathsep.join([str(machine.ROOT), str(machine.ROOT / "kernels")])
    done = subprocess.run(command, env=os.environ | {"PYTHONPATH": paths}, capture_output=True, text=True)
    assert done.returncode == 2 and culprit in done.stderr and "Traceback" not in done.stderr

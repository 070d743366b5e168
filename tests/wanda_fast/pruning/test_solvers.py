"""admm, --refine and --polish in the driver: against a copy of each step on the first block's inputs."""

import copy

import pytest
import torch

import wanda_fast
from tests.tiny_models import FAMILIES, token_ids
from wanda_fast import errors
from wanda_fast.model.architecture import all_linears
from wanda_fast.pruning import registry
from wanda_fast.pruning.patterns import Pattern

pytestmark = pytest.mark.usefixtures("one_thread")

PATTERNS = ("0.6", "2:4", "16:32")
WANDA, SPARSEGPT, ADMM = (dict(prune_method=name) for name in ("wanda", "sparsegpt", "admm"))


def sparsity(pattern):
    return dict(sparsity_type=pattern) if ":" in pattern else dict(sparsity_ratio=float(pattern))


def pruned(dense, pattern="2:4", **options):
    model = copy.deepcopy(dense)
    ids = token_ids(dense, 8, 32)
    return model, wanda_fast.prune(model, dataset=ids, measure_error=True, **sparsity(pattern), **options)


def first_inputs(dense):
    """By name, fp64 `[tokens, in]`: what the first block's linears read in the dense model."""
    found = {}

    def note(name, args):
        found[name] = args[0].double().flatten(0, -2)

    handles = [
        module.register_forward_pre_hook(lambda _, args, name=name: note(name, args))
        for name, module in dense.named_modules()
        if ".layers.0." in name and isinstance(module, torch.nn.Linear)
    ]
    with torch.no_grad():
        dense(token_ids(dense, 8, 32))
    for handle in handles:
        handle.remove()
    return found


def error_of(dense, model, name, x):
    difference = (dense.get_submodule(name).weight - model.get_submodule(name).weight).double()
    return (x @ difference.T).square().sum().item()


def counts(model, pattern, name):
    """Zeros of each row, or of each group."""
    weight = model.get_submodule(name).weight
    m = int(pattern.partition(":")[2]) if ":" in pattern else weight.shape[1]
    return (weight == 0).reshape(-1, m).sum(dim=1)


@pytest.mark.parametrize("pattern", PATTERNS)
@pytest.mark.parametrize(
    ("before", "after", "share"),
    [
        (WANDA, WANDA | dict(refine=3), 0.9),
        (WANDA, WANDA | dict(polish=10), 0.8),
        (WANDA | dict(update="obs"), WANDA | dict(update="obs", refine=2, polish=10), 0.95),
        (SPARSEGPT, SPARSEGPT | dict(polish=10), 0.95),
        (SPARSEGPT | dict(polish=10), SPARSEGPT | dict(refine=3, polish=10), 1.0),
        (SPARSEGPT, ADMM, 0.9),
    ],
)
def test_each_step_lowers_the_error_of_every_linear(before, after, share, pattern):
    """Errors on the first block's own inputs, computed here in fp64."""
    dense = FAMILIES["llama3"]()
    inputs = first_inputs(dense)
    (old, _), (new, report) = pruned(dense, pattern, **before), pruned(dense, pattern, **after)
    errors_of = {
        name: (error_of(dense, old, name, x), error_of(dense, new, name, x)) for name, x in inputs.items()
    }
    # Damping leaves a little more error on the calibration itself.
    assert all(lower < 1.01 * higher for higher, lower in errors_of.values())
    assert sum(lower for _, lower in errors_of.values()) < share * sum(x for x, _ in errors_of.values())
    for name in inputs:
        assert report.linears[name].error == pytest.approx(errors_of[name][1], rel=1e-3)
        if before is not SPARSEGPT or ":" in pattern:
            assert torch.equal(counts(old, pattern, name), counts(new, pattern, name))


def test_refine_changes_no_weight_that_it_keeps():
    dense = FAMILIES["llama3"]()
    (plain, _), (refined, report) = pruned(dense, **WANDA), pruned(dense, refine=3, **WANDA)
    for name in report.linears:
        kept = (weight := refined.get_submodule(name).weight) != 0
        assert torch.equal(weight[kept], dense.get_submodule(name).weight[kept])
    assert any(
        not torch.equal(plain.get_submodule(name).weight, refined.get_submodule(name).weight)
        for name in report.linears
    )
    assert all("refine_mask_" in linear.further for linear in report.linears.values())
    assert {linear.dampening for linear in report.linears.values()} == {None}


def test_polish_keeps_the_mask():
    dense = FAMILIES["llama3"]()
    (plain, _), (polished, report) = pruned(dense, **WANDA), pruned(dense, polish=2, **WANDA)
    name = "model.layers.0.self_attn.q_proj"
    first, second = (model.get_submodule(name).weight for model in (plain, polished))
    assert torch.equal(first == 0, second == 0) and not torch.equal(first, second)
    assert report.linears[name].dampening == 0.01 and report.linears[name].iterations is None


@pytest.mark.parametrize("family", ["llama3", "gpt2", "qwen3_moe", "phi3"])
@pytest.mark.parametrize("order", ["block", "linear"])
def test_admm_on_every_kind_of_weight(family, order):
    """GPT-2 stores its weights transposed, experts are parts of one parameter."""
    dense = FAMILIES[family]()
    model, report = pruned(dense, "2:4", sequential=order, **ADMM)
    _, other = pruned(dense, "2:4", sequential=order, **SPARSEGPT)
    assert report.sparsity == 0.5
    for name, each in report.linears.items():
        weight = all_linears(model)[name].weight
        assert (weight.reshape(len(weight), -1, 4).count_nonzero(dim=2) <= 2).all()
        assert each.iterations > 0
    assert sum(report.block_error().values()) < sum(other.block_error().values())


def test_the_variant_is_refined_within_its_rows():
    dense = FAMILIES["llama3"]()
    (plain, _), (refined, _) = (
        pruned(dense, "0.5", use_variant=True, **WANDA, **more) for more in ({}, dict(refine=2))
    )
    name = "model.layers.0.mlp.gate_proj"
    zeros = counts(plain, "0.5", name)
    assert len(zeros.unique()) > 1 and torch.equal(zeros, counts(refined, "0.5", name))


@pytest.mark.parametrize("options", [ADMM, WANDA | dict(refine=1), WANDA | dict(polish=1)])
def test_patterns_of_a_users_own(options):
    class Halves(Pattern):
        def select(self, scores):
            return torch.arange(scores.shape[1]).expand_as(scores) < scores.shape[1] // 2

    def prune():
        model = FAMILIES["llama3"]()
        return wanda_fast.prune(
            model, dataset=token_ids(model, 2, 16), sparsity_type="halves", sparsity_ratio=0.5, **options
        )

    registry.register_pattern("halves")(Halves)
    try:
        if "polish" in options:
            assert prune().sparsity == 0.5
        else:
            with pytest.raises(errors.PatternError, match="not .*halves"):
                prune()
    finally:
        registry.PATTERNS.pop("halves")


@pytest.mark.parametrize(
    ("options", "error", "sentence"),
    [
        (dict(refine=-1), errors.OptionError, "refine must be a whole number from 0 on, got -1"),
        (dict(polish=-2), errors.OptionError, "polish must be a whole number from 0 on, got -2"),
        (dict(polish=1.5), errors.OptionError, "polish must be a whole number from 0 on, got 1.5"),
        (ADMM | dict(refine=3), errors.OptionError, "admm solves for mask and weights.*no --refine 3"),
        (ADMM | dict(update="obs"), errors.OptionError, "admm solves for mask and weights.*no --update obs"),
        (ADMM | dict(dampening=-1.0), errors.HessianError, "dampening must be a positive number, got -1"),
    ],
)
def test_bad_flags(options, error, sentence):
    model = FAMILIES["llama3"]()
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(error, match=sentence):
        wanda_fast.prune(model, dataset=token_ids(model, 2, 16), **options)
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())

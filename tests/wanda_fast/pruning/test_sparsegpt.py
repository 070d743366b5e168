"""SparseGPT, its ablations and `--update obs` in the driver, against the published code on tiny models."""

import copy

import pytest
import torch
from safetensors.torch import load_file

import wanda_fast
from benchmarks.jobs.published_pipeline import UPDATING
from tests.published import prune_published
from tests.tiny_models import FAMILIES, save_checkpoint, token_ids
from wanda_fast import api, errors
from wanda_fast.checkpoint import load as checkpoint
from wanda_fast.cli import main as cli
from wanda_fast.errors import NotStreamableError
from wanda_fast.model.architecture import all_linears
from wanda_fast.pruning import registry
from wanda_fast.run import inputs

pytestmark = pytest.mark.usefixtures("one_thread")

EQUAL_MASKS = 0.9999  # the others are near ties, which the last bit of a sum decides
WEIGHT_TOLERANCE = 2e-5  # of the largest weight: two ways to one factor, in fp32
PATTERNS = ("0.5", "0.7", "2:4", "4:8")


def sparsity(pattern):
    return dict(sparsity_type=pattern) if ":" in pattern else dict(sparsity_ratio=float(pattern))


def pruned(dense, ids, method, pattern="2:4", **options):
    model = copy.deepcopy(dense)
    report = wanda_fast.prune(model, dataset=ids, prune_method=method, **sparsity(pattern), **options)
    return model, report


CASES = [("llama3", "sparsegpt", pattern) for pattern in PATTERNS]
CASES += [("llama3", method, pattern) for method in UPDATING[1:] for pattern in ("0.5", "2:4")]
CASES += [("phi", "sparsegpt", "2:4"), ("opt", "sparsegpt", "0.5")]


@pytest.mark.parametrize(("family", "method", "pattern"), CASES)
def test_every_block_equals_the_published_code(family, method, pattern):
    """Each block on the inputs that the driver's saw; in the batches that it takes by itself."""
    dense = FAMILIES[family]()
    ids = token_ids(dense, 8, 64)
    model, report = pruned(dense, ids, method, pattern)
    updated = {}
    masks = prune_published(copy.deepcopy(dense), ids, method, pattern, follow=model, updated=updated)
    assert report.linears.keys() == masks.keys()
    differing = total = 0
    for name, expected in updated.items():
        weight = model.get_submodule(name).weight
        unequal = (weight == 0) != (expected == 0)
        differing, total = differing + unequal.sum().item(), total + weight.numel()
        rows = ~unequal.any(dim=1)  # a weight pruned otherwise changes its whole row
        assert (weight - expected)[rows].abs().max() < WEIGHT_TOLERANCE * expected.abs().max(), name
        assert report.linears[name].sparsity == pytest.approx(masks[name].float().mean().item(), abs=1e-3)
    assert differing <= (1 - EQUAL_MASKS) * total


def test_update_obs_is_the_ablation_of_the_same_masks():
    dense = FAMILIES["llama3"]()
    ids = token_ids(dense, 8, 64)
    for method, ablation in (("wanda", "ablate_wanda_seq"), ("magnitude", "ablate_mag_seq")):
        for pattern in ("0.5", "2:4"):
            updated, _ = pruned(dense, ids, method, pattern, update="obs")
            expected, _ = pruned(dense, ids, ablation, pattern)
            assert all(map(torch.equal, updated.parameters(), expected.parameters()))


class Softer(wanda_fast.Method):
    def score(self, weight, sq_norm):
        return weight.abs() * sq_norm.sqrt().sqrt()


class Halves(wanda_fast.Pattern):
    name = "halves"

    def select(self, scores):
        lowest = torch.zeros_like(scores, dtype=torch.bool)
        lowest[:, ::2] = True
        return lowest


@pytest.fixture
def registered(monkeypatch):
    monkeypatch.setitem(registry.METHODS, "softer", Softer)
    monkeypatch.setitem(registry.PATTERNS, "halves", Halves)


@pytest.mark.parametrize(
    ("method", "options"),
    [
        ("wanda", dict(use_variant=True)),
        ("wanda", {}),
        ("magnitude", {}),
        ("connect", dict(sparsity_type="2:4")),
        ("softer", dict(sparsity_type="2:4")),
        ("softer", dict(sparsity_type="halves")),
        ("magnitude", dict(sparsity_type="halves")),
    ],
)
def test_update_obs_keeps_the_masks_and_lowers_the_error(registered, method, options):
    """Of the first block, whose inputs are the same with and without."""
    dense = FAMILIES["llama3"]()
    ids = token_ids(dense, 8, 64)
    plain, updated = copy.deepcopy(dense), copy.deepcopy(dense)
    options = dict(dataset=ids, prune_method=method, **options)
    before = wanda_fast.prune(plain, measure_error=True, **options)
    after = wanda_fast.prune(updated, update="obs", **options)
    for name in before.linears:
        if ".layers.0." in name:
            old, new = (model.get_submodule(name).weight for model in (plain, updated))
            assert torch.equal(old == 0, new == 0), name
            assert after.linears[name].error < before.linears[name].error, name
    assert before.block_error().keys() == after.block_error().keys() and len(before.block_error()) == 2


def test_sparsegpt_takes_no_pattern_that_it_cannot_choose(registered):
    dense = FAMILIES["llama3"]()
    with pytest.raises(errors.PatternError, match="sparsegpt chooses unstructured or N:M.*halves"):
        wanda_fast.prune(
            dense, dataset=token_ids(dense, 2, 16), prune_method="sparsegpt", sparsity_type="halves"
        )


@pytest.mark.parametrize("method", ["sparsegpt", "ablate_wanda_iter", "ablate_mag_seq", "magnitude"])
def test_the_variant_has_no_effect(method):
    dense = FAMILIES["llama3"]()
    ids = token_ids(dense, 4, 32)
    with_it, report = pruned(dense, ids, method, "0.5", use_variant=True)
    without, _ = pruned(dense, ids, method, "0.5")
    assert f"--use_variant has no effect on {method} with unstructured" in report.warnings
    assert all(map(torch.equal, with_it.parameters(), without.parameters()))


def inputs_of(model, name, ids):
    """What a linear receives, `[tokens, in]` in fp64."""
    seen = []
    linear = model.get_submodule(name)
    handle = linear.register_forward_pre_hook(lambda _, args: seen.append(args[0].flatten(0, 1).double()))
    model(ids, use_cache=False)
    handle.remove()
    return torch.cat(seen)


@pytest.mark.parametrize(
    ("method", "pattern"), [("sparsegpt", "2:4"), ("wanda", "0.5"), ("magnitude", "2:4")]
)
def test_errors_are_those_of_the_outputs(method, pattern):
    dense = FAMILIES["llama3"]()
    ids = token_ids(dense, 4, 32)
    model, report = pruned(dense, ids, method, pattern, measure_error=True)
    for name in (name for name in report.linears if ".layers.0." in name):
        x = inputs_of(dense, name, ids)
        before, after = (each.get_submodule(name).weight.double() for each in (dense, model))
        error, whole = ((before - after) @ x.T).square().sum(), (before @ x.T).square().sum()
        assert report.linears[name].error == pytest.approx(error.item(), rel=1e-4)
        assert report.linears[name].relative_error == pytest.approx((error / whole).item(), rel=1e-4)


def test_errors_are_measured_when_asked_or_for_nothing():
    dense = FAMILIES["llama3"]()
    ids = token_ids(dense, 2, 16)
    for options, measured in (
        (dict(method="wanda"), False),
        (dict(method="sparsegpt"), True),
        (dict(method="sparsegpt", measure_error=False), False),
        (dict(method="wanda", measure_error=True), True),
    ):
        _, report = pruned(dense, ids, **options)
        assert all((linear.error is not None) is measured for linear in report.linears.values()), options


@pytest.mark.parametrize("pattern", ["0.5", "2:4"])
def test_sparsegpt_errs_less_than_wanda_in_every_block(pattern):
    """On inputs that are correlated, as real ones are: the embedding has a few directions of its own."""
    dense = FAMILIES["llama3"]()
    embedding = dense.get_input_embeddings().weight
    mixed = torch.randn(64, 64, generator=torch.Generator().manual_seed(0)) * torch.logspace(0, -2, 64)
    embedding.copy_(embedding @ mixed)
    ids = token_ids(dense, 8, 64)
    errs = [
        pruned(dense, ids, method, pattern, measure_error=True)[1].block_error()
        for method in ("sparsegpt", "wanda")
    ]
    assert all(errs[0][block] < 0.8 * errs[1][block] for block in errs[1])


@pytest.mark.parametrize("name", ["llama2", "phi", "qwen3_moe", "gpt_neox"])
def test_sequential_linear_prunes_every_linear_once(name):
    dense = FAMILIES[name]()
    model, report = pruned(dense, token_ids(dense, 3, 16), "sparsegpt", batch_size=1, sequential="linear")
    linears = all_linears(model)
    for linear in report.linears:
        zeros = (linears[linear].weight == 0).unflatten(1, (-1, 4)).sum(2)
        assert (zeros == 2).all(), linear


def test_sequential_linear_goes_by_pruned_forerunners():
    """The first linear as the dense block's; the last by the Hessian of what the pruned ones hand it."""
    dense = FAMILIES["llama3"]()
    ids = token_ids(dense, 8, 64)
    model, report = pruned(dense, ids, "sparsegpt", sequential="linear", batch_size=3)
    other, _ = pruned(dense, ids, "sparsegpt")
    first, last = "model.layers.0.self_attn.q_proj", "model.layers.0.mlp.down_proj"
    assert torch.equal(model.get_submodule(first).weight == 0, other.get_submodule(first).weight == 0)
    x = inputs_of(model, last, ids)
    difference = (dense.get_submodule(last).weight - model.get_submodule(last).weight).double()
    assert report.linears[last].error == pytest.approx((difference @ x.T).square().sum().item(), rel=1e-3)


@pytest.fixture(scope="module")
def checkpoint_bf16(tmp_path_factory, pydoc_text):
    folder = tmp_path_factory.mktemp("bf16")
    save_checkpoint(FAMILIES["smollm"]().bfloat16(), folder, pydoc_text[:20000])
    (folder / "text.txt").write_text(pydoc_text[:20000])
    return folder


@pytest.mark.parametrize("method", ["sparsegpt", "wanda"])
def test_updated_weights_are_those_that_are_stored(checkpoint_bf16, tmp_path, monkeypatch, method):
    """bf16 on disk, fp32 in the computation: perplexity is the saved model's, streamed or held as a whole."""
    monkeypatch.setattr(checkpoint, "_fast_on_cpu", lambda dtype: False)
    text = str(checkpoint_bf16 / "text.txt")
    options = dict(dataset=text, eval_dataset=text, nsamples=4, seqlen=32, eval_windows=4, device="cpu")
    options |= dict(prune_method=method, sparsity_type="2:4", update="obs", batch_size=1)
    reports = [wanda_fast.prune(str(checkpoint_bf16), save_model=tmp_path / "streamed", **options)]

    def refuse(*_args):
        raise NotStreamableError("for the test")

    with monkeypatch.context() as patch:
        patch.setattr(inputs, "open_meta_model", refuse)
        reports.append(wanda_fast.prune(str(checkpoint_bf16), save_model=tmp_path / "whole", **options))
    streamed, whole = (load_file(tmp_path / name / "model.safetensors") for name in ("streamed", "whole"))
    assert all(torch.equal(tensor, whole[name]) for name, tensor in streamed.items())
    assert {tensor.dtype for tensor in streamed.values()} == {torch.bfloat16}
    saved = api.evaluate(
        str(tmp_path / "streamed"), dataset=text, seqlen=32, eval_windows=4, device="cpu"
    ).perplexity["dense"]
    assert [report.perplexity["pruned"] for report in reports] == pytest.approx([saved, saved], rel=1e-6)
    for name, linear in reports[0].linears.items():
        assert linear.error == pytest.approx(reports[1].linears[name].error, rel=1e-6)


def test_command_line(checkpoint_bf16, tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("COLUMNS", "200")
    out = tmp_path / "out"
    words = [
        "prune",
        "--model",
        checkpoint_bf16,
        "--dataset",
        checkpoint_bf16 / "text.txt",
        "--nsamples",
        "4",
    ]
    words += ["--seqlen", "32", "--eval_windows", "2", "--prune_method", "wanda", "--sparsity_type", "2:4"]
    words += ["--update", "obs", "--dampening", "0.05", "--hessian_device", "device", "--measure_error"]
    monkeypatch.setattr("sys.argv", ["wanda-fast", *map(str, words), "--save_model", str(out)])
    with pytest.raises(SystemExit) as exit:
        cli.main()
    assert not exit.value.code
    said = capsys.readouterr().out
    assert "||(W - W')X||^2" in said and "model.layers.1.mlp.down_proj" in said
    assert "error, mean of a block" in said and "add_hessian_" in said and "factor" in said
    report = wanda_fast.Report.from_json((out / "wanda_fast.json").read_text())
    recipe = {key: report.recipe[key] for key in ("update", "dampening", "hessian_device", "measure_error")}
    assert recipe == dict(update="obs", dampening=0.05, hessian_device="device", measure_error=True)
    assert {linear.dampening for linear in report.linears.values()} == {0.05}

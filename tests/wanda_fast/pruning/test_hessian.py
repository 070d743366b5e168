"""Hessians in the driver: shared, freed, and refused where no dampening helps."""

import copy
import weakref

import pytest
import torch

import wanda_fast
import wanda_kernels
from tests.tiny_models import FAMILIES, save_checkpoint, token_ids
from wanda_fast import errors
from wanda_fast.cli import main as cli
from wanda_fast.pruning import hessian
from wanda_kernels import host_hessian

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture
def alive(monkeypatch):
    """How many Hessians were alive when each was factored and when each weight was updated."""
    made, counts = [], {"factored": [], "updated": []}
    init, factor, update = hessian.Hessian.__init__, wanda_kernels.factor_hessian, wanda_kernels.sparsegpt_

    def count(of):
        counts[of].append(sum(reference() is not None for reference in made))

    def noted(self, *args, **options):
        made.append(weakref.ref(self))
        init(self, *args, **options)

    def factor_hessian(*args):
        count("factored")
        return factor(*args)

    def sparsegpt_(*args, **options):
        count("updated")
        return update(*args, **options)

    monkeypatch.setattr(hessian.Hessian, "__init__", noted)
    monkeypatch.setattr(wanda_kernels, "factor_hessian", factor_hessian)
    monkeypatch.setattr(wanda_kernels, "sparsegpt_", sparsegpt_)
    return counts


def test_shared_once_and_gone_with_the_last_linear(alive):
    model = FAMILIES["llama2"]()
    wanda_fast.prune(model, dataset=token_ids(model, 4, 16), prune_method="sparsegpt", sparsity_type="2:4")
    assert alive["factored"] == [4, 4, 4, 4] * 2  # q k v, o, gate up, down
    assert alive["updated"] == [4, 4, 4, 3, 2, 2, 1] * 2


def test_shared_once_where_linears_are_pruned_one_by_one(alive):
    model, ids = FAMILIES["llama2"](), token_ids(FAMILIES["llama2"](), 4, 16)
    options = dict(prune_method="sparsegpt", sparsity_type="2:4", sequential="linear", batch_size=1)
    wanda_fast.prune(model, dataset=ids, **options)
    assert alive["factored"] == [1, 2, 3, 4] * 2
    assert len(alive["updated"]) == 14


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("rows", [1, 7, 24, 25])
def test_bands_that_visit_the_device_make_the_whole(rows, dtype, monkeypatch):
    monkeypatch.setattr(host_hessian, "BAND", 4 * 24 * rows)
    monkeypatch.setattr(host_hessian, "MOST_TOKENS", 70)
    x = torch.randn(3, 50, 24).to(dtype)
    acc = torch.full((24, 24), 2.0)
    host_hessian.add_hessian_on_host_(acc, x)
    flat = x.double().reshape(150, 24)
    torch.testing.assert_close(acc.double(), 2 + flat.T @ flat, rtol=1e-5, atol=1e-4)


ONE_TOKEN = torch.full((4, 32), 7)  # every hidden state is the same: Hessians of rank 1


def rank_one(dampening, **options):
    model = FAMILIES["llama3"]()
    options = dict(prune_method="sparsegpt", sparsity_type="2:4") | options
    return model, wanda_fast.prune(model, dataset=ONE_TOKEN, dampening=dampening, **options)


def test_rank_one_is_dampened_as_published():
    model, report = rank_one(0.01)
    assert {linear.dampening for linear in report.linears.values()} == {0.01} and not report.warnings
    assert report.sparsity == 0.5 and max(report.block_error().values()) < 1e-3


WANDA_UPDATED = dict(prune_method="wanda", update="obs")


@pytest.mark.parametrize("options", [{}, WANDA_UPDATED, dict(sequential="linear")])
def test_dampening_grows_and_the_report_says_so(options):
    model, report = rank_one(1e-7, **options)
    grown = {name for name, linear in report.linears.items() if linear.dampening > 1e-7}
    assert "model.layers.0.mlp.down_proj" in grown
    assert len(report.warnings) == 1
    assert "since 1e-07 leaves their Hessian not positive definite: " in report.warnings[0]
    assert all(parameter.isfinite().all() for parameter in model.parameters())


def test_no_dampening_helps():
    model = FAMILIES["llama3"]()
    before = copy.deepcopy(model.state_dict())
    sentence = (
        r"block model\.layers\.0: model\.layers\.0\.[a-z_.]+: the \d+ x \d+ Hessian is not positive definite"
    )
    with pytest.raises(errors.HessianError, match=sentence):
        wanda_fast.prune(
            model, dataset=ONE_TOKEN, prune_method="sparsegpt", sparsity_type="2:4", dampening=1e-12
        )
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())


@pytest.fixture(scope="module")
def llama(tmp_path_factory, pydoc_text):
    folder = tmp_path_factory.mktemp("llama")
    save_checkpoint(FAMILIES["llama3"](), folder, pydoc_text[:20000])
    (folder / "text.txt").write_text(pydoc_text[:20000])
    return folder


def test_a_streamed_run_keeps_its_finished_blocks(llama, tmp_path, monkeypatch, capsys):
    """The second block's Hessian is spoilt: exit code 2; the first block is kept, and a sound run goes on."""
    add = wanda_kernels.add_hessian_
    made, out = [], tmp_path / "out"

    def indefinite(acc, x):
        made.append(acc) if not any(acc is other for other in made) else None
        add(acc, x)
        if len(made) == 6:  # the o projection's of the second block
            acc.fill_diagonal_(1.0)[0, 1] = acc[1, 0] = -1e6

    words = ["prune", "--model", llama, "--dataset", llama / "text.txt", "--nsamples", "2", "--seqlen", "32"]
    words += ["--prune_method", "sparsegpt", "--eval_dataset", "none", "--device", "cpu", "--save_model", out]
    monkeypatch.setattr("sys.argv", ["wanda-fast", *map(str, words)])
    with monkeypatch.context() as patch, pytest.raises(SystemExit) as exit:
        patch.setattr(wanda_kernels, "add_hessian_", indefinite)
        cli.main()
    said = capsys.readouterr().err
    assert exit.value.code == 2 and "Traceback" not in said
    assert "block model.layers.1: model.layers.1.self_attn.o_proj: the 64 x 64 Hessian" in said
    partial = tmp_path / "out.partial"
    assert (partial / "block-00000.json").is_file() and not (partial / "block-00001.json").exists()
    monkeypatch.setattr("sys.argv", ["wanda-fast", *map(str, words), "--resume"])
    with pytest.raises(SystemExit) as exit:
        cli.main()
    assert not exit.value.code and (out / "config.json").is_file() and not partial.exists()


def without_input(model):
    """The second block's attention receives zeros alone."""
    model.model.layers[1].input_layernorm.weight.zero_()
    return model


@pytest.mark.parametrize(
    "options", [dict(prune_method="sparsegpt"), dict(prune_method="wanda", update="obs")]
)
@pytest.mark.parametrize("pattern", [dict(sparsity_type="2:4"), dict(sparsity_ratio=0.5)])
def test_dead_linears_are_pruned_by_magnitude(options, pattern):
    model, expected = without_input(FAMILIES["llama3"]()), without_input(FAMILIES["llama3"]())
    ids = token_ids(model, 4, 32)
    report = wanda_fast.prune(model, dataset=ids, **options, **pattern)
    wanda_fast.prune(expected, prune_method="magnitude", dataset=ids, **pattern)
    dead = [f"model.layers.1.self_attn.{name}_proj" for name in "qkvo"]
    assert [name for name, linear in report.linears.items() if linear.fallback] == dead
    for name in dead:
        assert torch.equal(model.get_submodule(name).weight, expected.get_submodule(name).weight)
        assert report.linears[name].error == report.linears[name].relative_error == 0
    sentence = "4 linears were pruned by magnitude, since no calibration token reached them, or zeros alone: "
    assert report.warnings == [sentence + ", ".join(dead)]


def test_single_dead_inputs_lose_their_weights():
    model = FAMILIES["llama3"]()
    model.model.layers[0].post_attention_layernorm.weight[5] = 0
    report = wanda_fast.prune(
        model, dataset=token_ids(model, 8, 64), prune_method="sparsegpt", sparsity_type="2:4"
    )
    assert not model.model.layers[0].mlp.gate_proj.weight[:, 5].any() and not report.warnings


@pytest.mark.parametrize(
    "options",
    [
        dict(prune_method="sparsegpt"),
        dict(prune_method="sparsegpt", sequential="linear"),
        dict(prune_method="wanda", update="obs"),
        dict(prune_method="magnitude", measure_error=True),
    ],
)
def test_one_infinite_activation(options):
    model = FAMILIES["llama3"]()
    model.model.layers[1].input_layernorm.weight[3] = float("inf")
    before = copy.deepcopy(model.model.layers[1].state_dict())
    with pytest.raises(errors.NonFiniteError, match=r"block model\.layers\.1: .*q_proj: .* inf at \[3\]"):
        wanda_fast.prune(model, dataset=token_ids(model, 4, 16), sparsity_type="2:4", **options)
    after = model.model.layers[1].state_dict()
    assert all(torch.equal(tensor, before[name]) for name, tensor in after.items())


def test_an_update_that_overflows_is_not_silent(monkeypatch):
    model = FAMILIES["llama3"]()
    update = wanda_kernels.sparsegpt_

    def overflow(weight, *args, **options):
        update(weight, *args, **options)
        weight[1, 2] = float("inf")

    monkeypatch.setattr(wanda_kernels, "sparsegpt_", overflow)
    with pytest.raises(errors.NonFiniteError, match=r"layers\.0\.self_attn\.q_proj\.weight .*float32"):
        wanda_fast.prune(model, dataset=token_ids(model, 2, 16), prune_method="sparsegpt")


@pytest.mark.parametrize(
    ("options", "error", "sentence"),
    [
        (dict(dampening=0.0), errors.HessianError, "dampening must be a positive number, got 0"),
        (dict(dampening=float("nan")), errors.HessianError, "dampening must be a positive number, got nan"),
        (dict(update="gptq"), errors.UnknownMethodError, "update must be 'none' or 'obs', got 'gptq'"),
        (dict(hessian_device="cuda"), errors.UnknownMethodError, "'auto', 'device' or 'host', got 'cuda'"),
    ],
)
def test_bad_flags(options, error, sentence):
    model = FAMILIES["llama3"]()
    with pytest.raises(error, match=sentence):
        wanda_fast.prune(model, dataset=token_ids(model, 2, 16), prune_method="sparsegpt", **options)

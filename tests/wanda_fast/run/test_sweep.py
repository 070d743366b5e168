"""A sweep: every setting gives what its single run gives, and the model stays as it is."""

import json
import sys
from contextlib import contextmanager

import pytest
import torch
import transformers
from safetensors.torch import load_file

import wanda_fast
from tests.tiny_models import FAMILIES, GQA, WINDOW, save_checkpoint, token_ids
from wanda_fast import errors
from wanda_fast.checkpoint.block_loader import StreamedModel
from wanda_fast.cli import main as cli
from wanda_fast.model.block_inputs import BlockInputs
from wanda_fast.output.pages import named_reports
from wanda_fast.pruning import block_loop, hessian
from wanda_fast.report.page import page
from wanda_fast.report.sweep import Sweep
from wanda_fast.run.settings import settings_of

pytestmark = pytest.mark.usefixtures("one_thread")

SEQLEN = 24
METHODS, TYPES, RATIOS = ["wanda", "sparsegpt", "magnitude"], ["2:4", "unstructured"], [0.4, 0.6]


@pytest.fixture(scope="module", params=["llama2", "mixtral"])
def folder(request, tmp_path_factory):
    folder = tmp_path_factory.mktemp("dense") / request.param
    save_checkpoint(FAMILIES[request.param]().bfloat16(), folder, "Some text to train a tokenizer. " * 50)
    return folder


@pytest.fixture
def llama():
    return FAMILIES["llama2"]()


def data(vocabulary_of, **options):
    model = FAMILIES[vocabulary_of]()
    calibration, windows = token_ids(model, 4, SEQLEN), token_ids(model, 3, SEQLEN, seed=1)
    return dict(dataset=calibration, eval_dataset=windows, seqlen=SEQLEN) | options


def one(report):
    """The options of the single run of a sweep's report."""
    return {name: report.recipe[name] for name in ("prune_method", "sparsity_type", "sparsity_ratio")}


def tensors(folder):
    return load_file(folder / "model.safetensors")


def equal(one, other):
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


@pytest.mark.parametrize("statistics", ["dense", "sequential"])
def test_each_setting_is_the_single_run(folder, statistics, tmp_path):
    """Every weight and every perplexity, of a model that is streamed."""
    before, options = (folder / "model.safetensors").read_bytes(), data("llama2", statistics=statistics)
    methods = METHODS if folder.name == "llama2" else METHODS[:2]
    swept = wanda_fast.sweep(
        folder,
        prune_method=methods,
        sparsity_type=TYPES,
        sparsity_ratio=RATIOS,
        save_model=tmp_path / "swept",
        **options,
    )
    patterns = ["2:4", "unstructured 0.4", "unstructured 0.6"]
    assert list(swept.reports) == [f"{method} {pattern}" for method in methods for pattern in patterns]
    for name, report in swept.reports.items():
        own = tmp_path / name.replace(" ", "-").replace(":", "of")
        single = wanda_fast.prune(folder, **one(report), save_model=own, **options)
        assert equal(tensors(tmp_path / "swept" / own.name), tensors(own)), name
        assert report.perplexity == single.perplexity
        assert report.sparsity == single.sparsity and report.warnings == single.warnings
        assert report.calibration == single.calibration and report.digests == single.digests
        assert {x.operation for x in report.linears.values()} == {
            x.operation for x in single.linears.values()
        }
    assert (folder / "model.safetensors").read_bytes() == before
    assert sorted(file.name for file in (tmp_path / "swept").iterdir()) == sorted(
        name.replace(" ", "-").replace(":", "of") for name in swept.reports
    )


@pytest.mark.parametrize(
    "options",
    [
        dict(prune_method=["admm"]),
        dict(prune_method=["connect", "gated"], statistics="dense"),
        dict(prune_method=["wanda", "admm"], refine=0, update="none", statistics="dense"),
        dict(prune_method=["wanda"], update="obs", refine=2, polish=1, statistics="dense"),
        dict(prune_method=["wanda", "sparsegpt"], sequential="linear"),
        dict(prune_method=["wanda"], measure_error=True, statistics="dense"),
    ],
    ids=str,
)
def test_other_methods_and_orders(options, llama, monkeypatch):
    """The weights as the loop gives them, of a model in memory, which is the same again at the end."""
    options = data("llama2", eval_dataset=None) | options
    methods = options.pop("prune_method")
    before = {name: tensor.clone() for name, tensor in llama.state_dict().items()}
    pruned, evaluate = {}, block_loop._evaluate

    def keep(turn, windows):
        evaluate(turn, windows)
        weights = {linear.name: linear.weight.detach().clone() for linear in turn.block.linears}
        pruned.setdefault(turn.index, []).append(weights)

    with monkeypatch.context() as patch:
        patch.setattr(block_loop, "_evaluate", keep)
        swept = wanda_fast.sweep(llama, prune_method=methods, sparsity_type="2:4,unstructured", **options)
    assert equal(llama.state_dict(), before)
    for number, report in enumerate(swept.reports.values()):
        model = FAMILIES["llama2"]()
        single = wanda_fast.prune(model, **one(report), **options)
        weights = {name: x for blocks in pruned.values() for name, x in blocks[number + 1].items()}
        assert all(torch.equal(model.get_submodule(name).weight, x) for name, x in weights.items())
        assert len(weights) == len(single.linears) == 14
        errors_of = [{n: x.error for n, x in each.linears.items()} for each in (report, single)]
        assert errors_of[0] == errors_of[1]


def test_a_model_in_memory_is_measured_and_left_as_it_is(llama):
    options = data("llama2")
    before = {name: tensor.clone() for name, tensor in llama.state_dict().items()}
    llama.train()
    swept = wanda_fast.sweep(llama, sparsity_ratio=[0.5, 0.7], **options)
    assert equal(llama.state_dict(), before) and llama.training
    for report in swept.reports.values():
        single = wanda_fast.prune(FAMILIES["llama2"](), **one(report), **options)
        for which in ("dense", "pruned"):
            assert report.perplexity[which] == pytest.approx(single.perplexity[which], rel=1e-5)


@pytest.mark.parametrize("statistics", ["dense", "sequential"])
def test_blocks_that_pass_on_keys_and_values(statistics, tmp_path):
    """Each setting has its own: Gemma 4's last blocks read those of earlier ones."""
    kinds = dict(layer_types=["sliding_attention", "full_attention"] * 2, num_kv_shared_layers=2)
    sizes = dict(num_hidden_layers=4, head_dim=16, global_head_dim=16, sliding_window=WINDOW)
    sizes |= dict(hidden_size_per_layer_input=16, vocab_size_per_layer_input=320)
    torch.manual_seed(0)
    transformers.Gemma4ForCausalLM(transformers.Gemma4TextConfig(**GQA | sizes | kinds)).save_pretrained(
        tmp_path
    )
    options = data("llama2", statistics=statistics, batch_size=2)
    swept = wanda_fast.sweep(tmp_path, sparsity_ratio=[0.4, 0.7], **options)
    for report in swept.reports.values():
        assert report.perplexity == wanda_fast.prune(tmp_path, **one(report), **options).perplexity


@contextmanager
def autocast():
    with torch.autocast("cpu", dtype=torch.bfloat16):
        yield


@pytest.mark.parametrize("mode", [autocast, torch.inference_mode])
def test_inside_of_the_callers_modes(mode):
    """Autocast keeps 16-bit copies of trainable weights: those of another setting must not be used."""
    options = data("llama2")
    with mode():
        model = FAMILIES["llama2"]().requires_grad_(mode is autocast)
        before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
        swept = wanda_fast.sweep(model, sparsity_ratio=[0.4, 0.7], **options)
        alone = wanda_fast.sweep(model, sparsity_ratio=[0.7], **options)
        assert equal(model.state_dict(), before)
    assert swept.reports["wanda unstructured 0.7"].perplexity == alone.first.perplexity


def test_an_interrupted_sweep_leaves_a_model_in_memory_dense(llama, monkeypatch):
    def interrupted(*_):
        raise KeyboardInterrupt

    before = {name: tensor.clone() for name, tensor in llama.state_dict().items()}
    monkeypatch.setattr(block_loop, "require_same_weights", interrupted)
    with pytest.raises(KeyboardInterrupt):
        wanda_fast.sweep(llama, sparsity_ratio=[0.5, 0.7], **data("llama2"))
    assert equal(llama.state_dict(), before)


def counted(monkeypatch, owner, name):
    """The calls of a function from now on."""
    calls, own = [], getattr(owner, name)
    monkeypatch.setattr(owner, name, lambda *args, **named: (calls.append(args), own(*args, **named))[1])
    return calls


@pytest.mark.parametrize("statistics, passes", [("dense", 1), ("sequential", 0)])
def test_what_is_done_once(folder, statistics, passes, monkeypatch):
    """Blocks are read once, the dense model is evaluated once. Dense statistics take one pass, and factors
    are made once for all settings of a method."""
    reads, advances = (
        counted(monkeypatch, StreamedModel, "block"),
        counted(monkeypatch, BlockInputs, "advance_"),
    )
    factors = counted(monkeypatch, hessian.wanda_kernels, "factor_hessian")
    swept = wanda_fast.sweep(
        folder,
        prune_method=["sparsegpt", "wanda"],
        sparsity_type=TYPES,
        sparsity_ratio=RATIOS,
        **data("llama2", statistics=statistics),
    )
    assert len(swept.reports) == 6 and len(reads) == 2
    pruned_passes = 0 if passes else 6  # the last block has none
    assert len(advances) == 2 * (1 + 6 + passes) + pruned_passes
    inputs = 2 * (2 + 2 * 4 if "mixtral" in str(folder) else 4)
    assert len(factors) == inputs * (1 if passes else 3)


def test_every_setting_has_the_windows_that_begin_with_bos(folder, tmp_path):
    (tmp_path / "text.txt").write_text("Some text to calibrate with. " * 100)
    options = dict(dataset=tmp_path / "text.txt", eval_dataset=tmp_path / "text.txt", nsamples=2, seqlen=16)
    options |= dict(eval_windows=2, bos="always")
    swept = wanda_fast.sweep(folder, prune_method=["magnitude", "wanda"], sparsity_ratio=[0.6], **options)
    for report in swept.reports.values():
        single = wanda_fast.prune(folder, **one(report), **options)
        assert report.perplexity == single.perplexity and "BOS" in report.perplexity["protocol"]
        assert report.calibration == single.calibration


def test_the_report_as_a_file(folder, tmp_path):
    swept = wanda_fast.sweep(folder, sparsity_ratio=[0.5, 0.7], save=tmp_path / "out", **data("llama2"))
    text = (tmp_path / "out" / "wanda_fast_sweep.json").read_text()
    read = Sweep.from_json(text)
    assert read.reports.keys() == swept.reports.keys() == json.loads(text)["reports"].keys()
    assert read.seconds == swept.seconds and read.all_seconds == pytest.approx(swept.all_seconds)
    for name, report in swept.reports.items():
        assert report.complete and read.reports[name].perplexity == report.perplexity
        assert read.reports[name].linears == report.linears
        assert {"selection", "pruned pass"} <= report.seconds.keys() and "read" not in report.seconds
    assert {"read", "block inputs", "evaluation"} <= swept.seconds.keys()


def test_settings():
    def names(*lists):
        return [setting.name for setting in settings_of(*lists)]

    assert names("wanda", "unstructured", None) == ["wanda unstructured 0.5"]
    assert names("wanda", "2:4", 0.5) == ["wanda 2:4"]
    assert names("wanda, magnitude", "2:4,unstructured,4:8", "0.4, .75") == [
        f"{method} {pattern}"
        for method in ("wanda", "magnitude")
        for pattern in ("2:4", "unstructured 0.4", "unstructured 0.75", "4:8")
    ]
    assert settings_of(["wanda"], ("unstructured",), [0.25])[0].sparsity_ratio == 0.25


@pytest.mark.parametrize(
    "options, kind, sentence",
    [
        (dict(resume=True), errors.SweepError, "takes no --resume"),
        (
            dict(sparsity_type="2:4,1:4", sparsity_ratio="0.5,0.4"),
            errors.SparsityRatioError,
            r"sparsity_ratio 0.4 goes with no pattern, .* 2:4 \(0.5\), 1:4 \(0.75\); add unstructured",
        ),
        (dict(sparsity_ratio=[0.5, 0.6, 0.5]), errors.OptionError, "sparsity_ratio has 0.5 2 times"),
        (dict(sparsity_ratio="0.5,0.50"), errors.OptionError, "sparsity_ratio has 0.5 2 times"),
        (dict(sparsity_type="2:4,2:4"), errors.OptionError, "sparsity_type has 2:4 2 times"),
        (dict(sparsity_ratio=[]), errors.OptionError, "sparsity_ratio is an empty list"),
        (dict(sparsity_type=""), errors.OptionError, "sparsity_type is an empty list"),
        (dict(prune_method=()), errors.OptionError, "prune_method is an empty list"),
        (dict(sparsity_ratio="0.5,half"), errors.SparsityRatioError, "got 'half'"),
        (dict(sparsity_ratio="0.5,,0.6"), errors.SparsityRatioError, "got ''"),
        (dict(sparsity_ratio=[0.5, 1.0]), errors.SparsityRatioError, r"in \(0, 1\) in a sweep, got 1.0"),
        (dict(sparsity_ratio=[0, 0.5]), errors.SparsityRatioError, "got 0"),
        (dict(sparsity_type="2:4,3of4"), errors.PatternError, "unknown sparsity_type '3of4'"),
        (dict(prune_method="wanda,wand"), errors.UnknownMethodError, "unknown prune_method 'wand'"),
        (dict(prune_method="wanda,dense"), errors.UnknownMethodError, "dense prunes nothing"),
        (dict(prune_method="connect,wanda_connect"), errors.OptionError, "are the same method"),
        (dict(prune_method="wanda,admm", refine=1), errors.OptionError, "admm solves"),
        (dict(dataset=torch.zeros(2, 3, 8, 8)), errors.SweepError, "image classifier"),
    ],
    ids=str,
)
def test_refused_before_anything_is_read(options, kind, sentence):
    with pytest.raises(kind, match=sentence) as raised:
        wanda_fast.sweep("no/such/folder", **options)
    assert "\n" not in str(raised.value)


def test_refused_before_the_work(folder, llama, tmp_path, monkeypatch):
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "file").touch()
    for option in ("save", "save_model"):
        with pytest.raises(errors.OutputError, match="is not empty"):
            wanda_fast.sweep(folder, **data("llama2", **{option: tmp_path / "full"}))
    with pytest.raises(errors.SweepError, match="held in memory as a whole: leave out save_model"):
        wanda_fast.sweep(llama, **data("llama2", save_model=tmp_path / "out"))
    assert not (tmp_path / "out").exists()
    with pytest.raises(errors.PatternError, match="not a multiple of 7"):
        wanda_fast.sweep(folder, sparsity_type="2:4,3:7", **data("llama2", save_model=tmp_path / "out"))
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("RANK", "0")
    with pytest.raises(errors.RanksError, match="one process"):
        wanda_fast.sweep(folder, **data("llama2"))


def test_a_failed_sweep_leaves_no_output(folder, tmp_path, monkeypatch):
    def fails(*_):
        raise OSError("no such thing")

    monkeypatch.setattr(block_loop, "require_same_weights", fails)
    with pytest.raises(OSError, match="no such thing"):
        wanda_fast.sweep(folder, sparsity_ratio=[0.4, 0.5], **data("llama2", save_model=tmp_path / "out"))
    assert not list(tmp_path.rglob("*.safetensors")) and not list(tmp_path.rglob("run.json"))


def test_the_command(folder, tmp_path, monkeypatch, capsys, short_pydoc):
    monkeypatch.setenv("COLUMNS", "120")
    words = ["--model", str(folder), "--dataset", "pydoc", "--nsamples", "2", "--seqlen", "32"]
    words += ["--eval-windows", "2", "--sparsity_type", "2:4,unstructured", "--save", str(tmp_path / "out")]
    monkeypatch.setattr(sys, "argv", ["wanda-fast", "sweep", *words, "--sparsity", "0.4,0.6"])
    with pytest.raises(SystemExit) as ended:
        cli.main()
    said = capsys.readouterr().out
    assert not ended.value.code and "wanda 2:4 " in said and f"written: {tmp_path / 'out'}" in said
    swept = Sweep.from_json((tmp_path / "out" / "wanda_fast_sweep.json").read_text())
    for report in swept.reports.values():
        assert f"{report.perplexity['pruned']:.4f}" in said
    for more in (["--resume"], ["--sparsity_ratio", "0.5,0.5"]):
        monkeypatch.setattr(sys, "argv", ["wanda-fast", "sweep", *words, *more])
        with pytest.raises(SystemExit) as ended:
            cli.main()
        assert ended.value.code == 2 and "wanda-fast: " in capsys.readouterr().err


def test_a_sweep_is_compared_on_a_page(folder, tmp_path):
    swept = wanda_fast.sweep(folder, sparsity_ratio=[0.3, 0.6], save=tmp_path / "sweep", **data("llama2"))
    runs = named_reports([tmp_path / "sweep"])
    assert list(runs) == list(swept.reports)
    assert "Perplexity by sparsity" in page(runs)
    (tmp_path / "sweep" / "wanda_fast_sweep.json").write_text("{}")
    with pytest.raises(errors.ReportError, match="is not a report of a sweep"):
        named_reports([tmp_path / "sweep"])

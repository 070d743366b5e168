"""Every option is where it is looked for: keyword, docstring, flag, panel, recipe, resume identity."""

import inspect
import sys
from dataclasses import fields

import pytest
import typer

import wanda_fast
from tests.tiny_models import FAMILIES, token_ids
from wanda_fast import api, errors
from wanda_fast.checkpoint.load import DTYPES
from wanda_fast.cli import main as cli
from wanda_fast.model.offload import KINDS
from wanda_fast.options.all_options import Options
from wanda_fast.options.option import BYTES, PANELS, RESULTS
from wanda_fast.options.signature import names_deciding

NAMES = [each.name for each in fields(Options)]
CHOICES = {each.name: each.metadata["choices"] for each in fields(Options) if each.metadata["choices"]}


def test_every_option_is_a_keyword_with_type_and_default():
    parameters = inspect.signature(wanda_fast.prune).parameters
    assert list(parameters) == [*NAMES, "tokenizer", "progress", "process_group"]
    for each in fields(Options)[1:]:
        assert parameters[each.name].default == each.default
        assert parameters[each.name].annotation == each.type


def test_help_describes_every_option():
    text = inspect.getdoc(wanda_fast.prune)
    for each in fields(Options)[1:]:
        kind = inspect.formatannotation(each.type)
        assert f"\n    {each.name} ({kind}, default {each.default!r}): " in text
    assert max(map(len, text.splitlines())) <= 110
    assert "\n    eval_windows (int | None, default None): " in inspect.getdoc(api.evaluate)


def test_a_sweep_takes_lists_and_the_options_of_all_settings():
    taken = set(inspect.signature(wanda_fast.sweep).parameters)
    assert set(NAMES) - taken == set("allocation checkpoint eval_zero_shot save_log save_mask".split()) | {
        "tasks",
        "tasks_path",
        "tasks_limit",
        "report",
        "expect",
        "save_packed",
    }
    assert taken - set(NAMES) == {"tokenizer", "progress"}
    assert "\n    nsamples (int | None, default None): " in inspect.getdoc(wanda_fast.sweep)
    flags = {flag.name: flag for flag in typer.main.get_command(cli.app).commands["sweep"].params}
    assert set(flags) == taken - {"tokenizer", "progress"} | {"plugin"}
    assert flags["sparsity_type"].default == "unstructured" and flags["sparsity_ratio"].default is None


def test_a_keyword_that_is_no_option_is_a_type_error():
    for function, keyword in ((wanda_fast.prune, "nsample"), (api.evaluate, "nsamples")):
        with pytest.raises(TypeError, match=f"unexpected keyword argument '{keyword}'"):
            function("model", **{keyword: 3})


def test_every_option_is_a_flag_in_its_panel(monkeypatch, capsys):
    monkeypatch.setenv("COLUMNS", "110")
    monkeypatch.setattr(sys, "argv", ["wanda-fast", "prune", "--help"])
    with pytest.raises(SystemExit):
        cli.main()
    said = capsys.readouterr().out
    starts = [said.index(f"╭─ {panel} ─") for panel in PANELS] + [len(said)]
    assert starts == sorted(starts)
    for each in fields(Options):
        panel = PANELS.index(each.metadata["panel"])
        assert f"--{each.name.replace('_', '-')} " in said[starts[panel] : starts[panel + 1]], each.name


@pytest.mark.parametrize("each", fields(Options), ids=NAMES)
def test_help_is_one_to_three_sentences(each):
    text = each.metadata["help"]
    assert text.endswith(".") and 1 <= text.count(". ") + 1 <= 3 and len(text) < 300


def test_flags_have_the_defaults_of_the_keywords():
    """But for three: the published default model, text by name, and a flag that can be repeated."""
    command = typer.main.get_command(cli.app).commands["prune"]
    flags = {flag.name: flag for flag in command.params}
    differ = {each.name for each in fields(Options) if flags[each.name].default != each.default}
    assert differ == {"model", "eval_dataset", "ignore"}
    assert flags["model"].default == "meta-llama/Llama-3.2-1B" and flags["eval_dataset"].default == "auto"
    assert not any(flag.secondary_opts for name, flag in flags.items() if name != "measure_error")
    assert flags["measure_error"].secondary_opts == ["--no-measure-error"]


@pytest.mark.parametrize("name", CHOICES)
def test_another_word_is_refused_before_the_work(name):
    model, choices = FAMILIES["llama2"](), CHOICES[name]
    listed = ", ".join(f"'{choice}'" for choice in choices[:-1]) + f" or '{choices[-1]}', got 'other'"
    kind = errors.CheckpointError if name == "dtype" else errors.UnknownMethodError
    with pytest.raises(kind, match=f"{name} must be {listed}"):
        wanda_fast.prune(model, dataset=token_ids(model, 2, 16), **{name: "other"})
    assert model.model.layers[0].mlp.up_proj.weight.all()


def test_choices_are_what_the_rooms_below_know():
    assert CHOICES["dtype"] == ("auto", *DTYPES)
    assert CHOICES["activations"] == ("auto", *KINDS)


def test_the_recipe_is_the_options_in_their_order():
    model = FAMILIES["llama2"]()
    ids = token_ids(model, 2, 16)
    report = wanda_fast.prune(model, dataset=ids, sparsity_type="2:4", ignore=["*.k_proj"])
    assert list(report.recipe) == NAMES
    changed = {"model", "dataset", "sparsity_type", "sparsity_ratio", "ignore"}
    assert {each.name for each in fields(Options) if report.recipe[each.name] != each.default} == changed
    assert report.recipe["model"] == "LlamaForCausalLM" and report.recipe["dataset"] == "token ids [2, 16]"
    assert report.recipe["sparsity_ratio"] == 0.5 and report.recipe["ignore"] == ["*.k_proj"]


def test_what_decides_whether_a_run_is_resumed():
    identity = "prune_method sparsity_type sparsity_ratio nsamples seqlen seed use_variant connect_gate"
    identity += " ignore dtype sequential update refine polish dampening measure_error"
    identity += " allocation bos expert_shrinkage expert_tokens expert_weighting prune_granularity statistics"
    assert set(names_deciding(BYTES)) == set(identity.split())
    finished = "model checkpoint dataset text_column eval_dataset eval_windows eval_zero_shot batch_size"
    finished += " save_mask save_packed protocol tasks tasks_path tasks_limit"
    assert set(names_deciding(RESULTS)) == set(finished.split())

"""Every bad input ends as one sentence with the culprit and the numbers, exit code 2, nothing written."""

import json
import resource
import shutil
import signal
import sys

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import AutoModelForCausalLM, Gemma3nTextConfig, XLMConfig
from transformers.modeling_outputs import BaseModelOutputWithPast

import wanda_fast
from tests.tiny_models import FAMILIES, GQA, save_checkpoint, token_ids
from tests.wanda_fast import forked
from wanda_fast import errors
from wanda_fast.cli import main as cli

pytestmark = pytest.mark.usefixtures("one_thread", "short_pydoc")


@pytest.fixture(scope="module")
def llama(tmp_path_factory, pydoc_text):
    folder = tmp_path_factory.mktemp("llama")
    save_checkpoint(FAMILIES["llama2"](), folder, pydoc_text[:20000])
    return folder


@pytest.fixture
def run(monkeypatch, capsys):
    """Run `wanda-fast` with these words; returns (exit code, standard error)."""

    def run(*words):
        monkeypatch.setattr(sys, "argv", ["wanda-fast", *map(str, words)])
        with pytest.raises(SystemExit) as exit:
            cli.main()
        return exit.value.code, capsys.readouterr().err

    return run


QUICK = ("--dataset", "pydoc", "--nsamples", "2", "--seqlen", "32", "--eval_windows", "2")

SENTENCES = {
    "unknown method": (["--prune_method", "wander"], ["'wander'", "magnitude, wanda, connect"]),
    "unknown pattern": (["--sparsity_type", "blocky"], ["'blocky'", "N:M"]),
    "pattern without sense": (["--sparsity_type", "4:2"], ["4:2", "1 <= N < M <= 32"]),
    "pattern too wide": (["--sparsity_type", "16:64"], ["16:64", "32"]),
    "ratio 1": (["--sparsity_ratio", "1.0"], ["[0, 1)", "1.0"]),
    "ratio below 0": (["--sparsity_ratio=-0.25"], ["[0, 1)", "-0.25"]),
    "ratio nan for N:M": (["--sparsity_type", "2:4", "--sparsity_ratio", "nan"], ["2:4", "0.5", "nan"]),
    "ratio against N:M": (["--sparsity_type", "2:4", "--sparsity_ratio", "0.7"], ["2:4", "0.5", "0.7"]),
    "in_features no multiple": (["--sparsity_type", "3:7"], ["model.layers.0", "64", "7"]),
    "no such placement": (["--activations", "tape"], ["'tape'", "'disk'"]),
    "text too short": (["--dataset", "{short}", "--seqlen", "64"], ["short.txt", "64", "--seqlen"]),
    "no such dataset": (["--dataset", "wikitext3"], ["'wikitext3'", "wikitext2", ".txt"]),
    "ignore matches nothing": (["--ignore", "*.no_proj"], ["'*.no_proj'", "14 linears"]),
    "ignore no expression": (["--ignore", "re:("], ["'re:('", "regular expression"]),
    "no such device": (["--device", "gpu"], ["'gpu'", "cpu, cuda or cuda:N"]),
    "no such gpu": (["--device", "cuda:99"], ["'cuda:99'", "not here"]),
    "no such dtype": (["--dtype", "int8"], ["'int8'", "bfloat16"]),
    "no such gate": (["--prune_method", "connect", "--connect_gate", "up"], ["'up'", "activated", "raw"]),
    "context exceeded": (["--seqlen", "512"], ["512", "256", "--seqlen"]),
    "no such plugin": (["--plugin", "{folder}/none.py"], ["none.py", "does not exist"]),
    "a limit without tasks": (["--tasks_limit", "3"], ["tasks_limit 3", "--tasks"]),
    "no task between commas": (["--tasks", "piqa,,copa"], ["'piqa,,copa'", "separated by commas"]),
    "task without file": (["--tasks", "piqa", "--tasks_path", "{folder}"], ["'piqa'", "piqa_openai.jsonl"]),
    "output not empty": (["--save_model", "{folder}"], ["not empty", "--overwrite"]),
    "log folder not empty": (["--save", "{folder}"], ["not empty", "--overwrite"]),
    "log file exists": (["--save_log", "{short}"], ["short.txt exists", "--overwrite"]),
    "mask file exists": (["--save_mask", "{short}"], ["short.txt exists", "--overwrite"]),
    "mask file is a folder": (["--save_mask", "{folder}", "--overwrite"], ["is not a regular file"]),
    "mask file under a file": (
        ["--save_mask", "{short}/mask"],
        ["short.txt/mask", "short.txt is not a writable folder"],
    ),
    "page exists": (["--report", "{short}"], ["short.txt exists", "--overwrite"]),
    "page without a folder": (
        ["--report", "{short}.d/page.html"],
        ["short.txt.d does not exist"],
    ),
    "page is a folder": (["--report", "{folder}", "--overwrite"], ["is not a regular file"]),
    "output is a file": (["--save_model", "{short}"], ["short.txt", "is not a folder"]),
}


@pytest.mark.parametrize("case", SENTENCES)
def test_one_sentence_and_exit_code_2(case, llama, run, tmp_path):
    short = tmp_path / "short.txt"
    short.write_text("too short")
    flags, expected = SENTENCES[case]
    words = [word.format(short=short, folder=llama) for word in flags]
    before = sorted(llama.iterdir())
    code, said = run("prune", "--model", llama, *QUICK, *words)
    assert code == 2
    assert said.startswith("wanda-fast: ") and said.count("\n") == 1 and "Traceback" not in said
    for words in expected:
        assert words in said
    assert sorted(llama.iterdir()) == before
    assert sorted(tmp_path.iterdir()) == [short]


def test_the_folder_at_hand_is_an_output_like_any_other(llama, run, monkeypatch):
    monkeypatch.chdir(llama)
    code, said = run("prune", "--model", llama, *QUICK, "--save_model", ".")
    assert code == 2 and "output folder . is not empty" in said


@pytest.mark.parametrize("flag", ["--nsamples=0", "--batch_size=0", "--seqlen=x", "--no_such_flag"])
def test_usage_errors_exit_with_2(flag, llama, run):
    code, said = run("prune", "--model", llama, *QUICK, flag)
    assert code == 2 and "Traceback" not in said


def test_a_model_that_is_not_there(run, tmp_path):
    assert run("prune", "--model", tmp_path / "none", *QUICK)[0] == 2
    empty = tmp_path / "empty"
    empty.mkdir()
    code, said = run("prune", "--model", empty, *QUICK)
    assert code == 2 and "is empty" in said
    code, said = run("prune", "--model", "someone/unheard-of", *QUICK)
    assert code == 2 and "someone/unheard-of cannot be loaded" in said


LACKS = {  # family, how its second block's tensors are spoilt -> the words of the sentence
    ("smollm", "one gone"): ["lacks 1 of its tensors: model.layers.1.mlp.down_proj.weight is absent"],
    ("smollm", "all gone"): ["lacks 9 of its tensors", "model.layers.1", "and 6 more"],
    ("smollm", "cut"): ["mlp.down_proj.weight is [47, 160] in the file, [48, 160] in the model"],
    ("mixtral", "one gone"): ["cannot be loaded"],  # an expert: transformers fails to merge the others
}


@pytest.mark.parametrize(("family", "how"), LACKS)
def test_a_checkpoint_that_lacks_tensors_is_not_filled_at_random(family, how, run, tmp_path, pydoc_text):
    folder, out = tmp_path / "model", tmp_path / "out"
    save_checkpoint(FAMILIES[family](), folder, pydoc_text[:20000])
    tensors = load_file(folder / "model.safetensors")
    block = [name for name in tensors if ".layers.1." in name]
    one = next(name for name in block if name.endswith(("down_proj.weight", "experts.0.w1.weight")))
    cut = {one: tensors[one][:-1].contiguous()} if how == "cut" else {}
    gone = block if how == "all gone" else [one]
    kept = {name: tensor for name, tensor in tensors.items() if name not in gone}
    save_file(kept | cut, folder / "model.safetensors", metadata={"format": "pt"})
    code, said = run("prune", "--model", folder, *QUICK, "--save_model", out)
    assert code == 2 and "Traceback" not in said
    for words in LACKS[family, how]:
        assert words in said.splitlines()[-1]
    assert not out.exists()


def test_two_gguf_files_in_one_folder(run, tmp_path):
    (tmp_path / "a.gguf").touch()
    (tmp_path / "b.gguf").touch()
    code, said = run("prune", "--model", tmp_path, *QUICK)
    assert code == 2 and "2 GGUF files (a.gguf, b.gguf)" in said


def test_offline_hub_dataset_names_the_local_file_option(llama, run, monkeypatch):
    import datasets

    def unreachable(*_args, **_kwargs):
        raise ConnectionError("Couldn't reach 'Salesforce/wikitext' on the Hub")

    monkeypatch.setattr(datasets, "load_dataset", unreachable)
    code, said = run("prune", "--model", llama, "--seqlen", "32")
    assert code == 2 and "wikitext2" in said and "--dataset FILE.txt" in said and said.count("\n") == 1


def test_nan_weight_names_block_and_linear_and_keeps_the_blocks_before_it(run, tmp_path, pydoc_text):
    model = FAMILIES["llama2"]()
    model.model.layers[1].mlp.up_proj.weight[3, 5] = float("nan")
    folder, out = tmp_path / "nan", tmp_path / "out"
    save_checkpoint(model, folder, pydoc_text[:20000])
    code, said = run("prune", "--model", folder, *QUICK, "--save_model", out, "--save", tmp_path / "log")
    assert code == 2
    assert "block model.layers.1" in said and "model.layers.1.mlp.up_proj.weight" in said and "[3, 5]" in said
    assert sorted(tmp_path.iterdir()) == [folder, tmp_path / "out.partial"]
    assert sorted(file.name for file in (tmp_path / "out.partial").glob("block-*")) == ["block-00000.json"]


def test_infinite_activation_names_block_and_linear():
    model = FAMILIES["llama2"]()
    model.model.layers[1].input_layernorm.weight[7] = float("inf")
    before = model.model.layers[1].self_attn.q_proj.weight.clone()
    with pytest.raises(errors.NonFiniteError, match=r"model\.layers\.1.*q_proj.*statistics.*\[7\]"):
        wanda_fast.prune(model, dataset=token_ids(model, 2, 32))
    assert torch.equal(model.model.layers[1].self_attn.q_proj.weight, before)


def test_no_prunable_block_lists_what_was_found():
    model = FAMILIES["llama2"]()
    model.model.layers = nn.ModuleList(nn.Conv2d(1, 1, 3) for _ in range(2))
    with pytest.raises(errors.NoPrunableBlockError, match="LlamaForCausalLM.*Conv2d"):
        wanda_fast.prune(model, dataset=token_ids(model, 2, 32))


def refused_unchanged(model, said):
    before = {name: weight.clone() for name, weight in model.state_dict().items()}
    with pytest.raises(errors.HiddenStatesError, match=said):
        wanda_fast.prune(model, dataset=token_ids(model, 2, 24), seqlen=24)
    assert all(torch.equal(weight, before[name]) for name, weight in model.state_dict().items())


def test_blocks_with_other_modules_between_them():
    """XLM keeps attentions, feed-forward parts and norms in a list each."""
    model = AutoModelForCausalLM.from_config(XLMConfig(vocab_size=320, emb_dim=64, n_layers=2, n_heads=4))
    refused_unchanged(model, r"the input of transformer\.ffns\.1 is not the output of transformer\.ffns\.0")


def test_blocks_that_run_in_cycles():
    model = FAMILIES["llama2"]()
    once = model.model.forward
    model.model.forward = lambda **inputs: once(inputs_embeds=once(**inputs).last_hidden_state)
    refused_unchanged(model, r"model\.layers\.0 runs 2 times in a forward")


@pytest.mark.parametrize("read", [True, False])
def test_blocks_that_pass_on_more_than_hidden_states(read):
    """Zaya's routers read the states of the router before; GLM-5's blocks may ignore what they receive."""
    model = FAMILIES["llama2"]()
    for layer in model.model.layers:
        own = layer.forward
        layer.forward = lambda hidden, state=None, own=own, **inputs: (
            own(hidden + state if read and state is not None else hidden, **inputs),
            hidden.mean(-1, keepdim=True),
        )

    def forward(input_ids, **_options):
        hidden, state = model.model.embed_tokens(input_ids), None
        positions = torch.arange(input_ids.shape[1])[None]
        for layer in model.model.layers:
            inputs = dict(position_embeddings=model.model.rotary_emb(hidden, positions))
            hidden, state = layer(hidden, state, **inputs)
        return BaseModelOutputWithPast(last_hidden_state=model.model.norm(hidden))

    model.model.forward = forward
    if not read:
        assert wanda_fast.prune(model, dataset=token_ids(model, 2, 24), seqlen=24).sparsity == 0.5
        return
    refused_unchanged(
        model, r"model\.layers\.1 takes more of an earlier block's output than its hidden states"
    )


@pytest.mark.parametrize("batch_size", [2, 3])
def test_hidden_states_that_do_not_begin_with_the_sequences(batch_size):
    """Gemma 3n has several streams of them, here two."""
    layers = dict(layer_types=["full_attention"] * 2, num_kv_shared_layers=0)
    inputs = dict(hidden_size_per_layer_input=16, vocab_size_per_layer_input=320, altup_num_inputs=2)
    config = Gemma3nTextConfig(
        **GQA | layers | inputs, laurel_rank=8, head_dim=16, activation_sparsity_pattern=[0.0, 0.0]
    )
    model = AutoModelForCausalLM.from_config(config)
    said = rf"TextDecoderLayer takes hidden states \[2, {batch_size}, 24, 64\] of {batch_size} sequences"
    with pytest.raises(errors.HiddenStatesError, match=said):
        wanda_fast.prune(model, dataset=token_ids(model, 6, 24), batch_size=batch_size)


@pytest.mark.parametrize(
    "ids", [torch.zeros(4, dtype=torch.long), torch.zeros(2, 8), torch.zeros(0, 8).long()]
)
def test_token_ids_of_another_form(ids):
    with pytest.raises(errors.CalibrationError, match=r"\[nsamples, seqlen\]"):
        wanda_fast.prune(FAMILIES["llama2"](), dataset=ids)


def test_token_id_outside_the_vocabulary():
    ids = torch.full((2, 8), 320)
    with pytest.raises(errors.CalibrationError, match="320 is outside the model's vocabulary of 320"):
        wanda_fast.prune(FAMILIES["llama2"](), dataset=ids)


def test_out_of_memory_says_what_to_lower(monkeypatch):
    def hungry(*_args, **_kwargs):
        raise RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 9 bytes")

    monkeypatch.setattr("wanda_fast.run.job.prune_blocks", hungry)
    model = FAMILIES["llama2"]()
    with pytest.raises(errors.OutOfMemoryError, match="--batch_size, --nsamples or --seqlen"):
        wanda_fast.prune(model, dataset=token_ids(model, 2, 32))


def test_full_disk_leaves_no_folder_that_looks_complete(llama, tmp_path):
    def limit():
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))

    out, file = tmp_path / "new" / "out", tmp_path / "said"
    words = ["wanda-fast", "prune", "--model", llama, *QUICK, "--eval_dataset", "none", "--save_model", out]
    code, said = forked.wait(forked.start(words, file, limit)), file.read_text()
    assert code == 2, said
    assert f"output {out} cannot be written" in said and "Traceback" not in said
    assert not out.parent.exists() or list(out.parent.iterdir()) == []


def test_an_index_that_names_an_absent_shard(llama, run, tmp_path):
    folder = tmp_path / "part"
    shutil.copytree(llama, folder)
    weights = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    index = {"metadata": {}, "weight_map": dict.fromkeys(weights, "model-00001-of-00001.safetensors")}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    code, said = run("prune", "--model", folder, *QUICK)
    assert code == 2 and "model-00001-of-00001.safetensors" in said and "Traceback" not in said


@pytest.mark.parametrize("changed", [{"hidden_size": "many"}, {"hidden_size": 48}, {"num_hidden_layers": 3}])
def test_a_configuration_at_odds_with_the_weights(changed, llama, run, tmp_path):
    folder = tmp_path / "odd"
    shutil.copytree(llama, folder)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | changed))
    code, said = run("prune", "--model", folder, *QUICK)
    assert code == 2 and str(folder) in said and "Traceback" not in said


ROWS = {
    "not json": ('{"text": "fine"}\n{"text": \n', ["line 2 is not JSON: Expecting value at column"]),
    "no column of text": ('{"body": "no text here"}\n', ["['body']", "text, sentence, content"]),
    "a row of another kind": ('{"text": "fine"}\n[1, 2]\n', ["row 2 is of type list"]),
    "a text that is none": ('{"text": "fine"}\n{"text": 7}\n', ["row 2's text is of type int"]),
    "nulls only": ('{"text": null}\n', ["holds no text"]),
    "empty": ("", ["it holds no text"]),
}


@pytest.mark.parametrize("case", ROWS)
def test_jsonl_of_another_form(case, llama, run, tmp_path):
    file, (content, expected) = tmp_path / "odd.jsonl", ROWS[case]
    file.write_text(content)
    code, said = run("prune", "--model", llama, *QUICK, "--dataset", file)
    assert code == 2 and f"dataset file {file} cannot be read" in said and said.count("\n") == 1
    assert all(words in said for words in expected)


def test_a_parquet_file_without_rows(llama, run, tmp_path):
    import pyarrow
    from pyarrow import parquet

    file = tmp_path / "empty.parquet"
    parquet.write_table(pyarrow.table({"text": pyarrow.array([], pyarrow.string())}), file)
    code, said = run("prune", "--model", llama, *QUICK, "--dataset", file)
    assert code == 2 and "empty.parquet cannot be read: it holds no text" in said


def test_text_for_a_model_without_tokenizer(llama, run, tmp_path):
    folder = tmp_path / "bare"
    shutil.copytree(llama, folder, ignore=shutil.ignore_patterns("tokenizer*", "special_tokens*"))
    code, said = run("eval", folder, "--dataset", "pydoc", "--seqlen", "32")
    assert code == 2 and "'pydoc' is text: pass a tokenizer" in said


def test_a_plugin_that_fails(llama, run, tmp_path):
    plugin = tmp_path / "plugin.py"
    plugin.write_text("import no_such_module\n")
    code, said = run("prune", "--model", llama, *QUICK, "--plugin", plugin)
    assert code == 2 and f"plugin '{plugin}' cannot be imported: ModuleNotFoundError" in said


def test_a_backend_of_another_name(llama, run, monkeypatch):
    monkeypatch.setenv("WANDA_KERNELS_BACKEND", "native")
    code, said = run("prune", "--model", llama, *QUICK)
    assert code == 2 and "'native'" in said and said.count("\n") == 1


def test_output_into_the_current_folder(llama, run, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "own").touch()
    code, said = run("prune", "--model", llama, *QUICK, "--save_model", ".")
    assert code == 2 and "not empty" in said

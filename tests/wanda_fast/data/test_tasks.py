"""Accuracy on tasks: against a straight computation, item by item, and against the harness by itself."""

import importlib.util
import json
import sys
from functools import partial
from pathlib import Path

import lm_eval.tasks
import pytest
import torch
from lm_eval import simple_evaluate
from lm_eval.models.huggingface import HFLM
from lm_eval.tasks import TaskManager
from transformers import AutoModelForCausalLM, AutoTokenizer

import wanda_fast
from tests.tiny_models import FAMILIES, save_checkpoint
from wanda_fast import errors
from wanda_fast.cli import main as cli
from wanda_fast.data import harness
from wanda_fast.data.tasks import open_tasks, task_names
from wanda_fast.report.task_results import in_words
from wanda_fast.run import task_inputs

pytestmark = pytest.mark.usefixtures("one_thread", "short_pydoc")

SHARED = Path(__file__).parents[4] / "shared" / "data" / "tasks"
ITEMS = {
    "arc_easy": [
        {"query": "Question: What is a module?", "choices": ["A file.", "The largest one", "x"], "gold": 0},
        {"query": "Question: What does return do?\n", "choices": ["It ends", "It begins a loop"], "gold": 1},
        {"query": "Question: And?", "choices": ["a statement é", "an expression", "none", "all"], "gold": 3},
    ],
    "copa": [
        {"query": "The list was empty, therefore", "choices": ["it was false.", "it was true."], "gold": 0},
        {"query": "The name is bound, because", "choices": ["of import.", "of an assignment."], "gold": 1},
    ],
    "winogrande": [
        {"context_options": ["The class and so the class", "The class and so the object"],
         "continuation": "has an attribute.", "gold": 1},
        {"context_options": ["A tuple holds", "A much longer context, with a tuple that holds"],
         "continuation": "items", "gold": 0},
    ],
    "lambada": [
        {"context": "The value of the expression is the", "continuation": "value"},
        {"context": "An exception is raised by the raise", "continuation": "statement"},
        {"context": " ".join(["a long context"] * 60), "continuation": "context"},
    ],
}  # fmt: skip


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A folder of task files; lambada's has the other name that is looked for."""
    folder = tmp_path_factory.mktemp("tasks")
    for name, items in ITEMS.items():
        file = folder / f"{name}{'_openai' if name == 'lambada' else ''}.jsonl"
        file.write_text("".join(json.dumps(item) + "\n" for item in items), encoding="utf-8")
    return folder


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory, pydoc_text):
    """A tiny model, after some steps on the text, so that its choices are not those of chance."""
    folder, model = tmp_path_factory.mktemp("model") / "dense", FAMILIES["smollm"]()
    save_checkpoint(model, folder, pydoc_text[:20000])
    ids = AutoTokenizer.from_pretrained(folder)(pydoc_text[:6000], return_tensors="pt").input_ids[0, :1024]
    optimizer = torch.optim.AdamW(model.requires_grad_(True).parameters(), lr=3e-3)
    for _ in range(12):
        model(input_ids=ids.view(16, 64), labels=ids.view(16, 64)).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    model.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def loaded(checkpoint):
    return AutoModelForCausalLM.from_pretrained(checkpoint), AutoTokenizer.from_pretrained(checkpoint)


@pytest.fixture
def run(monkeypatch, capsys):
    """Run `wanda-fast`; returns (exit code, standard output, standard error)."""

    def run(*words):
        monkeypatch.setattr(sys, "argv", ["wanda-fast", *map(str, words)])
        with pytest.raises(SystemExit) as exit:
            cli.main()
        return exit.value.code or 0, *capsys.readouterr()

    return run


def pairs_of(item):
    """The item's (context, continuation) pairs, written out anew."""
    if "choices" in item:
        query = item["query"].rstrip() + ("\nAnswer:" if item["query"].startswith("Question:") else "")
        return [(query, " " + choice) for choice in item["choices"]]
    contexts = item.get("context_options") or [item["context"]]
    return [(context, " " + item["continuation"]) for context in contexts]


@torch.no_grad()
def straight(model, tokenizer, context, continuation):
    """(sum of log-probabilities, all tokens are first choices) of one continuation, by a plain forward."""
    head = tokenizer(context).input_ids
    whole = tokenizer(context + continuation).input_ids
    most = model.config.max_position_embeddings + 1
    cut = torch.tensor([whole[-most:]])
    count = len(whole) - len(head)
    assert whole[: len(head)] == head and 0 < count
    log_probabilities = model(cut[:, :-1]).logits[0, -count:].log_softmax(-1)
    targets = cut[0, -count:]
    chosen = log_probabilities.argmax(-1)
    return log_probabilities[range(count), targets].sum().item(), bool((chosen == targets).all())


def expected(model, tokenizer, item):
    """(log-likelihoods, acc, acc_norm) of an item."""
    found = [straight(model, tokenizer, *pair) for pair in pairs_of(item)]
    likelihoods = torch.tensor([likelihood for likelihood, _ in found])
    if "context" in item:
        return likelihoods, float(found[0][1]), None
    right = float(likelihoods.argmax() == item["gold"])
    if "choices" not in item:
        return likelihoods, right, None
    by_length = likelihoods / torch.tensor([len(choice) for choice in item["choices"]])
    return likelihoods, right, float(by_length.argmax() == item["gold"])


def require_equal(model, tokenizer, folder, items):
    """The tasks' outcome is that of the straight computation, item by item."""
    tasks = open_tasks(list(items), folder, limit=max(map(len, items.values())))
    tasks.tokenizer = tokenizer
    outcome = tasks.outcome(model, lambda *_: None, log_samples=True)
    for name, own in items.items():
        samples = sorted(outcome["samples"][name], key=lambda sample: sample["doc_id"])
        assert len(samples) == len(own)
        wanted = [expected(model, tokenizer, item) for item in own]
        for sample, (likelihoods, acc, acc_norm) in zip(samples, wanted, strict=True):
            responses = [each[0] for each in sample["filtered_resps"]]
            assert responses == pytest.approx(likelihoods.tolist(), abs=1e-3, rel=1e-4), name
            assert sample["acc"] == acc and sample.get("acc_norm") == acc_norm, name
        accuracy = torch.tensor([acc for _, acc, _ in wanted])
        found = outcome["results"][name]
        assert found["acc,none"] == pytest.approx(accuracy.mean().item())
        error = (accuracy.std() / len(accuracy) ** 0.5).item()
        assert found["acc_stderr,none"] == pytest.approx(error, abs=1e-6)
    return outcome["results"]


def test_every_item_equals_a_plain_forward(loaded, folder, monkeypatch):
    """Also in batches of two or three rows, and for a context that is longer than the model's."""
    first = require_equal(*loaded, folder, ITEMS)
    monkeypatch.setattr(harness, "TOKENS_PER_FORWARD", 64)
    again = require_equal(*loaded, folder, ITEMS)
    assert {name: each["acc,none"] for name, each in first.items()} == {
        name: each["acc,none"] for name, each in again.items()
    }


@pytest.mark.skipif(not SHARED.is_dir(), reason="the shared data are not here")
def test_items_of_the_real_files_equal_a_plain_forward(loaded):
    names = ("arc_easy", "piqa", "winogrande", "copa", "lambada")
    files = {name: SHARED / f"{name}{'_openai' if name == 'lambada' else ''}.jsonl" for name in names}
    lines = {name: file.read_text(encoding="utf-8").splitlines()[:6] for name, file in files.items()}
    require_equal(*loaded, SHARED, {name: list(map(json.loads, each)) for name, each in lines.items()})


def test_the_harness_by_itself_agrees(loaded, checkpoint, folder):
    """On the model that transformers loads, in the harness's own batches; by the command's function."""
    model, tokenizer = loaded
    options = dict(tasks=list(ITEMS), tasks_path=folder, dataset=None)
    report = wanda_fast.evaluate(str(checkpoint), **options)
    tasks = open_tasks(list(ITEMS), folder)
    direct = simple_evaluate(
        model=HFLM(pretrained=model, tokenizer=tokenizer, batch_size=3),
        tasks=list(tasks.loaded["tasks"].values()),
        task_manager=TaskManager(include_defaults=False),
    )
    assert list(report.zero_shot) == list(ITEMS)
    for name, found in report.zero_shot.items():
        for metric in ("acc", "acc_stderr", "acc_norm", "acc_norm_stderr"):
            theirs = direct["results"][name].get(f"{metric},none")
            assert found["dense"].get(metric) == (theirs if theirs is None else pytest.approx(theirs))
        assert found["dense"]["items"] == len(ITEMS[name]) and list(found) == ["dense"]


def test_dense_beside_pruned(checkpoint, folder, run, tmp_path):
    """In the report, the log and the table; `eval` of the saved model finds what `prune` measured."""
    out, log = tmp_path / "out", tmp_path / "log"
    words = ["--dataset", "pydoc", "--nsamples", "2", "--seqlen", "32", "--eval-dataset", "none"]
    words += ["--sparsity-ratio", "0.9", "--tasks-path", folder, "--tasks", "arc_easy, lambada"]
    code, said, logged = run("prune", "--model", checkpoint, *words, "--save-model", out, "--save", log)
    assert code == 0 and "it/s" not in logged
    found = json.loads((out / "wanda_fast.json").read_text())["zero_shot"]
    assert list(found) == ["arc_easy", "lambada"]
    assert all(list(results) == ["dense", "pruned"] for results in found.values())
    row = next(line for line in said.splitlines() if "arc_easy" in line)
    assert f"dense {in_words(found['arc_easy']['dense'])}; pruned " in row
    tail = (log / "log_wanda.txt").read_text().splitlines()[2:]
    assert tail == [f"{name}\t{in_words(results['pruned'])}" for name, results in found.items()]
    words = ["--tasks", "arc_easy,lambada", "--tasks-path", folder]
    code, said, _ = run("eval", out, "--dataset", "none", *words)
    lines = [f"{name} {in_words(results['pruned'])}" for name, results in found.items()]
    assert code == 0 and said.splitlines()[-2:] == lines
    acc = found["lambada"]["pruned"]
    assert lines[1] == f"lambada {acc['acc']:.4f} +- {acc['acc_stderr']:.4f}"


def test_a_live_model_is_pruned_as_without_tasks(loaded, folder):
    """The caller's random state, tokenizer and weights are not touched by the measurement."""
    tokenizer = loaded[1]
    tokenizer.pad_token = None
    pruned = []
    for options in ({}, dict(tasks="copa", tasks_path=folder, tokenizer=tokenizer)):
        model = FAMILIES["llama2"]().train()
        torch.manual_seed(5)
        report = wanda_fast.prune(model, dataset=torch.arange(3, 67).view(2, 32), seqlen=32, **options)
        pruned.append((model.lm_head.weight, model.model.layers[1].mlp.up_proj.weight, torch.rand(3)))
        assert model.training
    assert all(map(torch.equal, *pruned)) and tokenizer.pad_token is None
    assert set(report.zero_shot["copa"]) == {"dense", "pruned"}


def test_which_tasks_are_named():
    published = ["boolq", "rte", "hellaswag", "winogrande", "arc_easy", "arc_challenge", "openbookqa"]
    assert task_names(True, None) == published and task_names(False, None) == []
    assert task_names(True, "piqa, arc_easy") == [*published, "piqa"]
    assert task_names(False, ("copa", "copa")) == ["copa"]


BAD_LINES = {
    "not JSON": ("{", "is not JSON"),
    "a list": ("[1]", "is list, not an object"),
    "another kind": ('{"context": "a", "continuation": "b"}', "has no choices"),
    "no gold": ('{"query": "a", "choices": ["b", "c"]}', "has no gold"),
    "gold too high": ('{"query": "a", "choices": ["b", "c"], "gold": 2}', "gold is 2, not the number of one"),
    "gold a word": ('{"query": "a", "choices": ["b", "c"], "gold": "0"}', "gold is '0'"),
    "one choice": ('{"query": "a", "choices": ["b"], "gold": 0}', "not a list of two texts or more"),
    "an empty choice": ('{"query": "a", "choices": ["b", " "], "gold": 0}', "one of choices is ' '"),
    "no text": ('{"query": 3, "choices": ["b", "c"], "gold": 0}', "query is 3, not a text"),
}


@pytest.mark.parametrize("case", BAD_LINES)
def test_a_malformed_line_is_named_before_the_model_is_read(case, run, tmp_path):
    line, sentence = BAD_LINES[case]
    file = tmp_path / "copa.jsonl"
    file.write_text(f"{json.dumps(ITEMS['copa'][0])}\n\n{line}\n")
    code, _, said = run("eval", tmp_path / "no-model", "--tasks", "copa", "--tasks_path", tmp_path)
    assert code == 2 and said.startswith(f"wanda-fast: task file {file}, line 3") and sentence in said
    assert said.count("\n") == 1


@pytest.mark.parametrize(("content", "words"), [(b"\n", "holds no item"), (b"\xff", "cannot be read")])
def test_a_file_without_items(content, words, tmp_path):
    (tmp_path / "copa.jsonl").write_bytes(content)
    with pytest.raises(errors.CalibrationError, match=f"copa.jsonl {words}"):
        open_tasks(["copa"], tmp_path)


@pytest.fixture
def few_known(monkeypatch, tmp_path):
    """The harness knows three tasks, whose data are on the hub: to list its own takes it many seconds."""
    for name in ("arc_easy", "arc_hard", "piqa"):
        task = f"task: {name}\ndataset_path: nobody/{name}\noutput_type: multiple_choice\ntest_split: test\n"
        (tmp_path / f"{name}.yaml").write_text(task)
    manager = partial(TaskManager, include_defaults=False, include_path=str(tmp_path))
    monkeypatch.setattr(lm_eval.tasks, "TaskManager", manager)


def test_an_unknown_task(few_known, run, tmp_path):
    code, _, said = run("eval", tmp_path / "no-model", "--tasks", "piqa,arc_esy")
    assert code == 2 and "task 'arc_esy' is not one of the 3" in said and "near it: arc_easy" in said
    assert said.count("\n") == 1


def test_a_task_whose_data_cannot_be_fetched(few_known):
    with pytest.raises(errors.CalibrationError, match="task 'piqa' cannot be read: .*--tasks_path DIR"):
        open_tasks(["piqa"])


def test_without_the_harness(monkeypatch, run, tmp_path):
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "lm_eval" else find(name))
    for flags in (["--eval_zero_shot"], ["--tasks", "piqa"]):
        code, _, said = run("eval", tmp_path / "no-model", *flags)
        assert code == 2 and "lm-evaluation-harness" in said and "wanda_fast[eval]" in said


def test_a_model_that_predicts_no_tokens(run, folder, tmp_path, pydoc_text):
    from transformers import LlamaForSequenceClassification

    model = LlamaForSequenceClassification(FAMILIES["llama2"]().config)
    save_checkpoint(model, tmp_path / "reward", pydoc_text[:20000])
    for command in (["eval"], ["prune", "--nsamples", "2", "--seqlen", "32", "--model"]):
        words = [*command, tmp_path / "reward", "--dataset", "pydoc", "--tasks", "copa"]
        code, _, said = run(*words, "--tasks_path", folder)
        assert code == 2 and "LlamaForSequenceClassification predicts no tokens: no task" in said


def test_a_live_model_without_tokenizer(folder):
    with pytest.raises(errors.CalibrationError, match="pass a tokenizer"):
        wanda_fast.prune(
            FAMILIES["llama2"](), dataset=torch.arange(64).view(2, 32), tasks="copa", tasks_path=folder
        )


def test_a_model_larger_than_the_memory(checkpoint, run, folder, monkeypatch):
    monkeypatch.setattr(task_inputs, "free_memory", lambda _: 2**16)
    code, _, said = run("eval", checkpoint, "--tasks", "copa", "--tasks_path", folder)
    assert code == 2 and "tasks need the whole model in memory" in said and "0 MiB are free on cpu" in said


def test_other_items_are_another_run(checkpoint, folder, tmp_path):
    """`--resume` on a finished run compares the local files, not their names alone."""
    own, out = tmp_path / "tasks", tmp_path / "out"
    own.mkdir()
    file = own / "copa.jsonl"
    file.write_bytes((folder / "copa.jsonl").read_bytes())
    options = dict(dataset=torch.arange(3, 67).view(2, 32), tasks="copa", tasks_path=str(own))
    options |= dict(save_model=out, resume=True)
    first = wanda_fast.prune(str(checkpoint), **options)
    assert wanda_fast.prune(str(checkpoint), **options).seconds == first.seconds
    file.write_text(file.read_text().replace("empty", "full"))
    with pytest.raises(errors.ResumeError, match="items of the tasks differ"):
        wanda_fast.prune(str(checkpoint), **options)

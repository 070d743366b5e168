"""The page on a run: what is in it, that values cannot break it, and the command that repeats the run."""

import json
import shlex
import sys
from dataclasses import fields
from html.parser import HTMLParser
from pathlib import Path

import pytest

import wanda_fast
from tests.tiny_models import FAMILIES, save_checkpoint, token_ids
from tests.wanda_fast.report.reports import NASTY, content_of, full, of_experts
from wanda_fast.cli import main as cli
from wanda_fast.options.all_options import Options
from wanda_fast.report.charts import charts
from wanda_fast.report.command import repeat_command
from wanda_fast.report.contents import Report
from wanda_fast.report.expected import Row, held_against
from wanda_fast.report.page import page
from wanda_fast.report.weights import by_block, columns

pytestmark = pytest.mark.usefixtures("one_thread", "short_pydoc")


class Read(HTMLParser):
    """The text of a page, its tags, and what its scripts are given."""

    def __init__(self, html: str):
        super().__init__(convert_charrefs=True)
        self.tags, self.texts, self.data, self._inside = [], [], None, None
        self.feed(html)
        self.text = " ".join(" ".join(self.texts).split())

    def handle_starttag(self, tag, attributes):
        self.tags.append(tag)
        self._inside = "data" if ("id", "data") in attributes else tag

    def handle_endtag(self, tag):
        self._inside = None

    def handle_data(self, text):
        if self._inside == "data":
            self.data = json.loads(text)
        elif self._inside not in ("script", "style"):
            self.texts.append(text)


def runs(*contents):
    return [
        {"label": f"run {at}", "content": content, "weights": columns(content["linears"])}
        for at, content in enumerate(contents)
    ]


def charts_of(*contents):
    return {chart["id"]: chart for chart in charts(runs(*contents))}


def rebuilt(weights):
    """The names of the weights, from their columns, as the page's script puts them together."""
    names = []
    for block, kind, numbers in zip(weights["block"], weights["kind"], weights["numbers"], strict=True):
        left = iter(numbers)
        parts = [str(next(left)) if part == "*" else part for part in weights["kinds"][kind].split(".")]
        names.append(".".join(filter(None, (weights["blocks"][block], ".".join(parts)))))
    return names


def test_a_page_says_what_the_report_has():
    content = full()
    read = Read(page({"": content}))
    assert "tiny, 50% pruned by wanda" in read.text
    for said in ("Perplexity 20.00 dense 12.50, × 1.60", "KL divergence 0.3100", "Flips 20.0%"):
        assert said in read.text
    assert "arc_easy accuracy ± standard error 54.00% ± 1.00% 41.00% ± 1.00% -13.00 points" in read.text
    assert "2 experts saw few tokens" in read.text and "wanda_fast 0.1.0" in read.text
    assert "1, node1 4.0 1.0 1,024 0" in read.text
    shown = [chart["id"] for chart in read.data["charts"]]
    assert shown == ["relative_error", "output_error", "sparsity", "tasks", "seconds", "memory"]


def test_a_page_has_the_published_figures():
    row = Row("m", "wanda", "2:4", 0.5, 12.0, "a paper", protocol={"nsamples": 128})
    content = full() | {"expected": held_against(row, {"pruned": 9.0}, {"nsamples": 16}, [])}
    text = Read(page({"": content})).text
    assert "held against, pruned published 12.00, here 9.0000, -25.00% apart" in text
    assert "held against m, wanda 2:4 0.5 (a paper)" in text
    assert "differs from the published one: calibration samples 16 in place of 128" in text


def test_fields_that_are_missing_leave_no_holes():
    recipe = Options(model="m", prune_method="dense").recipe() | {"sparsity_ratio": 0.0}
    read = Read(page({"": content_of(Report(recipe, perplexity={"dense": float("inf")}))}))
    assert "m, measured" in read.text and read.data == {"charts": [], "runs": []}
    for title in ("Warnings", "Ranks", "How it ran", "sha256"):
        assert title not in read.texts
    older = full()
    for linear in older["linears"].values():
        linear |= dict.fromkeys(("error", "relative_error", "tokens", "fallback"))
    older |= {"block_output_error": {}, "zero_shot": {}, "ranks": [], "perplexity": {}}
    read = Read(page({"": older}))
    assert set(read.data["runs"][0]["values"]) == {"weights", "sparsity", "seconds", "operation", "backend"}
    assert [chart["id"] for chart in read.data["charts"]] == ["sparsity", "seconds", "memory"]


def test_no_value_can_break_the_page():
    plain = Read(page({"a": full(), "b": full()}))
    content = full()
    content["linears"] = {f"{NASTY}.{name}": linear for name, linear in content["linears"].items()}
    content["recipe"] |= {"model": NASTY, "prune_method": NASTY, "ignore": [NASTY], "dataset": NASTY}
    content["perplexity"]["protocol"] = content["warnings"][0] = NASTY
    content["seconds"] = {NASTY: 1.0, "load": 2.0, "selection": 3.0}
    content["zero_shot"] = {NASTY: content["zero_shot"]["piqa"], "piqa": content["zero_shot"]["piqa"]}
    html = page({NASTY: content, "b": full()})
    read = Read(html)
    scripts = [tags.count("script") for tags in (read.tags, plain.tags)]
    assert scripts == [3, 3] and "b" not in read.tags and "alert(" in read.text and "{{ 7 * 7 }}" in read.text
    assert rebuilt(read.data["runs"][0]) == list(content["linears"])
    assert read.data["runs"][0]["label"] == NASTY


def test_nothing_is_loaded_from_elsewhere():
    html = page({"": full()})
    assert "default-src 'none'" in html and "sourceMappingURL" not in html
    assert not {"iframe", "object", "embed", "img"} & set(Read(html).tags)
    for word in ('src="', 'href="http', "@import", "url("):
        assert word not in html.split("<body>")[0].split("<style>")[0] + html.split("</style>")[1][:20000]


@pytest.mark.parametrize("family", ["llama2", "qwen3_moe", "gpt2"])
def test_columns_hold_every_weight_of_a_run(family):
    model = FAMILIES[family]()
    report = wanda_fast.prune(model, dataset=token_ids(model, 2, 16), sparsity_ratio=0.3)
    content = content_of(report)
    weights = columns(content["linears"])
    assert rebuilt(weights) == list(report.linears)
    assert weights["labels"] == ["0", "1"]
    means = report.block_sparsity()
    assert by_block(weights, "sparsity", weighted=True) == pytest.approx(list(means.values()), abs=1e-5)


def test_blocks_of_names_of_all_kinds():
    linear = full()["linears"]["model.layers.0.self_attn.q_proj"]
    names = ["stages.1.blocks.0.fc1", "stages.1.blocks.1.fc1", "stages.2.fc", "fc", "h.3"]
    names += ["l.0.mlp.experts.12.up", "l.0.mlp.experts.3.sub.4.up"]
    weights = columns({name: linear for name in names})
    assert rebuilt(weights) == names
    expected = ["stages.1.blocks.0", "stages.1.blocks.1", "stages.2", "", "h.3", "l.0"]
    assert weights["blocks"] == weights["labels"] == expected
    assert weights["kinds"][-2:] == ["mlp.experts.*.up", "mlp.experts.*.sub.*.up"]


def test_charts_by_sparsity_have_a_line_for_each_method():
    points = [("wanda", "unstructured", 0.6, 30.0), ("wanda", "unstructured", 0.5, 20.0)]
    points += [("wanda", "2:4", 0.5, 40.0), ("sparsegpt", "unstructured", 0.5, float("inf"))]
    contents = []
    for method, pattern, sparsity, perplexity in points:
        content = full() | {"sparsity": sparsity, "perplexity": {"dense": 12.5, "pruned": perplexity}}
        content["recipe"] |= {"prune_method": method, "sparsity_type": pattern}
        contents.append(content)
    found = charts_of(*contents)
    assert {"kl", "flips"}.isdisjoint(found)
    lines = {line["label"]: [(p["x"], p["y"]) for p in line["values"]] for line in found["pruned"]["series"]}
    assert lines == {"wanda": [(50, 20), (60, 30)], "wanda, 2:4": [(50, 40)], "dense": [(0, 12.5)]}
    assert "pruned" not in charts_of(contents[0])


def test_bars_of_seconds_and_memory():
    content = full() | {"ranks": [], "seconds": {f"phase {at}": float(at) for at in range(10)}}
    seconds = charts_of(content)["seconds"]
    assert seconds["labels"] == [f"phase {at}" for at in (9, 8, 7, 6, 5, 4, 3)] + ["3 others"]
    assert seconds["series"][0]["values"] == [9, 8, 7, 6, 5, 4, 3, 0 + 1 + 2]
    memory = charts_of(content, content)["memory"]
    assert memory["labels"] == ["run 0, cuda:0", "run 0, host", "run 1, cuda:0", "run 1, host"]
    assert [line["values"] for line in memory["series"]] == [[2048, 256] * 2, [2048, 1024] * 2]


def test_a_model_with_many_experts_makes_a_page_of_less_than_2_megabytes():
    content = full(blocks=48, experts=384)
    assert len(content["linears"]) > 18_000
    assert len(page({"": content}).encode()) < 2e6


OTHER = {  # an option's values that need a shell's quotes, or are like flags
    "model": "models/it's $HOME, <b>",
    "dataset": "-data.txt",
    "ignore": ["*.k_proj", "re:^model\\.(a|b) c", "-x"],
    "dtype": "float16",
    "sparsity_type": "2:4",
    "measure_error": False,
    "device": "cpu",
    "text_column": "Überschrift",
    "cache_dir": "a b",
}
WHOLE = {"sparsity_ratio": 0.25, "dampening": 0.02, "expert_shrinkage": 8.0}


def another(each):
    """A value of an option that is not its default."""
    if each.name in OTHER | WHOLE:
        return (OTHER | WHOLE)[each.name]
    if each.metadata["choices"]:
        return next(choice for choice in each.metadata["choices"][::-1] if choice != each.default)
    if "bool" in str(each.type):
        return not each.default
    if "int" in str(each.type):
        return 7
    return f"some {each.name}"


EVERY = {each.name: another(each) for each in fields(Options)}
RECIPES = {
    "every option": EVERY,
    "defaults": {"model": "org/model"},
    "dense, not measured": {
        "model": "m",
        "prune_method": "dense",
        "sparsity_ratio": 0.0,
        "eval_dataset": None,
    },
    "measure error": {"model": "m", "measure_error": True, "polish": 0},
}


@pytest.mark.parametrize("which", RECIPES)
def test_the_command_line_parses_to_the_same_recipe(which, monkeypatch):
    recipe = json.loads(json.dumps(Options(**RECIPES[which]).recipe(), default=str))
    words = shlex.split(repeat_command({"recipe": recipe}).replace("\\\n", ""))
    given = {}

    def prune(model, *, progress, process_group, **options):
        given.update(Options(model=model, **options).recipe())
        raise KeyboardInterrupt

    monkeypatch.setattr(cli.api, "prune", prune)
    monkeypatch.setattr(sys, "argv", words)
    with pytest.raises((KeyboardInterrupt, SystemExit)):
        cli.main()
    assert words[:2] == ["wanda-fast", "prune"]
    assert json.loads(json.dumps(given, default=str)) == recipe
    differ = [name for name, value in RECIPES[which].items() if value not in (None, [])]
    flags = {word.partition("=")[0].removeprefix("--no-").removeprefix("--") for word in words[2:]}
    assert set(differ) <= flags
    if which != "every option":
        assert {word for word in words if word.startswith("--")} <= {
            *(f"--{name}" for name in differ),
            "--eval_dataset",
            "--no-measure_error",
        }


def test_the_command_of_several_ranks():
    command = repeat_command(full())
    assert command.startswith("torchrun --nnodes 2 --nproc-per-node 1 -m wanda_fast prune --model org/tiny")


def test_a_run_of_objects_in_memory_has_no_command():
    content = of_experts()
    assert content["objects"] == ["model", "dataset", "eval_dataset"]
    assert repeat_command(content) is None
    assert "was given Python objects as model, dataset, eval_dataset" in Read(page({"": content})).text


@pytest.fixture(scope="module")
def llama(tmp_path_factory, pydoc_text):
    folder = tmp_path_factory.mktemp("llama")
    save_checkpoint(FAMILIES["smollm"](), folder, pydoc_text[:20000])
    return folder


QUICK = dict(dataset="pydoc", nsamples=2, seqlen=32, eval_windows=2)


def run(monkeypatch, capsys, *words):
    """(exit code, standard output, standard error) of `wanda-fast`."""
    monkeypatch.setattr(sys, "argv", ["wanda-fast", *map(str, words)])
    with pytest.raises(SystemExit) as exit:
        cli.main()
    return exit.value.code or 0, *capsys.readouterr()


def test_prune_and_eval_write_a_page(llama, tmp_path, monkeypatch, capsys):
    """Also into the folder that the run makes; the report command writes the same page, but for the seconds
    of writing the model, which its report cannot hold."""
    out, monkey = tmp_path / "out", (monkeypatch, capsys)
    report = wanda_fast.prune(
        str(llama), **QUICK, eval_dataset="pydoc", save_model=out, report=out / "page.html"
    )
    read = Read((out / "page.html").read_text(encoding="utf-8"))
    assert f"{report.perplexity['pruned']:,.2f}" in read.text
    assert f"--report {out}/page.html" in read.text
    code, said, _ = run(*monkey, "report", out)
    assert code == 0 and said == f"written: {out / 'report.html'}\n"
    assert Read((out / "report.html").read_text(encoding="utf-8")).data["runs"] == read.data["runs"]
    words = ("eval", out, "--dataset", "pydoc", "--seqlen", 32, "--eval_windows", 2)
    code, said, _ = run(*monkey, *words, "--report", tmp_path / "eval.html")
    assert code == 0 and f"written: {tmp_path / 'eval.html'}" in said
    assert f"{report.perplexity['pruned']:,.2f}" in Read((tmp_path / "eval.html").read_text()).text
    code, _, said = run(*monkey, *words, "--report", tmp_path / "eval.html")
    assert code == 2 and "eval.html exists" in said
    assert run(*monkey, *words, "--report", tmp_path / "eval.html", "--overwrite")[0] == 0


def written(folder: Path, content: dict) -> Path:
    folder.mkdir()
    (folder / "wanda_fast.json").write_text(json.dumps(content))
    return folder


def test_compare_shows_runs_side_by_side(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    other = full(seed=1)
    other["recipe"]["prune_method"], other["future"] = "sparsegpt", {"a field of": "a later version"}
    one, two = written(Path("one"), full()), written(Path("two"), other)
    code, said, error = run(monkeypatch, capsys, "compare", one, two)
    assert code == 0 and said == "written: compare.html\n", error
    read = Read(Path("compare.html").read_text(encoding="utf-8"))
    assert "Options that differ run prune_method one wanda two sparsegpt" in read.text
    assert [each["label"] for each in read.data["runs"]] == ["one", "two"]
    assert "run method sparsity perplexity" in read.text
    below = Path("below")
    below.mkdir()
    same = written(below / "one", full())
    assert run(monkeypatch, capsys, "compare", one, same, "-o", "same.html")[0] == 0
    read = Read(Path("same.html").read_text(encoding="utf-8"))
    assert [each["label"] for each in read.data["runs"]] == ["one", "below/one"]


def unfinished(folder: Path) -> Path:
    written(folder.with_name("run.partial"), {})
    (folder.with_name("run.partial") / "run.json").write_text("{}")
    return folder.with_name("run")


REFUSED = {  # what makes the folder -> the words of the sentence
    "no folder": (lambda folder: folder, ["does not exist"]),
    "no report": (lambda folder: folder.mkdir() or folder, ["holds no wanda_fast.json"]),
    "unfinished": (unfinished, ["unfinished", "run.partial"]),
    "not complete": (lambda folder: written(folder, full() | {"complete": False}), ["did not finish"]),
    "a list": (lambda folder: written(folder, [1]), ["is not a report"]),
    "a number": (lambda folder: written(folder, 1), ["is not a report"]),
    "another's": (lambda folder: written(folder, {"recipe": {}, "complete": True}), ["is not a report"]),
    "other linears": (lambda folder: written(folder, full() | {"linears": {"a": {}}}), ["is not a report"]),
    "other fields": (lambda folder: written(folder, full() | {"perplexity": 3}), ["is not a report"]),
}


@pytest.mark.parametrize("what", REFUSED)
def test_a_folder_without_a_report_is_refused(what, tmp_path, monkeypatch, capsys):
    make, expected = REFUSED[what]
    folder, page_file = make(tmp_path / "folder"), tmp_path / "page.html"
    for words in (("report", folder), ("compare", written(tmp_path / "good", full()), folder)):
        code, _, said = run(monkeypatch, capsys, *words, "-o", page_file)
        assert code == 2 and said.startswith("wanda-fast: ") and said.count("\n") == 1, said
        assert all(part in said for part in (folder.name, *expected)), said
    assert not page_file.exists()


def test_a_run_that_is_named_twice_is_refused(tmp_path, monkeypatch, capsys):
    folder = written(tmp_path / "one", full())
    code, _, said = run(monkeypatch, capsys, "compare", folder, folder)
    assert code == 2 and "one is named twice" in said


def test_errors_of_a_resumed_run_stand_at_their_own_blocks():
    content = full(blocks=4)
    blocks = columns(content["linears"])["blocks"]
    content["block_output_error"] = {blocks[2]: 0.25, blocks[3]: 0.5}
    run = {"label": "", "content": content, "weights": columns(content["linears"])}
    [chart] = [each for each in charts([run]) if each["id"] == "output_error"]
    assert chart["series"][0]["values"] == [None, None, 0.25, 0.5] and chart["labels"] == list("0123")


def test_tasks_of_a_list_are_one_flag():
    recipe = full()["recipe"] | {"tasks": ["arc_easy", "piqa"]}
    assert "--tasks arc_easy,piqa" in repeat_command(full() | {"recipe": recipe})

"""`~` in paths from Python and in flags; characters that the output's encoding lacks."""

import io
import sys
from pathlib import Path

import pytest

import wanda_fast
from tests.tiny_models import FAMILIES, save_checkpoint, token_ids
from wanda_fast import api, errors
from wanda_fast.cli import main as cli
from wanda_fast.options.all_options import Options

pytestmark = pytest.mark.usefixtures("one_thread")
QUICK = dict(nsamples=2, seqlen=24, device="cpu")
FLAGS = ["--nsamples", "2", "--seqlen", "24", "--device", "cpu", "--eval-windows", "2"]


@pytest.fixture(scope="module")
def made(tmp_path_factory, pydoc_text):
    folder = tmp_path_factory.mktemp("home")
    save_checkpoint(FAMILIES["smollm"](), folder / "model", pydoc_text[:20000])
    (folder / "text.txt").write_text(pydoc_text[:20000])
    return folder


@pytest.fixture
def home(made, tmp_path, monkeypatch):
    """A home folder with a model and a text; the current folder is another one, and empty."""
    folder, elsewhere = tmp_path / "home", tmp_path / "elsewhere"
    folder.mkdir()
    elsewhere.mkdir()
    for name in ("model", "text.txt"):
        (folder / name).symlink_to(made / name)
    monkeypatch.setenv("HOME", str(folder))
    monkeypatch.chdir(elsewhere)
    yield folder
    assert not list(elsewhere.iterdir())


def run(monkeypatch, *words):
    monkeypatch.setattr(sys, "argv", ["wanda-fast", *map(str, words)])
    try:
        cli.main()
    except SystemExit as exit:
        return exit.code or 0
    return 0


@pytest.mark.parametrize("kind", [str, Path])
def test_every_path_from_python(kind, home):
    paths = dict(save="logs", save_model="out", save_log="log.txt", save_mask="masks")
    report = wanda_fast.prune(
        kind("~/model"),
        dataset="~/text.txt",
        eval_dataset="~/text.txt",
        eval_windows=2,
        **{name: kind(f"~/{path}") for name, path in paths.items()},
        **QUICK,
    )
    assert {path.name for path in home.iterdir()} == {"model", "text.txt", *paths.values()}
    assert report.recipe["save_model"] == kind(home / "out")
    assert api.evaluate(kind("~/out"), dataset="~/text.txt", eval_windows=2, seqlen=24).perplexity


def test_a_live_model(home):
    model = FAMILIES["smollm"]()
    wanda_fast.prune(model, dataset=token_ids(model, 2, 24), save_model="~/out", save_mask="~/masks")
    assert (home / "out" / "config.json").is_file() and (home / "masks").is_file()


def test_every_flag(home, monkeypatch, capsys):
    """bash leaves `--flag=~/path` as it is."""
    words = ["--model=~/model", "--dataset=~/text.txt", "--save-model=~/out", "--save-mask=~/masks"]
    assert run(monkeypatch, "prune", *words, *FLAGS) == 0
    assert run(monkeypatch, "apply-mask", "~/model", "--mask=~/masks", "--save-model=~/masked") == 0
    assert run(monkeypatch, "verify", "~/masked", "--mask=~/masks") == 0
    assert run(monkeypatch, "inspect", "~/masked") == 0


@pytest.mark.parametrize("name", ["model", "dataset", "eval_dataset", "save_model", "save_mask", "cache_dir"])
def test_a_home_that_is_unknown(name, home):
    options = dict(model="~/model", dataset="~/text.txt") | {name: "~nobody-of-this-name/x"}
    with pytest.raises(errors.PathError, match=r"path ~nobody-of-this-name/x .* home folder is unknown"):
        wanda_fast.prune(**options, **QUICK)


def test_other_values_are_left_as_they_are():
    options = Options(model="someone/model~", dataset="wikitext2", save_model=Path("a/~/b"))
    assert (options.model, options.dataset, options.save_model) == (
        "someone/model~",
        "wikitext2",
        Path("a/~/b"),
    )


@pytest.mark.parametrize("encoding", ["ascii", "latin-1", "cp1252"])
def test_an_output_encoding_that_lacks_a_character(encoding, home, monkeypatch):
    """The run has ended, so the program ends with exit code 0. Names are escaped, frames are plain."""
    monkeypatch.setenv("COLUMNS", "300")
    (home / "texte-é-文.txt").symlink_to(home / "text.txt")
    out, stdout = home / "sortie-é-文", io.BytesIO()
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(stdout, encoding=encoding, errors="strict"))
    words = ["--model", home / "model", "--dataset", home / "texte-é-文.txt", "--save-model", out]
    code = run(monkeypatch, "prune", *words, *FLAGS)
    sys.stdout.flush()
    said = stdout.getvalue().decode(encoding)
    assert code == 0 and (out / "wanda_fast.json").is_file()
    assert "perplexity, pruned" in said and "\\u6587" in said and "written: " in said

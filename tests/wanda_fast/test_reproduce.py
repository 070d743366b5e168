"""docs/reproduce.md: each command runs from end to end, on a tiny model, local text and short windows."""

import json
import re
import shlex
from pathlib import Path

import pytest
from typer.testing import CliRunner

from tests.tiny_models import FAMILIES, save_checkpoint
from wanda_fast.cli.main import app

ROOT = Path(__file__).parents[2]
PAGE = (ROOT / "docs" / "reproduce.md").read_text(encoding="utf-8")
BLOCKS = re.findall(r"```sh\n(.*?)```", PAGE, flags=re.DOTALL)
COMMANDS = [shlex.split(line) for block in BLOCKS for line in block.replace("\\\n", " ").splitlines()]
SMALL = {"--nsamples": "4", "--seqlen": "16", "--eval_windows": "3"}


@pytest.fixture(scope="module")
def folder(tmp_path_factory, pydoc_text):
    folder = tmp_path_factory.mktemp("reproduce")
    save_checkpoint(FAMILIES["llama2"](), folder / "tiny", pydoc_text[:20000])
    (folder / "text.txt").write_text(pydoc_text[:20000], encoding="utf-8")
    return folder


def test_each_table_has_a_command():
    named = {words[words.index("--expect") + 1] for words in COMMANDS}
    assert named == {f"docs/published/{file.name}" for file in (ROOT / "docs" / "published").iterdir()}
    assert len(named) == len(COMMANDS)


@pytest.mark.parametrize("words", COMMANDS, ids=lambda words: Path(words[-1]).stem)
def test_the_command_is_held_against_its_row(words, folder, monkeypatch):
    program, command, *words = words
    assert (program, command) == ("wanda-fast", "prune") and len(words) % 2 == 0
    flags = dict(zip(words[::2], words[1::2], strict=True))
    text, protocol = str(folder / "text.txt"), flags.pop("--protocol")
    assert flags["--dataset"] == "c4" and protocol in ("wanda", "2048", "4096", "8192")
    table = json.loads((ROOT / flags["--expect"]).read_text())
    name = flags["--model"]
    for row in table["rows"]:
        row["model"] = "some/Tiny" if row["model"] == name else row["model"]
    (folder / "table.json").write_text(json.dumps(table))
    small = SMALL | {"--nsamples": flags.get("--nsamples", "4")}
    flags |= {"--model": str(folder / "tiny"), "--dataset": text, "--expect": str(folder / "table.json")}
    flags |= {"--save": str(folder / Path(words[-1]).stem)} | small
    monkeypatch.setattr("wanda_fast.cli.main.console.width", 200)
    done = CliRunner().invoke(app, ["prune", *(word for pair in flags.items() for word in pair)])
    assert done.exit_code == 0, done.exception
    said = " ".join(done.stdout.split())
    report = json.loads((folder / Path(words[-1]).stem / "wanda_fast.json").read_text())
    expected, setting = report["expected"], [flags["--prune_method"], flags.get("--sparsity_type")]
    [row] = [
        row
        for row in table["rows"]
        if row["model"] == "some/Tiny"
        and [row["prune_method"], row["sparsity_type"]] == [setting[0], setting[1] or "unstructured"]
        and row["sparsity_ratio"] == float(flags.get("--sparsity_ratio", 0.5))
        and str(row.get("nsamples", small["--nsamples"])) == small["--nsamples"]
    ]
    assert expected["pruned"]["published"] == row["pruned"]
    assert expected["dense"]["published"] == row.get("dense")
    assert expected["pruned"]["measured"] == report["perplexity"]["pruned"]
    assert f"published {row['pruned']:.2f}, here {report['perplexity']['pruned']:.4f}" in said
    assert "this run's differs from the published one" in said and "the first 3 windows only" in said

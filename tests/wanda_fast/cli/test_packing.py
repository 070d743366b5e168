"""`pack`, `unpack` and `--save-packed` on the command line, and the commands that read a packed folder."""

import sys

import pytest
import torch

from tests.tiny_models import FAMILIES, save_checkpoint
from tests.wanda_fast.checkpoint.packed_folders import contents, pruned, saved
from wanda_fast.cli import main as cli

pytestmark = pytest.mark.usefixtures("one_thread", "short_pydoc")

QUICK = "--dataset pydoc --nsamples 2 --seqlen 24 --device cpu".split()


@pytest.fixture
def run(monkeypatch, capsys, tmp_path):
    """Run `wanda-fast` in an empty folder; returns the exit code and what it printed."""
    monkeypatch.chdir(tmp_path)

    def run(*words):
        monkeypatch.setattr(sys, "argv", ["wanda-fast", *map(str, words)])
        code = 0
        try:
            cli.main()
        except SystemExit as exit:
            code = exit.code or 0
        said = capsys.readouterr()
        return code, " ".join((said.out + said.err).split())

    return run


def test_pack_prints_sizes_and_unpack_gives_the_folder_back(run, tmp_path):
    source = saved(pruned("smollm", torch.bfloat16, "2:4"), tmp_path / "dense")
    code, said = run("pack", source, "packed")
    assert code == 0 and "written: packed" in said
    assert "weights packed │ 14 of 14 prunable ones" in said
    # 58,368 weights in 2 bytes; half of these and 1 bit for each.
    assert "their bytes │ 116,736 to 65,664 (0.5625)" in said
    before, after = (folder.stat().st_size for folder in files(tmp_path))
    assert f"all files' bytes │ {before:,} to {after:,} ({after / before:.4f})" in said
    assert f"dense model in 8 bits │ {before - 116736 + 58368 * 17 // 16:,}, prunable weights at 8.5" in said
    assert f"dense model in 4 bits │ {before - 116736 + 58368 * 9 // 16:,}, prunable weights at 4.5" in said
    code, said = run("unpack", "packed", "again")
    assert code == 0 and said.endswith("written: again")
    assert contents(tmp_path / "again") == contents(source)


def files(folder):
    return folder / "dense" / "model.safetensors", folder / "packed" / "packed.safetensors"


def test_commands_read_a_packed_folder_as_the_dense_one(run, tmp_path):
    source = saved(pruned("smollm", torch.bfloat16, "2:4"), tmp_path / "dense")
    assert run("pack", source, "packed")[0] == 0
    for words in (["inspect"], ["verify", "--pattern", "2:4"]):
        (code, dense), (other, packed) = (run(words[0], name, *words[1:]) for name in ("dense", "packed"))
        assert code == other == 0 and packed.replace("packed", "dense") == dense
    assert "packed keeps 2:4" in packed


def test_prune_and_eval(run, tmp_path, pydoc_text):
    save_checkpoint(FAMILIES["smollm"]().bfloat16(), tmp_path / "dense", pydoc_text[:20000])
    words = ["prune", "--model", "dense", *QUICK, "--eval_dataset", "none", "--save_model"]
    assert run(*words, "pruned")[0] == 0
    code, said = run(*words, "packed", "--save_packed")
    assert code == 0 and "their bytes │ 116,736 to 65,664 (0.5625)" in said
    assert run("pack", "pruned", "other")[0] == 0
    wanted = contents(tmp_path / "other")["packed.safetensors"]
    assert contents(tmp_path / "packed")["packed.safetensors"] == wanted
    measured = [
        run("eval", name, *QUICK[:2], *QUICK[4:], "--eval_windows", 3) for name in ("pruned", "packed")
    ]
    # Seconds of blocks come before.
    lines = [said[said.index("perplexity ") :] for _, said in measured]
    assert lines[0] == lines[1] and not any(code for code, _ in measured)


def test_errors_are_one_sentence_with_exit_code_2(run, tmp_path):
    source = saved(pruned("smollm", torch.bfloat16, "rows"), tmp_path / "dense")
    assert run("pack", source, "packed")[0] == 0
    for words, sentence in (
        (["pack", "packed", "out"], "wanda-fast: model packed is packed already"),
        (
            ["unpack", "dense", "out"],
            "wanda-fast: model dense is not packed: its config.json does",
        ),
        (
            ["pack", "dense", "packed"],
            "wanda-fast: output folder packed is not empty (3 entries)",
        ),
        (
            ["pack", "dense", "dense", "--overwrite"],
            "wanda-fast: output dense and model dense are one",
        ),
        (["prune", "--model", "dense", "--save_packed"], "wanda-fast: --save_packed packs what --save_model"),
    ):
        code, said = run(*words)
        assert code == 2 and said.startswith(sentence), said
    assert {path.name for path in tmp_path.iterdir()} == {"dense", "packed"}

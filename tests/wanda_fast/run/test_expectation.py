"""`expect`: the row is found before the work, and stands in report and table beside what was measured."""

import json
import sys

import pytest

import wanda_fast
from tests import tiny_models
from wanda_fast import errors
from wanda_fast.checkpoint import load as checkpoints
from wanda_fast.cli import main as cli

TEXT = "The quick brown fox jumps over the lazy dog, and nobody asks where it came from. " * 40
ROW = dict(model="some/Tiny", prune_method="wanda", sparsity_type="2:4", sparsity_ratio=0.5)


@pytest.fixture
def folder(tmp_path):
    tiny_models.save_checkpoint(tiny_models.build("llama2"), tmp_path / "tiny", TEXT)
    (tmp_path / "text.txt").write_text(TEXT)
    write(tmp_path, ROW | {"dense": 100.0, "pruned": 200.0})
    return tmp_path


def write(folder, *rows):
    text = str(folder / "text.txt")
    protocol = dict(text=text, window=32, bos=False, calibration=text, nsamples=3, seqlen=32)
    content = dict(source="a paper", protocol=protocol, rows=rows)
    (folder / "table.json").write_text(json.dumps(content))


def options(folder, **others):
    text = str(folder / "text.txt")
    own = dict(dataset=text, eval_dataset=text, nsamples=3, seqlen=32, sparsity_type="2:4")
    return own | {"expect": folder / "table.json"} | others


@pytest.mark.parametrize("streamed", [True, False])
def test_the_report_has_what_is_published_and_measured(folder, streamed):
    own = options(folder, save_model=folder / "out")
    if streamed:
        report = wanda_fast.prune(folder / "tiny", **own)
    else:
        loaded = checkpoints.load(str(folder / "tiny"))
        report = wanda_fast.prune(loaded.model, tokenizer=loaded.tokenizer, **own)
    for which, published in (("dense", 100), ("pruned", 200)):
        figures, measured = report.expected[which], report.perplexity[which]
        assert figures["published"] == published and figures["measured"] == measured
        assert figures["apart"] == pytest.approx((measured - published) / published * 100)
    assert report.expected["row"] == "some/Tiny, wanda 2:4 0.5"
    assert report.expected["differences"] == report.expected["not_stated"] == []
    written = json.loads((folder / "out" / "wanda_fast.json").read_text())
    assert written["expected"] == report.expected


def test_a_finished_run_is_held_against_another_row(folder):
    own = options(folder, save_model=folder / "out", expect=None)
    first = wanda_fast.prune(folder / "tiny", **own)
    assert first.expected == {}
    again = wanda_fast.prune(folder / "tiny", **own | {"expect": folder / "table.json"}, resume=True)
    assert again.seconds["load"] == first.seconds["load"]  # nothing was done again
    assert again.expected["pruned"]["measured"] == first.perplexity["pruned"]


def test_every_difference_is_said(folder):
    write(folder, ROW | {"prune_method": "connect", "pruned": 200.0, "dense": None})
    others = dict(nsamples=4, seqlen=16, protocol="wanda", eval_windows=1, bos="always", refine=1)
    others |= dict(prune_method="wanda_connect", ignore=["*.k_proj"], dataset=folder / "other.txt")
    (folder / "other.txt").write_text(TEXT)
    found = wanda_fast.prune(folder / "tiny", **options(folder, **others)).expected
    assert found["differences"] == [
        "evaluation window 256 in place of 32",
        "BOS in every window yes in place of no",
        f"calibration set {folder}/other.txt in place of {folder}/text.txt",
        "calibration samples 4 in place of 3",
        "calibration window 16 in place of 32",
        "the first 1 windows only",
        "refine 1",
        "ignore ['*.k_proj']",
    ]
    assert found["dense"]["published"] is None and found["dense"]["apart"] is None


def test_a_method_without_calibration_has_no_protocol_of_it(folder):
    write(folder, ROW | {"prune_method": "magnitude", "pruned": 200.0})
    found = wanda_fast.prune(folder / "tiny", **options(folder, prune_method="magnitude", nsamples=9))
    assert found.expected["differences"] == []


@pytest.mark.parametrize(
    ("others", "kind", "words"),
    [
        (dict(eval_dataset=None), errors.ExpectedError, "needs a perplexity, and eval_dataset is none"),
        (dict(sparsity_type="4:8"), errors.ExpectedError, "no row for .*tiny with wanda 4:8 0.5"),
        (dict(prune_method="dense"), errors.ExpectedError, "no row for .*tiny with dense"),
        (dict(expect="none.json"), errors.PathError, "expect file none.json cannot be read"),
        (dict(expect="~nobody-here/a.json"), errors.PathError, "home folder is unknown"),
    ],
)
def test_refused_before_the_model_is_read(folder, others, kind, words, monkeypatch):
    monkeypatch.setattr("wanda_fast.run.prune_model.open_model", lambda *_: pytest.fail("it was read"))
    with pytest.raises(kind, match=words):
        wanda_fast.prune(folder / "tiny", **options(folder, **others))


def test_the_exit_code(folder, monkeypatch, capsys):
    words = f"wanda-fast prune --model {folder}/tiny --dataset {folder}/text.txt --expect {folder}/table.json"
    monkeypatch.setattr(sys, "argv", words.split())
    with pytest.raises(SystemExit) as exit:
        cli.main()
    said = capsys.readouterr().err.strip()
    assert exit.value.code == 2 and said.count("\n") == 0
    assert "no row for" in said and said.endswith("its rows: wanda 2:4 0.5")

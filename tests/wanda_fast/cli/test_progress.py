"""The progress display: what a terminal shows, what a log gets, and the phases that a run names."""

import io

import pytest
from rich.console import Console

import wanda_fast
from tests.tiny_models import FAMILIES, save_checkpoint, token_ids
from wanda_fast.checkpoint import load as checkpoints
from wanda_fast.cli import progress
from wanda_fast.cli.progress import LiveProgress, PlainProgress

RUN = [("loading", 0, 1, "model"), ("block inputs", 0, 1, "")]
RUN += [(phase, block, 3, f"block {block}") for block in range(3) for phase in ("dense pass", "pruned pass")]
RUN += [("writing", 0, 1, "out")] + [("perplexity, pruned", done, 4, "") for done in range(5)]


class Noted:
    """Notes (phase, done, total, detail)."""

    def __init__(self):
        self.steps = []

    def step(self, phase, done, total, detail=""):
        self.steps.append((phase, done, total, detail))


@pytest.fixture
def clock(monkeypatch):
    """Each look at it is a second later."""
    now = iter(range(10**6))
    monkeypatch.setattr(progress.time, "perf_counter", lambda: float(next(now)))


def lines_of(run, **kind):
    console = Console(file=io.StringIO(), width=110, **kind)
    with progress.terminal_progress(console) as display:
        for step in run:
            display.step(*step)
    return console.file.getvalue()


def test_a_log_gets_a_line_for_each_block_and_each_long_phase(clock, monkeypatch):
    lines = lines_of(RUN).splitlines()
    assert [line.split(",")[0] for line in lines[:3]] == ["blocks 1/3", "blocks 2/3", "blocks 3/3"]
    assert [line.split(" s,")[0] for line in lines[3:]] == [
        f"perplexity, pruned {done}/4, {done}.0" for done in range(1, 5)
    ]
    monkeypatch.setattr(progress, "WORTH_A_LINE", 1.0)
    lines = lines_of(RUN).splitlines()
    assert lines[:2] == ["loading model: 1.0 s", "block inputs: 1.0 s"] and "writing out: 1.0 s" in lines


def test_a_run_that_fails_ends_no_block():
    console = Console(file=io.StringIO(), width=110)
    with pytest.raises(ZeroDivisionError), PlainProgress(console) as display:
        display.step("dense pass", 0, 3)
        raise ZeroDivisionError
    assert console.file.getvalue() == ""


def test_a_terminal_shows_phase_count_and_detail():
    console = Console(file=io.StringIO(), width=110, force_terminal=True)
    display = progress.terminal_progress(console)
    assert isinstance(display, LiveProgress)
    with display:
        for step in RUN:
            display.step(*step)
            display._bar.refresh()
    said = console.file.getvalue()
    for phase, done, total, detail in RUN:
        assert phase in said and detail in said
        assert total == 1 or f"{done}/{total}" in said
    assert "0/1" not in said


def test_a_streamed_run_names_its_phases(tmp_path, pydoc_text):
    save_checkpoint(FAMILIES["llama2"](), tmp_path / "model", pydoc_text[:20000])
    ids, noted = token_ids(FAMILIES["llama2"](), 2, 24), Noted()
    options = dict(dataset=ids, eval_dataset=ids, prune_method="sparsegpt", seqlen=24, progress=noted)
    wanda_fast.prune(str(tmp_path / "model"), save_model=tmp_path / "out", **options)
    phases = [(phase, detail) for phase, _done, total, detail in noted.steps if total == 1]
    assert phases == [
        ("loading", str(tmp_path / "model")),
        ("calibration text", ""),
        ("block inputs", ""),
        ("evaluation", ""),
        ("writing", str(tmp_path / "out")),
    ]
    inside = {phase for phase, _done, total, _detail in noted.steps if total == 2}
    assert {"evaluation", "dense pass", "factor", "selection", "pruned pass"} <= inside


def test_a_model_in_memory_names_its_phases(tmp_path):
    model, noted = FAMILIES["llama2"](), Noted()
    ids = token_ids(model, 2, 24)
    options = dict(dataset=ids, eval_dataset=ids, seqlen=24, progress=noted)
    wanda_fast.prune(model, save_model=tmp_path / "out", **options)
    phases = list(dict.fromkeys(phase for phase, *_ in noted.steps))
    assert phases[:3] == ["calibration text", "perplexity, dense", "block inputs"]
    assert phases[-2:] == ["writing", "perplexity, pruned"]


def test_a_gguf_is_named_before_it_is_converted(tmp_path, monkeypatch, caplog):
    """In the display and in the log: converting takes a minute or more."""
    caplog.set_level("INFO", logger="wanda_fast")
    (tmp_path / "tiny.Q4_1.gguf").touch()
    noted = Noted()

    class ConvertedError(Exception):
        pass

    def convert(*_):
        assert noted.steps == [("converting", 0, 1, "tiny.Q4_1.gguf")]
        assert any("converting tiny.Q4_1.gguf" in record.message for record in caplog.records)
        raise ConvertedError

    monkeypatch.setattr(checkpoints, "load", convert)
    with pytest.raises(ConvertedError):
        wanda_fast.prune(str(tmp_path), progress=noted)

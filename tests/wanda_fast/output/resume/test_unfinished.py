"""Runs that were killed, stopped, out of disk space or altered give the same bytes when resumed."""

import collections
import hashlib
import resource
import signal
import sys
import time

import pytest

import wanda_fast
from tests.wanda_fast import forked
from tests.wanda_fast.output.resume import killed_runs
from tests.wanda_fast.output.resume.runs import (
    NBLOCKS,
    QUICK,
    WORDS,
    assert_same,
    copied,
    fine_tune,
    masks,
    partial,
    resume,
    stop_in,
)
from wanda_fast import errors
from wanda_fast.checkpoint import shards
from wanda_fast.cli import main as cli
from wanda_fast.output import activation_cache
from wanda_fast.output import streamed as output
from wanda_fast.run import streamed

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.mark.parametrize(
    ("family", "method", "kills"),
    [("llama", "connect", 14), ("llama", "sparsegpt", 7), ("mixtral", "gated", 14)],
)
def test_killed_at_random_moments(request, tmp_path, family, method, kills):
    """Many kills at different moments. Every run that ends gives the same bytes."""
    model = request.getfixturevalue(family)
    moments, digests = killed_runs.main(model, tmp_path / "out", method, kills, seed=1)
    assert len(digests) >= 2 and len(set(digests)) == 1
    assert len(moments) == kills
    # There are seven kinds of moments.
    assert min(collections.Counter(moments).values()) == kills // 7


def test_ctrl_c_ends_after_the_block_and_says_how_to_continue(llama, unbroken, broken_off, pruned):
    out = broken_off()
    assert not out.exists() and len(list((partial(out) / "model").glob("*.safetensors"))) == 4
    report = resume(llama, out)
    # No block was pruned twice.
    assert pruned == [f"model.layers.{index}" for index in range(NBLOCKS)]
    assert_same(out, unbroken, report)


def test_the_command_line_prints_the_command(llama, tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("COLUMNS", "400")
    out, write_block = tmp_path / "out", output.StreamedOutput.write_block
    words = ["prune", "--model", str(llama), *WORDS, "--save-model", str(out)]
    monkeypatch.setattr(output.StreamedOutput, "write_block", stop_in(0, write_block))
    assert run(monkeypatch, words) == 130
    said = capsys.readouterr().err
    assert f"wanda-fast {' '.join(words)} --resume" in said and "Traceback" not in said
    for command in (
        ["eval", str(out)],
        ["eval", str(partial(out))],
        ["inspect", str(partial(out) / "model")],
    ):
        assert run(monkeypatch, command) == 2
        assert "is not finished: continue it with --resume" in capsys.readouterr().err
    assert run(monkeypatch, words) == 2
    assert "holds an unfinished run: continue it with --resume" in capsys.readouterr().err
    monkeypatch.setattr(output.StreamedOutput, "write_block", write_block)
    assert run(monkeypatch, [*words, "--resume"]) == 0
    assert (out / "config.json").is_file() and not partial(out).exists()
    # The run is finished: nothing is left to do, and its report is shown.
    assert run(monkeypatch, [*words, "--resume"]) == 0
    assert "perplexity, pruned" in capsys.readouterr().out


# Pieces of a tensor that a copy would take minutes for.
ENDLESS = 200_000


def test_a_second_ctrl_c_does_not_wait_for_the_copy(llama, tmp_path, monkeypatch):
    pieces, copied = shards.TensorFiles.pieces, []

    def many(self, name, dtype=None):
        piece = next(pieces(self, name, dtype))
        for _ in range(ENDLESS):
            time.sleep(0.001)
            copied.append(name)
            yield piece

    def interrupted(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(shards.TensorFiles, "pieces", many)
    monkeypatch.setattr(streamed, "record_activations", interrupted)
    with pytest.raises(KeyboardInterrupt):
        wanda_fast.prune(str(llama), save_model=tmp_path / "out", **QUICK)
    assert len(copied) < ENDLESS and list(tmp_path.iterdir()) == []


def run(monkeypatch, words):
    monkeypatch.setattr(sys, "argv", ["wanda-fast", *words])
    try:
        cli.main()
    except SystemExit as exit:
        return exit.code or 0
    return 0


# file -> the blocks that are pruned again if it is spoilt
SPOILT = {
    "model/model-00003-of-00006.safetensors": [1],
    "masks-00002.safetensors": [2],
    "block-00000.json": [0],
    "run.json": [],
    "boundary.0.json": [],
    "boundary-00003.0.safetensors": [],
}


WAYS = [(name, how) for name in SPOILT for how in ("altered", "cut", "gone")]
# Without this note the folder is not an unfinished run.
WAYS.remove(("run.json", "gone"))


@pytest.mark.parametrize(("name", "how"), WAYS)
def test_only_what_is_spoilt_is_done_again(name, how, llama, unbroken, broken_off, pruned):
    out = broken_off()
    file = partial(out) / name
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    file.write_bytes(content if how == "altered" else content[: len(content) // 3])
    if how == "gone":
        file.unlink()
    pruned.clear()
    report = resume(llama, out)
    assert pruned == [f"model.layers.{index}" for index in [*SPOILT[name], 3, 4]]
    assert_same(out, unbroken, report)


def test_blocks_are_run_again_without_cached_activations(llama, unbroken, broken_off, pruned, monkeypatch):
    monkeypatch.setattr(activation_cache.ActivationCache, "begin", lambda *_: lambda: None)
    out = broken_off()
    assert not list(partial(out).glob("boundary*"))
    pruned.clear()
    report = resume(llama, out)
    assert pruned == ["model.layers.3", "model.layers.4"]
    assert_same(out, unbroken, report)


DIFFERENCES = {
    "sparsity_ratio was 0.5, is 0.25": dict(sparsity_ratio=0.25),
    "prune_method was wanda, is connect": dict(prune_method="connect"),
    "seed was 0, is 1; calibration tokens differ": dict(seed=1),
    "batch_size was": dict(batch_size=1),
    "sequential was block, is linear": dict(sequential="linear"),
    "update was none, is obs": dict(update="obs"),
    "dampening was 0.01, is 0.1": dict(dampening=0.1),
    "evaluation tokens differ": dict(eval_windows=1),
    "measure_error was None, is True": dict(measure_error=True),
}


@pytest.mark.parametrize("sentence", DIFFERENCES)
def test_another_run_is_not_resumed(sentence, llama, unbroken, broken_off):
    out = broken_off()
    with pytest.raises(errors.ResumeError, match=f"cannot be resumed: {sentence}"):
        resume(llama, out, **DIFFERENCES[sentence])
    # The refusal has not changed the unfinished run.
    assert_same(out, unbroken, resume(llama, out))


def test_another_model_is_not_resumed(llama, broken_off, tmp_path_factory):
    other = copied(llama, tmp_path_factory.mktemp("other"))
    fine_tune(other)
    with pytest.raises(errors.ResumeError, match="cannot be resumed: the model differs"):
        resume(other, broken_off())


def test_out_of_space_in_a_shard(llama, tmp_path, monkeypatch, unbroken):
    """A limit on the size of files stops the run in a shard. Resumed without it, the bytes are the same."""
    write_block = output.StreamedOutput.write_block

    def limited(self, index, *rest):
        if index == 2:
            resource.setrlimit(resource.RLIMIT_FSIZE, (30_000, 30_000))
        write_block(self, index, *rest)

    def limit():  # in the fork alone
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        output.StreamedOutput.write_block = limited

    out, file = tmp_path / "new" / "out", tmp_path / "said"
    words = ["wanda-fast", "prune", "--model", llama, *WORDS, "--save-model", out, "--save-mask", masks(out)]
    code, said = forked.wait(forked.start(words, file, limit)), file.read_text()
    assert code == 2, said
    assert f"output {out} cannot be written" in said and "Traceback" not in said
    assert "2 of 5 blocks are kept: continue with --resume" in said
    assert not out.exists()
    assert_same(out, unbroken, resume(llama, out))


def test_resume_without_a_folder_is_refused(llama):
    with pytest.raises(errors.ResumeError, match="--save_model FOLDER"):
        wanda_fast.prune(str(llama), resume=True, **QUICK)


def test_overwrite_drops_an_unfinished_run(llama, unbroken, broken_off, pruned):
    out = broken_off()
    pruned.clear()
    report = wanda_fast.prune(
        str(llama), save_model=out, save_mask=str(out) + ".masks", overwrite=True, **QUICK
    )
    assert len(pruned) == NBLOCKS
    assert_same(out, unbroken, report)


def test_a_resumed_run_replaces_its_own_mask_file(llama, tmp_path, unbroken, monkeypatch):
    """The mask file is written before the last rename, so a killed run can have written it."""
    out, log = tmp_path / "out", tmp_path / "log"

    def stopped(*_):
        raise errors.InterruptedRunError

    with monkeypatch.context() as patch, pytest.raises(errors.InterruptedRunError):
        patch.setattr(output.StreamedOutput, "finish", stopped)
        resume(llama, out)
    assert masks(out).is_file() and not out.exists()
    log.touch()
    resume(llama, out, save_log=log)
    log.unlink()
    assert_same(out, unbroken, resume(llama, out))


def test_the_unbroken_run_twice(llama, tmp_path, unbroken):
    """Two uninterrupted runs write the same file."""
    out = tmp_path / "out"
    wanda_fast.prune(str(llama), save_model=out, save_mask=str(out) + ".masks", **QUICK)
    digests = {hashlib.sha256((f / "model.safetensors").read_bytes()).digest() for f in (out, unbroken[1])}
    assert len(digests) == 1

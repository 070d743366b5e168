"""Runs that were killed, stopped, out of space or tampered with: resumed, they give the same bytes."""

import collections
import hashlib
import json
import os
import resource
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

import wanda_fast
from tests.tiny_models import CONFIGS, FAMILIES, save_checkpoint, token_ids
from wanda_fast import boundary, cli, driver, errors, job, output, pipeline, shards

pytestmark = pytest.mark.usefixtures("one_thread")

NBLOCKS = 5
QUICK = dict(dataset="text.txt", eval_dataset="text.txt", nsamples=2, seqlen=24, eval_windows=2, device="cpu")
WORDS = "--dataset text.txt --nsamples 2 --seqlen 24 --eval-windows 2 --device cpu".split()


@pytest.fixture(scope="module", autouse=True)
def text(llama):
    before = Path.cwd()
    os.chdir(llama)
    yield
    os.chdir(before)


@pytest.fixture(scope="module")
def llama(tmp_path_factory, pydoc_text):
    """Folder of a checkpoint of five blocks."""
    folder, small = tmp_path_factory.mktemp("llama"), CONFIGS["smollm"]
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(CONFIGS, "smollm", lambda: deeper(small()))
        save_checkpoint(FAMILIES["smollm"]().bfloat16(), folder, pydoc_text[:20000])
    (folder / "text.txt").write_text(pydoc_text[:20000])
    return folder


def deeper(config):
    config.num_hidden_layers = NBLOCKS
    return config


@pytest.fixture(scope="module")
def unbroken(llama, tmp_path_factory):
    out = tmp_path_factory.mktemp("unbroken") / "out"
    report = wanda_fast.prune(str(llama), save_model=out, save_mask=str(out) + ".masks", **QUICK)
    return report, out


@pytest.fixture
def pruned(monkeypatch):
    """Names of the blocks whose weights were selected, in order."""
    names, prune_block = [], pipeline.prune_block
    monkeypatch.setattr(
        pipeline, "prune_block", lambda block, *rest: names.append(block.name) or prune_block(block, *rest)
    )
    return names


@pytest.fixture
def broken_off(llama, tmp_path, monkeypatch):
    """The folder of a run that was stopped by Ctrl-C after three of five blocks."""

    def broken_off(**options):
        out = tmp_path / "out"
        with monkeypatch.context() as patch:
            write_block = output.StreamedOutput.write_block
            patch.setattr(output.StreamedOutput, "write_block", stop_in(2, write_block))
            with pytest.raises(errors.InterruptedRunError, match="stopped after block 3 of 5"):
                wanda_fast.prune(str(llama), save_model=out, save_mask=str(out) + ".masks", **QUICK | options)
        return out

    return broken_off


def stop_in(block, write_block):
    def write(self, index, *rest):
        write_block(self, index, *rest)
        if index == block:
            os.kill(os.getpid(), signal.SIGINT)

    return write


def resume(llama, out, **options):
    return wanda_fast.prune(
        str(llama), save_model=out, save_mask=str(out) + ".masks", resume=True, **QUICK | options
    )


def assert_same(out, unbroken, report):
    expected, folder = unbroken
    files = [(out / "model.safetensors", folder / "model.safetensors"), (masks(out), masks(folder))]
    for file, other in files:
        tensors, wanted = load_file(file), load_file(other)
        assert tensors.keys() == wanted.keys()
        assert all(torch.equal(tensors[name], wanted[name]) for name in wanted)
    assert report.perplexity == expected.perplexity and report.sparsity == expected.sparsity
    assert list(report.linears) == list(expected.linears)
    assert {path.name for path in out.parent.iterdir()} == {"out", "out.masks"}


def masks(out):
    return Path(str(out) + ".masks")


def partial(out):
    return out.with_name("out.partial")


@pytest.mark.parametrize(("method", "kills"), [("connect", 21), ("sparsegpt", 7)])
def test_killed_at_random_moments(llama, tmp_path, method, kills):
    """Many kills, each at its own moment; whatever they left, each finished run is the same bytes."""
    script = Path(__file__).with_name("killed_runs.py")
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(p for p in sys.path if p)}
    words = [sys.executable, str(script), str(llama), str(tmp_path / "out"), method, str(kills), "1"]
    runs = json.loads(subprocess.run(words, env=environment, stdout=subprocess.PIPE, check=True).stdout)
    assert len(runs["digests"]) >= 2 and len(set(runs["digests"])) == 1
    assert len(runs["moments"]) == kills
    assert min(collections.Counter(runs["moments"]).values()) == kills // 7  # of each kind


def test_ctrl_c_ends_after_the_block_and_says_how_to_go_on(llama, unbroken, broken_off, pruned):
    out = broken_off()
    assert not out.exists() and len(list((partial(out) / "model").glob("*.safetensors"))) == 4
    report = resume(llama, out)
    assert pruned == [f"model.layers.{index}" for index in range(NBLOCKS)]  # none of them twice
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
    assert run(monkeypatch, [*words, "--resume"]) == 0  # complete: nothing to do, nothing lost
    assert "perplexity, pruned" in capsys.readouterr().out


def test_a_second_ctrl_c_does_not_wait_for_the_copy(llama, tmp_path, monkeypatch):
    pieces, copied = shards.TensorFiles.pieces, []

    def many(self, name, dtype=None):
        piece = next(pieces(self, name, dtype))
        for _ in range(1000):
            time.sleep(0.01)
            copied.append(name)
            yield piece

    def interrupted(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(shards.TensorFiles, "pieces", many)
    monkeypatch.setattr(job, "record_activations", interrupted)
    with pytest.raises(KeyboardInterrupt):
        wanda_fast.prune(str(llama), save_model=tmp_path / "out", **QUICK)
    assert len(copied) < 500 and list(tmp_path.iterdir()) == []


def run(monkeypatch, words):
    monkeypatch.setattr(sys, "argv", ["wanda-fast", *words])
    try:
        cli.main()
    except SystemExit as exit:
        return exit.code or 0
    return 0


SPOILT = {  # file -> the blocks that are pruned again
    "model/model-00003-of-00006.safetensors": [1],
    "masks-00002.safetensors": [2],
    "block-00000.json": [0],
    "run.json": [],
    "boundary.json": [],
    "boundary-00003.safetensors": [],
}


WAYS = [(name, how) for name in SPOILT for how in ("altered", "cut", "gone")]
WAYS.remove(("run.json", "gone"))  # without its first note the folder is no run


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


def test_blocks_are_replayed_where_no_boundary_was_written(llama, unbroken, broken_off, pruned, monkeypatch):
    monkeypatch.setattr(boundary.Boundary, "begin", lambda *_: lambda: None)
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
    assert_same(out, unbroken, resume(llama, out))  # the refusal cost nothing


def test_another_model_is_not_resumed(llama, broken_off, tmp_path_factory):
    other = copied(llama, tmp_path_factory.mktemp("other"))
    fine_tune(other)
    with pytest.raises(errors.ResumeError, match="cannot be resumed: the model differs"):
        resume(other, broken_off())


def copied(llama, folder):
    return Path(shutil.copytree(llama, folder, dirs_exist_ok=True))


def fine_tune(folder):
    """The last bit of the model."""
    file = folder / "model.safetensors"
    content = bytearray(file.read_bytes())
    content[-1] ^= 1
    file.write_bytes(content)


@pytest.fixture(params=["streamed", "in memory"])
def held(request, monkeypatch):
    """Runs of this kind."""
    if request.param == "in memory":

        def refuse(*_):
            raise errors.NotStreamableError("the test says so")

        monkeypatch.setattr(driver, "open_skeleton", refuse)


IDS = torch.arange(48).reshape(2, 24) + 3
FINISHED = dict(dataset=IDS, eval_dataset=IDS)


def test_a_finished_run_is_known_by_what_it_saw(held, llama, tmp_path, pruned, monkeypatch):
    """Not by its options alone: by the weights, and the token ids themselves."""
    model, out = copied(llama, tmp_path / "model"), tmp_path / "out"
    first = resume(model, out, **FINISHED)
    pruned.clear()
    again = resume(model, out, **FINISHED)
    assert not pruned and again.linears == first.linears and again.perplexity == first.perplexity
    for change, sentence in (
        (dict(dataset=IDS + 1), "calibration tokens differ"),
        (dict(eval_dataset=IDS + 1), "evaluation tokens differ"),
    ):
        with pytest.raises(errors.ResumeError, match=rf"a finished run of other input \({sentence}\)"):
            resume(model, out, **FINISHED | change)
    with pytest.raises(errors.OutputError, match="not empty .* and holds no finished run of this recipe"):
        resume(model, out, **FINISHED, measure_error=True)
    monkeypatch.setattr(driver, "require_zero_shot", lambda: None)
    with pytest.raises(errors.OutputError, match="not empty .* and holds no finished run of this recipe"):
        resume(model, out, **FINISHED, eval_zero_shot=True)
    fine_tune(model)
    with pytest.raises(errors.ResumeError, match=r"a finished run of other input \(the model differs\)"):
        resume(model, out, **FINISHED)
    assert not pruned
    resume(model, out, overwrite=True, **FINISHED)
    assert len(pruned) == NBLOCKS


def test_a_run_whose_files_are_gone_or_torn_is_not_finished(held, llama, tmp_path, pruned):
    out = tmp_path / "out"
    resume(llama, out)
    masks(out).unlink()
    resume(llama, out)
    assert masks(out).is_file() and len(pruned) == 2 * NBLOCKS
    report = out / "wanda_fast.json"
    content = report.read_text()
    for spoilt in (content[: len(content) // 2], "[]", "{}", '{"recipe": 3}', "\udcff"):
        report.write_text(spoilt, errors="surrogateescape")
        with pytest.raises(
            errors.OutputError, match="and holds no finished run of this recipe: name another"
        ):
            resume(llama, out)


def test_a_run_that_failed_after_its_save_is_done_again(llama, tmp_path, pruned, monkeypatch):
    """In memory: the model is saved first. What was not measured is no finished run, and no stranger's."""
    out = tmp_path / "out"
    monkeypatch.setattr(driver, "require_zero_shot", lambda: None)
    with monkeypatch.context() as patch, pytest.raises(ZeroDivisionError):
        patch.setattr(driver, "zero_shot", lambda *_: 1 / 0)
        resume(llama, out, eval_zero_shot=True)
    monkeypatch.setattr(driver, "zero_shot", lambda *_: {"boolq": {"acc": 0.5}})
    report = resume(llama, out, eval_zero_shot=True)
    assert report.zero_shot and len(pruned) == 2 * NBLOCKS
    assert resume(llama, out, eval_zero_shot=True).zero_shot == report.zero_shot
    assert len(pruned) == 2 * NBLOCKS


def test_a_live_model_is_always_pruned(tmp_path):
    """A finished run of another live model says nothing about this one."""
    model, out = FAMILIES["smollm"](), tmp_path / "out"
    options = dict(dataset=token_ids(model, 2, 24), save_model=out, resume=True)
    wanda_fast.prune(model, **options)
    dense = FAMILIES["smollm"]()
    with pytest.raises(errors.OutputError, match="not empty"):
        wanda_fast.prune(dense, **options)
    wanda_fast.prune(dense, overwrite=True, **options)
    assert torch.equal(dense.model.layers[1].mlp.up_proj.weight, model.model.layers[1].mlp.up_proj.weight)


def test_out_of_space_in_a_shard(llama, tmp_path, monkeypatch, unbroken):
    """A limit on file size that the second shard meets; resumed without it, the same bytes."""
    limit = (
        "import resource, signal, sys\n"
        "from wanda_fast import output\n"
        "from wanda_fast.cli import main\n"
        f"signal.signal({int(signal.SIGXFSZ)}, signal.SIG_IGN)\n"
        "write_block = output.StreamedOutput.write_block\n"
        "def limited(self, index, *rest):\n"
        "    if index == 2:\n"
        f"        resource.setrlimit({resource.RLIMIT_FSIZE}, (30_000, 30_000))\n"
        "    write_block(self, index, *rest)\n"
        "output.StreamedOutput.write_block = limited\n"
        "main()\n"
    )
    out = tmp_path / "out"
    words = ["prune", "--model", str(llama), *WORDS, "--save-model", str(out), "--save-mask", str(masks(out))]
    done = subprocess.run([sys.executable, "-c", limit, *words], capture_output=True, text=True)
    assert done.returncode == 2, done.stderr
    assert f"output {out} cannot be written" in done.stderr and "Traceback" not in done.stderr
    assert "2 of 5 blocks are kept: continue with --resume" in done.stderr
    assert not out.exists()
    assert_same(out, unbroken, resume(llama, out))


def test_resume_with_nothing_to_resume_begins(llama, tmp_path, unbroken):
    out = tmp_path / "out"
    assert_same(out, unbroken, resume(llama, out))
    report = resume(llama, out)  # complete
    assert_same(out, unbroken, report)
    with pytest.raises(errors.OutputError, match="not empty"):
        resume(llama, out, seed=3)


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
    """It is written before the last rename, so a run may be killed with it there."""
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
    """That nothing else moves: two runs write the same file."""
    out = tmp_path / "out"
    wanda_fast.prune(str(llama), save_model=out, save_mask=str(out) + ".masks", **QUICK)
    digests = {hashlib.sha256((f / "model.safetensors").read_bytes()).digest() for f in (out, unbroken[1])}
    assert len(digests) == 1

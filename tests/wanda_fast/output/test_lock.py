"""One run at a time writes a folder: a second one ends with a sentence and changes nothing."""

import errno
import fcntl
import os
import platform
import random
import re
import signal
import sys

import pytest
import torch

import wanda_fast
from tests.tiny_models import FAMILIES, save_checkpoint, token_ids
from tests.wanda_fast.output import racing_runs
from tests.wanda_fast.output.resume.runs import partial
from wanda_fast import errors
from wanda_fast.cli import main as cli

pytestmark = pytest.mark.usefixtures("one_thread", "short_pydoc")
IDS = torch.arange(48).reshape(2, 24) + 3
QUICK = dict(dataset=IDS, device="cpu")
THIS_PROCESS = f"process {os.getpid()} on {platform.node()}"


@pytest.fixture(scope="module")
def llama(tmp_path_factory, pydoc_text):
    folder = tmp_path_factory.mktemp("llama")
    save_checkpoint(FAMILIES["smollm"](), folder, pydoc_text[:20000])
    return str(folder)


@pytest.fixture
def run(monkeypatch, capsys):
    """Run `wanda-fast`; returns (exit code, standard error)."""

    def run(*words):
        monkeypatch.setattr(sys, "argv", ["wanda-fast", *map(str, words)])
        try:
            cli.main()
        except SystemExit as exit:
            return exit.code or 0, capsys.readouterr().err
        return 0, capsys.readouterr().err

    return run


class Meanwhile:
    """A progress display that calls `work` once, while blocks are pruned."""

    def __init__(self, work):
        self.work, self.result = work, None

    def step(self, phase, done, *_):
        if self.work is not None and done == 1:
            work, self.work = self.work, None
            self.result = work()


def folders(out):
    """Which of DIR and DIR.partial exist; the first run may add files to them meanwhile."""
    return [(path.name, path.stat().st_ino) for path in (out, partial(out)) if path.exists()]


MODES = {"start": {}, "resume": dict(resume=True), "overwrite": dict(overwrite=True)}


@pytest.mark.parametrize("held", ["streamed", "in memory"])
@pytest.mark.parametrize("second", ["streamed", "in memory", "apply-mask"])
@pytest.mark.parametrize("mode", MODES)
def test_a_second_run_changes_nothing(mode, second, held, llama, tmp_path, run):
    """Not even with --overwrite. Its sentence names the process and the machine of the first."""
    out = tmp_path / "new" / "out"

    def meanwhile():
        before = folders(out)
        if second == "apply-mask":
            flags = ["--overwrite"] * (mode == "overwrite")
            code, said = run("apply-mask", llama, "--mask", "none", "--save-model", out, *flags)
            assert code == 2 and said.count("\n") == 1
        else:
            other = llama if second == "streamed" else FAMILIES["smollm"]()
            with pytest.raises(errors.OutputInUseError) as refused:
                wanda_fast.prune(other, save_model=out, sparsity_type="4:8", **QUICK | MODES[mode])
            said = str(refused.value)
        assert folders(out) == before
        return said

    first = Meanwhile(meanwhile)
    model = llama if held == "streamed" else FAMILIES["smollm"]()
    report = wanda_fast.prune(model, save_model=out, sparsity_type="2:4", progress=first, **QUICK)
    assert f"output {out} is being written by {THIS_PROCESS}: wait until that run has ended" in first.result
    assert report.sparsity == 0.5 and run("verify", out, "--pattern", "2:4")[0] == 0
    assert [path.name for path in out.parent.iterdir()] == ["out"]


@pytest.mark.parametrize("option", ["save", "save_log", "save_mask"])
def test_other_outputs_have_one_writer_too(option, llama, tmp_path):
    output = {option: tmp_path / "new" / "it"}

    def meanwhile():
        with pytest.raises(errors.OutputInUseError) as refused:
            wanda_fast.prune(llama, save_model=tmp_path / "out", overwrite=True, **output, **QUICK)
        return str(refused.value)

    first = Meanwhile(meanwhile)
    wanda_fast.prune(llama, progress=first, **output, **QUICK)
    assert f"output {output[option]} is being written by {THIS_PROCESS}" in first.result
    assert [path.name for path in tmp_path.iterdir()] == ["new"]
    assert [path.name for path in (tmp_path / "new").iterdir()] == ["it"]


def test_another_name_of_the_folder(llama, tmp_path, monkeypatch):
    out = tmp_path / "out"
    (tmp_path / "link").symlink_to(tmp_path)
    monkeypatch.chdir(tmp_path)

    def meanwhile():
        for name in ("out", "./out", tmp_path / "link" / "out"):
            with pytest.raises(errors.OutputInUseError, match=re.escape(THIS_PROCESS)):
                wanda_fast.prune(llama, save_model=name, overwrite=True, **QUICK)
        wanda_fast.prune(llama, save_model="other", **QUICK)
        return True

    first = Meanwhile(meanwhile)
    wanda_fast.prune(llama, save_model=out, progress=first, **QUICK)
    assert first.result and sorted(path.name for path in tmp_path.iterdir()) == ["link", "other", "out"]


def test_the_lock_dies_with_the_process(llama, tmp_path):
    out, file = tmp_path / "out", tmp_path / "out.partial.lock"
    pid = os.fork()
    if not pid:
        kill = Meanwhile(lambda: os.kill(os.getpid(), signal.SIGKILL))
        try:
            wanda_fast.prune(llama, save_model=out, progress=kill, **QUICK)
        finally:
            os._exit(1)
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == -signal.SIGKILL
    assert file.read_text() == f"process {pid} on {platform.node()}\n" and partial(out).is_dir()
    wanda_fast.prune(llama, save_model=out, overwrite=True, **QUICK)
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_a_refused_run_leaves_no_lock_and_no_folder(llama, tmp_path):
    for _ in range(2):
        with pytest.raises(errors.CalibrationError):
            wanda_fast.prune(llama, save_model=tmp_path / "a" / "b" / "out", dataset=IDS + 1000)
        assert not list(tmp_path.iterdir())
    (tmp_path / "file").touch()
    with pytest.raises(errors.OutputError, match="file/out cannot be written: "):
        wanda_fast.prune(llama, save_model=tmp_path / "file" / "out", **QUICK)


def test_a_lock_file_that_its_run_removes(llama, tmp_path, monkeypatch):
    """A run may open the file just before the run before it removes that file: it takes the new one."""
    file, flock, opened = tmp_path / "out.partial.lock", fcntl.flock, []

    def late(descriptor, operation):
        if not opened:
            file.unlink()
        opened.append(os.fstat(descriptor).st_ino)
        flock(descriptor, operation)

    monkeypatch.setattr(fcntl, "flock", late)
    wanda_fast.prune(llama, save_model=tmp_path / "out", **QUICK)
    assert len(opened) == 2 and [path.name for path in tmp_path.iterdir()] == ["out"]


def test_a_file_system_without_locks_is_a_warning(llama, tmp_path, monkeypatch, caplog):
    def unsupported(*_):
        raise OSError(errno.ENOLCK, os.strerror(errno.ENOLCK))

    monkeypatch.setattr(fcntl, "flock", unsupported)
    wanda_fast.prune(llama, save_model=tmp_path / "out", **QUICK)
    assert f"{tmp_path / 'out'} is on a file system without locks" in caplog.text
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_torchrun_is_a_sentence(llama, tmp_path, run, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    out, quick = tmp_path / "out", ["--dataset", "pydoc", "--nsamples", "2", "--seqlen", "24"]
    for words in (
        ["prune", "--model", llama, *quick, "--save-model", out],
        ["prune", "--model", llama, *quick],
        ["apply-mask", llama, "--mask", "none", "--save-model", out],
    ):
        code, said = run(*words)
        assert code == 2 and said.startswith("wanda-fast: WORLD_SIZE is 2") and said.count("\n") == 1
        assert "RANK, LOCAL_RANK, MASTER_ADDR, MASTER_PORT not set" in said or "start this once" in said
        assert not list(tmp_path.iterdir())
    model = FAMILIES["smollm"]()
    with pytest.raises(errors.RanksError, match="WORLD_SIZE is 2"):
        wanda_fast.prune(model, save_mask=tmp_path / "mask", **QUICK)
    # Each rank may prune a model of its own in memory.
    assert wanda_fast.prune(model, dataset=token_ids(model, 2, 24)).sparsity > 0.4
    monkeypatch.setenv("WORLD_SIZE", "1")
    assert wanda_fast.prune(llama, save_model=out, **QUICK).sparsity > 0.4


def test_runs_that_race_for_a_folder(capsys):
    """A few races; `python -m tests.wanda_fast.output.racing_runs` runs fifty rounds of all of them."""
    seed = str(random.SystemRandom().randrange(10**6))
    print(f"seed {seed}")
    racing_runs.main(["--rounds", "1", "--races", "3", "--seed", seed])
    assert "3 races" in capsys.readouterr().out

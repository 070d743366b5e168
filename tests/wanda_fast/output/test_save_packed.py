"""`--save_packed`: the folder is what `pack` makes of the dense one, and a killed run goes on."""

import json
import os
import signal
from dataclasses import asdict
from types import SimpleNamespace

import pytest
import torch
from transformers import AutoModelForCausalLM

import wanda_fast
from tests.tiny_models import FAMILIES, token_ids
from tests.wanda_fast.checkpoint.packed_folders import contents, saved
from wanda_fast import errors
from wanda_fast.checkpoint.packed import packing
from wanda_fast.output import streamed

pytestmark = pytest.mark.usefixtures("one_thread")

IDS = token_ids(FAMILIES["smollm"](), 2, 24)
QUICK = dict(dataset=IDS, eval_dataset=None, device="cpu")


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    return saved(FAMILIES["smollm"]().bfloat16(), tmp_path_factory.mktemp("source") / "dense")


def weights(folder):
    return {name: content for name, content in contents(folder).items() if name != "wanda_fast.json"}


@pytest.mark.parametrize("whole", [False, True])
def test_the_folder_is_the_dense_one_packed(whole, source, tmp_path, monkeypatch):
    if whole:
        monkeypatch.setattr("wanda_fast.run.inputs.open_meta_model", refuse_to_stream)
    wanda_fast.prune(str(source), save_model=tmp_path / "dense", **QUICK)
    sizes = wanda_fast.pack(tmp_path / "dense", tmp_path / "packed")
    report = wanda_fast.prune(str(source), save_model=tmp_path / "out", save_packed=True, **QUICK)
    assert weights(tmp_path / "out") == weights(tmp_path / "packed")
    assert report.packed == asdict(sizes)
    written = json.loads((tmp_path / "out" / "wanda_fast.json").read_text())
    assert written["packed"] == asdict(sizes) and written["recipe"]["save_packed"] is True
    assert {path.name for path in tmp_path.iterdir()} == {"dense", "packed", "out"}


def refuse_to_stream(*_):
    raise errors.NotStreamableError("the test says so")


def test_a_live_model_is_written_packed_and_stays_dense(tmp_path):
    model = FAMILIES["smollm"]().bfloat16()
    report = wanda_fast.prune(model, dataset=IDS, save_model=tmp_path / "out", save_packed=True)
    assert report.packed["packed"] == 14 and (tmp_path / "out" / "packed.safetensors").is_file()
    wanda_fast.unpack(tmp_path / "out", tmp_path / "again")
    other = type(model).from_pretrained(tmp_path / "again")
    assert all(map(torch.equal, model.state_dict().values(), other.state_dict().values()))


@pytest.mark.parametrize("whole", [False, True])
def test_what_gets_no_smaller_is_written_dense_with_a_warning(whole, source, tmp_path, monkeypatch):
    """A run is not lost for it."""
    if whole:
        monkeypatch.setattr("wanda_fast.run.inputs.open_meta_model", refuse_to_stream)
    options = QUICK | dict(sparsity_ratio=0.03, save_model=tmp_path / "out")
    report = wanda_fast.prune(str(source), save_packed=True, **options)
    assert report.packed == {} and "written dense, not packed" in report.warnings[-1]
    assert (tmp_path / "out" / "model.safetensors").is_file()
    assert {path.name for path in tmp_path.iterdir()} == {"out"}


def test_a_disk_that_is_full_while_packing_leaves_the_dense_model(tmp_path, monkeypatch):
    monkeypatch.setattr(packing, "pack_file", full_disk)
    model = FAMILIES["smollm"]().bfloat16()
    report = wanda_fast.prune(model, save_model=tmp_path / "out", save_packed=True, **QUICK)
    assert any("written dense, not packed: [Errno 28] No space" in each for each in report.warnings)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "out").state_dict()
    assert all(torch.equal(tensor, loaded[name]) for name, tensor in model.state_dict().items())
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_it_needs_a_folder(source):
    with pytest.raises(errors.OptionError, match="--save_packed packs what --save_model FOLDER receives"):
        wanda_fast.prune(str(source), save_packed=True, **QUICK)


MOMENTS = ("in the first packed file", "before the rename", "after the rename", "while it cleans up")


@pytest.mark.parametrize("moment", MOMENTS)
def test_a_run_that_was_killed_while_packing_goes_on(moment, source, tmp_path, monkeypatch):
    """Blocks that are finished are not pruned again, and a finished run is found to be finished."""
    monkeypatch.setattr("wanda_fast.checkpoint.save.ONE_FILE", 0)
    out = tmp_path / "out"
    pid = os.fork()
    if not pid:
        try:
            kill_at(moment)
            wanda_fast.prune(str(source), save_model=out, save_packed=True, **QUICK)
        finally:
            os._exit(1)
    assert os.waitpid(pid, 0)[1] == signal.SIGKILL
    assert out.exists() == (moment in MOMENTS[2:])
    monkeypatch.setattr("wanda_fast.pruning.orders.prune_block", refuse_to_prune)
    report = wanda_fast.prune(str(source), save_model=out, save_packed=True, resume=True, **QUICK)
    assert report.complete and report.packed["packed"] == 14
    assert {path.name for path in tmp_path.iterdir()} == {"out"}
    wanda_fast.unpack(out, tmp_path / "again")
    monkeypatch.undo()
    monkeypatch.setattr("wanda_fast.checkpoint.save.ONE_FILE", 0)
    wanda_fast.prune(str(source), save_model=tmp_path / "dense", **QUICK)
    assert weights(tmp_path / "again") == weights(tmp_path / "dense")


def kill_at(moment):
    def kill(*_):
        os.kill(os.getpid(), signal.SIGKILL)

    def move_and_kill(*arguments):
        move(*arguments)
        kill()

    def clean_and_kill(folder, **_):
        if (folder / streamed.PACKED_DONE).is_file():
            (folder / streamed.PACKED_DONE).unlink()
            kill()

    move = streamed.move_into_place
    if moment == MOMENTS[3]:
        streamed.shutil = SimpleNamespace(rmtree=clean_and_kill)
    elif moment == MOMENTS[0]:
        packing.pack_file = kill
    else:
        streamed.move_into_place = kill if moment == MOMENTS[1] else move_and_kill


def refuse_to_prune(*_):
    raise AssertionError("a finished block is pruned again")


def test_an_unfinished_dense_run_can_be_finished_packed(source, tmp_path, monkeypatch):
    monkeypatch.setattr("wanda_fast.checkpoint.save.ONE_FILE", 0)
    out = tmp_path / "out"
    with monkeypatch.context() as patch:
        patch.setattr(streamed, "move_into_place", full_disk)
        with pytest.raises(errors.OutputError, match="2 of 2 blocks are kept: continue with --resume"):
            wanda_fast.prune(str(source), save_model=out, **QUICK)
    monkeypatch.setattr("wanda_fast.pruning.orders.prune_block", refuse_to_prune)
    wanda_fast.prune(str(source), save_model=out, save_packed=True, resume=True, **QUICK)
    assert (out / "packed.safetensors.index.json").is_file()
    # A run without save_packed is another one.
    with pytest.raises(errors.OutputError, match="holds no finished run of this recipe"):
        wanda_fast.prune(str(source), save_model=out, resume=True, **QUICK)


def full_disk(*_):
    raise OSError(28, "No space left on device")

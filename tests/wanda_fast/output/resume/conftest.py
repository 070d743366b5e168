"""A checkpoint of five blocks, an uninterrupted run on it, and an interrupted one."""

import os
from pathlib import Path

import pytest

import wanda_fast
from tests.tiny_models import CONFIGS, FAMILIES, save_checkpoint
from tests.wanda_fast.output.resume.runs import NBLOCKS, QUICK, stop_in
from wanda_fast import errors
from wanda_fast.output import streamed as output
from wanda_fast.pruning import orders


@pytest.fixture(scope="module", autouse=True)
def text(llama):
    before = Path.cwd()
    os.chdir(llama)
    yield
    os.chdir(before)


@pytest.fixture(scope="module")
def llama(tmp_path_factory, pydoc_text):
    """Folder of a checkpoint of five blocks."""
    return five_blocks("smollm", tmp_path_factory, pydoc_text)


@pytest.fixture(scope="module")
def mixtral(tmp_path_factory, pydoc_text):
    """The same with experts, which the checkpoint has in tensors of their own."""
    return five_blocks("mixtral", tmp_path_factory, pydoc_text)


def five_blocks(family, tmp_path_factory, text):
    folder, small = tmp_path_factory.mktemp(family), CONFIGS[family]
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(CONFIGS, family, lambda: deeper(small()))
        save_checkpoint(FAMILIES[family]().bfloat16(), folder, text[:20000])
    (folder / "text.txt").write_text(text[:20000])
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
    """Names of the blocks that were pruned, in order."""
    names, prune_block = [], orders.prune_block

    def note(block, *rest):
        names.append(block.name)
        return prune_block(block, *rest)

    monkeypatch.setattr(orders, "prune_block", note)
    return names


@pytest.fixture
def broken_off(llama, tmp_path, monkeypatch):
    """A function that stops a run by Ctrl-C after three of five blocks, and returns its output folder."""

    def broken_off(**options):
        out = tmp_path / "out"
        with monkeypatch.context() as patch:
            write_block = output.StreamedOutput.write_block
            patch.setattr(output.StreamedOutput, "write_block", stop_in(2, write_block))
            with pytest.raises(errors.InterruptedRunError, match="stopped after block 3 of 5"):
                wanda_fast.prune(str(llama), save_model=out, save_mask=str(out) + ".masks", **QUICK | options)
        return out

    return broken_off

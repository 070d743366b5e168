"""The dense pass ends where nothing more is to be learned; statistics are a phase of their own."""

import itertools

import pytest
import torch

import wanda_fast
from tests.tiny_models import FAMILIES, token_ids
from wanda_fast import timer
from wanda_fast.model.architecture import find_blocks
from wanda_fast.timer import Clock


@pytest.mark.parametrize("name", ["llama2", "opt", "phi3"])
def test_forwards_end_at_the_last_linear(name):
    model, ended = FAMILIES[name](), []
    blocks = find_blocks(model)

    def note(module, _args, output):
        recorded = "forward" in vars(module)  # a recorder stands for the block, or asks it on the meta device
        if not (recorded or (output[0] if isinstance(output, tuple) else output).is_meta):
            ended.append(module)

    for block in blocks:
        block.module.register_forward_hook(note)
    wanda_fast.prune(model, dataset=token_ids(model, 6, 16), batch_size=2)
    first, pruned_passes = 1, 3 * (len(blocks) - 1)  # the first forward of all tells which linear is the last
    assert len(ended) == first + pruned_passes


def test_experts_that_a_batch_passes_by_end_no_forward():
    model, ended = FAMILIES["qwen3_moe"](), []
    for block in find_blocks(model):
        block.module.register_forward_hook(lambda *_: ended.append(1))
    report = wanda_fast.prune(model, dataset=token_ids(model, 2, 8), batch_size=1)
    assert report.sparsity == pytest.approx(0.5, abs=1e-3) and ended


def test_parts_are_taken_out_of_their_phase(monkeypatch):
    """A clock of the test's own: each reading is one second after the one before."""
    readings = itertools.count()
    monkeypatch.setattr(timer.time, "perf_counter", lambda: float(next(readings)))
    clock = Clock(torch.device("cpu"))
    with clock.phase("outer"):  # begins at 0
        with clock.part("part"):  # 1 to 2
            pass
        with clock.phase("inner"):  # begins at 3
            with clock.part("part"):  # 4 to 5
                pass
        # inner ends at 6
    # outer ends at 7
    assert clock.seconds == {"part": 2.0, "inner": 2.0, "outer": 3.0}
    assert sum(clock.seconds.values()) == 7.0

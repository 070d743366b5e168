"""Memory is reused only when no tensor uses it, and is unmapped when the context ends."""

import gc
import threading
from contextvars import copy_context
from functools import partial

import psutil
import pytest
import torch

from wanda_kernels.native import reused_memory

SHAPE = (512, 1024)  # fp32: 2 MiB


def allocated(*shape, dtype=torch.float32):
    return reused_memory.empty(*shape, dtype=dtype)


def test_outside_the_context_memory_is_torchs():
    assert reused_memory._regions.get() is None
    assert allocated(*SHAPE).untyped_storage().resizable()


def test_memory_is_reused_when_its_last_view_is_gone():
    with reused_memory.reused_memory():
        first = allocated(*SHAPE)
        address = first.data_ptr()
        view = first[3:].t()
        del first
        second = allocated(*SHAPE)
        assert second.data_ptr() != address  # the view still uses it
        del view
        assert allocated(1024, 1024, dtype=torch.bfloat16).data_ptr() == address


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_tensors_at_once_do_not_overlap(dtype):
    with reused_memory.reused_memory():
        held = [allocated(2**20 + i, dtype=dtype).fill_(i) for i in range(4)]
        for _ in range(10):
            del held[1]
            held.append(allocated(2**20, dtype=dtype).fill_(7))
            assert [each[-1].item() for each in held] == [each[0].item() for each in held]
        assert [each.unique().item() for each in held] == [0, 7, 7, 7]
        assert all(each.is_contiguous() for each in held)


def test_a_small_tensor_does_not_take_a_large_region():
    with reused_memory.reused_memory():
        large = allocated(8 << 20)
        address = large.data_ptr()
        del large
        assert allocated(4 << 20).data_ptr() != address  # half the size needs another region
        assert allocated(5 << 20).data_ptr() == address
        assert allocated(16).untyped_storage().resizable()  # small tensors come from torch


def test_a_tensor_outlives_the_context():
    with reused_memory.reused_memory():
        kept = allocated(*SHAPE).fill_(3.0)
    other = torch.ones(SHAPE)
    gc.collect()
    assert (kept == 3).all() and (other == 1).all()


def test_memory_is_unmapped_with_the_context():
    resident = lambda: psutil.Process().memory_info().rss  # noqa: E731
    with reused_memory.reused_memory():
        allocated(64 << 20).fill_(1.0)
        held = resident()
    assert resident() < held - (200 << 20)


def test_a_thread_shares_regions_only_if_it_runs_in_the_context():
    found = []
    see = lambda: found.append(reused_memory._regions.get())  # noqa: E731
    with reused_memory.reused_memory():
        for target in (see, partial(copy_context().run, see)):
            thread = threading.Thread(target=target)
            thread.start()
            thread.join()
        assert found == [None, reused_memory._regions.get()]


def test_small_pages_if_the_system_has_no_large_ones(monkeypatch):
    monkeypatch.setattr(reused_memory.mmap, "MADV_HUGEPAGE", 9999, raising=False)  # EINVAL
    with reused_memory.reused_memory():
        assert allocated(*SHAPE).fill_(2.0).sum() == 2 * 512 * 1024


def test_out_of_memory_raises_torchs_message():
    with reused_memory.reused_memory(), pytest.raises(MemoryError, match="can't allocate memory: 1125899"):
        allocated(2**48)

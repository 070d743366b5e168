"""Activations on the device, in host memory or in a file: the same values in any order of copies."""

import errno
import os
import resource
import threading
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from safetensors.torch import load_file

import wanda_fast
from tests.tiny_models import FAMILIES, save_checkpoint, token_ids
from wanda_fast import errors
from wanda_fast.model import block_inputs, offload
from wanda_fast.model.offload import Offload, Offloaded, on_host
from wanda_fast.output import streamed as output

pytestmark = pytest.mark.usefixtures("one_thread")

CPU = torch.device("cpu")
# Seconds after which a thread is taken to hang, also on a busy machine.
HANGS = 300


@pytest.fixture
def on_disk(tmp_path):
    disk = Offload("disk", CPU, tmp_path)
    yield disk
    disk.close()


def batches(total, size):
    return [slice(start, min(start + size, total)) for start in range(0, total, size)]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize(("total", "size"), [(7, 2), (4, 4), (3, 5), (1, 1)])
def test_passes_in_place(total, size, dtype, on_disk):
    """Three passes that overwrite batch by batch, as blocks do, compared with a tensor."""
    expected = torch.randn(total, 5, 3).to(dtype)
    hidden = on_disk.empty(expected.shape, dtype)
    assert isinstance(hidden, Offloaded) and len(hidden) == total and hidden.nbytes == expected.nbytes
    for batch in batches(total, size):
        hidden[batch] = expected[batch]
    for _ in range(3):
        for batch in batches(total, size):
            seen = hidden[batch]
            assert torch.equal(seen, expected[batch])
            expected[batch] = expected[batch] * 2 + 1
            hidden[batch] = seen * 2 + 1
    assert torch.equal(torch.cat(list(on_host(hidden))), expected)


def test_all_read_before_any_is_written(on_disk):
    """As in `--sequential linear`. A batch that was read does not change when it is overwritten."""
    first = torch.randn(5, 4, 2)
    hidden = on_disk.empty(first.shape, first.dtype)
    for batch in batches(5, 2):
        hidden[batch] = first[batch]
    held = [hidden[batch] for batch in batches(5, 2)]
    for batch, seen in zip(batches(5, 2), held, strict=True):
        hidden[batch] = seen + 1
    assert torch.equal(torch.cat(held), first)
    assert torch.equal(torch.cat([hidden[batch] for batch in batches(5, 2)]), first + 1)


def test_an_overwritten_batch_is_not_read_from_the_prefetched_copy(on_disk):
    hidden = on_disk.empty((4, 1, 1), torch.float32)
    hidden[0:4] = torch.zeros(4, 1, 1)
    # Starts to prefetch 2:4.
    hidden[0:2]
    hidden[2:4] = torch.ones(2, 1, 1)
    assert hidden[2:4].eq(1).all()


class Slow(offload._Copier):
    """Copies slowly, and records requests and completed copies."""

    def __init__(self):
        super().__init__(CPU)
        self.events, self.may_copy = [], threading.Event()

    def copy(self, target, source, done):
        self.events.append("requested")
        return super().copy(target, source, done)

    def _copy(self, *copy):
        assert self.may_copy.wait(HANGS)
        super()._copy(*copy)
        self.events.append("copied")


def test_the_next_batch_is_copied_while_this_one_is_computed():
    copier = Slow()
    hidden = Offloaded(torch.arange(6.0).view(6, 1, 1), copier)
    copier.may_copy.set()
    first = hidden[0:2]
    # Wait for all copies that were requested: of this batch and the next.
    copier._thread.submit(lambda: None).result()
    assert sorted(copier.events) == ["copied", "copied", "requested", "requested"]
    copier.may_copy.clear()
    copier.events.clear()
    # Neither this copy nor the prefetch of the third batch blocks.
    hidden[0:2] = first + 1
    second = hidden[2:4]
    assert copier.events == ["requested", "requested"] and second.flatten().tolist() == [2, 3]
    hidden[2:4] = second + 1
    with ThreadPoolExecutor(1) as pool:
        third_out = pool.submit(hidden.__setitem__, slice(4, 6), torch.zeros(2, 1, 1))
        with pytest.raises(TimeoutError):
            # Two batches are pending, so a third one blocks.
            third_out.result(timeout=0.1)
        copier.may_copy.set()
        third_out.result(timeout=HANGS)
    assert torch.cat(list(on_host(hidden))).flatten().tolist() == [1, 2, 3, 4, 0, 0]
    copier.close()


def test_the_file_has_no_name(on_disk, tmp_path):
    hidden = on_disk.empty((2, 8, 4), torch.bfloat16)
    assert not list(tmp_path.iterdir()) and hidden.shape == (2, 8, 4)


def test_an_error_in_the_copying_thread_is_raised(on_disk):
    hidden = on_disk.empty((2, 8, 4), torch.float32)
    hidden[0:1] = torch.zeros(1, 8, 5)
    with pytest.raises(RuntimeError, match="size of tensor"):
        list(on_host(hidden))


@pytest.fixture(scope="module")
def llama(tmp_path_factory, pydoc_text):
    folder = tmp_path_factory.mktemp("llama")
    save_checkpoint(FAMILIES["llama2"]().bfloat16(), folder, pydoc_text[:20000])
    return folder


def prune(model, out, **options):
    """(report, the bytes of each tensor that was written)."""
    settings = dict(dataset=token_ids(FAMILIES["llama2"](), 5, 24), batch_size=2, seqlen=24, device="cpu")
    settings |= dict(eval_dataset=token_ids(FAMILIES["llama2"](), 3, 24), save_model=out)
    report = wanda_fast.prune(model, **settings | options)
    return report, {name: t.view(torch.uint8) for name, t in load_file(out / "model.safetensors").items()}


@pytest.mark.parametrize(
    "options",
    [dict(prune_method="connect"), dict(sequential="linear"), dict(prune_method="dense")],
    ids=["block", "linear", "dense"],
)
@pytest.mark.parametrize("live", [False, True], ids=["streamed", "live"])
def test_the_results_are_the_same(options, live, llama, tmp_path):
    results = {}
    for kind in ("device", "host", "disk"):
        model = FAMILIES["llama2"]() if live else str(llama)
        report, tensors = prune(model, tmp_path / kind, activations=kind, **options)
        results[kind] = report.perplexity, tensors
        assert report.resources["activations"] == kind
        assert {path.name for path in tmp_path.iterdir()} == results.keys()
    for perplexity, tensors in results.values():
        assert perplexity == results["device"][0]
        assert all(torch.equal(tensors[name], other) for name, other in results["device"][1].items())


def test_no_room_on_the_disk(llama, tmp_path):
    """The whole file is allocated at once. If that fails, an error is raised and no file remains."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (10_000, before[1]))
    try:
        with pytest.raises(
            errors.OutputError, match=r"activations of 15,360 bytes cannot be kept in .*partial"
        ):
            prune(str(llama), tmp_path / "out", activations="disk", dtype="bfloat16")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert not list(tmp_path.iterdir())
    assert prune(str(llama), tmp_path / "out", activations="disk")[0].sparsity == pytest.approx(0.5, abs=1e-3)


def test_no_room_on_the_disk_when_resumed(llama, tmp_path, monkeypatch):
    """Finished blocks are kept. A run can be resumed with activations in another kind of memory."""
    expected, out = prune(str(llama), tmp_path / "whole")[1], tmp_path / "out"
    with monkeypatch.context() as patch:
        patch.setattr(output.StreamedOutput, "reached", stop)
        with pytest.raises(errors.InterruptedRunError):
            prune(str(llama), out, activations="host")
    full = OSError(errno.ENOSPC, "No space left on device")
    with monkeypatch.context() as patch:
        patch.setattr(os, "posix_fallocate", lambda *_: (_ for _ in ()).throw(full))
        with pytest.raises(errors.OutputError, match="No space left on device"):
            prune(str(llama), out, activations="disk", resume=True)
    tensors = prune(str(llama), out, activations="disk", resume=True)[1]
    assert all(torch.equal(tensors[name], other) for name, other in expected.items())


def stop(self, index, activations):
    self.interrupts.requested = True
    self.writer.submit(self.activation_cache.begin(index, activations))
    raise errors.InterruptedRunError("stopped")


@pytest.mark.parametrize("kinds", [("device", "disk"), ("disk", "host")])
def test_cached_activations_are_restored_in_any_kind_of_memory(kinds, llama, tmp_path, monkeypatch):
    expected, out = prune(str(llama), tmp_path / "whole")[1], tmp_path / "out"
    with monkeypatch.context() as patch:
        patch.setattr(output.StreamedOutput, "reached", stop)
        with pytest.raises(errors.InterruptedRunError):
            prune(str(llama), out, activations=kinds[0])
    replayed = []
    advance_ = block_inputs.BlockInputs.advance_
    monkeypatch.setattr(
        block_inputs.BlockInputs,
        "advance_",
        lambda self, index, block: replayed.append(index) or advance_(self, index, block),
    )
    tensors = prune(str(llama), out, activations=kinds[1], resume=True)[1]
    assert 0 not in replayed and 1 in replayed
    assert all(torch.equal(tensors[name], other) for name, other in expected.items())


def test_another_kind_is_refused():
    model = FAMILIES["llama2"]()
    with pytest.raises(errors.UnknownMethodError, match="'device', 'host' or 'disk', got 'tape'"):
        wanda_fast.prune(model, dataset=token_ids(model, 2, 16), activations="tape")

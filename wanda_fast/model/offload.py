"""Buffers for the hidden states of all sequences, of which the blocks process one batch at a time.

On the device a buffer is a tensor. In host memory or in a file it is an `Offloaded`: a thread copies the next
batch to the device, and finished batches from it, while the device computes.
"""

import mmap
import os
import tempfile
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

import torch
from torch import Tensor

from wanda_fast.errors import OutputError

KINDS = ("device", "host", "disk")
# Copies from the device that may be under way before the next one waits.
MAX_PENDING_COPIES = 2


class Offload:
    """Makes a run's buffers: on the device, in host memory (pinned if the device is a GPU), or in a file.

    Args:
        kind: one of KINDS.
        device: where blocks are computed; on a CPU, "device" and "host" are the same.
        folder: where the file is created; None: the system's folder for temporary files. The file is
            unlinked as soon as it is open, so it disappears with the process, however that ends.
    """

    def __init__(self, kind: str, device: torch.device, folder: Path | None = None):
        self.kind, self.device, self.folder = kind, device, folder
        self._copier: _Copier | None = None

    def empty(self, shape: tuple[int, ...], dtype: torch.dtype) -> "Tensor | Offloaded":
        """An uninitialized buffer `[sequences, seqlen, features]`.

        Raises: `OutputError` if the disk has no room for the file. All of it is allocated here, so that no
            later write can fail.
        """
        nothing = not torch.Size(shape).numel()
        if self.kind == "device" or nothing or (self.kind == "host" and self.device.type == "cpu"):
            return torch.empty(shape, dtype=dtype, device=self.device)
        self._copier = self._copier or _Copier(self.device)
        if self.kind == "host":
            return Offloaded(torch.empty(shape, dtype=dtype, pin_memory=True), self._copier)
        mapping = self._mapping(torch.Size(shape).numel() * dtype.itemsize)
        return Offloaded(torch.frombuffer(mapping, dtype=dtype).view(shape), self._copier, mapping)

    def _mapping(self, nbytes: int) -> mmap.mmap:
        try:
            with tempfile.TemporaryFile(dir=self.folder) as file:
                if hasattr(os, "posix_fallocate"):
                    os.posix_fallocate(file.fileno(), 0, nbytes)
                else:
                    file.truncate(nbytes)
                return mmap.mmap(file.fileno(), nbytes)
        except OSError as error:
            where = self.folder or tempfile.gettempdir()
            raise OutputError(
                f"activations of {nbytes:,} bytes cannot be kept in {where}: {error}; make room, or lower "
                f"--nsamples or --seqlen"
            ) from error

    def close(self) -> None:
        """Stop the copying thread. Copies that have not begun are dropped."""
        if self._copier is not None:
            self._copier.close()


class Offloaded:
    """Hidden states `[sequences, seqlen, features]` that are not on the device.

    Reading `hidden[batch]`, where the slice has both ends, returns a copy on the device, and starts to copy
    the batch of the same size that follows. Assigning `hidden[batch] = output` copies back in the background,
    after the kernels that compute `output`; `output` must not be changed afterwards.

    Args:
        stored: all of the hidden states, on the host.
        copier: does the copies.
        mapping: the file's mapping that `stored` is a view of. Its pages are dropped after each copy, because
            they would count as memory of this process.
    """

    def __init__(self, stored: Tensor, copier: "_Copier", mapping: mmap.mmap | None = None):
        self._stored, self._copier, self._mapping = stored, copier, mapping
        # (begin, end) -> the batch that follows the one read last; at most one.
        self._prefetched: dict[tuple[int, int], tuple[Tensor, Future]] = {}
        self._pending: deque[Future] = deque()
        self.shape, self.dtype, self.nbytes = stored.shape, stored.dtype, stored.nbytes

    def __len__(self) -> int:
        return len(self._stored)

    def __getitem__(self, batch: slice) -> Tensor:
        wanted = self._prefetched.pop((batch.start, batch.stop), None) or self._fetch(batch.start, batch.stop)
        begin, end = batch.stop, min(2 * batch.stop - batch.start, len(self))
        self._prefetched = {(begin, end): self._fetch(begin, end)} if begin < end else {}
        hidden, copied = wanted
        copied.result()
        return hidden

    def __setitem__(self, batch: slice, hidden: Tensor) -> None:
        # A copy that was prefetched holds the old values.
        self._prefetched.pop((batch.start, batch.stop), None)
        target = self._stored[batch.start : batch.stop]
        self._pending.append(self._copier.copy(target, hidden, self._drop_pages))
        while len(self._pending) > MAX_PENDING_COPIES:
            self._pending.popleft().result()

    def on_host(self) -> Iterator[Tensor]:
        """The sequences in order, each a view `[1, seqlen, features]` of the stored tensor."""
        while self._pending:
            self._pending.popleft().result()
        for sequence in self._stored.split(1):
            yield sequence
            self._drop_pages()

    def _fetch(self, begin: int, end: int) -> tuple[Tensor, Future]:
        stored = self._stored[begin:end]
        hidden = torch.empty_like(stored, device=self._copier.device, pin_memory=False)
        return hidden, self._copier.copy(hidden, stored, self._drop_pages)

    def _drop_pages(self) -> None:
        # The mapping is shared: what was written stays in the file.
        if self._mapping is not None and hasattr(mmap, "MADV_DONTNEED"):
            self._mapping.madvise(mmap.MADV_DONTNEED)


class _Copier:
    """A thread that copies between host and device, in the order of the calls, on a CUDA stream of its own.

    A copy waits for all work that the current stream had received when the copy was requested. That includes
    earlier readers of the memory that the copy writes to. The future completes when the data has been copied,
    so neither source nor target can be reused too early.
    """

    def __init__(self, device: torch.device):
        self.device = device
        self._stream = torch.cuda.Stream(device) if device.type == "cuda" else None
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="wanda-fast-copy")

    def copy(self, target: Tensor, source: Tensor, done: Callable[[], None]) -> Future:
        """Copy `source` into `target` in the background, then call `done()`."""
        computed = torch.cuda.current_stream(self.device).record_event() if self._stream else None
        return self._thread.submit(self._copy, target, source, computed, done)

    def _copy(
        self, target: Tensor, source: Tensor, computed: "torch.cuda.Event | None", done: Callable[[], None]
    ) -> None:
        if self._stream is None:
            target.copy_(source)
        else:
            with torch.cuda.stream(self._stream):
                self._stream.wait_event(computed)
                target.copy_(source, non_blocking=True)
                self._stream.synchronize()
        done()

    def close(self) -> None:
        self._thread.shutdown(cancel_futures=True)


def on_host(hidden: Tensor | Offloaded) -> Iterator[Tensor]:
    """The sequences of `hidden` in order, each `[1, seqlen, features]` on the host."""
    if isinstance(hidden, Offloaded):
        return hidden.on_host()
    return (sequence.cpu() for sequence in hidden.split(1))

"""Where the hidden states of all sequences lie while the blocks work on one batch of them at a time.

On the device they are a tensor. In host memory or in a file they are `Moved`: a thread copies the next batch
in and finished ones out while the device computes.
"""

import mmap
import os
import tempfile
from collections import deque
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

import torch
from torch import Tensor

from wanda_fast.errors import OutputError, UnknownMethodError

KINDS = ("device", "host", "disk")
LEAVING = 2  # batches on their way out before the next one waits


def require_kind(kind: str) -> None:
    if kind not in ("auto", *KINDS):
        raise UnknownMethodError(f"activations must be 'auto', 'device', 'host' or 'disk', got {kind!r}")


class Placement:
    """Makes the buffers of a run: on the device, in host memory (pinned where a GPU copies), or in a file.

    Args:
        kind: one of KINDS.
        device: where blocks are computed; on a CPU, "device" and "host" are the same.
        folder: of the file; None: the system's folder for temporary files. The file has no name, so that
            however the process ends it leaves none behind.
    """

    def __init__(self, kind: str, device: torch.device, folder: Path | None = None):
        self.kind, self.device, self.folder = kind, device, folder
        self._mover: _Mover | None = None

    def empty(self, shape: tuple[int, ...], dtype: torch.dtype) -> "Tensor | Moved":
        """`[sequences, seqlen, features]`, to be filled.

        Raises: `OutputError` where the disk has no room for the file: now, not when it is written.
        """
        if self.kind == "device" or (self.kind == "host" and self.device.type == "cpu"):
            return torch.empty(shape, dtype=dtype, device=self.device)
        self._mover = self._mover or _Mover(self.device)
        if self.kind == "host":
            return Moved(torch.empty(shape, dtype=dtype, pin_memory=True), self._mover)
        mapping = self._mapping(torch.Size(shape).numel() * dtype.itemsize)
        return Moved(torch.frombuffer(mapping, dtype=dtype).view(shape), self._mover, mapping)

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
        if self._mover is not None:
            self._mover.close()


class Moved:
    """Hidden states `[sequences, seqlen, features]` that lie off the device.

    `hidden[batch]`, of a slice with both ends, is a copy on the device; the batch behind it, of the same
    size, is copied meanwhile. `hidden[batch] = output` copies back, after what computes the output, which
    must not change afterwards.

    Args:
        stored: all of them, on the host.
        mapping: of the file that `stored` is a view of. Its pages are let go after each copy: they would
            count as this process's memory.
    """

    def __init__(self, stored: Tensor, mover: "_Mover", mapping: mmap.mmap | None = None):
        self._stored, self._mover, self._mapping = stored, mover, mapping
        self._ahead: dict[tuple[int, int], tuple[Tensor, Future]] = {}  # at most one
        self._leaving: deque[Future] = deque()
        self.shape, self.dtype, self.nbytes = stored.shape, stored.dtype, stored.nbytes

    def __len__(self) -> int:
        return len(self._stored)

    def __getitem__(self, batch: slice) -> Tensor:
        asked = self._ahead.pop((batch.start, batch.stop), None) or self._fetch(batch.start, batch.stop)
        begin, end = batch.stop, min(2 * batch.stop - batch.start, len(self))
        self._ahead = {(begin, end): self._fetch(begin, end)} if begin < end else {}
        hidden, copied = asked
        copied.result()
        return hidden

    def __setitem__(self, batch: slice, hidden: Tensor) -> None:
        self._ahead.pop((batch.start, batch.stop), None)  # it was read too early
        target = self._stored[batch.start : batch.stop]
        self._leaving.append(self._mover.copy(target, hidden, self._let_go))
        while len(self._leaving) > LEAVING:
            self._leaving.popleft().result()

    def on_host(self) -> Iterator[Tensor]:
        """One sequence after the other, where they are stored."""
        while self._leaving:
            self._leaving.popleft().result()
        for sequence in self._stored.split(1):
            yield sequence
            self._let_go()

    def _fetch(self, begin: int, end: int) -> tuple[Tensor, Future]:
        stored = self._stored[begin:end]
        hidden = torch.empty_like(stored, device=self._mover.device, pin_memory=False)
        return hidden, self._mover.copy(hidden, stored, self._let_go)

    def _let_go(self) -> None:
        if self._mapping is not None and hasattr(mmap, "MADV_DONTNEED"):
            self._mapping.madvise(
                mmap.MADV_DONTNEED
            )  # of a shared mapping: what was written stays in the file


class _Mover:
    """A thread that copies between host and device, in the order asked, on a stream of its own.

    A copy waits for what the current stream was given before it was asked for (which also frees the memory
    that it writes to), and its future is done when the copy is: neither side can be reused too early.
    """

    def __init__(self, device: torch.device):
        self.device = device
        self._stream = torch.cuda.Stream(device) if device.type == "cuda" else None
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="wanda-fast-move")

    def copy(self, target: Tensor, source: Tensor, done) -> Future:
        computed = torch.cuda.current_stream(self.device).record_event() if self._stream else None
        return self._thread.submit(self._copy, target, source, computed, done)

    def _copy(self, target: Tensor, source: Tensor, computed: "torch.cuda.Event | None", done) -> None:
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


def on_host(hidden: Tensor | Moved) -> Iterator[Tensor]:
    """One sequence after the other, on the host."""
    if isinstance(hidden, Moved):
        return hidden.on_host()
    return (sequence.cpu() for sequence in hidden.split(1))

"""Memory for what a forward on a CPU puts out, taken again once nobody holds the tensor that lay in it.

A fresh page costs a microsecond or two to be mapped and cleared, which is more than an elementwise operation
does on it. A region here is mapped once, in pages of 2 MiB where the system grants them, and goes back to the
system when the last of the tensors in it and the context are gone.
"""

import math
import mmap
import weakref
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from contextvars import ContextVar

import torch
from torch import Tensor

LEAST_BYTES = 1 << 20  # of a tensor: smaller ones are the allocator's
HUGE_PAGE = 2 << 20
CPU = torch.device("cpu")


@contextmanager
def reused_memory() -> Iterator[None]:
    """Inside, in this context (a thread has its own), `empty` takes memory again."""
    token = _regions.set(_Regions())
    try:
        yield
    finally:
        _regions.reset(token)


def empty(*shape: int, dtype: torch.dtype, device: torch.device = CPU) -> Tensor:
    """`torch.empty(shape, dtype=dtype, device=device)`; on another device than the CPU it is torch's own."""
    regions, n_bytes = _regions.get(), math.prod(shape) * dtype.itemsize
    if regions is None or n_bytes < LEAST_BYTES or device != CPU:
        return torch.empty(shape, dtype=dtype, device=device)
    return torch.frombuffer(regions.take(n_bytes), dtype=dtype, count=math.prod(shape)).view(shape)


class _Regions:
    def __init__(self):
        self.idle: list[mmap.mmap] = []

    def take(self, n_bytes: int) -> memoryview:
        """At least `n_bytes`, and less than twice as many in pages; idle again when the view is gone, which
        torch keeps as long as the storage of a tensor in it."""
        n_bytes = -(-n_bytes // HUGE_PAGE) * HUGE_PAGE
        fitting = [region for region in self.idle if n_bytes <= len(region) < 2 * n_bytes]
        region = min(fitting, key=len, default=None)
        if region is None:
            region = _mapped(n_bytes)
        else:
            self.idle.remove(region)
        view = memoryview(region)
        weakref.finalize(view, self.idle.append, region).atexit = False
        return view


def _mapped(n_bytes: int) -> mmap.mmap:
    try:
        private = {"flags": mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS} if hasattr(mmap, "MAP_PRIVATE") else {}
        region = mmap.mmap(-1, n_bytes, **private)
    except OSError as error:
        raise MemoryError(f"can't allocate memory: {n_bytes} bytes") from error
    if hasattr(mmap, "MADV_HUGEPAGE"):
        with suppress(OSError):  # a kernel that was built without such pages
            region.madvise(mmap.MADV_HUGEPAGE)
    return region


_regions: ContextVar[_Regions | None] = ContextVar("reused memory", default=None)

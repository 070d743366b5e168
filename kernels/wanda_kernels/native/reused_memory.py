"""Reuses memory for the outputs of a forward on a CPU: a region is free again when its last tensor is gone.

Mapping and clearing a fresh page takes a microsecond or two, longer than an elementwise operation on it. A
region is mapped once, in pages of 2 MiB if the system grants them. It is unmapped when both the context and
the last tensor in it are gone.
"""

import math
import mmap
import weakref
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from contextvars import ContextVar

import torch
from torch import Tensor

LEAST_BYTES = 1 << 20  # smaller tensors come from torch's allocator
HUGE_PAGE = 2 << 20
CPU = torch.device("cpu")


@contextmanager
def reused_memory() -> Iterator[None]:
    """Inside, `empty` reuses memory. This holds for the current context; every thread has its own."""
    token = _regions.set(_Regions())
    try:
        yield
    finally:
        _regions.reset(token)


def empty(*shape: int, dtype: torch.dtype, device: torch.device = CPU) -> Tensor:
    """`torch.empty(shape, dtype=dtype, device=device)`, in reused memory on the CPU in `reused_memory()`."""
    regions, n_bytes = _regions.get(), math.prod(shape) * dtype.itemsize
    if regions is None or n_bytes < LEAST_BYTES or device != CPU:
        return torch.empty(shape, dtype=dtype, device=device)
    return torch.frombuffer(regions.take(n_bytes), dtype=dtype, count=math.prod(shape)).view(shape)


class _Regions:
    def __init__(self):
        self.idle: list[mmap.mmap] = []

    def take(self, n_bytes: int) -> memoryview:
        """A view of an idle region, or of a new one, of at least `n_bytes` and less than twice as many pages.

        torch holds the view as long as a tensor uses it. The region then becomes idle again.
        """
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
        # The system's kernel may be built without large pages.
        with suppress(OSError):
            region.madvise(mmap.MADV_HUGEPAGE)
    return region


_regions: ContextVar[_Regions | None] = ContextVar("reused memory", default=None)

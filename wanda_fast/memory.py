"""Memory: how much is free, the peak so far, and an error that says which options lower the need."""

import ctypes
import os
import resource
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from pathlib import Path

import torch

from wanda_fast.errors import OutOfMemoryError

# --sequential linear holds the activations of all samples inside a block, whatever the batch size.
FEWER_TOKENS = (
    "lower --batch_size, --nsamples or --seqlen (--batch_size does not help with --sequential linear), "
    "or pass --activations disk"
)


@contextmanager
def out_of_memory_explained(remedy: str = FEWER_TOKENS) -> Iterator[None]:
    """Turn a failed allocation into `OutOfMemoryError`, whose message ends with `remedy`."""
    try:
        yield
    except (RuntimeError, MemoryError) as error:
        if not _is_out_of_memory(error):
            raise
        reason = next(iter(str(error).splitlines()), "no memory left")
        raise OutOfMemoryError(f"out of memory: {reason}; {remedy}") from error


def _is_out_of_memory(error: RuntimeError | MemoryError) -> bool:
    if isinstance(error, MemoryError | torch.OutOfMemoryError):
        return True
    # The one check in this package that reads a message. torch's CPU allocator raises a plain RuntimeError
    # that has no attributes, so only its text tells it from another RuntimeError. The free memory does not:
    # the size of the request is known from the text alone.
    return "allocate memory" in str(error)


def peak_memory() -> dict[str, int]:
    """Peak bytes since the process began, by device: resident on "host", allocated on each "cuda:N"."""
    # getrusage counts bytes on macOS, KiB elsewhere.
    unit = 1 if sys.platform == "darwin" else 1024
    peak = {"host": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit}
    for index in range(torch.cuda.device_count()):
        peak[f"cuda:{index}"] = torch.cuda.max_memory_allocated(index)
    return peak


def free_memory(device: torch.device) -> int:
    """Bytes that this process can still allocate on `device`.

    On a GPU: what the driver reports, and what torch has reserved and does not use. On the host: what is
    available without swapping, within the limits of the process's control groups.
    """
    if device.type == "cuda":
        cached = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return torch.cuda.mem_get_info(device)[0] + cached
    import psutil

    return min([psutil.virtual_memory().available, *_left_in_cgroups(Path("/proc/self/cgroup"))])


def prefer_huge_pages() -> None:
    """Ask torch to allocate large tensors in pages of 2 MiB where the system has them.

    A page fault costs one to two microseconds, and a block's forward takes tens of thousands of 4 KiB pages.
    Must be called before the first large tensor is allocated. A value that the user has set is kept.
    """
    os.environ.setdefault("THP_MEM_ALLOC_ENABLE", "1")


def release_freed_memory() -> None:
    """Return freed memory to the system; does nothing without glibc.

    glibc keeps freed pages that are between blocks in use, and has a heap for each thread.
    """
    if trim := _malloc_trim():
        trim(0)


@cache
def _malloc_trim():
    return getattr(ctypes.CDLL(None), "malloc_trim", None) if sys.platform == "linux" else None


def _left_in_cgroups(membership: Path, root: Path = Path("/sys/fs/cgroup")) -> list[int]:
    """Bytes left in each control group around this process that has a limit, for version 1 and 2.

    Cached pages of files count as free, because the kernel can drop them.
    """
    left = []
    for line in membership.read_text().splitlines() if membership.is_file() else ():
        _, controllers, own = line.split(":", 2)
        if controllers == "":
            top, limit, usage, droppable = root, "memory.max", "memory.current", "inactive_file"
        elif controllers == "memory":
            top, limit, usage = root / "memory", "memory.limit_in_bytes", "memory.usage_in_bytes"
            droppable = "total_inactive_file"
        else:
            continue
        around = [top.joinpath(*Path(own).parts[1:depth]) for depth in range(1, len(Path(own).parts) + 1)]
        for group in (group for group in around if (group / limit).is_file()):
            most = (group / limit).read_text().strip()
            stat = dict(line.split() for line in (group / "memory.stat").read_text().splitlines())
            if most != "max":
                left.append(int(most) - int((group / usage).read_text()) + int(stat.get(droppable, 0)))
    return left

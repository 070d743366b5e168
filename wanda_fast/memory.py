"""Memory: how much is free, how much a run took at its highest, what to lower where there was too little."""

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


@contextmanager
def out_of_memory_explained() -> Iterator[None]:
    try:
        yield
    except (RuntimeError, MemoryError) as error:  # torch has a type for it on GPUs, a RuntimeError on CPUs
        on_cpu = "allocate memory" in str(error) or isinstance(error, MemoryError)
        if not on_cpu and not isinstance(error, torch.OutOfMemoryError):
            raise
        reason = next(iter(str(error).splitlines()), "no memory left")
        raise OutOfMemoryError(
            f"out of memory: {reason}; lower --batch_size, --nsamples or --seqlen, or name --activations disk"
        ) from error


def peak_memory() -> dict[str, int]:
    """Bytes at the highest, since the process began: resident on the host, allocated on each GPU."""
    unit = 1 if sys.platform == "darwin" else 1024
    peak = {"host": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit}
    for index in range(torch.cuda.device_count()):
        peak[f"cuda:{index}"] = torch.cuda.max_memory_allocated(index)
    return peak


def free_memory(device: torch.device) -> int:
    """Bytes that can still be had: of a GPU; of the host without swapping, within a container's limit."""
    if device.type == "cuda":
        cached = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return torch.cuda.mem_get_info(device)[0] + cached
    import psutil

    return min([psutil.virtual_memory().available, *_left_in_cgroups(Path("/proc/self/cgroup"))])


def prefer_huge_pages() -> None:
    """torch's large tensors lie in pages of 2 MiB where the system grants them: a fresh page of 4 KiB costs a
    microsecond or two, and a block's forward takes them by the ten thousand. Before the first large tensor;
    a value that is set stays."""
    os.environ.setdefault("THP_MEM_ALLOC_ENABLE", "1")


def give_back_freed() -> None:
    """Memory that was freed goes back to the system: glibc keeps what lies between blocks in use, and every
    thread has a heap of its own. Elsewhere: nothing."""
    if trim := _malloc_trim():
        trim(0)


@cache
def _malloc_trim():
    return getattr(ctypes.CDLL(None), "malloc_trim", None) if sys.platform == "linux" else None


def _left_in_cgroups(membership: Path, root: Path = Path("/sys/fs/cgroup")) -> list[int]:
    """Bytes that each control group around this process has left, of version 1 or 2; pages of files that can
    be dropped count as free."""
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

"""Memory: how much a run took at its highest, and what to lower where there was too little."""

import resource
import sys
from collections.abc import Iterator
from contextlib import contextmanager
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
            f"out of memory: {reason}; lower --batch_size, --nsamples or --seqlen"
        ) from error


def peak_memory() -> dict[str, int]:
    """Bytes at the highest, since the process began: resident on the host, allocated on each GPU."""
    unit = 1 if sys.platform == "darwin" else 1024
    peak = {"host": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit}
    for index in range(torch.cuda.device_count()):
        peak[f"cuda:{index}"] = torch.cuda.max_memory_allocated(index)
    return peak


def free_memory(device: torch.device) -> int:
    """Bytes that can still be had: of a GPU, or of the host without swapping."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    try:
        lines = Path("/proc/meminfo").read_text().splitlines()
    except OSError:  # no Linux
        return sys.maxsize
    available = next(line for line in lines if line.startswith("MemAvailable:"))
    return int(available.split()[1]) * 1024

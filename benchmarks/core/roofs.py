"""What this machine can do at most, measured before anything else in the same process: a copy and a matmul.

GPU: a copy of 1 GiB and a bf16 matmul of 8192^3. CPU: a copy of 256 MiB and an fp32 matmul of 2048^3, with
torch's threads. A roof is the best of many runs, so a share of it errs on the low side.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch

from benchmarks.core import timing

REPEATS = 20


@dataclass(frozen=True)
class Roofs:
    bytes_per_s: float
    flops_per_s: float
    copy: str  # what was run, for the reader
    matmul: str


def measure(device: str, quick: bool) -> Roofs:
    copied = (1 << 30) if device == "cuda" else (256 << 20)
    side = 8192 if device == "cuda" else 2048
    if quick:
        copied, side = 1 << 20, 128
    dtype = torch.bfloat16 if device == "cuda" else torch.float32
    name = str(dtype).removeprefix("torch.")
    return Roofs(
        bytes_per_s=2 * copied / _best(device, _copy(copied, device)),
        flops_per_s=2 * side**3 / _best(device, _matmul(side, dtype, device)),
        copy=f"copy of {copied >> 20} MiB",
        matmul=f"{name} matmul {side}x{side}x{side}",
    )


def _copy(n_bytes: int, device: str) -> Callable:
    source = torch.ones(n_bytes // 4, device=device)
    target = torch.zeros_like(source)
    return lambda: target.copy_(source)


def _matmul(side: int, dtype: torch.dtype, device: str) -> Callable:
    a, b = (torch.randn(side, side, device=device).to(dtype) for _ in range(2))
    out = torch.empty_like(a)
    return lambda: torch.mm(a, b, out=out)


def _best(device: str, call: Callable) -> float:
    stopwatch = timing.stopwatch_of(device)
    return min([stopwatch(call) for _ in range(REPEATS + 3)][3:])

"""How long calls take: cold buffers used in turn, variants interleaved, median and spread.

A call that prunes in place gets dense weights each time; restoring them is not timed. Each round runs every
variant once, starting with a different one, so that slow moments of the machine affect all of them alike. A
variant leaves the rounds when it has used its time; a slow one is timed `LEAST_ROUNDS` times, unless that
takes more than three times as long.
"""

import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from itertools import count
from pathlib import Path

import torch
from torch import Tensor

LEAST_ROUNDS, MOST_ROUNDS = 5, 200
LEAST_BUFFERS, MOST_BUFFERS = 2, 256
RING_BYTES = {"cpu": 768 << 20, "cuda": 8 << 30}
# GPU cycles, half a millisecond: time for a slow host to launch the call
LAUNCH_COVER = 1_000_000

Operands = tuple[Tensor | None, ...]
Stopwatch = Callable[[Callable[[], None]], float]


@dataclass(frozen=True)
class Timing:
    seconds: float  # median
    fastest: float
    spread: float  # between the quartiles, as a fraction of the median
    rounds: int


class Ring:
    """Copies of the operands, more than the cache holds, used in turn; a call changes one of a copy."""

    def __init__(self, operands: Operands, cache_bytes: int, changed: int = 0):
        self.original, self.changed = operands[changed].clone(), changed
        device = operands[0].device.type
        size = sum(operand.nbytes for operand in operands if operand is not None)
        wanted = min(2 * cache_bytes, RING_BYTES[device]) // max(size, 1) + 1
        self.slots = [_copy(operands) for _ in range(min(max(wanted, LEAST_BUFFERS), MOST_BUFFERS))]
        self._taken = 0

    def take(self) -> Operands:
        """Unchanged operands, those that were used longest ago."""
        self._taken += 1
        return self.slots[self._taken % len(self.slots)]

    def renew(self, slot: Operands) -> None:
        slot[self.changed].copy_(self.original)


def _copy(operands: Operands) -> Operands:
    return tuple(None if operand is None else operand.clone() for operand in operands)


def measure(
    calls: Mapping[str, Callable[..., None]], ring: Ring, stopwatch: Stopwatch, budget_s: float
) -> dict[str, Timing]:
    """Time each of `calls`, given the ring's operands, for about `budget_s` seconds each."""
    times = {name: [] for name in calls}
    _one_round(calls, list(calls), ring, stopwatch)  # warm-up
    for number in count():
        active = [name for name in calls if _wants_more(times[name], budget_s)]
        if not active:
            return {name: _timing(seconds) for name, seconds in times.items()}
        start = number % len(active)
        for name, seconds in _one_round(calls, active[start:] + active[:start], ring, stopwatch):
            times[name].append(seconds)


def _one_round(calls, names, ring: Ring, stopwatch: Stopwatch) -> list[tuple[str, float]]:
    seconds = []
    for name in names:
        slot = ring.take()
        call = calls[name]
        seconds.append((name, stopwatch(lambda call=call, slot=slot: call(*slot))))
        ring.renew(slot)
    return seconds


def _wants_more(times: list[float], budget_s: float) -> bool:
    spent = sum(times)
    if len(times) < LEAST_ROUNDS:
        return spent < 3 * budget_s or not times
    return spent < budget_s and len(times) < MOST_ROUNDS


def _timing(times: list[float]) -> Timing:
    median = statistics.median(times)
    low, _, high = statistics.quantiles(times, n=4, method="inclusive") if len(times) > 1 else times * 3
    return Timing(median, min(times), (high - low) / median if median else 0.0, len(times))


def cpu_stopwatch(call: Callable[[], None]) -> float:
    start = time.perf_counter()
    call()
    return time.perf_counter() - start


def gpu_stopwatch(call: Callable[[], None]) -> float:
    """Seconds on the stream between two events, the first behind a short sleep that hides the launch."""
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    torch.cuda._sleep(LAUNCH_COVER)
    start.record()
    call()
    end.record()
    end.synchronize()
    return start.elapsed_time(end) / 1e3


def stopwatch_of(device: str) -> Stopwatch:
    return gpu_stopwatch if device == "cuda" else cpu_stopwatch


def cache_bytes(device: str) -> int:
    """Size of the last cache before memory; 32 MiB where the system does not say."""
    if device == "cuda":
        return torch.cuda.get_device_properties(0).L2_cache_size
    sizes = [
        path.read_text().strip() for path in Path("/sys/devices/system/cpu/cpu0/cache").glob("index*/size")
    ]
    return max((int(size[:-1]) << 10 for size in sizes if size.endswith("K")), default=32 << 20)

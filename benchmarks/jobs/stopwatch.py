"""Seconds of each phase of a job, on a CPU or a GPU."""

import time
from contextlib import contextmanager

import torch


class Stopwatch:
    """Seconds by phase. Parts inside a phase are subtracted from it. GPU parts are timed by events."""

    def __init__(self, device: torch.device):
        self.on_gpu = device.type == "cuda"
        self.seconds: dict[str, float] = {}
        self._parts: list[tuple] = []

    @contextmanager
    def phase(self, name: str):
        start = time.perf_counter()
        yield
        if self.on_gpu:
            torch.cuda.synchronize()
        inside = self._parts_by_name()
        for part, seconds in inside.items():
            self._add(part, seconds)
        self._add(name, time.perf_counter() - start - sum(inside.values()))

    @contextmanager
    def part(self, name: str):
        """A piece of the phase around it, too short to wait for the device."""
        begin = self._mark()
        yield
        self._parts.append((name, begin, self._mark()))

    def _mark(self):
        if not self.on_gpu:
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    def _parts_by_name(self) -> dict[str, float]:
        found: dict[str, float] = {}
        for name, begin, end in self._parts:
            seconds = begin.elapsed_time(end) / 1e3 if self.on_gpu else end - begin
            found[name] = found.get(name, 0.0) + seconds
        self._parts.clear()
        return found

    def _add(self, name: str, seconds: float) -> None:
        self.seconds[name] = self.seconds.get(name, 0.0) + seconds

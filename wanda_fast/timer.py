"""The phases of a run: their seconds, and who is told of them."""

import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Protocol

import torch


@dataclass
class _Open:
    """A phase that has not ended: seconds of the phases inside it, and its parts (name, begin, end)."""

    inner: float = 0.0
    parts: list[tuple] = field(default_factory=list)


class Clock:
    """Seconds per phase; a phase inside another counts for itself only, so that the sum is the run's time.

    On a GPU a phase's end waits for the device, once a block and phase, and so does the begin of one inside
    another: what the outer one gave the device to do is the outer one's.
    """

    def __init__(self, device: torch.device):
        self.device = device
        self.seconds: dict[str, float] = {}
        self._open = [_Open()]

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        if len(self._open) > 1:
            self._wait()
        start = time.perf_counter()
        self._open.append(_Open())
        try:
            yield
        finally:
            self._wait()
            elapsed = time.perf_counter() - start
            own = self._open.pop()
            in_parts = sum(self._add(part, seconds_between(*marks)) for part, *marks in own.parts)
            self._add(name, elapsed - own.inner - in_parts)
            self._open[-1].inner += elapsed

    @contextmanager
    def part(self, name: str) -> Iterator[None]:
        """A short piece of the innermost phase, counted for itself; on a GPU by events, without waiting."""
        begin = mark(self.device)
        yield
        self._open[-1].parts.append((name, begin, mark(self.device)))

    def _wait(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)

    def _add(self, name: str, seconds: float) -> float:
        self.seconds[name] = self.seconds.get(name, 0.0) + seconds
        return seconds


class Progress(Protocol):
    """A display. It is told that `done` of `total` blocks (or windows) are done and a phase has begun."""

    def step(self, phase: str, done: int, total: int, detail: str = "") -> None: ...


class Phases:
    """Phases of one block: the display is told, the clock counts."""

    def __init__(self, clock: Clock, progress: Progress | None, index: int, total: int, block: str):
        self._clock, self._progress = clock, progress
        self._index, self._total, self._block = index, total, block

    @contextmanager
    def __call__(self, phase: str) -> Iterator[None]:
        self.tell(phase)
        with self._clock.phase(phase):
            yield

    def tell(self, phase: str, detail: str = "") -> None:
        if self._progress is not None:
            self._progress.step(phase, self._index, self._total, detail or self._block)


def mark(device: torch.device) -> "float | torch.cuda.Event":
    """The time; on a GPU an event, which is recorded without waiting for the device."""
    if device.type != "cuda":
        return time.perf_counter()
    event = torch.cuda.Event(enable_timing=True)
    event.record(torch.cuda.current_stream(device))
    return event


def seconds_between(begin: "float | torch.cuda.Event", end: "float | torch.cuda.Event") -> float:
    """Of two marks of one device, after it was waited for."""
    return end - begin if isinstance(end, float) else begin.elapsed_time(end) / 1e3

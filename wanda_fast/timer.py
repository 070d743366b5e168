"""Seconds spent in each phase of a run, and the interface of a progress display."""

import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Protocol

import torch


@dataclass
class _OpenPhase:
    """A phase that has not ended: the seconds of phases nested in it, and its parts as (name, begin, end)."""

    inner: float = 0.0
    parts: list[tuple] = field(default_factory=list)


class Clock:
    """Sums seconds by phase. The time of a nested phase is not counted in the outer one, so that the phases
    add up to the time of the run.

    On a GPU the end of a phase synchronizes the device, and so does the beginning of a nested one: work that
    the outer phase launched is counted in the outer phase.
    """

    def __init__(self, device: torch.device):
        self.device = device
        self.seconds: dict[str, float] = {}
        self._open = [_OpenPhase()]

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """Context whose duration is added to `seconds[name]`."""
        if len(self._open) > 1:
            self._synchronize()
        start = time.perf_counter()
        self._open.append(_OpenPhase())
        try:
            yield
        finally:
            self._synchronize()
            elapsed = time.perf_counter() - start
            own = self._open.pop()
            in_parts = sum(self._add(part, seconds_between(*marks)) for part, *marks in own.parts)
            self._add(name, elapsed - own.inner - in_parts)
            self._open[-1].inner += elapsed

    @contextmanager
    def part(self, name: str) -> Iterator[None]:
        """A short part of the innermost phase, added to `seconds[name]` instead of the phase.

        Does not synchronize: on a GPU it is measured by events.
        """
        begin = mark(self.device)
        yield
        self._open[-1].parts.append((name, begin, mark(self.device)))

    def _synchronize(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)

    def _add(self, name: str, seconds: float) -> float:
        self.seconds[name] = self.seconds.get(name, 0.0) + seconds
        return seconds


class Progress(Protocol):
    """A progress display."""

    def step(self, phase: str, done: int, total: int, detail: str = "") -> None:
        """`phase` begins, and `done` of `total` blocks (or evaluation windows) are done."""


class Phases:
    """The phases of one block: `phases(name)` is a context that the clock measures and the display shows."""

    def __init__(self, clock: Clock, progress: Progress | None, index: int, total: int, block: str):
        self._clock, self._progress = clock, progress
        self._index, self._total, self._block = index, total, block

    @contextmanager
    def __call__(self, phase: str) -> Iterator[None]:
        self.tell(phase)
        with self._clock.phase(phase):
            yield

    def timed_by(self, clock: Clock) -> "Phases":
        """The same phases, measured by another clock."""
        return Phases(clock, self._progress, self._index, self._total, self._block)

    def tell(self, phase: str, detail: str = "") -> None:
        """Show `phase`, with `detail` in place of the block's name."""
        if self._progress is not None:
            self._progress.step(phase, self._index, self._total, detail or self._block)


def mark(device: torch.device) -> "float | torch.cuda.Event":
    """The present time: seconds on a CPU, a recorded event on a GPU, which is not synchronized."""
    if device.type != "cuda":
        return time.perf_counter()
    event = torch.cuda.Event(enable_timing=True)
    event.record(torch.cuda.current_stream(device))
    return event


def seconds_between(begin: "float | torch.cuda.Event", end: "float | torch.cuda.Event") -> float:
    """Seconds between two marks of one device, which must have been synchronized since."""
    return end - begin if isinstance(end, float) else begin.elapsed_time(end) / 1e3

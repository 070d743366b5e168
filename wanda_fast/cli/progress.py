"""Progress on the terminal: one live line, or, where the output is no terminal, plain lines for a log.

A phase of one step (loading, converting, writing) is shown by its name alone. All phases of the block loop
count blocks; an evaluation counts windows, images or items of tasks, and packing counts tensors.
"""

import time

from rich.console import Console
from rich.progress import BarColumn, TextColumn, TimeRemainingColumn
from rich.progress import Progress as Bar

WORTH_A_LINE = 5.0  # seconds
# Phases that count something else than blocks.
COUNTED_ALONE = ("perplexity", "accuracy", "images", "tasks", "packing", "unpacking")


class LiveProgress:
    """Phase, blocks done, rate, time left and detail, on one line that redraws itself."""

    def __init__(self, console: Console):
        self._bar = Bar(
            TextColumn("{task.fields[phase]:<18}"),
            BarColumn(bar_width=30),
            TextColumn("{task.fields[count]}"),
            TextColumn("{task.fields[rate]}"),
            TimeRemainingColumn(),
            TextColumn("{task.fields[detail]}"),
            console=console,
            transient=True,
        )
        self._task, self._counted, self._began = None, None, 0.0

    def __enter__(self) -> "LiveProgress":
        self._bar.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._bar.stop()

    def step(self, phase: str, done: int, total: int, detail: str = "") -> None:
        counted = _counted(phase, total)
        if counted != self._counted:
            self._begin(counted, phase, total)
        seconds = time.perf_counter() - self._began
        count = f"{done}/{total}" if total > 1 else ""
        rate = f"{seconds / done:.1f} s each" if done else ""
        self._bar.update(self._task, completed=done, phase=phase, count=count, rate=rate, detail=detail)

    def _begin(self, counted: str, phase: str, total: int) -> None:
        if self._task is not None:
            self._bar.remove_task(self._task)
        self._counted, self._began = counted, time.perf_counter()
        # Without a total the bar pulses.
        self._task = self._bar.add_task(
            "", total=total if total > 1 else None, phase=phase, count="", rate="", detail=""
        )


class PlainProgress:
    """For logs: a line at the end of each block and of each evaluation step, and one for each other phase
    that took WORTH_A_LINE seconds or more."""

    def __init__(self, console: Console):
        self._console = console
        self._counted, self._done, self._total, self._began = None, 0, 0, 0.0
        self._detail = ""

    def __enter__(self) -> "PlainProgress":
        return self

    def __exit__(self, _kind: object, error: BaseException | None, _trace: object) -> None:
        if error is None:
            self._end()

    def step(self, phase: str, done: int, total: int, detail: str = "") -> None:
        counted = _counted(phase, total)
        if counted != self._counted:
            self._end()
            self._counted, self._done, self._began = counted, 0, time.perf_counter()
        self._total, self._detail = total, detail
        if done != self._done:
            self._count(done)

    def _count(self, done: int) -> None:
        self._done = done
        seconds = time.perf_counter() - self._began
        left = seconds / done * (self._total - done)
        self._print(f"{self._counted} {done}/{self._total}, {seconds:.1f} s, {left:.0f} s left")

    def _end(self) -> None:
        """What was counted is complete: the line of the last block, or of a phase that took long."""
        seconds = time.perf_counter() - self._began
        if self._total == 1 and seconds >= WORTH_A_LINE:
            self._print(f"{' '.join(filter(None, (self._counted, self._detail)))}: {seconds:.1f} s")
        elif self._total > 1 and self._done < self._total:
            self._count(self._total)

    def _print(self, line: str) -> None:
        self._console.print(line, highlight=False, markup=False, soft_wrap=True)


def _counted(phase: str, total: int) -> str:
    """What a phase counts: the blocks, the windows of an evaluation, images, or nothing but itself."""
    return phase if total == 1 or phase.startswith(COUNTED_ALONE) else "blocks"


def terminal_progress(console: Console) -> LiveProgress | PlainProgress:
    return LiveProgress(console) if console.is_terminal else PlainProgress(console)

"""Progress on the terminal: one live line where there is a terminal, plain lines where there is none."""

import time

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeRemainingColumn
from rich.progress import Progress as Bar


class LiveProgress:
    """Block, linear, phase, rate and time left, on one line that redraws itself."""

    def __init__(self, console: Console):
        self._bar = Bar(
            TextColumn("{task.fields[phase]:<18}"),
            BarColumn(bar_width=30),
            MofNCompleteColumn(),
            TextColumn("{task.fields[rate]}"),
            TimeRemainingColumn(),
            TextColumn("{task.fields[detail]}"),
            console=console,
            transient=True,
        )
        self._task, self._job, self._began = None, None, 0.0

    def __enter__(self) -> "LiveProgress":
        self._bar.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._bar.stop()

    def step(self, phase: str, done: int, total: int, detail: str = "") -> None:
        job = phase if phase.startswith("perplexity") else "blocks"
        if job != self._job:
            if self._task is not None:
                self._bar.remove_task(self._task)
            self._job, self._began = job, time.perf_counter()
            self._task = self._bar.add_task("", total=total, phase=phase, rate="", detail="")
        seconds = time.perf_counter() - self._began
        rate = f"{seconds / done:.1f} s each" if done else ""
        self._bar.update(self._task, completed=done, phase=phase, rate=rate, detail=detail)


class PlainProgress:
    """A line at the end of each block, and at the end of each evaluation, for logs."""

    def __init__(self, console: Console):
        self._console = console
        self._done, self._began = {}, {}

    def __enter__(self) -> "PlainProgress":
        return self

    def __exit__(self, *_: object) -> None:
        pass

    def step(self, phase: str, done: int, total: int, detail: str = "") -> None:
        job = phase if phase.startswith("perplexity") else "blocks"
        began = self._began.setdefault(job, time.perf_counter())
        if done == self._done.get(job, 0):
            return
        self._done[job] = done
        seconds = time.perf_counter() - began
        left = seconds / done * (total - done)
        self._console.print(f"{job} {done}/{total}, {seconds:.1f} s, {left:.0f} s left", highlight=False)


def terminal_progress(console: Console) -> LiveProgress | PlainProgress:
    return LiveProgress(console) if console.is_terminal else PlainProgress(console)

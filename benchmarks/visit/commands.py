"""Commands in processes and process groups of their own, several at once, each with a time limit.

What a kernel can do at worst, hang or spoil the process's CUDA context, then ends one command and no more.
"""

import os
import signal
import subprocess
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path


@dataclass(frozen=True)
class Command:
    name: str
    argv: list[str]
    limit_s: float
    log: Path  # stdout and stderr, from the start again
    env: dict[str, str] = field(default_factory=dict)  # beside this process's own


@dataclass(frozen=True)
class Ended:
    name: str
    code: int  # negative: the signal that ended it
    seconds: float
    timed_out: bool
    log: Path

    def why(self) -> str:
        """Why it did not end well; empty where it did."""
        if self.timed_out:
            return f"stopped after {self.seconds:.0f} s"
        return f"exit code {self.code}: {self.last_line()}" if self.code else ""

    def last_line(self) -> str:
        lines = self.log.read_text(errors="replace").strip().splitlines()
        return lines[-1] if lines else "no output"


class Running:
    """A command that has been started."""

    def __init__(self, command: Command):
        self.command, self.began = command, time.monotonic()
        with command.log.open("wb") as log:
            self.process = subprocess.Popen(
                command.argv,
                stdout=log,
                stderr=subprocess.STDOUT,
                stdin=subprocess.DEVNULL,
                env=os.environ | command.env,
                preexec_fn=os.setpgrp,  # so that what it starts ends with it
            )

    def poll(self) -> Ended | None:
        """What became of it, once it has ended or its time is over."""
        seconds = time.monotonic() - self.began
        timed_out = self.process.poll() is None and seconds > self.command.limit_s
        if timed_out:
            self.stop()
        if self.process.returncode is None:
            return None
        return Ended(self.command.name, self.process.returncode, seconds, timed_out, self.command.log)

    def stop(self) -> None:
        """End it and all that it has started."""
        try:
            os.killpg(self.process.pid, signal.SIGKILL)
        except ProcessLookupError:
            pass  # it has just ended
        self.process.wait()


def run_all(commands: Sequence[Command], at_once: int) -> Iterator[Ended]:
    """Start them in order, `at_once` at a time; each as it ends. An interrupt ends all that run."""
    waiting, running = list(commands), []
    try:
        while waiting or running:
            while waiting and len(running) < at_once:
                running.append(Running(waiting.pop(0)))
            ended = {each: each.poll() for each in running}
            running = [each for each in running if ended[each] is None]
            yield from filter(None, ended.values())
            if running:
                time.sleep(0.05)
    finally:
        for each in running:
            each.stop()


def run(command: Command) -> Ended:
    return next(run_all([command], 1))

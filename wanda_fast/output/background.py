"""Work that a thread does while its giver goes on."""

from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor


class Background:
    """One thread that does what it is given, in that order, up to the first failure."""

    def __init__(self, name: str):
        self._thread = ThreadPoolExecutor(1, thread_name_prefix=name)
        self._last: Future | None = None

    def do(self, work: Callable[[], object]) -> None:
        self._last = self._thread.submit(_after, self._last, work)

    def wait(self) -> None:
        """Until all is done; raises the first failure."""
        if self._last is not None:
            self._last.result()

    def close(self) -> None:
        """After what was given is done, or has failed."""
        self._thread.shutdown()


def _after(before: Future | None, work: Callable[[], object]) -> None:
    if before is not None:
        before.result()  # over, since the thread is one; its failure is this one's
    work()

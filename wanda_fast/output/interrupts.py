"""Ctrl-C: the first one ends the run after the current block."""

import logging
import signal
import threading

logger = logging.getLogger(__name__)


class Interrupts:
    """Context in which the first Ctrl-C sets `requested`, and a second one ends the program at once.

    Outside of the main thread it has no effect, because Python allows no signal handlers there.
    """

    def __init__(self):
        self.requested, self._before = False, None

    def __enter__(self) -> "Interrupts":
        if threading.current_thread() is threading.main_thread():
            self._before = signal.signal(signal.SIGINT, self._request)
        return self

    def __exit__(self, *_: object) -> None:
        if self._before is not None:
            signal.signal(signal.SIGINT, self._before)

    def _request(self, *_: object) -> None:
        self.requested = True
        signal.signal(signal.SIGINT, self._before)
        logger.info("stopping after this block; Ctrl-C again stops at once")

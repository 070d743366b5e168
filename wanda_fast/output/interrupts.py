"""Ctrl-C, asked for politely: the run ends after the block at hand."""

import logging
import signal
import threading

logger = logging.getLogger(__name__)


class Interrupts:
    """Context in which the first Ctrl-C sets `asked`, and a second one ends the program at once."""

    def __init__(self):
        self.asked, self._before = False, None

    def __enter__(self) -> "Interrupts":
        if threading.current_thread() is threading.main_thread():  # elsewhere Python allows no handler
            self._before = signal.signal(signal.SIGINT, self._ask)
        return self

    def __exit__(self, *_: object) -> None:
        if self._before is not None:
            signal.signal(signal.SIGINT, self._before)

    def _ask(self, *_: object) -> None:
        self.asked = True
        signal.signal(signal.SIGINT, self._before)
        logger.info("stopping after this block; Ctrl-C again stops at once")

"""The activations between two blocks, on disk, so that a resumed run need not compute them again.

They are a cache. Without them the finished blocks are run again, with their pruned weights, to get the inputs
of the first unfinished block. Therefore they are not written after every block: at most 3% of a run's time is
spent on them. They are never written if blocks pass on more than hidden states: the rest would be missing.
"""

import time
from collections.abc import Callable
from pathlib import Path

from wanda_fast.checkpoint.atomic_write import checksum
from wanda_fast.checkpoint.journal import Journal
from wanda_fast.checkpoint.shards import begin_tensors
from wanda_fast.hidden_states import Activations
from wanda_fast.model.offload import on_host

SHARE_OF_TIME = 0.03
# Seconds that the first write is assumed to take. With the share above it is due after ten seconds.
FIRST_COST = 0.3
NOTE = "boundary.json"


class ActivationCache:
    """The file `boundary-K.safetensors` with the inputs of block K. The note names the valid file."""

    def __init__(self, journal: Journal):
        self.journal = journal
        self._file: Path | None = None
        self._written, self._cost = time.monotonic(), FIRST_COST

    def restore_(self, activations: Activations, first_unfinished: int) -> int:
        """Replace the inputs of block 0 by cached ones.

        Returns: the block whose inputs `activations` has now: 0 without a valid cache, and `first_unfinished`
            if the run has no activations.
        """
        if not activations.hidden():
            return first_unfinished
        note = None if activations.has_containers else self.journal.read(NOTE)
        if note is None or note["block"] > first_unfinished:
            return 0
        file = self.journal.folder / note["file"]
        if not file.is_file() or checksum(file) != note.get("checksum"):
            return 0
        activations.restore_(file)
        self._file = file
        return note["block"]

    def due(self) -> bool:
        """Whether another write stays within the share of time."""
        return time.monotonic() - self._written >= self._cost / SHARE_OF_TIME

    def begin(self, block: int, activations: Activations) -> Callable[[], None]:
        """Write the inputs of `block` to a temporary file.

        Returns: a function that waits for the disk, makes this file the valid one, and deletes the previous
            one. It can be called from another thread.
        """
        hidden, began = activations.hidden(), time.monotonic()
        if not hidden or activations.has_containers:
            return lambda: None
        file = self.journal.folder / f"boundary-{block:05}.safetensors"
        finish = begin_tensors(file, hidden, lambda _, held: on_host(held))
        self._written = time.monotonic()
        spent = self._written - began

        def commit() -> None:
            began = time.monotonic()
            self.journal.write(NOTE, {"block": block, "file": file.name, "checksum": finish()})
            if self._file is not None and self._file != file:
                self._file.unlink(missing_ok=True)
            self._file = file
            self._cost = spent + time.monotonic() - began

        return commit

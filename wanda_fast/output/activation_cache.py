"""The activations between two blocks, on disk: where an interrupted run goes on without replaying its blocks.

They are a cache: without them, finished blocks are run again (not pruned again) to make them anew. So they
are not written after every block where that would take more than 3% of the time, nor ever where the hidden
states are not all that a block leaves to later ones.
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
FIRST_COST = 0.3  # seconds, until one has been written: the first is due after ten
NOTE = "boundary.json"


class Boundary:
    """`boundary-K.safetensors`: the inputs of block K; the note says which is the one that counts."""

    def __init__(self, journal: Journal):
        self.journal = journal
        self._file: Path | None = None
        self._written, self._cost = time.monotonic(), FIRST_COST

    def restore_(self, activations: Activations, first_unfinished: int) -> int:
        """Overwrite the first block's inputs with those of the block that is returned: where to go on."""
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
        """Whether another is worth its time."""
        return time.monotonic() - self._written >= self._cost / SHARE_OF_TIME

    def begin(self, block: int, activations: Activations) -> Callable[[], None]:
        """Write the inputs of `block`; what is returned waits for the disk and makes them count."""
        hidden, began = activations.hidden(), time.monotonic()
        if not hidden or activations.has_containers:
            return lambda: None
        file = self.journal.folder / f"boundary-{block:05}.safetensors"
        finish = begin_tensors(file, hidden, lambda _, held: on_host(held))
        self._written = time.monotonic()
        spent = self._written - began

        def make_it_count() -> None:
            began = time.monotonic()
            self.journal.write(NOTE, {"block": block, "file": file.name, "checksum": finish()})
            if self._file is not None and self._file != file:
                self._file.unlink(missing_ok=True)
            self._file = file
            self._cost = spent + time.monotonic() - began

        return make_it_count

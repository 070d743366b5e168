"""The activations between two blocks, on disk: where an interrupted run goes on without replaying its blocks.

They are a cache: without them, finished blocks are run again (not pruned again) to make them anew. So they
are not written after every block where that would take more than 3% of the time.
"""

import time
from pathlib import Path

from wanda_fast.activations import Activations
from wanda_fast.journal import Journal
from wanda_fast.placement import on_host
from wanda_fast.shards import sha256, write_tensors

SHARE_OF_TIME = 0.03
FIRST_COST = 0.3  # seconds, until one has been written: the first is due after ten
NOTE = "boundary.json"


class Boundary:
    """`boundary-K.safetensors`: the inputs of block K; the note says which is the one that counts."""

    def __init__(self, journal: Journal):
        self.journal, self.block = journal, 0
        self._file: Path | None = None
        self._written, self._cost = time.monotonic(), FIRST_COST

    def restore_(self, activations: Activations, first_unfinished: int) -> int:
        """Overwrite the first block's inputs with those of the block that is returned: where to go on."""
        if not activations.hidden():
            return first_unfinished
        note = self.journal.read(NOTE)
        if note is None or note["block"] > first_unfinished:
            return 0
        file = self.journal.folder / note["file"]
        if not file.is_file() or sha256(file) != note["sha256"]:
            return 0
        activations.restore_(file)
        self.block, self._file = note["block"], file
        return self.block

    def reached(self, block: int, activations: Activations, at_once: bool) -> None:
        """Write the inputs of `block` where it is `at_once`, or worth its time."""
        hidden = activations.hidden()
        began = time.monotonic()
        if not hidden or not (at_once or began - self._written >= self._cost / SHARE_OF_TIME):
            return
        file = self.journal.folder / f"boundary-{block:05}.safetensors"
        digest = write_tensors(file, hidden, on_host)
        self.journal.write(NOTE, {"block": block, "file": file.name, "sha256": digest})
        if self._file is not None and self._file != file:
            self._file.unlink(missing_ok=True)
        self.block, self._file = block, file
        self._written = time.monotonic()
        self._cost = self._written - began

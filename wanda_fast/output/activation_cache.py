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
from wanda_fast.distributed.ranks import Ranks
from wanda_fast.hidden_states import Activations
from wanda_fast.model.offload import on_host

SHARE_OF_TIME = 0.03
# Seconds that the first write is assumed to take. With the share above it is due after ten seconds.
FIRST_COST = 0.3


class ActivationCache:
    """The files `boundary-K.R.safetensors` with rank R's part of the inputs of block K.

    The note `boundary.R.json` names the rank's valid file.
    """

    def __init__(self, journal: Journal, ranks: Ranks):
        self.journal, self.ranks = journal, ranks
        self._file: Path | None = None
        self._written, self._cost = time.monotonic(), FIRST_COST

    def restore_(self, activations: Activations, first_unfinished: int) -> int:
        """Replace the inputs of block 0 by cached ones.

        Any number of ranks restores what any number has written.

        Returns: the block whose inputs `activations` has now: 0 without a valid cache, and `first_unfinished`
            if the run has no activations.
        """
        if not any(self.ranks.gather(bool(activations.present()))):
            return first_unfinished
        notes = self._notes(first_unfinished)
        # Every rank reads the same block, or none.
        held = self.ranks.gather(self._held(notes, activations))
        found = max(set.intersection(*held), default=0)
        if not found:
            return 0
        for note in notes:
            if note["block"] == found:
                activations.restore_(self.journal.folder / note["file"], note["sequences"])
        self._file = self._file_of(found)
        return found

    def due(self, activations: Activations) -> bool:
        """Whether another write is possible, and stays within the share of time."""
        late = time.monotonic() - self._written >= self._cost / SHARE_OF_TIME
        return late and not activations.has_containers

    def begin(self, block: int, activations: Activations) -> Callable[[], None]:
        """Write the inputs of `block` to a temporary file.

        Returns: a function that waits for the disk, makes this file the valid one, and deletes the previous
            one. It can be called from another thread.
        """
        hidden, began = activations.hidden(), time.monotonic()
        if not hidden or activations.has_containers:
            return lambda: None
        file = self._file_of(block)
        finish = begin_tensors(file, hidden, lambda _, held: on_host(held))
        self._written = time.monotonic()
        spent = self._written - began

        def commit() -> None:
            began = time.monotonic()
            note = {"block": block, "file": file.name, "sequences": activations.sequences()}
            self.journal.write(f"boundary.{self.ranks.rank}.json", note | {"checksum": finish()})
            if self._file is not None and self._file != file:
                self._file.unlink(missing_ok=True)
            self._file = file
            self._cost = spent + time.monotonic() - began

        return commit

    def _file_of(self, block: int) -> Path:
        return self.journal.folder / f"boundary-{block:05}.{self.ranks.rank}.safetensors"

    def _notes(self, first_unfinished: int) -> list[dict]:
        """The notes of all ranks whose files are as they were written."""
        read = [self.journal.read(file.name) for file in sorted(self.journal.folder.glob("boundary.*.json"))]
        notes = [note for note in read if note is not None and note["block"] <= first_unfinished]
        return [note for note in notes if self._is_valid(note)]

    def _is_valid(self, note: dict) -> bool:
        file = self.journal.folder / note["file"]
        return file.is_file() and checksum(file) == note.get("checksum")

    def _held(self, notes: list[dict], activations: Activations) -> set[int]:
        """The blocks of which the files hold all of this rank's sequences."""
        if activations.has_containers:
            return set()
        blocks = {note["block"] for note in notes}
        parts = {at: [note["sequences"] for note in notes if note["block"] == at] for at in blocks}
        return {at for at in blocks if activations.are_in(parts[at])}

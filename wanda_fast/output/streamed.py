"""A streamed model's folder: a shard for each block as soon as it is pruned, the rest around them.

DIR.partial/                 until all is done
    run.json                 what the run is: options, digests of model and tokens
    block-00003.json         block 3 is finished: its shard's checksum, its linears' reports
    boundary-00004...        the inputs of block 4
    model/                   becomes DIR by one rename
    replaced/                what was DIR, from that rename to the end
"""

import shutil
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict
from functools import partial
from pathlib import Path

from safetensors.torch import load_file
from torch import Tensor

from wanda_fast.checkpoint.atomic_write import checksum, sync_folder
from wanda_fast.checkpoint.block_loader import StreamedModel
from wanda_fast.checkpoint.journal import RUN, Journal, partial_of
from wanda_fast.checkpoint.layout import save_outside, save_surroundings
from wanda_fast.checkpoint.save import MODEL, put_back_replaced, save_report, take_place, writing
from wanda_fast.checkpoint.shards import TensorFiles, begin_tensors
from wanda_fast.errors import InterruptedRunError, OutputError, WandaFastError
from wanda_fast.hidden_states import Activations
from wanda_fast.output.activation_cache import Boundary
from wanda_fast.output.background import Background
from wanda_fast.output.interrupts import Interrupts
from wanda_fast.report import LinearReport, Report


class StreamedOutput:
    """`DIR.partial` while it grows; `DIR`, by one rename, when all of it is there.

    Args:
        folder: DIR.
        identity: what decides the output's bytes, by name.
        resume: go on from what `DIR.partial` holds, where it holds a run.
    """

    def __init__(self, folder: Path, source: StreamedModel, identity: dict, resume: bool = False):
        self.folder, self.source, self.resume = folder, source, resume
        self.nblocks = len(source.blocks)
        self.partial = partial_of(folder)
        self.model = self.partial / MODEL
        self.journal = Journal(self.partial, identity)
        self.boundary = Boundary(self.journal)
        self.interrupts = Interrupts()
        self.disk = Background("wanda-fast-disk")  # while the next block is at work
        self.abandoned = threading.Event()
        self.finished: dict[int, dict] = {}  # block -> its note

    def __enter__(self) -> "StreamedOutput":
        put_back_replaced(self.folder)
        if self.resume and self.is_under_way(self.folder):
            self.journal.require_same_run()
            notes = {index: self._sound_note(index) for index in range(self.nblocks)}
            self.finished = {index: note for index, note in notes.items() if note is not None}
        else:
            self.discard()
            with self._writing():
                self.model.mkdir(parents=True)
                self.journal.begin()
        self.disk.do(partial(save_outside, self.source, self._shard(-1), self.abandoned.is_set))
        self.interrupts.__enter__()
        return self

    def __exit__(self, _kind: object, error: BaseException | None, _trace: object) -> None:
        self.interrupts.__exit__()
        if error is not None:
            self.abandoned.set()  # what is outside of the blocks, which is copied before the first one counts
        self.disk.close()
        worth_resuming = not isinstance(error, WandaFastError) or error.resumable
        if error is None or not worth_resuming or not self.finished:
            self.discard()

    def begin_(self, activations: Activations) -> int:
        """The block to go on with, its inputs in `activations`; earlier ones are finished."""
        unfinished = (index for index in range(self.nblocks) if index not in self.finished)
        return self.boundary.restore_(activations, next(unfinished, self.nblocks))

    def holds(self, index: int) -> bool:
        """Whether the run that this one resumes left block `index` pruned."""
        return index in self.finished

    def reports(self, index: int, masks: dict[str, Tensor] | None) -> dict[str, LinearReport]:
        """Of a finished block; its masks join `masks`."""
        if masks is not None:
            masks |= load_file(self._masks(index))
        linears = self.finished[index]["linears"]
        return {name: LinearReport(**linear) for name, linear in linears.items()}

    def restore_block(self, index: int) -> None:
        """The source's block `index` gets its pruned weights."""
        shard = TensorFiles.of([self._shard(index)])
        self.source.place(shard.read(shard.location))

    def write_block(
        self, index: int, linears: dict[str, LinearReport], masks: dict[str, Tensor] | None
    ) -> None:
        """Shard and masks first, then the note that makes them count."""
        if self.holds(index):
            return
        with self.source.clock.phase("write"):
            self._write_block(index, linears, masks)

    def _write_block(
        self, index: int, linears: dict[str, LinearReport], masks: dict[str, Tensor] | None
    ) -> None:
        with self._writing():
            self.disk.wait()
        stored = self.source.stored(self.source.names[index])
        contents = {self._shard(index): stored.tensors}
        if masks is not None:
            contents[self._masks(index)] = {name: masks[name] for name in linears}

        def begin() -> dict[Path, Callable[[], str]]:
            stored.arrived()
            return {file: begin_tensors(file, tensors) for file, tensors in contents.items()}

        with self._writing():
            begun = None if stored.is_copy else begin()

        def make_it_count() -> None:
            files = begun or begin()
            digests = {str(file.relative_to(self.partial)): finish() for file, finish in files.items()}
            note = {"files": digests, "linears": {name: asdict(linear) for name, linear in linears.items()}}
            self.journal.write(self._note(index), note)
            self.finished[index] = note

        self.disk.do(make_it_count)

    def reached(self, index: int, activations: Activations) -> None:
        """Every block before `index` is finished; here Ctrl-C takes effect."""
        asked = self.interrupts.asked
        with self.source.clock.phase("write"), self._writing():
            if asked or self.boundary.due():
                self.disk.do(self.boundary.begin(index, activations))
            if asked:
                self.disk.wait()
        if asked:
            raise InterruptedRunError(
                f"stopped after block {index} of {self.nblocks}; they are kept in {self.partial}"
            )

    def finish(self, report: Report) -> None:
        """All but the blocks, then the rename that makes the folder a model."""
        with self._writing():
            self.disk.wait()
            shards = [self._shard(index) for index in range(-1, self.nblocks)]
            save_surroundings(self.source, self.model, shards)
            save_report(report, self.model)
            sync_folder(self.model, files=True)
            take_place(self.model, self.folder)

    @staticmethod
    def is_under_way(folder: Path) -> bool:
        """Whether a run towards `folder` was left before its last rename."""
        partial = partial_of(folder)
        return (partial / RUN).is_file() and (partial / MODEL).is_dir()

    def discard(self) -> None:
        shutil.rmtree(self.partial, ignore_errors=True)

    def _sound_note(self, index: int) -> dict | None:
        """The note of a block whose files are what they were."""
        note = self.journal.read(self._note(index))
        if note is None:
            return None
        files = {self.partial / name: digest for name, digest in note["files"].items()}
        sound = all(file.is_file() and checksum(file) == digest for file, digest in files.items())
        return note if sound else None

    def _note(self, index: int) -> str:
        return f"block-{index:05}.json"

    def _masks(self, index: int) -> Path:
        return self.partial / f"masks-{index:05}.safetensors"

    def _shard(self, index: int) -> Path:
        """Of block `index`; -1 is what surrounds the blocks."""
        return self.model / f"model-{index + 2:05}-of-{self.nblocks + 1:05}.safetensors"

    @contextmanager
    def _writing(self) -> Iterator[None]:
        try:
            with writing(self.folder):
                yield
        except OutputError as error:
            if not self.finished:
                raise
            kept = f"{len(self.finished)} of {self.nblocks} blocks are kept: continue with --resume"
            raise OutputError(f"{error}; {kept}") from error

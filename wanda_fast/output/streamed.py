"""The output folder DIR of a streamed model. Each block is written as soon as it is pruned.

DIR.partial/                     exists until the run has ended
    run.json                     what the run is: options, digests of tokens and of tensors outside the blocks
    block-00003.json             block 3 is finished: checksums of its files, digest of the tensors of blocks
                                 0 to 3, reports of its linears
    masks-00003.safetensors      packed masks of block 3, if masks are saved
    boundary.0.json              which of the following files of rank 0 is valid
    boundary-00004.0.safetensors rank 0's part of the inputs of block 4
    model/                       shards, configurations, report; becomes DIR by a rename
    packed/                      the same packed, if that is to become DIR
    packed.done                  packed/ is complete; if there is no packed/, it has become DIR
    replaced/                    the earlier DIR, from that rename until DIR.partial is removed
"""

import logging
import shutil
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import asdict
from functools import partial
from pathlib import Path

from safetensors.torch import load_file
from torch import Tensor

from wanda_fast.checkpoint.atomic_write import checksum, sync_folder
from wanda_fast.checkpoint.block_loader import StreamedModel
from wanda_fast.checkpoint.journal import RUN, Journal, partial_of
from wanda_fast.checkpoint.packed.packing import pack_folder, prunable_names
from wanda_fast.checkpoint.save import (
    MODEL,
    move_into_place,
    restore_replaced,
    save_outside,
    save_report,
    save_surroundings,
    warn_of_dense,
    writing,
)
from wanda_fast.checkpoint.shards import TensorFiles, begin_tensors
from wanda_fast.distributed.ranks import Ranks
from wanda_fast.errors import (
    InterruptedRunError,
    OutputError,
    PackError,
    RanksError,
    ResumeError,
    WandaFastError,
)
from wanda_fast.hidden_states import Activations
from wanda_fast.output.activation_cache import ActivationCache
from wanda_fast.output.interrupts import Interrupts
from wanda_fast.report.contents import LinearReport, Report
from wanda_fast.report.versions import deciding_versions

logger = logging.getLogger(__name__)

# In DIR.partial of a run whose output is packed.
PACKED, PACKED_DONE = "packed", "packed.done"


class StreamedOutput:
    """Writes a streamed model to DIR.partial, and renames it to DIR when it is complete.

    It is the `BlockStore` of the block loop, and a context: DIR.partial is removed at the end, unless the run
    failed after a block in a way that `--resume` can continue.

    Args:
        folder: DIR.
        source: the model that is being pruned.
        identity: everything that the output's bytes depend on, by name.
        resume: continue the run in DIR.partial if there is one.
        ranks: that prune the model together. Blocks are dealt to them to be written; the first one does the
            rest.
        resumable: keep finished blocks if the run fails or is interrupted.
        packed: write DIR packed, once all blocks are finished.
    Raises: on entry, `ResumeError` if that run has another identity; `OutputError` if a write fails;
        `RanksError` on a rank that does not see the folder.
    """

    def __init__(
        self,
        folder: Path,
        source: StreamedModel,
        identity: dict,
        resume: bool = False,
        ranks: Ranks | None = None,
        resumable: bool = True,
        packed: bool = False,
    ):
        self.folder, self.source, self.resume = folder, source, resume
        self.resumable, self.packed = resumable, packed
        self.ranks = ranks or Ranks()
        self.nblocks = len(source.blocks)
        self.partial = partial_of(folder)
        self.model = self.partial / MODEL
        self.journal = Journal(self.partial, identity)
        self.activation_cache = ActivationCache(self.journal, self.ranks)
        self.interrupts = Interrupts()
        self.writer = BackgroundWriter()
        self.abandoned = threading.Event()
        self.finished: dict[int, dict] = {}  # block -> its note
        self.versions = deciding_versions()

    def __enter__(self) -> "StreamedOutput":
        if self.ranks.from_first(self._begin):
            own = range(self.ranks.rank, self.nblocks, self.ranks.size)
            notes = {index: self._valid_note(index) for index in own}
            for of_rank in self.ranks.gather(notes):
                self.finished |= {index: note for index, note in of_rank.items() if note is not None}
            self.ranks.from_first(self._require_same_blocks)
        if self.ranks.is_first:
            self.writer.submit(partial(save_outside, self.source, self._shard(-1), self.abandoned.is_set))
        elif not self.journal.is_begun():
            host = self.ranks.hosts[self.ranks.rank].split()[0]
            raise RanksError(
                f"rank {self.ranks.rank} on {host} does not see {self.partial}, which rank 0 has made: "
                f"--save_model needs a folder that all machines share"
            )
        if self.resumable:
            self.interrupts.__enter__()
        return self

    def _begin(self) -> bool:
        """Make DIR.partial, or find that of the run that is resumed. Returns whether there is one."""
        restore_replaced(self.folder)
        if self.resume and self.is_under_way(self.folder):
            self.journal.require_same_run()
            return True
        self.discard()
        with self._writing():
            self.model.mkdir(parents=True)
            self.journal.begin()
        return False

    def __exit__(self, _kind: object, error: BaseException | None, _trace: object) -> None:
        if self.resumable:
            self.interrupts.__exit__()
        if error is not None:
            # Stops the copying of the tensors outside of the blocks.
            self.abandoned.set()
        self.writer.close()
        if not self.ranks.is_first:
            return
        worth_resuming = not isinstance(error, WandaFastError) or error.resumable
        if error is None or not worth_resuming or not self._kept():
            self.discard()
        # The messages of the others say it.
        elif not isinstance(error, InterruptedRunError | OutputError):
            kept = f"{self._kept()} of {self.nblocks} blocks are kept in {self.partial}"
            logger.info("%s: continue with --resume", kept)

    def _kept(self) -> int:
        """How many blocks are finished, by this rank or another, for a run that resumes this one."""
        return self.resumable and sum(
            (self.partial / self._note(index)).is_file() for index in range(self.nblocks)
        )

    def begin_(self, activations: Activations) -> int:
        """The block to continue with. `activations` becomes its inputs; all earlier blocks are finished."""
        unfinished = (index for index in range(self.nblocks) if index not in self.finished)
        return self.activation_cache.restore_(activations, next(unfinished, self.nblocks))

    def holds(self, index: int) -> bool:
        """Whether block `index` is finished: pruned by an earlier run, or written by this one."""
        return index in self.finished

    def reports(self, index: int, masks: dict[str, Tensor] | None) -> dict[str, LinearReport]:
        """The reports of a finished block by linear name. Its packed masks are added to `masks`."""
        if masks is not None:
            masks |= load_file(self._masks(index))
        linears = self.finished[index]["linears"]
        return {name: LinearReport(**linear) for name, linear in linears.items()}

    def restore_block(self, index: int) -> None:
        """Load the pruned weights of the finished block `index` into the source's model."""
        self.source.restore(TensorFiles.of([self._shard(index)]))

    def write_block(
        self, index: int, linears: dict[str, LinearReport], masks: dict[str, Tensor] | None
    ) -> None:
        """Write shard and masks of block `index`, then its note, in the background where possible."""
        if self.holds(index) or index % self.ranks.size != self.ranks.rank:
            return
        with self.source.clock.phase("write"):
            self._write_block(index, linears, masks)

    def _write_block(
        self, index: int, linears: dict[str, LinearReport], masks: dict[str, Tensor] | None
    ) -> None:
        with self._writing():
            self.writer.wait()
        stored = self.source.stored(self.source.names[index])
        contents = {self._shard(index): stored.tensors}
        if masks is not None:
            contents[self._masks(index)] = {name: masks[name] for name in linears}

        def begin() -> dict[Path, Callable[[], str]]:
            stored.arrived()
            return {file: begin_tensors(file, tensors) for file, tensors in contents.items()}

        # Tensors that are no copy are the model's own: they are written before the block changes. `commit`
        # does not hold them.
        with self._writing():
            begun = begin if stored.is_copy else begin().copy

        def commit() -> None:
            digests = {str(file.relative_to(self.partial)): finish() for file, finish in begun().items()}
            held = {name: asdict(linear) for name, linear in linears.items()}
            note = {"files": digests, "tensors": self._tensors_up_to(index), "linears": held}
            note |= {"versions": self.versions, "ranks": self.ranks.size}
            self.journal.write(self._note(index), note)
            self.finished[index] = note

        self.writer.submit(commit)

    def reached(self, index: int, activations: Activations) -> None:
        """Every block before `index` is written. The activations are cached if that is due.

        Raises: `InterruptedRunError` after a Ctrl-C.
        """
        if not self.resumable:
            return
        stop, due = self.interrupts.requested, self.activation_cache.due(activations)
        answers = self.ranks.gather((stop, due))
        stops = any(stop for stop, _ in answers)
        with self.source.clock.phase("write"), self._writing():
            if stops or answers[0][1]:
                self.writer.submit(self.activation_cache.begin(index, activations))
            if stops:
                self.writer.wait()
        if stops:
            raise InterruptedRunError(
                f"stopped after block {index} of {self.nblocks}; finished blocks are kept in {self.partial}"
            )

    def finish(self, report: Report) -> None:
        """Write the rest of the model's folder, then rename it to DIR."""
        with self._writing():
            self.writer.wait()
        self.ranks.wait_for_all()
        self.ranks.from_first(lambda: self._complete(report))

    def _complete(self, report: Report) -> None:
        with self._writing():
            shards = [self._shard(index) for index in range(-1, self.nblocks)]
            report.copied = save_surroundings(self.source, self.model, shards)
            complete = self._pack(report) if self.packed else self.model
            save_report(report, complete)
            sync_folder(complete, files=True)
            if complete != self.model:
                (self.partial / PACKED_DONE).touch()
                sync_folder(self.partial)
            move_into_place(complete, self.folder)

    def _pack(self, report: Report) -> Path:
        """The folder of the packed model, which needs its report; the dense one if no weight gets smaller.

        The dense model stays as it is until the run has ended: its shards are the finished blocks.
        """
        packed = self.partial / PACKED
        (self.partial / PACKED_DONE).unlink(missing_ok=True)
        shutil.rmtree(packed, ignore_errors=True)
        packed.mkdir()
        files = TensorFiles.of(sorted(self.model.glob("*.safetensors")))
        try:
            sizes = pack_folder(files, prunable_names(self.source.meta_model), packed)
        except PackError as error:
            warn_of_dense(error, report)
            return self.model
        report.packed = asdict(sizes)
        return packed

    @staticmethod
    def is_under_way(folder: Path) -> bool:
        """Whether there is an unfinished run whose output is `folder`, ended before its last rename."""
        partial = partial_of(folder)
        renamed = (partial / PACKED_DONE).is_file() and not (partial / PACKED).exists()
        return (partial / RUN).is_file() and (partial / MODEL).is_dir() and not renamed

    def discard(self) -> None:
        """Remove DIR.partial, first the file without which it is no unfinished run."""
        (self.partial / RUN).unlink(missing_ok=True)
        shutil.rmtree(self.partial, ignore_errors=True)

    def _valid_note(self, index: int) -> dict | None:
        """The note of a finished block; None if it or a file of the block is missing or changed."""
        note = self.journal.read(self._note(index))
        if note is None:
            return None
        files = {self.partial / name: digest for name, digest in note["files"].items()}
        unchanged = all(file.is_file() and checksum(file) == digest for file, digest in files.items())
        return note if unchanged else None

    def _require_same_blocks(self) -> None:
        """Raise `ResumeError` if the checkpoint no longer has the tensors that finished blocks came from."""
        for index, note in self.finished.items():
            if note["tensors"] != self._tensors_up_to(index):
                raise ResumeError(
                    f"{self.partial} cannot be resumed: the model differs in block {index + 1} of "
                    f"{self.nblocks}, which is finished, or in one before it"
                )

    def _tensors_up_to(self, index: int) -> str:
        names = [name for block in self.source.names[: index + 1] for name in block]
        return self.source.meta_model.files.digest(names)

    def _note(self, index: int) -> str:
        return f"block-{index:05}.json"

    def _masks(self, index: int) -> Path:
        return self.partial / f"masks-{index:05}.safetensors"

    def _shard(self, index: int) -> Path:
        """The shard of block `index`; of the tensors outside of the blocks for -1."""
        return self.model / f"model-{index + 2:05}-of-{self.nblocks + 1:05}.safetensors"

    @contextmanager
    def _writing(self) -> Iterator[None]:
        """As `save.writing`; the message also says how many blocks are kept."""
        try:
            with writing(self.folder):
                yield
        except OutputError as error:
            if not (count := self._kept()):
                raise
            kept = f"{count} of {self.nblocks} blocks are kept: continue with --resume"
            raise OutputError(f"{error}; {kept}") from error


class BackgroundWriter:
    """A thread that runs functions in the order of submission, while the next block is computed.

    After one has failed, the later ones do not run.
    """

    def __init__(self):
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="wanda-fast-disk")
        self._last: Future | None = None

    def submit(self, work: Callable[[], object]) -> None:
        self._last = self._thread.submit(_run_after, self._last, work)

    def wait(self) -> None:
        """Wait until all submitted functions have run. Raises the exception of the first that failed."""
        if self._last is not None:
            self._last.result()

    def close(self) -> None:
        """Wait until all submitted functions have run or were skipped. Raises nothing of theirs."""
        self._thread.shutdown()


def _run_after(before: Future | None, work: Callable[[], object]) -> None:
    # The earlier one has ended, since there is one thread. If it failed, this raises its exception.
    if before is not None:
        before.result()
    work()

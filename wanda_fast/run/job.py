"""One job on a model, in memory or streamed: activations, the block loop, perplexities, masks."""

import logging
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor

from wanda_fast.checkpoint import save as saving
from wanda_fast.data.accuracy import LabelledImages
from wanda_fast.data.evaluation import EvaluationSet
from wanda_fast.data.tasks import Tasks
from wanda_fast.distributed.ranks import Ranks
from wanda_fast.hidden_states import Activations
from wanda_fast.memory import peak_memory
from wanda_fast.model.block_source import BlockSource
from wanda_fast.model.image_shapes import ImageShapes
from wanda_fast.output.masks import write_masks
from wanda_fast.output.streamed import StreamedOutput
from wanda_fast.pruning.block_loop import Lane, prune_blocks
from wanda_fast.pruning.expert_statistics import ExpertOptions
from wanda_fast.pruning.methods import Method
from wanda_fast.pruning.patterns import Pattern
from wanda_fast.pruning.selection import Selection
from wanda_fast.pruning.store import BlockStore, KeepNothing
from wanda_fast.report.contents import RankReport, Report
from wanda_fast.report.warnings import pruning_warnings
from wanda_fast.timer import Clock, Progress

logger = logging.getLogger(__name__)

# Times that a progress display is told how many images are done.
IMAGE_STEPS = 20


@dataclass
class Job:
    """The work on a model and what it has so far; the same for a model in memory and a streamed one.

    Attributes:
        token_ids: calibration tokens int64 `[nsamples, seqlen]`, or images `[nsamples, 3, height, width]`;
            None for a method that needs none.
        evaluation: windows to measure perplexity on; None: not measured.
        masks: receives the packed masks by linear; None: they are not kept.
        activations: where the hidden states are kept, a kind of `Offload`.
        ranks: that do the job together. All of them have all tokens and windows, and run their shares.
        patterns: of linears that have another one than `pattern`, by name.
        by_outliers: whether `patterns` are to be set by OWL.
        image_shapes: of the hidden states of an image, if the calibration is images.
        labelled: images to measure accuracy on; None: not measured.
        said: warnings that the log has already.
        tasks: to measure accuracy on; None: not measured.
        against: from perplexities makes what the report says of published ones; None: there are none.
    """

    method: Method
    pattern: Pattern
    token_ids: Tensor | None
    evaluation: EvaluationSet | None
    clock: Clock
    report: Report
    progress: Progress | None
    masks: dict[str, Tensor] | None
    batch_size: int = 1
    sequential: str = "block"
    forward_dtype: str | None = None
    expert_options: ExpertOptions = ExpertOptions()
    activations: str = "device"
    ranks: Ranks = field(default_factory=Ranks)
    patterns: dict[str, Pattern] = field(default_factory=dict)
    by_outliers: bool = False
    image_shapes: ImageShapes | None = None
    labelled: LabelledImages | None = None
    said: set[str] = field(default_factory=set)
    tasks: Tasks | None = None
    against: Callable[[dict], dict] | None = None

    @property
    def calibration_shape(self) -> tuple[int, int]:
        """(samples of the rank that has the most, tokens of each); an image has those of its largest hidden
        states."""
        nsamples, seqlen = (1, 1) if self.token_ids is None else self.own_tokens.shape[:2]
        return nsamples, self.image_shapes.tokens if self.image_shapes else seqlen

    @property
    def device(self) -> torch.device:
        return self.clock.device

    @property
    def own_tokens(self) -> Tensor | None:
        """The largest part of the calibration that a rank runs."""
        return None if self.token_ids is None else self.token_ids[self.ranks.shares(len(self.token_ids))[0]]

    @property
    def own_windows(self) -> Tensor | None:
        """The largest part of the evaluation windows that a rank runs."""
        windows = self.evaluation and self.evaluation.windows
        return None if windows is None else windows[self.ranks.shares(len(windows))[0]]

    @contextmanager
    def phase(self, name: str, shown: str | None = None, detail: str = "") -> Iterator[None]:
        """Time a phase, and show it as `shown` in the progress display: one step, which has no parts."""
        if self.progress:
            self.progress.step(shown or name, 0, 1, detail)
        with self.clock.phase(name):
            yield

    def count_images(self, name: str, done: int, total: int) -> None:
        """Show how many images are done, at most IMAGE_STEPS times."""
        if self.progress and (done in (0, total) or done % max(1, total // IMAGE_STEPS) == 0):
            self.progress.step(name, done, total)

    def lane(self, activations: Activations, store: BlockStore | None = None) -> Lane:
        """The job's way through the block loop."""
        inputs = activations.calibration
        before = (0, 0) if inputs is None else (inputs.before, inputs.before * inputs.hidden.shape[1])
        selection = Selection(
            self.method, self.pattern, self.masks, self.expert_options, self.ranks, before, self.patterns
        )
        return Lane(selection, activations, self.clock, store or KeepNothing())

    def prune(
        self, source: BlockSource, activations: Activations, output: StreamedOutput | None = None
    ) -> None:
        lane = self.lane(activations, output)
        prune_blocks(
            source,
            [lane],
            clock=self.clock,
            progress=self.progress,
            sequential=self.sequential,
            forward_dtype=self.forward_dtype,
        )
        self.note(lane)

    def note(self, lane: Lane) -> None:
        """Keep what the lane reports, and warn of what differs from the request."""
        self.report.linears = linears = lane.reports
        shares = self.ranks.gather(lane.distances)
        for block in lane.distances:
            apart, length = (sum(share[block][part] for share in shares) for part in (0, 1))
            self.report.block_output_error[block] = apart / length if length else 0.0
        hessians = self.method.hessians
        self.warn(pruning_warnings(linears, hessians and hessians.dampening))

    def warn(self, sentences: list[str]) -> None:
        """Keep the sentences in the report, and log them once for all ranks."""
        self.report.warnings += sentences
        new = [sentence for sentence in sentences if sentence not in self.said]
        self.said.update(new)
        for sentence in new if self.ranks.is_first else ():
            logger.warning("%s", sentence)

    def finish_report(self) -> None:
        """Note what the run took, on all ranks."""
        self.report.peak_memory, self.report.complete = peak_memory(), True
        if self.against is not None:
            self.report.expected = self.against(self.report.perplexity)
        if self.ranks.size > 1:
            host = self.ranks.hosts[self.ranks.rank].split()[0]
            own = RankReport(host, self.clock.seconds, self.report.peak_memory, self.ranks.moved)
            self.report.ranks = self.ranks.gather(own)

    def write_masks(self) -> None:
        if self.masks is not None and self.ranks.is_first:
            file = Path(self.report.recipe["save_mask"])
            with saving.writing(file):
                write_masks(self.masks, file, self.report.recipe)

"""One job on a model, in memory or streamed: activations, the block loop, perplexities, masks."""

import logging
from collections.abc import Iterator
from contextlib import closing, contextmanager, nullcontext
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path

import torch
from torch import Tensor, nn

from wanda_fast.checkpoint import save as saving
from wanda_fast.checkpoint.block_loader import StreamedModel
from wanda_fast.checkpoint.load import Checkpoint
from wanda_fast.data.accuracy import LabelledImages, accuracy
from wanda_fast.data.evaluation import EvaluationSet, losses, mean_perplexity
from wanda_fast.data.tasks import Tasks
from wanda_fast.distributed.ranks import Ranks
from wanda_fast.hidden_states import Activations, perplexities, record_activations
from wanda_fast.memory import peak_memory
from wanda_fast.model.block_source import BlockSource, LiveModel, on_device
from wanda_fast.model.image_shapes import ImageShapes
from wanda_fast.model.offload import Offload
from wanda_fast.output.masks import write_masks
from wanda_fast.output.streamed import StreamedOutput
from wanda_fast.pruning.block_loop import prune_blocks
from wanda_fast.pruning.expert_statistics import ExpertOptions
from wanda_fast.pruning.methods import Method
from wanda_fast.pruning.patterns import Pattern
from wanda_fast.report.contents import RankReport, Report
from wanda_fast.report.warnings import pruning_warnings, ranks_warnings, version_warnings
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
        image_shapes: of the hidden states of an image, if the calibration is images.
        labelled: images to measure accuracy on; None: not measured.
        tasks: to measure accuracy on; None: not measured.
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
    expert_options: ExpertOptions = ExpertOptions()
    activations: str = "device"
    ranks: Ranks = field(default_factory=Ranks)
    image_shapes: ImageShapes | None = None
    labelled: LabelledImages | None = None
    tasks: Tasks | None = None

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

    def prune(
        self, source: BlockSource, activations: Activations, output: StreamedOutput | None = None
    ) -> None:
        self.report.linears = prune_blocks(
            source,
            self.method,
            self.pattern,
            activations,
            clock=self.clock,
            progress=self.progress,
            masks=self.masks,
            store=output,
            sequential=self.sequential,
            expert_options=self.expert_options,
            ranks=self.ranks,
        )
        hessians = self.method.hessians
        self.warn(pruning_warnings(self.report.linears, hessians and hessians.dampening))

    def warn(self, sentences: list[str]) -> None:
        """Keep the sentences in the report, and log them once for all ranks."""
        self.report.warnings += sentences
        for sentence in sentences if self.ranks.is_first else ():
            logger.warning("%s", sentence)

    def finish_report(self) -> None:
        """Note what the run took, on all ranks."""
        self.report.peak_memory, self.report.complete = peak_memory(), True
        if self.ranks.size > 1:
            host = self.ranks.hosts[self.ranks.rank].split()[0]
            own = RankReport(host, self.clock.seconds, self.report.peak_memory, self.ranks.moved)
            self.report.ranks = self.ranks.gather(own)

    def write_masks(self) -> None:
        if self.masks is not None and self.ranks.is_first:
            file = Path(self.report.recipe["save_mask"])
            with saving.writing(file):
                write_masks(self.masks, file, self.report.recipe)


def run_in_memory(job: Job, source: LiveModel, loaded: Checkpoint, folder: Path | None) -> None:
    """Prune a model in memory. It is saved before it is evaluated, since the evaluation may fail."""
    prunes = job.method.prunes
    _measure(job, source.model, "dense")
    _measure_tasks(job, source.model, "dense")
    if prunes:
        with closing(Offload(job.activations, source.device)) as offload:
            with job.phase("block inputs"):
                activations = record_activations(
                    source, offload, job.token_ids, job.batch_size, ranks=job.ranks
                )
            job.prune(source, activations)
    if folder is not None:
        with job.phase("write", "writing", str(folder)):
            job.ranks.from_first(lambda: saving.save(loaded, folder, job.report))
    job.write_masks()
    if prunes:
        _measure(job, source.model, "pruned")
        _measure_tasks(job, source.model, "pruned")


def run_streamed(job: Job, source: StreamedModel, output: StreamedOutput | None) -> None:
    """Prune a streamed model in one sweep over its blocks. The evaluation windows' hidden states, dense and
    pruned, advance block by block with those of the calibration."""
    offload = Offload(job.activations, source.device, output and output.partial)
    with closing(source), output or nullcontext(), closing(offload):
        if output is not None:
            notes = output.finished.values()
            job.warn(version_warnings(notes) + ranks_warnings(notes, job.ranks.size))
        with job.phase("block inputs"):
            pruned = job.method.prunes
            activations = record_activations(
                source, offload, job.token_ids, job.batch_size, job.evaluation, pruned, job.ranks
            )
        job.prune(source, activations, output)
        if job.evaluation is not None:
            with job.phase("evaluation"), source.surroundings(head=True):
                found = perplexities(source, activations, job.evaluation, job.ranks)
                job.report.perplexity |= found
        job.write_masks()
        if output is not None:
            job.finish_report()
            with job.phase("write", "writing", str(output.folder)):
                output.finish(job.report)


def _measure(job: Job, model: nn.Module, which: str) -> None:
    """The perplexity or accuracy of a model in memory, by its own forward."""
    if job.labelled is not None:
        _measure_accuracy(job, model, which)
    if job.evaluation is None:
        return
    share = job.ranks.share(len(job.evaluation.windows))
    own = replace(job.evaluation, windows=job.evaluation.windows[share])
    total = len(own.windows)

    def tell(done: int) -> None:
        if job.progress:
            job.progress.step(f"perplexity, {which}", done, total)

    tell(0)
    with job.clock.phase("evaluation"):
        found = job.ranks.gather(losses(model, own, progress=tell))
        job.report.perplexity[which] = mean_perplexity(sum(found, []))


def _measure_accuracy(job: Job, model: nn.Module, which: str) -> None:
    tell = partial(job.count_images, f"accuracy, {which}", total=len(job.labelled.indices))
    tell(0)
    with job.clock.phase("evaluation"):
        job.report.accuracy[which] = accuracy(model, job.labelled, progress=tell)


def _measure_tasks(job: Job, model: nn.Module, which: str) -> None:
    if job.tasks is None:
        return

    def tell(done: int, total: int) -> None:
        if job.progress:
            job.progress.step(f"tasks, {which}", done, total)

    tell(0, 1)
    with job.clock.phase("tasks"), on_device(model, job.device):
        found = job.tasks.measure(model, tell)
    for task, metrics in found.items():
        job.report.zero_shot.setdefault(task, {})[which] = metrics

"""One job on a model, in memory or streamed: activations, the block loop, perplexities, masks."""

import logging
from contextlib import closing, nullcontext
from dataclasses import dataclass
from pathlib import Path

from torch import Tensor, nn

from wanda_fast.checkpoint import save as saving
from wanda_fast.checkpoint.block_loader import StreamedModel
from wanda_fast.checkpoint.load import Checkpoint
from wanda_fast.data.evaluation import EvaluationSet, perplexity
from wanda_fast.hidden_states import Activations, perplexities, record_activations
from wanda_fast.memory import peak_memory
from wanda_fast.model.block_source import BlockSource, LiveModel
from wanda_fast.model.offload import Placement
from wanda_fast.output.masks import write_masks
from wanda_fast.output.streamed import StreamedOutput
from wanda_fast.pruning.block_loop import prune_blocks
from wanda_fast.pruning.methods import Method
from wanda_fast.pruning.patterns import Pattern
from wanda_fast.report import Report, update_warnings
from wanda_fast.timer import Clock, Progress

logger = logging.getLogger(__name__)


@dataclass
class Job:
    """What is to be done with a model, wherever its blocks come from."""

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
    activations: str = "device"  # where they lie: a kind of Placement

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
        )
        if self.method.hessians is not None:
            warnings = update_warnings(self.report.linears, self.method.hessians.dampening)
            self.report.warnings += warnings
            for sentence in warnings:
                logger.warning("%s", sentence)

    def write_masks(self) -> None:
        if self.masks is not None:
            file = Path(self.report.recipe["save_mask"])
            with saving.writing(file):
                write_masks(self.masks, file, self.report.recipe)


def run_in_memory(job: Job, source: LiveModel, loaded: Checkpoint, folder: Path | None) -> None:
    """The pruned model is saved first: what comes after it may fail."""
    prunes = job.method.prunes
    _measure(source.model, job.evaluation, "dense", job.clock, job.report, job.progress)
    if prunes:
        with closing(Placement(job.activations, source.device)) as placement:
            with job.clock.phase("block inputs"):
                activations = record_activations(source, placement, job.token_ids, job.batch_size)
            job.prune(source, activations)
    if folder is not None:
        with job.clock.phase("write"):
            saving.save(loaded, folder, job.report)
    job.write_masks()
    if prunes:
        _measure(source.model, job.evaluation, "pruned", job.clock, job.report, job.progress)


def run_streamed(job: Job, source: StreamedModel, output: StreamedOutput | None) -> None:
    """One sweep over the blocks: the perplexities, dense and pruned, travel along with the calibration."""
    placement = Placement(job.activations, source.device, output and output.partial)
    with closing(source), output or nullcontext(), closing(placement):
        with job.clock.phase("block inputs"):
            pruned = job.method.prunes
            activations = record_activations(
                source, placement, job.token_ids, job.batch_size, job.evaluation, pruned
            )
        job.prune(source, activations, output)
        if job.evaluation is not None:
            with job.clock.phase("evaluation"), source.surroundings(head=True):
                job.report.perplexity |= perplexities(source, activations, job.evaluation)
        job.write_masks()
        if output is not None:
            job.report.peak_memory, job.report.complete = peak_memory(), True
            with job.clock.phase("write"):
                output.finish(job.report)


def _measure(
    model: nn.Module,
    evaluation: EvaluationSet | None,
    which: str,
    clock: Clock,
    report: Report,
    progress: Progress | None,
) -> None:
    if evaluation is None:
        return
    total = len(evaluation.windows)
    tell = (lambda done: progress.step(f"perplexity, {which}", done, total)) if progress else None
    if tell:
        tell(0)
    with clock.phase("evaluation"):
        report.perplexity[which] = perplexity(model, evaluation, progress=tell)

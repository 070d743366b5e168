"""Prunes a streamed model: one block at a time is in memory, and the evaluation runs along."""

from contextlib import closing, nullcontext

from wanda_fast.checkpoint.block_loader import StreamedModel
from wanda_fast.data.scores import joined, summary
from wanda_fast.hidden_states import record_activations, scores_by_blocks
from wanda_fast.model.offload import Offload
from wanda_fast.output.streamed import StreamedOutput
from wanda_fast.report.warnings import ranks_warnings, version_warnings
from wanda_fast.run.allocation import allocate_by_outliers
from wanda_fast.run.job import Job


def run_streamed(job: Job, source: StreamedModel, output: StreamedOutput | None) -> None:
    """Prune a streamed model in one sweep over its blocks. The evaluation windows' hidden states, dense and
    pruned, advance block by block with those of the calibration."""
    offload = Offload(job.activations, source.device, output and output.partial)
    with closing(source), output or nullcontext(), closing(offload):
        if output is not None:
            notes = output.finished.values()
            job.warn(version_warnings(notes) + ranks_warnings(notes, job.ranks.size))
        allocate_by_outliers(job, source, offload)
        with job.phase("block inputs"):
            pruned = job.method.prunes
            activations = record_activations(
                source, offload, job.token_ids, job.batch_size, job.evaluation, pruned, job.ranks
            )
        job.prune(source, activations, output)
        if job.evaluation is not None:
            states = {"dense": activations.dense, "pruned": activations.pruned}
            with job.phase("evaluation"), source.surroundings(head=True):
                found = scores_by_blocks(source, states, job.evaluation, job.ranks)
                job.report.perplexity |= summary(joined(job.ranks.gather(found)))
        job.write_masks()
        if output is not None:
            job.finish_report()
            with job.phase("write", "writing", str(output.folder)):
                output.finish(job.report)

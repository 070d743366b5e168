"""The settings of a sweep go through the blocks side by side, and are measured at the end."""

from contextlib import closing

from wanda_fast.data.scores import summary
from wanda_fast.hidden_states import Activations, record_activations, scores_by_blocks
from wanda_fast.model.block_source import BlockSource
from wanda_fast.model.offload import Offload
from wanda_fast.output.streamed import StreamedOutput
from wanda_fast.pruning.block_loop import Lane, prune_blocks
from wanda_fast.run.job import Job


def run_settings(shared: Job, jobs: list[Job], source: BlockSource, outputs: list[StreamedOutput]) -> None:
    """Prune the source's blocks by the setting of each job, which leaves them dense, and measure the results.

    Args:
        shared: its clock measures what the settings share.
        outputs: one of each job, or none.
    """
    with closing(Offload(shared.activations, source.device)) as offload:
        with shared.phase("block inputs"):
            recorded = record_activations(
                source, offload, shared.token_ids, shared.batch_size, shared.evaluation, pruned=False
            )
            own = _activations(recorded, shared, jobs, offload)
            stores = outputs or [None] * len(jobs)
            lanes = [job.lane(each, store) for job, each, store in zip(jobs, own, stores, strict=True)]
        prune_blocks(
            source,
            lanes,
            clock=shared.clock,
            progress=shared.progress,
            sequential=shared.sequential,
            forward_dtype=shared.forward_dtype,
            in_place=False,
        )
        _measure(shared, jobs, lanes, source)
    for job, lane in zip(jobs, lanes, strict=True):
        job.note(lane)
        job.finish_report()
    for job, output in zip(jobs, outputs, strict=False):
        with shared.phase("write", "writing", str(output.folder)):
            output.finish(job.report)


def _activations(recorded: Activations, shared: Job, jobs: list[Job], offload: Offload) -> list[Activations]:
    """The first block's inputs for each setting: copies, but for those that no pruned block changes."""
    calibration, dense, found = recorded.calibration, recorded.dense, []
    for job in jobs:
        pruned = None if dense is None else dense.copy(offload)
        own = calibration if job.method.calibrates else None
        found.append(Activations(own, dense, pruned))
    if shared.sequential != "dense":
        for each in [each for each in found if each.calibration is not None][1:]:
            each.calibration = calibration.copy(offload)
    return found


def _measure(shared: Job, jobs: list[Job], lanes: list[Lane], source: BlockSource) -> None:
    """Measure all pruned models beside the dense one, whose logits are computed once."""
    if shared.evaluation is None:
        return
    states = {"dense": lanes[0].activations.dense}
    states |= {str(number): lane.activations.pruned for number, lane in enumerate(lanes)}
    with shared.phase("evaluation"), source.surroundings(head=True):
        dense, *pruned = scores_by_blocks(source, states, shared.evaluation, shared.ranks).values()
    for job, scores in zip(jobs, pruned, strict=True):
        job.report.perplexity |= summary({"dense": dense, "pruned": scores})

"""Prunes a model in memory, and measures it before and after.

The dense model's hidden states behind the last block are kept until the pruned model is measured. Logits are
far larger, and are made of them a few tokens at a time.
"""

from collections.abc import Callable
from contextlib import closing
from functools import partial
from pathlib import Path

from torch import Tensor

from wanda_fast.checkpoint import save as saving
from wanda_fast.checkpoint.load import Checkpoint
from wanda_fast.data.accuracy import accuracy
from wanda_fast.data.evaluation import EvaluationSet
from wanda_fast.data.perplexity import whole_scores
from wanda_fast.data.scores import Scores, joined, scores_of_hidden, summary
from wanda_fast.errors import HiddenStatesError
from wanda_fast.hidden_states import record_activations
from wanda_fast.model.block_source import LiveModel, on_device
from wanda_fast.model.head import body, fast_forwards, last_hidden
from wanda_fast.model.offload import Offload, Offloaded
from wanda_fast.model.recorder import record_block_inputs
from wanda_fast.run.allocation import allocate_by_outliers
from wanda_fast.run.job import Job

# Tokens of the trial that finds out whether a model's blocks run one by one.
TRIAL_TOKENS = 8


def run_in_memory(
    job: Job, source: LiveModel, loaded: Checkpoint, folder: Path | None, packed: bool = False
) -> None:
    """Prune a model in memory. It is saved, `packed` or not, before it is evaluated, since the evaluation may
    fail."""
    with closing(Offload(job.activations, source.device)) as offload:
        dense = _measure_dense(job, source, offload)
        _measure_tasks(job, source, "dense")
        if job.method.prunes:
            allocate_by_outliers(job, source, offload)
            with job.phase("block inputs"):
                activations = record_activations(
                    source, offload, job.token_ids, job.batch_size, ranks=job.ranks
                )
            job.prune(source, activations)
        if folder is not None:
            with job.phase("write", "writing", str(folder)):
                job.ranks.from_first(lambda: saving.save(loaded, folder, job.report, packed))
        job.write_masks()
        if job.method.prunes:
            _measure_pruned(job, source, dense)
            _measure_tasks(job, source, "pruned")


def _measure_dense(job: Job, source: LiveModel, offload: Offload) -> Tensor | Offloaded | None:
    """Measure the model before it is pruned.

    Returns: the hidden states of the evaluation windows, `[nwindows, seqlen, features]`, if the model is to
        be compared with the pruned one. Its perplexity is then measured with that of the pruned one.
    """
    if job.labelled is not None:
        _measure_accuracy(job, source, "dense")
    if job.evaluation is None:
        return None
    own, tell = _own_windows(job), partial(_tell, job, "dense")
    with job.clock.phase("evaluation"):
        if not runs_by_blocks(source, job.evaluation.windows, offload):
            _note(job, {"dense": whole_scores(source.model, own, tell)})
        elif job.method.prunes:
            return _recorded(source, own, offload, tell)
        else:
            _note(job, _compared(source, own, {}, "dense", tell))
    return None


def _measure_pruned(job: Job, source: LiveModel, dense: Tensor | Offloaded | None) -> None:
    """Measure the model after it was pruned; `dense` is what `_measure_dense` returned."""
    if job.labelled is not None:
        _measure_accuracy(job, source, "pruned")
    if job.evaluation is None:
        return
    own, tell = _own_windows(job), partial(_tell, job, "pruned")
    with job.clock.phase("evaluation"):
        if dense is None:
            _note(job, {"pruned": whole_scores(source.model, own, tell)})
        else:
            _note(job, _compared(source, own, {"dense": dense.__getitem__}, "pruned", tell))


def _compared(
    source: LiveModel,
    evaluation: EvaluationSet,
    stored: dict[str, Callable[[slice], Tensor]],
    name: str,
    tell: Callable[[int], None],
) -> dict[str, Scores]:
    """Scores of the model as it is now, under `name`, beside those of stored hidden states."""
    model, blocks = source.model, source.blocks

    def hidden(batch: slice) -> Tensor:
        return last_hidden(model, blocks, evaluation.windows[batch])

    device = next(model.parameters()).device
    return scores_of_hidden(model, blocks, evaluation, stored | {name: hidden}, device, tell)


def _recorded(
    source: LiveModel, evaluation: EvaluationSet, offload: Offload, tell: Callable[[int], None]
) -> Tensor | Offloaded:
    hidden, windows = None, evaluation.windows
    with fast_forwards(source.model, next(source.model.parameters()).device):
        for batch in evaluation.batches():
            each = last_hidden(source.model, source.blocks, windows[batch])
            if hidden is None:
                hidden = offload.empty((len(windows), *each.shape[1:]), each.dtype)
            hidden[batch] = each
            tell(batch.stop)
    return offload.empty((0,), source.model.dtype) if hidden is None else hidden


def runs_by_blocks(source: LiveModel, windows: Tensor, offload: Offload) -> bool:
    """Whether the hidden states behind the last block are all that the head needs."""
    try:
        record_block_inputs(body(source.model), source.blocks, windows[:1, :TRIAL_TOKENS], 1, offload)
    except HiddenStatesError:
        return False
    return True


def _measure_tasks(job: Job, source: LiveModel, which: str) -> None:
    if job.tasks is None:
        return

    def tell(done: int, total: int) -> None:
        if job.progress:
            job.progress.step(f"tasks, {which}", done, total)

    tell(0, 1)
    with job.clock.phase("tasks"), on_device(source.model, job.device):
        found = job.tasks.measure(source.model, tell)
    for task, metrics in found.items():
        job.report.zero_shot.setdefault(task, {})[which] = metrics


def _note(job: Job, own: dict[str, Scores]) -> None:
    job.report.perplexity |= summary(joined(job.ranks.gather(own)))


def _own_windows(job: Job) -> EvaluationSet:
    """The windows of this rank."""
    return job.evaluation.part(job.ranks.share(len(job.evaluation.windows)))


def _tell(job: Job, which: str, done: int) -> None:
    if job.progress:
        job.progress.step(f"perplexity, {which}", done, len(_own_windows(job).windows))


def _measure_accuracy(job: Job, source: LiveModel, which: str) -> None:
    tell = partial(job.count_images, f"accuracy, {which}", total=len(job.labelled.indices))
    tell(0)
    with job.clock.phase("evaluation"):
        job.report.accuracy[which] = accuracy(source.model, job.labelled, progress=tell)

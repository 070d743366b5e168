"""The memory model of a sweep, from that of single runs."""

from dataclasses import replace

import torch
from torch import nn

from wanda_fast.model.architecture import Block
from wanda_fast.run.job import Job
from wanda_fast.run.memory_model import Footprint, footprint


def sweep_footprint(
    jobs: list[Job],
    shared: Job,
    model: nn.Module,
    blocks: list[Block],
    stored: torch.dtype | None,
    batch_size: int,
    converted: frozenset[str] = frozenset(),
) -> Footprint:
    """The formula's terms for settings that go through the blocks together.

    The evaluation windows have hidden states of the dense model and of each setting. The calibration has one
    set if the statistics are of the dense model, else one for each setting. Statistics and Hessians of
    several methods exist at the same time only if one dense pass gathers them.

    Args:
        jobs: of the settings.
        shared: the job that has the calibration and the evaluation windows.
        model, blocks, stored, batch_size, converted: as in `footprint`.
    """
    rest = (model, blocks, stored, batch_size, converted)
    whole = footprint(shared, *rest)
    calibration = footprint(replace(shared, evaluation=None), *rest).activations
    windows = (whole.activations - calibration) // 2
    methods = {job.method.name: job.method for job in jobs if job.method.calibrates}
    each = [footprint(replace(shared, method=method), *rest) for method in methods.values()]
    one_pass = shared.sequential == "dense"
    sets = 1 if one_pass else sum(job.method.calibrates for job in jobs)
    together = sum if one_pass else max
    return replace(
        whole,
        activations=sets * calibration + (1 + len(jobs)) * windows,
        statistics=together([parts.statistics for parts in each] or [0]),
        hessians=together([parts.hessians for parts in each] or [0]),
        dense=max(sum(linear.weight.nbytes for linear in block.linears) for block in blocks),
    )

"""The statistics of a block are summed over the ranks, each of which has run its own calibration samples."""

from wanda_fast.distributed.ranks import Ranks
from wanda_fast.model.architecture import Block
from wanda_fast.model.experts import ExpertLinear
from wanda_fast.pruning.gathering import BlockStatistics
from wanda_fast.pruning.hessian import Hessian
from wanda_fast.pruning.shared_by_input import SharedByInput
from wanda_fast.pruning.statistics import Statistic


def complete(statistics: BlockStatistics, block: Block, ranks: Ranks) -> None:
    """Complete the statistics of the linears in `block`, a part of the block that ran.

    Sums that several linears share, or that were completed for an earlier part, are not summed again.
    """
    experts = {linear.experts.name for linear in block.linears if isinstance(linear, ExpertLinear)}
    for each in statistics.experts:
        if each.experts.name in experts:
            each.finish(ranks)
    if ranks.size == 1:
        return
    for shared in (statistics.shared_statistics, statistics.shared_hessians):
        _share_alike(shared, statistics.block, ranks)
    # In the block's order, which is the same on all ranks.
    new: list[Statistic | Hessian] = []
    for linear in block.linears:
        for own in (statistics.by_name.get(linear.name), statistics.hessians.get(linear.name)):
            if own is not None and own not in statistics.summed:
                statistics.summed.add(own)
                new.append(own)
    ranks.sum_([tensor for own in new for tensor in own.partial_sums()])


def _share_alike(shared: SharedByInput, block: Block, ranks: Ranks) -> None:
    """Make the sums that other ranks have: this one may have no sample, or none that reached a linear."""
    linears = {linear.name: linear for linear in block.dense}
    first: dict[str, str] = {}
    for sharing in reversed(ranks.gather(shared.sharing())):
        first |= sharing
    for name, linear in linears.items():
        if name in first:
            shared.share(linear, linears[first[name]])

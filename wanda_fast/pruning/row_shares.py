"""Which rank prunes which rows of a block's weights, and how all ranks get all of them."""

from dataclasses import dataclass

from torch import Tensor

from wanda_fast.distributed.ranks import Ranks
from wanda_fast.model.architecture import Block
from wanda_fast.model.experts import ExpertLinear
from wanda_fast.model.linears import Linear


@dataclass(frozen=True)
class RowShares:
    """The rows of one weight that each rank prunes.

    Attributes:
        rows: by rank.
        owner: the rank that has all rows; None if they are split.
        is_expert: whether the weight is an expert's.
    """

    rows: list[slice]
    owner: int | None
    is_expert: bool


def row_shares(block: Block, ranks: Ranks, whole: set[str]) -> dict[str, RowShares]:
    """The shares of each linear of the block, by its name: experts are dealt to the ranks, rows are split.

    Args:
        whole: names of linears whose rows cannot be pruned apart: these are dealt too.
    """
    return {
        linear.name: _shares_of(linear, place, ranks, linear.name in whole)
        for place, linear in enumerate(block.linears)
    }


def _shares_of(linear: Linear, place: int, ranks: Ranks, whole: bool) -> RowShares:
    count, is_expert = linear.out_features, isinstance(linear, ExpertLinear)
    if not (whole or is_expert or count < ranks.size):
        return RowShares(ranks.shares(count), None if ranks.size > 1 else 0, False)
    owner = ranks.owner(linear.index, linear.experts.count) if is_expert else place % ranks.size
    rows = [slice(0, count if rank == owner else 0) for rank in range(ranks.size)]
    return RowShares(rows, owner, is_expert)


def exchange_(
    block: Block, shares: dict[str, RowShares], masks: dict[str, Tensor] | None, ranks: Ranks
) -> None:
    """Give every rank the rows that the others have pruned, and their packed masks.

    Args:
        masks: `[out, ceil(in / 8)]` by linear, on the weight's device; None: they are not kept.
    """
    for rank in range(ranks.size if ranks.size > 1 else 0):
        pieces = []
        for linear in block.linears:
            rows = shares[linear.name].rows[rank]
            if rows.stop > rows.start:
                pieces.append(linear.weight.data[rows])
                pieces += [] if masks is None else [masks[linear.name][rows]]
        ranks.send_(pieces, rank)

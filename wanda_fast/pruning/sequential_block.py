"""`--sequential block`, the published order: statistics of the dense block, then all of its linears."""

from dataclasses import dataclass, field
from functools import partial

from wanda_fast.model.architecture import Block
from wanda_fast.model.block_inputs import BlockInputs
from wanda_fast.pruning.dense_pass import dense_pass
from wanda_fast.pruning.gathering import BlockStatistics
from wanda_fast.pruning.selection import Selection, prune_block
from wanda_fast.report import LinearReport
from wanda_fast.timer import Clock, Phases


@dataclass
class Turn:
    """One block's turn in the loop.

    Attributes:
        inputs: the block's inputs on the calibration; None for a method that needs none.
        reports: of its linears, once they are pruned.
    """

    index: int
    block: Block
    inputs: BlockInputs | None
    is_last: bool
    phases: Phases
    reports: dict[str, LinearReport] = field(default_factory=dict)


class SequentialBlock:
    """Three steps for each block; the loop calls them in this order."""

    def __init__(self, selection: Selection, clock: Clock):
        self.selection, self.clock = selection, clock
        self.last_linear: dict[tuple, str] = {}

    def dense_pass(self, turn: Turn) -> BlockStatistics | None:
        if turn.inputs is None:
            return None
        with turn.phases("dense pass"):
            statistics = block_statistics(turn.block, self.selection, self.clock)
            dense_pass(turn.block, statistics, turn.inputs, turn.index, self.last_linear)
        return statistics

    def prune(self, turn: Turn, statistics: BlockStatistics | None) -> dict[str, LinearReport]:
        with self.clock.phase("selection"):
            return prune_block(turn.block, self.selection, statistics, turn.phases)

    def pruned_pass(self, turn: Turn) -> None:
        pruned_pass(turn)


def block_statistics(
    block: Block, selection: Selection, clock: Clock, before_call: bool = False
) -> BlockStatistics:
    method, timed = selection.method, partial(clock.part, "statistics")
    return BlockStatistics(block, method.statistic, method.make_hessian, before_call, timed)


def pruned_pass(turn: Turn) -> None:
    """The next block's inputs: what the pruned block makes of its own."""
    if turn.inputs is not None and not turn.is_last:
        with turn.phases("pruned pass"):
            turn.inputs.advance_(turn.index, turn.block.module)

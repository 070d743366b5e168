"""The orders of one block's steps: dense pass, pruning, pruned pass."""

from collections import Counter
from contextlib import ExitStack
from typing import Protocol

from torch import Tensor

from wanda_fast.model.architecture import Block
from wanda_fast.pruning.dense_pass import dense_pass
from wanda_fast.pruning.gathering import BlockStatistics
from wanda_fast.pruning.selection import Selection, prune_block
from wanda_fast.pruning.sequential_linear import SequentialLinear
from wanda_fast.pruning.store import BlockStore
from wanda_fast.pruning.turn import Turn
from wanda_fast.report.contents import LinearReport
from wanda_fast.timer import Clock


class Order(Protocol):
    """The steps of one setting's turn with a block, in which `turn.inputs` become the next block's."""

    def dense_pass(self, turn: Turn) -> BlockStatistics | None:
        """Gather the statistics of the dense block."""

    def prune(self, turn: Turn, statistics: BlockStatistics | None) -> dict[str, LinearReport]:
        """Prune the block's linears."""

    def pruned_pass(self, turn: Turn) -> None:
        """Run the calibration through the pruned block."""


def orders_of(
    selections: list[Selection], sequential: str, clocks: list[Clock], shared_clock: Clock
) -> list[Order]:
    """The order of each setting.

    Args:
        sequential: as in `prune_blocks`.
        clocks: of the settings.
        shared_clock: of a pass that serves all of them.
    """
    calibrating = [each for each in selections if each.method.calibrates and each.method.prunes]
    one_pass = DensePass(calibrating, shared_clock)
    return [_order(each, sequential, clock, one_pass) for each, clock in zip(selections, clocks, strict=True)]


def _order(selection: Selection, sequential: str, clock: Clock, one_pass: "DensePass") -> Order:
    if not selection.method.prunes:
        return LeaveDense()
    if selection.method.calibrates and sequential == "dense":
        return DenseStatistics(selection, clock, one_pass)
    if selection.method.calibrates and sequential == "linear":
        return SequentialLinear(selection, clock)
    return SequentialBlock(selection, clock)


def restored(order: Order, store: BlockStore, masks: dict[str, Tensor] | None) -> Order:
    """The order of a block that the store holds, in place of `order`."""
    return (RestoredBehindDense if isinstance(order, DenseStatistics) else Restored)(store, masks)


class SequentialBlock:
    """`--sequential block`, the published order: statistics of the dense block, then all of its linears."""

    def __init__(self, selection: Selection, clock: Clock):
        self.selection, self.clock = selection, clock
        self.last_stage: dict[tuple, str] = {}

    def dense_pass(self, turn: Turn) -> BlockStatistics | None:
        if turn.inputs is None:
            return None
        *parts, last = self._parts(turn.block)
        for part in parts:
            # No linear of the block reads what an expert gives, so the later passes are dense ones too.
            turn.reports |= self._prune_part(turn, part, self._statistics(turn, part))
        return self._statistics(turn, last)

    def prune(self, turn: Turn, statistics: BlockStatistics | None) -> dict[str, LinearReport]:
        found = turn.reports | self._prune_part(turn, self._parts(turn.block)[-1], statistics)
        return {linear.name: found[linear.name] for linear in turn.block.linears}

    def _parts(self, block: Block) -> list[Block]:
        use = self.selection.method.hessians
        return block.in_passes(1 if use is None else use.passes)

    def _statistics(self, turn: Turn, part: Block) -> BlockStatistics:
        with turn.phases("dense pass"):
            statistics = self.selection.statistics(part, self.clock)
            dense_pass(part, statistics, turn.inputs, turn.index, self.last_stage)
        return statistics

    def _prune_part(
        self, turn: Turn, part: Block, statistics: BlockStatistics | None
    ) -> dict[str, LinearReport]:
        with self.clock.phase("selection"):
            return prune_block(part, self.selection, statistics, turn.phases)

    def pruned_pass(self, turn: Turn) -> None:
        pruned_pass(turn)


def pruned_pass(turn: Turn) -> None:
    """The next block's inputs: what the pruned block makes of its own."""
    if turn.inputs is not None and not turn.is_last:
        with turn.phases("pruned pass"):
            turn.inputs.advance_(turn.index, turn.block.module)


class DenseStatistics(SequentialBlock):
    """`--statistics dense`: no block sees what pruned ones give, as in the published code for classifiers."""

    def __init__(self, selection: Selection, clock: Clock, one_pass: "DensePass"):
        super().__init__(selection, clock)
        self.one_pass = one_pass

    def pruned_pass(self, turn: Turn) -> None:
        """Runs nothing: the dense pass gave the next block's inputs."""

    def _parts(self, block: Block) -> list[Block]:
        # There is one pass over the block's inputs, since it replaces them.
        return [block]

    def _statistics(self, turn: Turn, part: Block) -> BlockStatistics:
        return self.one_pass.statistics(turn, self.selection.method.name)


class DensePass:
    """One pass of the calibration over a dense block, for all settings. Those of a method share statistics.

    Args:
        selections: of all settings that calibrate.
    """

    def __init__(self, selections: list[Selection], clock: Clock):
        self._clock = clock
        self._of_method = {selection.method.name: selection for selection in selections}
        self._settings = Counter(selection.method.name for selection in selections)
        self._block: int | None = None
        self._found: dict[str, BlockStatistics] = {}
        self._waiting: Counter[str] = Counter()

    def statistics(self, turn: Turn, method: str) -> BlockStatistics:
        """The block's statistics for one setting of the method; each setting asks for them once.

        The first setting that asks runs the pass.
        """
        if turn.index != self._block:
            self._block, self._waiting = turn.index, self._settings.copy()
            with turn.phases.timed_by(self._clock)("dense pass"):
                self._run(turn)
        self._waiting[method] -= 1
        # The last one frees them as it prunes.
        return self._found[method].shared() if self._waiting[method] else self._found.pop(method)

    def _run(self, turn: Turn) -> None:
        block, clock = turn.block, self._clock
        self._found = {name: own.statistics(block, clock) for name, own in self._of_method.items()}
        with ExitStack() as hooks:
            for statistics in self._found.values():
                hooks.enter_context(statistics.gathering())
            turn.inputs.advance_(turn.index, turn.block.module)


class LeaveDense:
    """The order of a run that only evaluates."""

    def dense_pass(self, turn: Turn) -> None: ...

    def prune(self, turn: Turn, statistics: None) -> dict[str, LinearReport]:
        return {}

    def pruned_pass(self, turn: Turn) -> None: ...


class Restored:
    """The order of a block that an earlier run pruned: it is read instead."""

    def __init__(self, store: BlockStore, masks: dict[str, Tensor] | None):
        self.store, self.masks = store, masks

    def dense_pass(self, turn: Turn) -> None: ...

    def prune(self, turn: Turn, statistics: BlockStatistics | None) -> dict[str, LinearReport]:
        self.store.restore_block(turn.index)
        return self.store.reports(turn.index, self.masks)

    def pruned_pass(self, turn: Turn) -> None:
        pruned_pass(turn)


class RestoredBehindDense(Restored):
    """The same for `--statistics dense`: the next block gets what the block gives before it is restored."""

    def dense_pass(self, turn: Turn) -> None:
        pruned_pass(turn)

    def pruned_pass(self, turn: Turn) -> None: ...

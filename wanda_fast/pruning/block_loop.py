"""The block loop: for each block a dense pass that gathers statistics, the pruning, and a pruned pass."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Protocol

import torch
from torch import Tensor

from wanda_fast.distributed.ranks import Ranks
from wanda_fast.distributed.same_weights import require_same_weights
from wanda_fast.hidden_states import Activations
from wanda_fast.model.architecture import Block
from wanda_fast.model.block_inputs import BlockInputs
from wanda_fast.model.block_source import BlockSource
from wanda_fast.model.experts import sorted_by_expert
from wanda_fast.model.fused_modules import fused_modules
from wanda_fast.pruning.dense_pass import dense_pass
from wanda_fast.pruning.expert_statistics import ExpertOptions
from wanda_fast.pruning.gathering import BlockStatistics
from wanda_fast.pruning.methods import Method
from wanda_fast.pruning.patterns import Pattern
from wanda_fast.pruning.selection import Selection, prune_block
from wanda_fast.pruning.sequential_linear import SequentialLinear
from wanda_fast.pruning.turn import Turn
from wanda_fast.report.contents import LinearReport
from wanda_fast.timer import Clock, Phases, Progress
from wanda_kernels.forward import reused_memory


class BlockStore(Protocol):
    """Keeps each block as soon as it is pruned, so that an interrupted run can go on behind the last one."""

    def begin_(self, activations: Activations) -> int:
        """The block to go on with, its inputs now in `activations`. All earlier blocks are held."""

    def holds(self, index: int) -> bool:
        """Whether an earlier run left block `index` pruned."""

    def reports(self, index: int, masks: dict[str, Tensor] | None) -> dict[str, LinearReport]:
        """The reports of a block that is held; its packed masks join `masks`."""

    def restore_block(self, index: int) -> None:
        """Give the model's block `index` its pruned weights."""

    def write_block(
        self, index: int, linears: dict[str, LinearReport], masks: dict[str, Tensor] | None
    ) -> None:
        """Keep block `index`, unless it is held already."""

    def reached(self, index: int, activations: Activations) -> None:
        """Every block before `index` is done, and its inputs are in `activations`."""


@torch.no_grad()
@reused_memory()
def prune_blocks(
    source: BlockSource,
    method: Method,
    pattern: Pattern,
    activations: Activations,
    *,
    clock: Clock,
    progress: Progress | None = None,
    masks: dict[str, Tensor] | None = None,
    store: BlockStore | None = None,
    sequential: str = "block",
    expert_options: ExpertOptions = ExpertOptions(),  # noqa: B008  (it is frozen)
    ranks: Ranks | None = None,
) -> dict[str, LinearReport]:
    """Prune every linear of the source's blocks, block by block.

    Args:
        activations: the first block's inputs; in the end, what leaves the last block.
        masks: receives each linear's packed mask, uint8 `[out, ceil(in / 8)]` on the host; None: none wanted.
        store: keeps each pruned block, and has those of the run that this one resumes.
        sequential: "block": the statistics of a dense block, then all of its linears; "linear": one linear
            after the other; "dense": as "block", but the next block gets what the dense block gives.
        expert_options: how tokens count in the statistics of experts.
        ranks: that prune the model together, each with its share of the calibration in `activations`.
    Raises: `RanksDifferError`; `NonFiniteError`, which names block and linear. Blocks before it stay pruned;
        so do, with `sequential="linear"` or after an update of weights, linears of the block itself.
    """
    store = store or KeepNothing()
    inputs = activations.calibration
    before = (0, 0) if inputs is None else (inputs.before, inputs.before * inputs.hidden.shape[1])
    selection = Selection(method, pattern, masks, expert_options, ranks or Ranks(), before)
    order = _order(selection, sequential, clock)
    restored = RestoredBehindDense if isinstance(order, DenseStatistics) else Restored
    first = store.begin_(activations)
    source.release_memory()
    reports: dict[str, LinearReport] = {}
    for index in range(first):
        reports |= store.reports(index, masks)
    for index, block in enumerate(source.blocks[first:], start=first):
        phases = Phases(clock, progress, index, len(source.blocks), block.name)
        turn = Turn(index, block, activations.calibration, index + 1 == len(source.blocks), phases)
        passes = restored(store, masks) if store.holds(index) else order
        with _around(turn, source, activations, store, masks):
            statistics = passes.dense_pass(turn)
            turn.reports = passes.prune(turn, statistics)
            require_same_weights(block.name, block.module, selection.ranks)
            passes.pruned_pass(turn)
        reports |= turn.reports
    return reports


@contextmanager
def _around(
    turn: Turn,
    source: BlockSource,
    activations: Activations,
    store: BlockStore,
    masks: dict[str, Tensor] | None,
) -> Iterator[None]:
    """Read the block, take the evaluation windows through it, dense and then pruned, and keep it."""
    block = turn.block
    with source.block(turn.index), fused_modules(block.module), sorted_by_expert(block.experts):
        _evaluate(turn, activations.dense)
        yield
        _evaluate(turn, activations.pruned)
        # The passes' memory is returned before the block is written, which takes memory too.
        source.release_memory()
        store.write_block(turn.index, turn.reports, masks)
    if any(following.chain > block.chain for following in source.blocks[turn.index + 1 : turn.index + 2]):
        with turn.phases("between stages"):
            activations.enter_next_chain_(source, turn.index)
    store.reached(turn.index + 1, activations)


def _evaluate(turn: Turn, windows: BlockInputs | None) -> None:
    if windows is not None:
        with turn.phases("evaluation"):
            windows.advance_(turn.index, turn.block.module)


def _order(
    selection: Selection, sequential: str, clock: Clock
) -> "SequentialBlock | SequentialLinear | LeaveDense":
    if not selection.method.prunes:
        return LeaveDense()
    if selection.method.calibrates and sequential in ORDERS:
        return ORDERS[sequential](selection, clock)
    return SequentialBlock(selection, clock)


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

    def pruned_pass(self, turn: Turn) -> None:
        """Runs nothing: the dense pass gave the next block's inputs."""

    def _parts(self, block: Block) -> list[Block]:
        # There is one pass over the block's inputs, since it replaces them.
        return [block]

    def _statistics(self, turn: Turn, part: Block) -> BlockStatistics:
        with turn.phases("dense pass"):
            statistics = self.selection.statistics(part, self.clock)
            with statistics.gathering():
                turn.inputs.advance_(turn.index, turn.block.module)
        return statistics


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


ORDERS = {"linear": SequentialLinear, "dense": DenseStatistics}


class KeepNothing:
    """The `BlockStore` of a run that cannot be resumed."""

    def begin_(self, activations: Activations) -> int:
        return 0

    def holds(self, index: int) -> bool:
        return False

    def write_block(
        self, index: int, linears: dict[str, LinearReport], masks: dict[str, Tensor] | None
    ) -> None: ...

    def reached(self, index: int, activations: Activations) -> None: ...

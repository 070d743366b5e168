"""The block loop: for each block a dense pass that gathers statistics, the pruning, and a pruned pass.

A lane is one setting, that is a method and a pattern, on its way through the blocks. `prune` has one lane. A
sweep has several: each block is read once, and every lane finds it dense.
"""

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field

import torch

from wanda_fast.distributed.same_weights import require_same_weights
from wanda_fast.hidden_states import Activations, enter_next_chain_
from wanda_fast.model.block_inputs import BlockInputs
from wanda_fast.model.block_source import BlockSource
from wanda_fast.model.experts import sorted_by_expert
from wanda_fast.model.fused_modules import fused_modules
from wanda_fast.model.rounded_products import rounded_products
from wanda_fast.pruning.dense_weights import DenseWeights
from wanda_fast.pruning.orders import Order, orders_of, restored
from wanda_fast.pruning.selection import Selection
from wanda_fast.pruning.store import BlockStore, KeepNothing
from wanda_fast.pruning.turn import Turn
from wanda_fast.report.contents import LinearReport
from wanda_fast.timer import Clock, Phases, Progress
from wanda_kernels.forward import reused_memory


@dataclass(eq=False)
class Lane:
    """One setting on its way through the blocks.

    Attributes:
        selection: how it prunes.
        activations: the next block's inputs; in the end, what leaves the last block. Of a sweep, all lanes
            have the same `dense`, and with statistics of the dense model the same `calibration`.
        clock: of its own steps.
        store: keeps each pruned block, and has those of the run that this one resumes.
        reports: of the linears that it has pruned.
        distances: by block, the squared distance of the pruned blocks' output from the dense blocks', and the
            squared length of the dense one; over the evaluation windows of this rank.
    """

    selection: Selection
    activations: Activations
    clock: Clock
    store: BlockStore = field(default_factory=KeepNothing)
    reports: dict[str, LinearReport] = field(default_factory=dict)
    distances: dict[str, tuple[float, float]] = field(default_factory=dict)


@torch.no_grad()
@reused_memory()
def prune_blocks(
    source: BlockSource,
    lanes: list[Lane],
    *,
    clock: Clock,
    progress: Progress | None = None,
    sequential: str = "block",
    forward_dtype: str | None = None,
    in_place: bool = True,
) -> None:
    """Prune every linear of the source's blocks, block by block, by the setting of each lane.

    Args:
        lanes: their reports and masks are filled.
        clock: of what the lanes share.
        sequential: "block": the statistics of a dense block, then all of its linears; "linear": one linear
            after the other; "dense": as "block", but the next block gets what the dense block gives.
        forward_dtype: of the products in calibration passes, "fp8" or "int8"; None: as in any forward.
        in_place: the blocks stay pruned, by the one lane; if not, they are dense again after each lane.
    Raises: `RanksDifferError`; `NonFiniteError`, which names block and linear. Blocks before it stay pruned;
        so do, with `sequential="linear"` or after an update of weights, linears of the block itself.
    """
    selections, clocks = [lane.selection for lane in lanes], [lane.clock for lane in lanes]
    orders = orders_of(selections, sequential, clocks, clock)
    first = max(map(_begin, lanes))
    source.release_memory()
    for index in range(first, len(source.blocks)):
        shared = _turn(source, index, None, clock, progress)
        with read_block(source, index):
            _evaluate(shared, lanes[0].activations.dense)
            dense_again = nullcontext if in_place else DenseWeights(shared.block).again
            for lane, order in zip(lanes, orders, strict=True):
                turn = _turn(source, index, lane.activations.calibration, lane.clock, progress)
                with dense_again():
                    _prune(turn, lane, order, source, forward_dtype)
        _pass_on(shared, lanes, source)


def _begin(lane: Lane) -> int:
    """The block that the lane goes on with."""
    first = lane.store.begin_(lane.activations)
    for index in range(first):
        lane.reports |= lane.store.reports(index, lane.selection.masks)
    return first


def _turn(
    source: BlockSource, index: int, inputs: BlockInputs | None, clock: Clock, progress: Progress | None
) -> Turn:
    block, total = source.blocks[index], len(source.blocks)
    return Turn(index, block, inputs, index + 1 == total, Phases(clock, progress, index, total, block.name))


@contextmanager
def read_block(source: BlockSource, index: int) -> Iterator[None]:
    """Context in which the block is on the device, and runs by the faster forwards."""
    block = source.blocks[index]
    with source.block(index), fused_modules(block.module), sorted_by_expert(block.experts):
        yield


def _prune(turn: Turn, lane: Lane, order: Order, source: BlockSource, forward_dtype: str | None) -> None:
    """Prune the block, take the lane's evaluation windows through it, and keep it."""
    block, masks = turn.block, lane.selection.masks
    if lane.store.holds(turn.index):
        order = restored(order, lane.store, masks)
    with rounded_products(block.linears, forward_dtype):
        turn.reports = order.prune(turn, order.dense_pass(turn))
        require_same_weights(block.name, block.module, lane.selection.ranks)
        order.pruned_pass(turn)
    _evaluate(turn, lane.activations.pruned)
    if lane.activations.pruned is not None:
        lane.distances[block.name] = lane.activations.distance()
    # The passes' memory is returned before the block is written, which takes memory too.
    source.release_memory()
    lane.store.write_block(turn.index, turn.reports, masks)
    lane.reports |= turn.reports


def _evaluate(turn: Turn, windows: BlockInputs | None) -> None:
    if windows is not None:
        with turn.phases("evaluation"):
            windows.advance_(turn.index, turn.block.module)


def _pass_on(turn: Turn, lanes: list[Lane], source: BlockSource) -> None:
    """The outputs of the block become the inputs of the next one."""
    if any(
        following.chain > turn.block.chain for following in source.blocks[turn.index + 1 : turn.index + 2]
    ):
        flowing = {id(own): own for lane in lanes for own in lane.activations.present().values()}
        with turn.phases("between stages"):
            enter_next_chain_(source, turn.index, list(flowing.values()))
    for lane in lanes:
        lane.store.reached(turn.index + 1, lane.activations)

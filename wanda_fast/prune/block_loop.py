"""The block loop: dense pass with statistics, selection in place, pruned pass to the next block's inputs."""

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Protocol

import torch
from torch import Tensor

from wanda_fast.checkpoint.block_loader import BlockSource
from wanda_fast.hidden_states import Activations
from wanda_fast.model.architecture import Block, Linear
from wanda_fast.model.block_inputs import BlockCall, BlockInputs
from wanda_fast.model.fused_modules import fused_modules
from wanda_fast.output.streamed import StreamedOutput
from wanda_fast.prune.dense_pass import dense_pass
from wanda_fast.prune.methods import Dense, Method
from wanda_fast.prune.patterns import Pattern
from wanda_fast.prune.selection import prune_block
from wanda_fast.prune.sequential_linear import run_in_lockstep
from wanda_fast.prune.statistics import BlockStatistics
from wanda_fast.report import LinearReport
from wanda_fast.timer import Clock
from wanda_kernels.forward import reused_memory


class Progress(Protocol):
    """Whoever watches: `done` of `total` blocks (or windows) are behind, `phase` of the next has begun."""

    def step(self, phase: str, done: int, total: int, detail: str = "") -> None: ...


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
    output: StreamedOutput | None = None,
    sequential: str = "block",
) -> dict[str, LinearReport]:
    """Prune every linear of the source's blocks, block by block; `activations` end behind the last block.

    Args:
        activations: the first block's inputs.
        masks: where given, receives each linear's packed mask, uint8 `[out, ceil(in / 8)]` on the host.
        output: where given, receives each block as soon as it is pruned, and has those of a resumed run.
        sequential: "block": statistics of the dense block, then its linears; "linear": one after the other.
    Raises: `NonFiniteError`, naming block and linear, before that block is touched.
    """
    reports, one_pass = {}, sequential == "linear" and method.calibrates
    treat = (_OnePass if one_pass else _TwoPasses)(method, pattern, clock, masks)
    start = 0 if output is None else output.begin_(activations)
    source.give_back()
    for index, block in enumerate(source.blocks):
        finished = output is not None and index in output.finished
        if finished:
            reports |= output.reports(index, masks)
        if index < start:
            continue
        tell = _teller(progress, index, len(source.blocks), block.name)
        with source.block(index), fused_modules(block.module):
            if activations.dense is not None:
                tell("evaluation")
                with clock.phase("evaluation"):
                    activations.dense.advance_(index, block.module)
            own = {}
            if finished:
                output.restore_block(index)
            elif not isinstance(method, Dense):
                own = treat(index, block, activations.calibration, tell)
                reports |= own
            ahead = index + 1 < len(source.blocks) and (finished or not one_pass)
            _pruned_pass(index, block, ahead, activations, clock, tell)
            source.give_back()  # of the passes, before the block is written
            if output is not None and not finished:
                with clock.phase("write"):
                    output.write_block(index, own, masks)
        if output is not None:
            with clock.phase("write"):
                output.reached(index + 1, activations)
    return reports


def _pruned_pass(
    index: int, block: Block, ahead: bool, activations: Activations, clock: Clock, tell: Callable[..., None]
) -> None:
    """On to the next block's inputs, where there is one `ahead` and the calibration is not there yet."""
    if activations.calibration is not None and ahead:
        tell("pruned pass")
        with clock.phase("pruned pass"):
            activations.calibration.advance_(index, block.module)
    if activations.pruned is not None:
        tell("evaluation")
        with clock.phase("evaluation"):
            activations.pruned.advance_(index, block.module)


class _TwoPasses:
    """`--sequential block`, as published: statistics of the dense block, then all of its linears."""

    def __init__(
        self, method: Method, pattern: Pattern, clock: Clock, masks: dict[str, Tensor] | None = None
    ):
        self.method, self.pattern, self.clock, self.masks = method, pattern, clock, masks
        self.last_linear: dict[tuple, str] = {}

    def __call__(
        self, index: int, block: Block, calibration: BlockInputs | None, tell: Callable[..., None]
    ) -> dict[str, LinearReport]:
        statistics = None
        if calibration is not None:
            tell("dense pass")
            with self.clock.phase("dense pass"):
                statistics = self.statistics(block)
                dense_pass(block, statistics, calibration, index, self.last_linear)
        return self.select(block, statistics, tell)

    def statistics(self, block: Block, before_call: bool = False) -> BlockStatistics:
        timed = partial(self.clock.part, "statistics")
        return BlockStatistics(block, self.method.statistic, self.method.make_hessian, before_call, timed)

    def select(
        self, block: Block, statistics: BlockStatistics | None, tell: Callable[..., None]
    ) -> dict[str, LinearReport]:
        with self.clock.phase("selection"):
            return prune_block(block, self.method, self.pattern, statistics, tell, self.masks, self.clock)


class _OnePass(_TwoPasses):
    """`--sequential linear`: each linear once its input is known; leaves the next block's inputs."""

    def __call__(
        self, index: int, block: Block, calibration: BlockInputs, tell: Callable[..., None]
    ) -> dict[str, LinearReport]:
        statistics = self.statistics(block, before_call=True)
        reports: dict[str, LinearReport] = {}
        forwards = [
            partial(_advance_batch, block, calibration, batch, call)
            for batch, call in calibration.batches(index)
        ]

        def prune(linear: Linear) -> None:
            reports.update(self.select(replace(block, linears=[linear]), statistics, tell))

        tell("one pass")
        with self.clock.phase("one pass"), statistics.gathering():
            run_in_lockstep(block, forwards, prune)
        unseen = [linear for linear in block.linears if linear.name not in reports]
        reports |= self.select(replace(block, linears=unseen), statistics, tell) if unseen else {}
        return {linear.name: reports[linear.name] for linear in block.linears}


def _advance_batch(block: Block, inputs: BlockInputs, batch: slice, call: BlockCall) -> None:
    inputs.hidden[batch] = call.run(block.module, inputs.hidden[batch])


def _teller(progress: Progress | None, index: int, total: int, block: str) -> Callable[..., None]:
    return (
        (lambda phase, detail="": progress.step(phase, index, total, detail or block))
        if progress
        else lambda *_: None
    )

"""Selection: the linears of one block are judged, pruned by their statistics, and counted."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial

import torch
from torch import Tensor

import wanda_kernels
from wanda_fast.distributed.ranks import Ranks
from wanda_fast.errors import NonFiniteError
from wanda_fast.model.architecture import Block
from wanda_fast.model.linears import Linear
from wanda_fast.pruning.expert_selection import prune_stacks_
from wanda_fast.pruning.expert_statistics import ExpertOptions
from wanda_fast.pruning.gathering import BlockStatistics
from wanda_fast.pruning.hessian import (
    Hessian,
    factor,
    not_positive_definite,
    prepare,
    reconstruction_error,
)
from wanda_fast.pruning.linear_reports import Outcome, linear_reports, of_all_ranks
from wanda_fast.pruning.methods import Magnitude, Method, prunes_by_rows
from wanda_fast.pruning.patterns import Pattern, empty_mask
from wanda_fast.pruning.row_shares import RowShares, exchange_, row_shares
from wanda_fast.pruning.solving import solve_
from wanda_fast.pruning.summing import complete
from wanda_fast.report.contents import LinearReport
from wanda_fast.timer import Clock, Phases, mark
from wanda_kernels import NotPositiveDefiniteError


@dataclass
class Selection:
    """How a run prunes.

    Attributes:
        pattern: of all linears but those in `patterns`, by name.
        masks: packed masks by linear name, filled block by block; None: none wanted.
        ranks: that prune the model together.
        before: sequences and tokens of the calibration that other ranks have before this one's.
    """

    method: Method
    pattern: Pattern
    masks: dict[str, Tensor] | None = None
    expert_options: ExpertOptions = ExpertOptions()
    ranks: Ranks = field(default_factory=Ranks)
    before: tuple[int, int] = (0, 0)
    patterns: dict[str, Pattern] = field(default_factory=dict)

    def pattern_of(self, linear: Linear) -> Pattern:
        return self.patterns.get(linear.name, self.pattern)

    def statistics(self, block: Block, clock: Clock, before_call: bool = False) -> BlockStatistics:
        """Empty statistics for the block's linears; `before_call` as in `BlockStatistics`."""
        timed, method = partial(clock.part, "statistics"), self.method
        return BlockStatistics(
            block,
            method.statistic,
            method.make_hessian,
            before_call,
            timed,
            self.expert_options,
            self.before,
        )

    def row_shares(self, block: Block, blind: set[str]) -> dict[str, RowShares]:
        """Who prunes which rows; the rows of `blind` linears by magnitude."""
        others = {linear.name for linear in block.linears} - blind
        whole = set() if prunes_by_rows(self.method, self.pattern) else others
        whole |= set() if prunes_by_rows(Magnitude(), self.pattern) else blind
        return row_shares(block, self.ranks, whole)


def prune_block(
    block: Block, selection: Selection, statistics: BlockStatistics | None, phases: Phases
) -> dict[str, LinearReport]:
    """Prune the block's linears in place.

    Raises: `NonFiniteError`, `HessianError`, before a linear of `block` is changed; `NonFiniteError` after it
        if an update made a weight infinite.
    """
    with own_arithmetic(block):
        return _prune_block(block, selection, statistics, phases)


def _prune_block(
    block: Block, selection: Selection, statistics: BlockStatistics | None, phases: Phases
) -> dict[str, LinearReport]:
    method, ranks = selection.method, selection.ranks
    if statistics is not None:
        complete(statistics, block, ranks)
    scales = {linear.name: _scale(linear, method, statistics) for linear in block.linears}
    _require_finite(block, scales, under_a_root=method.score is None)
    blind = _blind(scales, method, statistics)
    if method.hessians is not None:
        with phases("factor"):
            prepare(block, statistics.hessians, method.hessians)
            shares = selection.row_shares(block, blind | _without_hessian(block, statistics.hessians, method))
            factor(block, statistics.hessians, method.hessians, shares, ranks)
    else:
        shares = selection.row_shares(block, blind)
    masks = None if selection.masks is None else {x.name: empty_mask(x.weight.data) for x in block.linears}
    outcomes = prune_stacks_(block, method, selection.pattern_of, statistics, blind, masks, ranks)
    for linear in block.linears:
        rows = shares[linear.name].rows[ranks.rank]
        if linear.name not in outcomes and rows.stop > rows.start:
            phases.tell("selection", linear.name)
            hessian = statistics.hessians.get(linear.name) if method.hessians is not None else None
            by = Magnitude() if linear.name in blind else method
            part = _Part(linear, rows, scales[linear.name], hessian, masks and masks[linear.name][rows])
            others = ranks if shares[linear.name].owner is None else None
            outcomes[linear.name] = _prune_part(part, selection, by, others, phases)
        if statistics is not None and statistics.complete:
            statistics.forget_hessian(linear.name)
    for linear in block.linears:
        if statistics is not None and (hessian := statistics.hessians.get(linear.name)) is not None:
            hessian.release()
    exchange_(block, shares, masks, ranks)
    if masks is not None:
        selection.masks.update({name: mask.cpu() for name, mask in masks.items()})
    outcomes = of_all_ranks(outcomes, ranks)
    _require_finite_updates(block, outcomes)
    return linear_reports(block, outcomes, method, statistics)


@contextmanager
def own_arithmetic(block: Block) -> Iterator[None]:
    """Context without the caller's autocast, in which weights made in inference mode can be changed too."""
    weights = [linear.weight for linear in block.linears]
    inference = torch.is_inference_mode_enabled() or any(weight.is_inference() for weight in weights)
    device = weights[0].device.type if weights else "cpu"
    # Leaving inference mode would turn gradients on, so `no_grad` comes second.
    with torch.inference_mode(inference), torch.no_grad(), torch.autocast(device, enabled=False):
        yield
    # A caller's autocast keeps 16-bit copies of weights, which are dense.
    torch.clear_autocast_cache()


@dataclass
class _Part:
    """Rows of a linear, with what is known of all of it: its scale, and its Hessian if the run has them.

    Attributes:
        mask: receives the rows' packed mask; None: none wanted.
    """

    linear: Linear
    rows: slice
    scale: Tensor | None
    hessian: Hessian | None
    mask: Tensor | None

    @property
    def own_scale(self) -> Tensor | None:
        whole = self.rows.stop - self.rows.start == self.linear.out_features
        return self.scale if self.scale is None or whole or self.scale.dim() == 1 else self.scale[self.rows]


def _prune_part(
    part: _Part, selection: Selection, by: Method, others: Ranks | None, phases: Phases
) -> Outcome:
    """
    Args:
        others: the ranks that prune the other rows at the same time; None: these are all rows.
    """
    linear, hessian = part.linear, part.hessian
    weight = linear.weight.data[part.rows]
    measures = hessian is not None and selection.method.hessians.measure_error
    before = weight.clone() if measures else None
    begin = mark(weight.device)
    try:
        outcome = _prune_(weight, part, selection, by, others)
    except NotPositiveDefiniteError as error:
        raise not_positive_definite(linear.name, error) from error
    if outcome.dampening is not None:
        rounded = selection.method.hessians.rounded.get(linear.parameter, weight.dtype)
        weight.copy_(weight.to(rounded))
    outcome.lap = (begin, mark(weight.device))
    if before is not None:
        with phases("error"):
            outcome.energies = reconstruction_error(before, weight, hessian.acc)
    outcome.zeros = wanda_kernels.count_zeros(weight)
    return outcome


def _prune_(weight: Tensor, part: _Part, selection: Selection, by: Method, others: Ranks | None) -> Outcome:
    """Prune `weight` by the method `by`, by means of its Hessian if the run does that and it is not zero."""
    method, use, pattern = selection.method, selection.method.hessians, selection.pattern_of(part.linear)
    scale, hessian, mask = part.own_scale, part.hessian, part.mask
    changes = use is not None and use.changes
    if changes and (hessian is None or hessian.blind):
        by, changes = Magnitude(), False
    if changes:
        outcome = solve_(weight, by, scale, pattern, hessian, use, mask, others)
    else:
        outcome = Outcome(by.prune_(weight, scale, pattern, mask))
    outcome.fallback = None if by is method else by.name
    return outcome


def _without_hessian(block: Block, hessians: dict[str, Hessian], method: Method) -> set[str]:
    """Linears that magnitude prunes, because no token reached them, or zeros alone."""
    if not method.hessians.changes:
        return set()
    return {x.name for x in block.linears if x.name not in hessians or hessians[x.name].blind}


def _scale(linear: Linear, method: Method, statistics: BlockStatistics | None) -> Tensor | None:
    """What the linear's score takes; None if it takes nothing, or no token reached the linear."""
    if statistics is None or not method.uses_activations:
        return None
    if linear.name in statistics.by_name:
        return statistics.by_name[linear.name].acc
    if method.score is None or linear.name not in statistics.without:
        return None
    weight = linear.weight
    return torch.zeros(weight.shape[1], dtype=torch.float32, device=weight.device)


def _blind(scales: dict[str, Tensor | None], method: Method, statistics: BlockStatistics | None) -> set[str]:
    """Linears that no calibration token reached (an expert's), or zeros alone.

    Their scores would all be zero, and ties prune the first columns, so magnitude prunes them. One wait for
    the device serves the whole block.
    """
    if statistics is None or not method.uses_activations:
        return set()
    seen = {name: scale for name, scale in scales.items() if scale is not None}
    live = [scale.numel() - wanda_kernels.count_zeros(scale) for scale in seen.values()]
    counts = torch.stack(live).tolist() if live else []
    zeros = {name for name, count in zip(seen, counts, strict=True) if not count}
    return ((scales.keys() - seen.keys()) | zeros) - statistics.without


def _require_finite(block: Block, scales: dict[str, Tensor | None], under_a_root: bool) -> None:
    """One check for the whole block, so that a GPU is waited for once.

    Args:
        under_a_root: the score takes the root of the statistics, which must not be negative.
    """
    weights = {f"{linear.name}.weight": linear.weight.data for linear in block.linears}
    statistics = {f"{name}: input statistics, as a scale": scale for name, scale in scales.items()}
    finite, non_negative = (weights, statistics) if under_a_root else (weights | statistics, {})
    try:
        wanda_kernels.require_finite(finite, non_negative=non_negative)
    except ValueError as error:
        raise NonFiniteError(f"block {block.name}: {error}; this weight was not changed") from error


def _require_finite_updates(block: Block, outcomes: dict[str, Outcome]) -> None:
    updated = {
        f"{linear.name}.weight": linear.weight.data
        for linear in block.linears
        if outcomes[linear.name].dampening
    }
    if name := wanda_kernels.first_not_finite(updated):
        raise NonFiniteError(
            f"block {block.name}: {name} ({updated[name].dtype}) is not finite after "
            f"its update: a larger --dampening or a wider --dtype helps"
        )

"""Selection for all experts of a projection at once: one call instead of one for each matrix."""

from collections.abc import Iterator
from dataclasses import dataclass

from torch import Tensor

import wanda_kernels
from wanda_fast.model.architecture import Block
from wanda_fast.model.experts import ExpertLinear, Projection
from wanda_fast.pruning.expert_sums import ExpertSums
from wanda_fast.pruning.gathering import BlockStatistics
from wanda_fast.pruning.linear_reports import Outcome
from wanda_fast.pruning.methods import Magnitude, Method
from wanda_fast.pruning.patterns import NM, Pattern, empty_mask
from wanda_fast.timer import mark


@dataclass
class Stack:
    """The matrices of some parts of a projection, of all experts.

    Attributes:
        scale: fp32 `[experts, in]` or `[experts, out, in]`; None: the score is abs(W).
    """

    projection: Projection
    parts: tuple[str, ...]
    scale: Tensor | None
    linears: list[ExpertLinear]

    @property
    def weight(self) -> Tensor:
        """`[experts, out, in]`, a view of the parameter."""
        stack = self.projection.stack.data
        return stack if self.parts == self.projection.parts else stack[:, self.projection.rows(self.parts[0])]

    def rows(self, linear: ExpertLinear) -> slice:
        """The linear's rows among its expert's in `weight`."""
        return slice(None) if len(self.parts) == 1 else self.projection.rows(linear.matrix)


def prune_stacks_(
    block: Block,
    method: Method,
    pattern: Pattern,
    statistics: BlockStatistics | None,
    alone: set[str],
    masks: dict[str, Tensor] | None,
) -> dict[str, Outcome]:
    """Prune the experts of the block that can be pruned together. Returns what became of their linears.

    Args:
        alone: names of linears that are pruned in another way than `method`'s.
    """
    outcomes: dict[str, Outcome] = {}
    if not _by_rows(method, pattern):
        return outcomes
    for stack in _stacks(block, method, statistics):
        if alone.isdisjoint(linear.name for linear in stack.linears):
            outcomes |= _prune_stack_(stack, method, pattern, masks)
    return outcomes


def _by_rows(method: Method, pattern: Pattern) -> bool:
    """Whether every row of a weight is pruned by itself, by abs(W) * sqrt(statistic)."""
    plain = method.score is None and method.hessians is None
    plain &= type(method).prune_ in (Method.prune_, Magnitude.prune_)
    granularity = getattr(pattern, "granularity", None)
    by_matrix = granularity is None and isinstance(method, Magnitude) and not isinstance(pattern, NM)
    whole_matrix = pattern.is_variant or granularity == "layer" or by_matrix
    return plain and pattern.rule is not None and not whole_matrix


def _stacks(block: Block, method: Method, statistics: BlockStatistics | None) -> Iterator[Stack]:
    """The stacks of which every matrix is to be pruned."""
    held = {linear.name for linear in block.linears}
    sums = {} if statistics is None else statistics.expert_sums()
    for stage in block.stages:
        if not isinstance(stage.module, Projection):
            continue
        parts: dict[ExpertSums | None, list[str]] = {}
        for part in stage.module.parts:
            parts.setdefault(sums[stage.module][part] if method.uses_activations else None, []).append(part)
        for own, names in parts.items():
            linears = [x for x in stage.linears if x.matrix in names and x.name in held]
            complete = len(linears) == stage.module.count * len(names)
            if complete and (own is None or own.joint is not None):
                yield Stack(stage.module, tuple(names), None if own is None else own.joint, linears)


def _prune_stack_(
    stack: Stack, method: Method, pattern: Pattern, masks: dict[str, Tensor] | None
) -> dict[str, Outcome]:
    weight = stack.weight
    mask = None if masks is None else empty_mask(weight)
    begin = mark(weight.device)
    operation = method.prune_(weight, stack.scale, pattern, mask)
    lap = (begin, mark(weight.device))
    outcomes = {}
    for linear in stack.linears:
        outcomes[linear.name] = Outcome(operation, lap=lap, share=1 / len(stack.linears))
        outcomes[linear.name].zeros = wanda_kernels.count_zeros(linear.weight.data)
        if masks is not None:
            masks[linear.name] = mask[linear.index, stack.rows(linear)].cpu()
    return outcomes

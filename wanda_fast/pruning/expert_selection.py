"""Selection for all experts of a projection at once: one call instead of one for each matrix."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass

from torch import Tensor

import wanda_kernels
from wanda_fast.distributed.ranks import Ranks
from wanda_fast.model.architecture import Block
from wanda_fast.model.experts import ExpertLinear, Projection
from wanda_fast.model.linears import Linear
from wanda_fast.pruning.expert_sums import ExpertSums
from wanda_fast.pruning.gathering import BlockStatistics
from wanda_fast.pruning.linear_reports import Outcome
from wanda_fast.pruning.methods import Method, prunes_by_rows
from wanda_fast.pruning.patterns import Pattern, empty_mask
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
    pattern_of: Callable[[Linear], Pattern],
    statistics: BlockStatistics | None,
    alone: set[str],
    masks: dict[str, Tensor] | None,
    ranks: Ranks,
) -> dict[str, Outcome]:
    """Prune the experts of the block that can be pruned together, of several ranks' those of this one.

    Args:
        pattern_of: a linear's pattern; experts with different ones are not pruned together.
        alone: names of linears that are pruned in another way than `method`'s.
    Returns: what became of their linears.
    """
    outcomes: dict[str, Outcome] = {}
    if method.hessians is not None:
        return outcomes
    for stack in _stacks(block, method, statistics):
        pattern, *others = {pattern_of(linear) for linear in stack.linears}
        together = not others and prunes_by_rows(method, pattern)
        if together and alone.isdisjoint(linear.name for linear in stack.linears):
            outcomes |= _prune_stack_(stack, method, pattern, masks, ranks.share(stack.projection.count))
    return outcomes


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
    stack: Stack, method: Method, pattern: Pattern, masks: dict[str, Tensor] | None, experts: slice
) -> dict[str, Outcome]:
    """Prune some experts of the stack."""
    linears = [linear for linear in stack.linears if experts.start <= linear.index < experts.stop]
    if not linears:
        return {}
    weight, scale = stack.weight[experts], None if stack.scale is None else stack.scale[experts]
    mask = None if masks is None else empty_mask(weight)
    begin = mark(weight.device)
    operation = method.prune_(weight, scale, pattern, mask)
    lap = (begin, mark(weight.device))
    outcomes = {}
    for linear in linears:
        outcomes[linear.name] = Outcome(operation, lap=lap, share=1 / len(linears))
        outcomes[linear.name].zeros = wanda_kernels.count_zeros(linear.weight.data)
        if masks is not None:
            masks[linear.name].copy_(mask[linear.index - experts.start, stack.rows(linear)])
    return outcomes

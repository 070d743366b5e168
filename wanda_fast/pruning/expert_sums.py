"""The sums that statistics and Hessians of experts are: one for each expert, added for all at once."""

from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from wanda_fast.model.experts import ExpertLinear, Projection, segments
from wanda_fast.model.linears import Linear
from wanda_fast.pruning.hessian import Hessian
from wanda_fast.pruning.statistics import OutputStatistic, Statistic

Make = Callable[[Linear], Statistic | None]


class ExpertSums:
    """One statistic or Hessian of each expert.

    Attributes:
        own: by the expert's index.
        joint: the sums of all experts, `[experts, ...]`, of which each one's are a part; None: each has its
            own, since the class does not say which attribute holds sums, or that is not wanted.
    """

    def __init__(
        self,
        linears: list[ExpertLinear],
        make: Callable[[Linear], Statistic | Hessian | None],
        joins: bool = True,
    ):
        self.own: dict[int, Statistic | Hessian] = {}
        self.joint: Tensor | None = None
        for linear in linears:
            own = make(linear)
            if own is None:
                continue
            if joins and own.sums is not None:
                sums = getattr(own, own.sums)
                if self.joint is None:
                    shape = (linear.module.count, *sums.shape)
                    self.joint = torch.zeros(shape, dtype=sums.dtype, device=sums.device)
                setattr(own, own.sums, self.joint[linear.index])
            self.own[linear.index] = own
        self.first = next(iter(self.own.values()), None)

    def add(self, x: Tensor, offsets: Tensor) -> None:
        if self.joint is not None:
            self.first.add_experts(self.joint, x, offsets)
            return
        for expert, begin, end in segments(offsets):
            if expert in self.own:
                self.own[expert].add(x[begin:end])

    def add_outputs(self, x: Tensor, output: Tensor, offsets: Tensor, others: "list[ExpertSums]") -> None:
        """Add to this sum and to others of its class, which read the same output."""
        if self.joint is not None:
            joint = {sums.first.part: sums.joint for sums in (self, *others)}
            self.first.add_expert_outputs(joint, x, output, offsets)
            return
        for expert, begin, end in segments(offsets):
            own = [sums.own[expert] for sums in (self, *others) if expert in sums.own]
            if own:
                own[0].add_outputs(x[begin:end], [output[begin:end]], own[1:], None)

    def shrink_(self, other: "ExpertSums", factor: float) -> None:
        """Add `factor` times another's sums, for the experts that both have."""
        for expert, sums in other.own.items():
            if sums.sums is not None:
                getattr(self.own[expert], sums.sums).add_(getattr(sums, sums.sums), alpha=factor)


class ProjectionSums:
    """The statistics and Hessians of one projection's matrices.

    Attributes:
        by_part: the statistics, by gate_proj, up_proj or down_proj; parts that read the input alone share.
        hessians: of the input; None: not gathered.
    """

    def __init__(
        self,
        projection: Projection,
        linears: list[ExpertLinear],
        statistic: Make,
        hessian: Make | None,
        joins: bool = True,
    ):
        self.projection, self.linears = projection, linears
        self.by_part: dict[str, ExpertSums] = {}
        kinds: dict[object, list[str]] = {}
        for part in projection.parts:
            kind = _kind(next((linear for linear in linears if linear.matrix == part), None), statistic)
            kinds.setdefault((part, kind) if issubclass(kind, OutputStatistic) else kind, []).append(part)
        for parts in kinds.values():
            own = _one_each([linear for linear in linears if linear.matrix in parts])
            self.by_part |= dict.fromkeys(parts, ExpertSums(own, statistic, joins))
        self.hessians = None if hessian is None else ExpertSums(_one_each(linears), hessian, joins)

    @property
    def reads_output(self) -> bool:
        return any(isinstance(sums.first, OutputStatistic) for sums in self.by_part.values())

    def add_input(self, x: Tensor, offsets: Tensor) -> None:
        for sums in dict.fromkeys(self.by_part.values()):
            if sums.first is not None and not isinstance(sums.first, OutputStatistic):
                sums.add(x, offsets)

    def add_hessian(self, x: Tensor, offsets: Tensor) -> None:
        if self.hessians is not None:
            self.hessians.add(x, offsets)

    def add_output(self, x: Tensor, output: Tensor, offsets: Tensor, weights: Tensor | None = None) -> None:
        """
        Args:
            weights: `[tokens]`: a token counts by their square; None: by 1.
        """
        groups: dict[type, list[ExpertSums]] = {}
        for sums in self.by_part.values():
            if isinstance(sums.first, OutputStatistic):
                groups.setdefault(type(sums.first), []).append(sums)
        for first, *others in groups.values():
            first.add_outputs(weighted(x, weights, first.first.degree), output, offsets, others)

    def shrink_(self, other: "ProjectionSums", factor: float) -> None:
        pairs = {sums: other.by_part[part] for part, sums in self.by_part.items()}
        for sums, added in pairs.items():
            sums.shrink_(added, factor)
        if self.hessians is not None:
            self.hessians.shrink_(other.hessians, factor)

    def named(self) -> Iterator[tuple[str, Statistic | None, Hessian | None]]:
        """(name, statistic, Hessian) of each matrix."""
        for linear in self.linears:
            hessian = None if self.hessians is None else self.hessians.own.get(linear.index)
            yield linear.name, self.by_part[linear.matrix].own.get(linear.index), hessian


def _kind(linear: ExpertLinear | None, statistic: Make) -> type:
    """The class of a linear's statistic."""
    return type(None if linear is None else statistic(linear.on_meta()))


def _one_each(linears: list[ExpertLinear]) -> list[ExpertLinear]:
    """One linear of each expert."""
    return list({linear.index: linear for linear in linears}.values())


def weighted(x: Tensor, weights: Tensor | None, degree: int = 2) -> Tensor:
    """x, scaled so that a token counts by its weight's square in a sum of `degree`-th powers of x."""
    if weights is None:
        return x
    return x * weights.pow(2 // degree).unsqueeze(-1).to(x.dtype)

"""What became of a block's linears, as the report says it."""

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from wanda_fast.distributed.ranks import Ranks
from wanda_fast.model.architecture import Block
from wanda_fast.model.linears import Linear
from wanda_fast.pruning.gathering import BlockStatistics
from wanda_fast.pruning.hessian import Hessian
from wanda_fast.pruning.methods import Method
from wanda_fast.report.contents import LinearReport
from wanda_fast.timer import seconds_between
from wanda_kernels import OPERATIONS, choose_backend


@dataclass
class Outcome:
    """What became of one weight, or of some of its rows. Tensors are scalars on its device, so that nothing
    waits for it yet; `of_all_ranks` makes them numbers.

    Attributes:
        operation: that selected.
        dampening: of the Hessian that the weight was updated with; None: not updated.
        further: other operations that took part.
        iterations: of ADMM.
        fallback: the method that pruned it in place of the one asked for.
        lap: the clock's marks before and after.
        share: of that time, for one of several weights that were pruned at once.
        energies: ||(W - W') X||^2 and ||W X||^2, if measured.
    """

    operation: str
    dampening: float | None = None
    further: tuple[str, ...] = ()
    iterations: int | None = None
    fallback: str | None = None
    lap: tuple = ()
    share: float = 1.0
    zeros: Tensor | int | None = None
    energies: tuple[Tensor, Tensor] | list[float] | None = None
    seconds: float = 0.0


def of_all_ranks(outcomes: dict[str, Outcome], ranks: Ranks) -> dict[str, Outcome]:
    """The outcomes of whole weights, in numbers, from each rank's rows of them; waits for the device once."""
    own = _in_numbers(outcomes)
    if ranks.size == 1:
        return own
    whole: dict[str, Outcome] = {}
    for name, part in (item for of_rank in ranks.gather(own) for item in of_rank.items()):
        whole[name] = part if name not in whole else _joined(whole[name], part)
    return whole


def _in_numbers(outcomes: dict[str, Outcome]) -> dict[str, Outcome]:
    if not outcomes:
        return {}
    zeros = torch.stack([outcome.zeros for outcome in outcomes.values()]).tolist()
    measured = {name: outcome.energies for name, outcome in outcomes.items() if outcome.energies is not None}
    energies = torch.stack([torch.stack(pair) for pair in measured.values()]).tolist() if measured else []
    errors = dict(zip(measured, energies, strict=True))
    return {
        name: replace(
            outcome,
            zeros=count,
            energies=errors.get(name),
            seconds=outcome.share * seconds_between(*outcome.lap),
            lap=(),
        )
        for (name, outcome), count in zip(outcomes.items(), zeros, strict=True)
    }


def _joined(one: Outcome, other: Outcome) -> Outcome:
    """The outcome of two parts of a weight's rows."""
    energies = (
        None if one.energies is None else [sum(x) for x in zip(one.energies, other.energies, strict=True)]
    )
    seconds = max(one.seconds, other.seconds)
    return replace(one, zeros=one.zeros + other.zeros, energies=energies, seconds=seconds)


def linear_reports(
    block: Block, outcomes: dict[str, Outcome], method: Method, statistics: BlockStatistics | None
) -> dict[str, LinearReport]:
    """The reports of the block's linears, by name, from their `of_all_ranks`."""
    tokens = {} if statistics is None or not outcomes else statistics.tokens()
    return {
        linear.name: _report(linear, outcomes[linear.name], method, statistics, tokens.get(linear.name))
        for linear in block.linears
    }


def _report(
    linear: Linear,
    outcome: Outcome,
    method: Method,
    statistics: BlockStatistics | None,
    tokens: int | None,
) -> LinearReport:
    device, weights = linear.weight.device.type, linear.weight.numel()
    gathered = statistics.by_name.get(linear.name) if statistics else None
    error, whole = outcome.energies or (None, None)
    return LinearReport(
        sparsity=outcome.zeros / max(weights, 1),
        weights=weights,
        seconds=outcome.seconds,
        operation=outcome.operation,
        backend=_backend(outcome.operation, device),
        statistic=gathered and gathered.operation,
        statistic_backend=gathered and _backend(gathered.operation, device),
        further=_further(linear, outcome, method, device),
        error=error,
        # 0 / 0 if every input was zero.
        relative_error=error / whole if whole else error,
        dampening=outcome.dampening,
        fallback=outcome.fallback,
        tokens=tokens,
        iterations=outcome.iterations,
    )


def _backend(operation: str, device: str) -> str:
    """The backend that serves an operation of the library; an operation of a user's own is plain torch."""
    return choose_backend(operation, device) if operation in OPERATIONS else "torch"


def _further(linear: Linear, outcome: Outcome, method: Method, device: str) -> dict[str, str]:
    """The operations beside selection and its statistic, with their backends."""
    further = {operation: choose_backend(operation, device) for operation in outcome.further}
    if further or outcome.energies is not None:
        on_host = linear.in_features in method.hessians.on_host
        further[Hessian.operation] = "torch" if on_host else choose_backend(Hessian.operation, device)
    return further

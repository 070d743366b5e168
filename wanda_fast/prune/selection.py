"""Selection: every linear of a block pruned (and updated) by its statistics, judged first, timed, counted."""

import logging
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

import wanda_kernels
from wanda_fast.errors import NonFiniteError
from wanda_fast.model.architecture import Block, Linear
from wanda_fast.prune.hessian import Hessian, prepare, reconstruction_error
from wanda_fast.prune.masks import empty_mask
from wanda_fast.prune.methods import Magnitude, Method
from wanda_fast.prune.patterns import Pattern
from wanda_fast.prune.statistics import BlockStatistics
from wanda_fast.report import LinearReport
from wanda_fast.timer import Clock, mark, seconds_between
from wanda_kernels import OPERATIONS, choose_backend

logger = logging.getLogger(__name__)


def prune_block(
    block: Block,
    method: Method,
    pattern: Pattern,
    statistics: BlockStatistics | None,
    tell: Callable[..., None],
    masks: dict[str, Tensor] | None,
    clock: Clock,
) -> dict[str, LinearReport]:
    scales = {linear.name: _scale(linear, method, statistics) for linear in block.linears}
    _require_finite(block, scales)
    if method.hessians is not None:
        tell("factor")
        with clock.phase("factor"):
            prepare(block, statistics.hessians, method.hessians)
    pruned: list[_Pruned] = []
    for linear in block.linears:
        tell("selection", linear.name)
        weight = linear.module.weight.data
        mask = None if masks is None else empty_mask(weight)
        hessian = statistics.hessians.get(linear.name) if method.hessians is not None else None
        before = weight.clone() if hessian is not None and method.hessians.measure_error else None
        begin = mark(weight.device)
        done = _prune_(weight, method, pattern, scales[linear.name], hessian, mask)
        done.lap = (begin, mark(weight.device))
        if before is not None:
            with clock.phase("error"):
                done.energies = reconstruction_error(before, weight, hessian.acc)
        if statistics is not None and statistics.complete:
            statistics.hessians.pop(linear.name, None)  # gone with its last linear
        if masks is not None:
            masks[linear.name] = mask.cpu()
        done.zeros = wanda_kernels.count_zeros(weight)
        pruned.append(done)
    _require_finite_still(block, pruned)
    counts = torch.stack([done.zeros for done in pruned]).tolist() if pruned else []  # waits for the device
    measured = [torch.stack(done.energies) for done in pruned if done.energies is not None]
    energies = iter(torch.stack(measured).tolist() if measured else [])  # one copy a block, not two a linear
    return {
        linear.name: _report(linear, done, zeros, method, statistics, energies)
        for linear, done, zeros in zip(block.linears, pruned, counts, strict=True)
    }


@dataclass
class _Pruned:
    """What became of one weight; tensors are scalars on its device."""

    operation: str
    dampening: float | None = None
    fallback: str | None = None
    lap: tuple = ()  # two marks of the clock
    zeros: Tensor | None = None
    energies: tuple[Tensor, Tensor] | None = None


def _prune_(
    weight: Tensor,
    method: Method,
    pattern: Pattern,
    scale: Tensor | None,
    hessian: Hessian | None,
    mask: Tensor | None,
) -> _Pruned:
    use = method.hessians
    if use is None or not use.update:
        return _Pruned(method.prune_(weight, scale, pattern, mask))
    if hessian is None or hessian.blind:  # an expert that no token reached: any other score is zero
        return _Pruned(Magnitude().prune_(weight, None, pattern, mask), fallback=Magnitude.name)
    operation = method.prune_and_update_(weight, scale, pattern, hessian.factor_on(weight.device), mask)
    if use.stored is not None:
        weight.copy_(weight.to(use.stored))
    return _Pruned(operation, hessian.factor.dampening)


def _report(
    linear: Linear,
    done: _Pruned,
    zeros: int,
    method: Method,
    statistics: BlockStatistics | None,
    energies: Iterator[list[float]],
) -> LinearReport:
    device, weights = linear.module.weight.device.type, linear.module.weight.numel()
    gathered = statistics.by_name.get(linear.name) if statistics else None
    error, whole = next(energies) if done.energies is not None else (None, None)
    return LinearReport(
        sparsity=zeros / max(weights, 1),
        weights=weights,
        seconds=seconds_between(*done.lap),
        operation=done.operation,
        backend=_backend(done.operation, device),
        statistic=gathered and gathered.operation,
        statistic_backend=gathered and choose_backend(gathered.operation, device),
        further=_further(linear, done, method, device),
        error=error,
        relative_error=error / whole if whole else error,  # 0 / 0 where every input was zero
        dampening=done.dampening,
        fallback=done.fallback,
    )


def _backend(operation: str, device: str) -> str:
    return choose_backend(operation, device) if operation in OPERATIONS else "torch"


def _further(linear: Linear, done: _Pruned, method: Method, device: str) -> dict[str, str]:
    """Hessian and update: the operations beside selection and its statistic, with their backends."""
    further = {}
    if done.energies is not None or done.dampening is not None:
        visits = linear.module.in_features in method.hessians.on_host
        further[Hessian.operation] = "torch" if visits else choose_backend(Hessian.operation, device)
    if done.dampening is not None:
        further["sparsegpt_"] = choose_backend("sparsegpt_", device)
    return further


def _scale(linear: Linear, method: Method, statistics: BlockStatistics | None) -> Tensor | None:
    if statistics is None or not method.uses_activations:
        return None
    if linear.name in statistics.by_name:
        return statistics.by_name[linear.name].acc
    if method.hessians is None or not method.hessians.update:
        logger.warning("%s saw no calibration token; its scores are all zero", linear.name)
    return torch.zeros(linear.module.in_features, device=linear.module.weight.device)


def _require_finite(block: Block, scales: dict[str, Tensor | None]) -> None:
    """One verdict a block, before any of its weights is touched."""
    weights = {f"{linear.name}.weight": linear.module.weight.data for linear in block.linears}
    statistics = {f"{name}: input statistics, as a scale": scale for name, scale in scales.items()}
    try:
        wanda_kernels.require_finite(weights, non_negative=statistics)
    except ValueError as error:
        raise NonFiniteError(f"block {block.name}: {error}; this weight was not changed") from error


def _require_finite_still(block: Block, pruned: list[_Pruned]) -> None:
    updated = {
        f"{linear.name}.weight": linear.module.weight.data
        for linear, done in zip(block.linears, pruned, strict=True)
        if done.dampening
    }
    if name := wanda_kernels.first_not_finite(updated):
        raise NonFiniteError(
            f"block {block.name}: {name} ({updated[name].dtype}) is not finite after "
            f"its update: a larger --dampening or a wider --dtype helps"
        )
